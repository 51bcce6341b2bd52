"""The files that say, for each architecture, what is proven and how kernels are launched."""

from __future__ import annotations

import importlib
import json
import pkgutil

import pytest
import torch

from cavmae_fast import ops
from cavmae_fast.ops import configuration, dispatch
from cavmae_fast.ops.configuration import ConfigurationError

FILES = sorted(configuration.FOLDER.glob("*.json"))
OPTIONS = {"num_warps", "num_stages", "PEEL"}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A copy of the checked-in files, in their place."""
    for path in FILES:
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(configuration, "FOLDER", tmp_path)
    clear()
    yield tmp_path
    clear()


def clear():
    for cached in (configuration.table, configuration.nearest, configuration.launch):
        cached.cache_clear()


def kernels() -> dict[str, set[str]]:
    """Kernel -> its parameters, of all files of the package."""
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        for name, value in vars(importlib.import_module(f"{ops.__name__}.{module.name}")).items():
            if name.endswith("_kernel"):
                found[name.removesuffix("_kernel")] = set(value.arg_names)
    return found


def test_every_kernel_has_launches_everywhere():
    """And in every file the same cases, so that one tuned case does not hide that another is missing."""
    known = kernels()
    assert [path.stem for path in FILES] == ["sm_100", "sm_80", "sm_90"]
    cases = [{k: set(v) for k, v in configuration.read(path)["launches"].items()} for path in FILES]
    assert set(cases[0]) == set(known)
    assert cases[0] == cases[1] == cases[2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_launches_name_parameters_of_their_kernels(path):
    content, known = configuration.read(path), kernels()
    for kernel, cases in content["launches"].items():
        for case, options in cases.items():
            assert set(options) - OPTIONS <= known[kernel], f"{kernel}, {case}"
            assert "num_warps" in options
    for operator, by_dtype in content["implementations"].items():
        assert set(by_dtype.values()) <= dispatch.operators[operator]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_writing_changes_nothing(path, tmp_path):
    configuration.write(tmp_path / "copy.json", configuration.read(path))
    assert (tmp_path / "copy.json").read_text() == path.read_text()


def test_cases():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    long = configuration.launch("attention_forward", "sm_90", bf16, "long 64")
    assert long == configuration.launch("attention_forward", "sm_90", fp16, "long 64")
    assert long != configuration.launch("attention_forward", "sm_90", fp32, "long 64")
    assert configuration.launch("take_rows", "sm_90", bf16) == configuration.launch("take_rows", "sm_90", fp32, "whatever")
    assert configuration.launch("masked_patch_mse_forward", "sm_90", fp32, "bytes")["num_warps"] == 8
    assert configuration.launch("masked_patch_mse_forward", "sm_90", fp32)["num_warps"] == 4
    with pytest.raises(TypeError):
        long["num_warps"] = 1  # shared by all callers
    with pytest.raises(ConfigurationError, match="sm_90 has no launch of attention_forward for bfloat16 long 48"):
        configuration.launch("attention_forward", "sm_90", bf16, "long 48")
    with pytest.raises(ConfigurationError, match="no launch of another for float32"):
        configuration.launch("another", "sm_90", fp32)


@pytest.mark.parametrize(
    ("here", "want"),
    [("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_120", "sm_100"), ("sm_75", "sm_80")],
)
def test_nearest(folder, here, want):
    configuration.mark_proven(want, "attention", torch.bfloat16)
    assert configuration.nearest(here) == want
    proven = configuration.implementation(here, "attention", torch.bfloat16)
    assert proven == ("triton" if here == want else "torch")  # never ran there


def test_marks_are_by_operator_and_dtype(folder):
    """One dtype's miss takes no other's mark away."""
    before = {path.name: path.read_text() for path in folder.iterdir()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        configuration.mark_proven("sm_90", "attention", dtype)
    configuration.mark_proven("sm_90", "gather_tokens", torch.bfloat16)
    configuration.mark_proven("sm_90", "attention", torch.float32, "torch")

    def proven(operator: str) -> list[str]:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        return [configuration.implementation("sm_90", operator, dtype) for dtype in dtypes]

    assert proven("attention") == ["triton", "triton", "torch"]
    assert proven("gather_tokens") == ["triton", "torch", "torch"]
    assert proven("scatter_tokens") == ["torch"] * 3
    marks = configuration.read(folder / "sm_90.json")
    assert marks["implementations"]["attention"] == {"bfloat16": "triton", "float16": "triton"}
    assert marks["launches"] == json.loads(before["sm_90.json"])["launches"]
    assert {p.name: p.read_text() for p in folder.iterdir() if p.stem != "sm_90"}.items() <= before.items()
    for operator, dtype in (("attention", torch.bfloat16), ("attention", torch.float16), ("gather_tokens", torch.bfloat16)):
        configuration.mark_proven("sm_90", operator, dtype, "torch")
    assert (folder / "sm_90.json").read_text() == before["sm_90.json"]


def test_an_architecture_gets_its_file_when_something_is_proven_there(folder):
    path = configuration.mark_proven("sm_89", "attention", torch.bfloat16)
    assert path == folder / "sm_89.json"
    assert configuration.read(path)["launches"] == configuration.read(folder / "sm_80.json")["launches"]
    assert configuration.nearest("sm_89") == "sm_89"
    assert configuration.implementation("sm_89", "attention", torch.bfloat16) == "triton"
    assert configuration.implementation("sm_80", "attention", torch.bfloat16) == "torch"


def test_an_earlier_file_wins_entry_by_entry(folder, monkeypatch):
    own = folder / "own.json"
    launches = {"take_rows": {"any": {"BLOCK_R": 2, "BLOCK_D": 64, "num_warps": 1}}}
    configuration.write(own, {"implementations": {"attention": {"bfloat16": "triton"}}, "launches": launches})
    monkeypatch.setattr(configuration, "files", lambda architecture: [own, folder / f"{architecture}.json"])
    assert configuration.launch("take_rows", "sm_90", torch.float32)["num_warps"] == 1
    assert configuration.launch("add_position", "sm_90", torch.float32)["num_warps"] == 4
    assert configuration.implementation("sm_90", "attention", torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold 'implementations' and 'launches'"),
        ('{"launches": {}}', "must hold 'implementations' and 'launches'"),
        ('{"implementations": {"attention": {"bf16": "triton"}}, "launches": {}}', "gives attention in bf16"),
        ('{"implementations": {"attention": {"float32": "fast"}}, "launches": {}}', "the implementation 'fast'"),
        ('{"implementations": {"attention": "triton"}, "launches": {}}', "has 'triton' in implementations for attention"),
        ('{"implementations": {}, "launches": {"a": {"any": {"num_warps": "4"}}}}', "launches a, 'any', with"),
        ('{"implementations": {}, "launches": {"a": {"num_warps": 4}}}', "launches a, 'num_warps', with 4"),
        ('{"implementations": {}, "launches": []}', "must hold"),
    ],
)
def test_damaged_files(folder, text, words):
    (folder / "sm_90.json").write_text(text)
    with pytest.raises(ConfigurationError, match=words) as error:
        configuration.launch("take_rows", "sm_90", torch.float32)
    assert "sm_90.json" in str(error.value)


def test_what_cannot_be_marked():
    with pytest.raises(ConfigurationError, match="'fast' in bfloat16 cannot be marked"):
        configuration.mark_proven("sm_90", "attention", torch.bfloat16, "fast")
    with pytest.raises(ConfigurationError, match="'triton' in float64 cannot be marked"):
        configuration.mark_proven("sm_90", "attention", torch.float64)
