"""`.ci/resolve.py`: what it asks pip for, and how it reads pip's answer (recorded from pip 26.3)."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("resolve", ROOT / ".ci" / "resolve.py")
resolve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resolve)

CONFLICT = """\
Collecting torch>=2.11
ERROR: Cannot install torch==2.13.0 and triton>=3.6 because these package versions have conflicting dependencies.

The conflict is caused by:
    The user requested triton>=3.6
    torch 2.13.0 depends on triton==3.7.1; platform_system == "Linux" and python_version < "3.15"
    The user requested (constraint) triton==3.9.0

ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/dependency-resolution/
Exception information:
Traceback (most recent call last):
"""
RETRIED = """\
WARNING: Retrying (Retry(total=4, connect=None, read=None, redirect=None, status=None)) after connection broken by \
'ReadTimeoutError("HTTPSConnectionPool(host='example.org', port=443): Read timed out. (read timeout=15)")': /simple/torch/
"""
MISSING = """\
ERROR: Could not find a version that satisfies the requirement numpy (from versions: none)
ERROR: No matching distribution found for numpy
"""
GIVEN_UP = [
    "Could not fetch URL https://example.org/numpy/: connection error: HTTPConnectionPool(host='example.org', port=443): "
    "Max retries exceeded with url: /simple/numpy/ (Caused by NewConnectionError('Connection refused')) - skipping\n",
    "Could not fetch URL https://example.org/numpy/: HTTPConnectionPool(host='example.org', port=443): Max retries "
    "exceeded with url: /simple/numpy/ (Caused by ResponseError('too many 503 error responses')) - skipping\n",
    "Could not fetch URL https://example.org/numpy/: 403 Client Error: Forbidden for url - skipping\n",
]
UNKNOWN_PACKAGE = "Could not fetch URL https://example.org/nmupy/: 404 Client Error: Not Found for url - skipping\n"


def test_success():
    assert resolve.verdict(0, RETRIED + "Would install torch-2.13.0 triton-3.7.1\n") == ("ok", "")


@pytest.mark.parametrize("before", ["", RETRIED])
def test_conflict(before):
    """Also after an answer that only came at the second attempt; the reason is pip's own, without its traceback."""
    found, why = resolve.verdict(1, before + CONFLICT)
    assert found == "conflict"
    assert "(constraint) triton==3.9.0" in why
    assert "Traceback" not in why


@pytest.mark.parametrize("line", GIVEN_UP)
@pytest.mark.parametrize("end", [MISSING, CONFLICT])
def test_registry_that_does_not_answer(line, end):
    """A missing page hides versions, so that pip itself speaks of a conflict."""
    assert resolve.verdict(1, RETRIED + line + end) == ("unreachable", line.strip())


def test_packages_and_versions_that_do_not_exist_are_conflicts():
    assert resolve.verdict(1, UNKNOWN_PACKAGE + MISSING)[0] == "conflict"
    assert resolve.verdict(1, MISSING)[0] == "conflict"


def test_a_check_that_does_not_check_fails():
    assert resolve.verdict(2, "no such option: --use-feature=fast-deps\n") == (
        "conflict",
        "no such option: --use-feature=fast-deps\n",
    )


def test_extras_are_expanded():
    project = {
        "name": "own",
        "dependencies": ["torch>=2"],
        "optional-dependencies": {"a": ["x", "own[b, c]"], "b": ["y>=1"], "c": ["x"], "d": ["z"]},
    }
    assert resolve.requirements(project, ("a",)) == ["torch>=2", "x", "y>=1"]
    with pytest.raises(KeyError):
        resolve.requirements(project, ("unknown",))


def test_what_is_asked_for():
    """This project's own requirements, each with a name that pip can look up."""
    wanted = resolve.requirements(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], resolve.EXTRAS)
    names = {re.match(r"[\w-]+", line)[0] for line in wanted}
    assert {"torch", "triton", "numpy", "nvidia-dali-cuda130", "xformers"} <= names
    assert "cavmae_fast" not in names


@pytest.mark.parametrize("answers, asked", [(["ok"], 1), (["unreachable", "conflict"], 2), (["unreachable"] * 3, 3)])
def test_only_a_registry_that_does_not_answer_is_asked_again(answers, asked, monkeypatch):
    left = list(answers)
    monkeypatch.setattr(resolve, "resolve", lambda *args: (left.pop(0), "why"))
    monkeypatch.setattr(resolve, "PAUSE", 0)
    assert resolve.resolve_patiently("3.11", [], Path("constraints.txt")) == (answers[-1], "why")
    assert len(answers) - len(left) == asked


@pytest.mark.parametrize("answer, code", [("ok", 0), ("unreachable", 0), ("conflict", 1)])
def test_only_a_conflict_fails(answer, code, monkeypatch, capsys):
    answers = {"3.11": "ok", "3.12": answer, "3.13": "ok"}
    monkeypatch.setattr(resolve, "resolve_patiently", lambda python, *args: (answers[python], "the reason"))
    assert resolve.main() == code
    printed = capsys.readouterr().out
    assert printed.count("resolve: Python") == 3
    if answer == "unreachable":
        assert "PASSED OVER" in printed and "the reason" in printed


def test_only_the_way_to_the_network_is_kept_of_pips_settings(monkeypatch):
    """A local folder of wheels or another index would answer for PyPI."""
    seen = {}

    def run(command, env, **kwargs):
        seen.update(env)
        return resolve.subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setenv("PIP_FIND_LINKS", "wheels")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///elsewhere")
    monkeypatch.setenv("PIP_CERT", "cert.pem")
    monkeypatch.setattr(resolve.subprocess, "run", run)
    resolve.resolve("3.11", ["numpy"], Path("constraints.txt"))
    settings = {name: value for name, value in seen.items() if name.startswith("PIP_")}
    assert settings == {"PIP_CERT": "cert.pem", "PIP_CONFIG_FILE": "/dev/null"}
