"""Which versions belong together: the doctor, docs/support.md, constraints.txt and pyproject.toml say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cavmae_fast import doctor

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("torch", "triton", "words"),
    [
        ("2.13.0+cpu", "3.7.1", None),
        ("2.12.1", "3.7.0", None),
        ("2.11.0+cu130", "3.6.0", None),
        ("2.13.0", None, None),
        ("2.13.0", "3.9.0", "triton 3.9.0 does not belong to torch 2.13: pip install triton==3.7.1"),
        ("2.11.0", "3.7.1", "pip install triton==3.6.0"),
        ("2.14.0.dev1", "3.7.1", "torch 2.14 is not among the tested releases: 2.11, 2.12, 2.13"),
    ],
)
def test_version_warning(torch, triton, words):
    warning = doctor.version_warning(torch, triton)
    assert warning is None if words is None else words in warning


def test_the_report_shows_the_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "3.9.0" if package == "triton" else None)
    assert "does not belong to torch" in doctor.render()


def test_all_files_name_the_same_versions():
    table = dict(re.findall(r"^\| (2\.\d+) \| (\d\S+) \|", (ROOT / "docs" / "support.md").read_text(), re.M))
    assert table == doctor.TRITON_OF_TORCH
    pins = dict(re.findall(r"^(torch|triton)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert doctor.version_warning(pins["torch"], pins["triton"]) is None
    oldest, triton = next(iter(table.items()))
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"torch>={oldest}" in required
    assert any(line.startswith(f"triton>={triton.removesuffix('.0')};") for line in required)
