"""What README, CONTRIBUTING and docs/ show runs as it stands there, and what they name exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"<!-- example -->\n```python\n(.*?)```", re.DOTALL)
"A page's marked blocks are one program: a later block may use what an earlier one made."
NOT_OURS = {"run_cavmae_pretrain.py", "traintest_cavmae.py", "videos/", "model/", "checkpoints/"}
"Files of the published code, of the reader, and of the folder of a run."


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if EXAMPLE.search(page.read_text())], ids=name)
def test_examples_run_and_print_what_they_say(page, tmp_path):
    """Each `print` in a marked block stands on a line of its own, with what it prints in a comment behind it."""
    code = "\n".join(EXAMPLE.findall(page.read_text()))
    said = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    (tmp_path / "page.py").write_text(code)  # Triton reads a kernel's source from its file
    run = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == said


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    lost = []
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (heading and heading not in headings(file)):
            lost.append(target)
    assert not lost


def headings(page: Path) -> list[str]:
    """The names under which a page's headings can be linked to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.fixture(scope="module")
def files() -> set[str]:
    """Every file and folder of the project: `/cavmae_fast/ops/dispatch.py`."""
    folders = [ROOT / folder for folder in ("cavmae_fast", "tests", "benchmarks", "examples", "docs", "csrc", ".ci")]
    paths = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
    return {"/" + path.relative_to(ROOT).as_posix() for path in paths}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page, files):
    """By their full path or the end of it. Names with <...> stand for files of the reader's own."""
    text = page.read_text()
    named = set(re.findall(r"(?<![\w<>/.{}*-])(\w[\w./-]*\.(?:py|cu|toml|md)\b|\w[\w/]*/(?=`))", text)) - NOT_OURS
    named |= {module.replace(".", "/") + ".py" for module in re.findall(r"python -m (benchmarks\.\w+)", text)}
    lost = [path for path in named if not any(known.endswith("/" + path.rstrip("/")) for known in files)]
    assert not lost


def test_every_environment_variable_is_documented():
    """Each that the package or its build reads has a row in docs/environment.md."""
    sources = [*(ROOT / "cavmae_fast").rglob("*.py"), ROOT / "setup.py"]
    read = {variable for path in sources for variable in re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text())}
    assert "CAVMAE_OPS" in read
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    assert read <= set(re.findall(r"`(\w+)`", " ".join(rows)))
