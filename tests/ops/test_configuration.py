"""The files that say, for each architecture, what is proven and how kernels are launched."""

from __future__ import annotations

import importlib
import pkgutil
import string

import pytest
import torch

from cavmae_fast import ops
from cavmae_fast.ops import configuration, dispatch
from cavmae_fast.ops.configuration import ConfigurationError

FILES = sorted(configuration.FOLDER.glob("sm_*.json"))
OPTIONS = {"num_warps", "num_stages", "maxnreg", "PEEL"}
ONE_PASS = {"ONE_PASS", "PER_SM", "SUMS"}
"Options of a launch of `attention_backward` that takes the kernel `attention_one_pass`, which has no launches of its own."


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A copy of the checked-in files, in their place."""
    for path in FILES:
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(configuration, "FOLDER", tmp_path)
    configuration.forget()
    yield tmp_path
    configuration.forget()


@pytest.fixture
def own(monkeypatch, tmp_path):
    """The folder of the user's own files, empty."""
    monkeypatch.setenv(configuration.VARIABLE, str(tmp_path / "tuned"))
    (tmp_path / "tuned").mkdir()
    configuration.forget()
    yield tmp_path / "tuned"
    configuration.forget()


def prove(folder, architecture: str, entries: dict) -> None:
    """Ships `entries` as proven on an architecture."""
    path = folder / f"{architecture}.json"
    configuration.write(path, {**configuration.read(path), "implementations": entries})


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
    assert set(cases[0]) == set(known) - {"attention_one_pass"}
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
    prove(folder, want, {"attention": {"bfloat16": "triton"}})
    assert configuration.nearest(here) == want
    proven = configuration.implementation(here, "attention", torch.bfloat16)
    assert proven == ("triton" if here == want else "torch")  # never ran there
    launch = configuration.launch("take_rows", f"{here} some-gpu", torch.bfloat16)
    assert launch == configuration.launch("take_rows", want, torch.bfloat16)


TARGET = "sm_90 nvidia-h200"


def tuned(target: str = TARGET, **changes) -> dict:
    """The contents of a file of the user's own."""
    launches = {"take_rows": {"any": {"BLOCK_R": 2, "BLOCK_D": 64, "num_warps": 1}}}
    content = {"implementations": {"attention": {"bfloat16 long 32": "triton"}}, "launches": launches}
    return {"made_for": configuration.made_for(target), **content, **changes}


def test_the_users_own_file_wins_entry_by_entry(own):
    configuration.write(configuration.user_file(TARGET), tuned())
    assert configuration.launch("take_rows", TARGET, torch.float32)["num_warps"] == 1
    assert configuration.launch("add_position", TARGET, torch.float32)["num_warps"] == 4
    assert configuration.launch("take_rows", "sm_90", torch.float32)["num_warps"] == 4  # the interpreter takes what ships
    assert configuration.launch("take_rows", "sm_90 another-gpu", torch.float32)["num_warps"] == 4
    assert configuration.implementation(TARGET, "attention", torch.bfloat16, "long 32") == "triton"
    assert configuration.implementation(TARGET, "attention", torch.bfloat16, "short 64") == "torch"
    assert str(configuration.user_file(TARGET)) in configuration.origin(TARGET, "attention", torch.bfloat16, "long 32")
    assert configuration.origin(TARGET, "attention", torch.bfloat16) is None
    with configuration.trial({"implementations": {}, "launches": {}}):  # a candidate is tried without it
        assert configuration.launch("take_rows", TARGET, torch.float32)["num_warps"] == 4


def test_a_shipped_file_after_the_users(own, folder):
    prove(folder, "sm_90", {"attention": {"bfloat16": "triton", "float32": "triton"}})
    configuration.write(configuration.user_file(TARGET), tuned(implementations={"attention": {"bfloat16": "sdpa_cudnn"}}))
    assert configuration.implementation(TARGET, "attention", torch.bfloat16) == "sdpa_cudnn"
    assert configuration.implementation(TARGET, "attention", torch.float32) == "triton"
    assert configuration.origin(TARGET, "attention", torch.float32) == "proven on sm_90"


def test_a_file_of_another_version_is_not_used_and_named(own):
    other = {**configuration.made_for(TARGET), "torch": "1.0"}
    renamed = configuration.user_file(TARGET)
    configuration.write(renamed, tuned(made_for=other))
    old = renamed.with_name(renamed.name.replace(torch.__version__.replace("+", "-"), "1.0"))
    configuration.write(old, tuned(made_for=other))
    configuration.write(own / f"another-gpu-sm_90-torch{torch.__version__}.json", tuned("sm_90 another-gpu"))
    assert configuration.implementation(TARGET, "attention", torch.bfloat16, "long 32") == "torch"
    assert configuration.launch("take_rows", TARGET, torch.float32)["num_warps"] == 4
    assert set(configuration.stale_files(TARGET)) == {old, renamed}


def test_where_the_users_files_lie(monkeypatch, tmp_path):
    monkeypatch.delenv(configuration.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configuration.user_folder() == tmp_path / "cavmae_fast" / "tuned"
    name = configuration.user_file(TARGET).name
    assert name.startswith(f"nvidia-h200-sm_90-torch{torch.__version__.replace('+', '-')}-triton")
    assert set(name) <= set(string.ascii_letters + string.digits + "._-")
    assert configuration.slug("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz") == "intel-xeon-platinum-8488c-cpu-2-40ghz"


def test_the_fingerprint_tells_choices_apart(own, monkeypatch):
    monkeypatch.delenv("CAVMAE_OPS", raising=False)
    target = configuration.target_of(torch.device("cpu"))
    assert configuration.fingerprint() == "torch" or torch.cuda.is_available()
    seen = [configuration.fingerprint("cpu")]
    for name in ("products", "flash"):
        configuration.write(configuration.user_file(target), tuned(target, implementations={"attention": {"float32": name}}))
        seen.append(configuration.fingerprint("cpu"))
        assert configuration.fingerprint("cpu") == seen[-1]
    assert seen[0] == "torch" and len(set(seen)) == 3 and all(len(text) < 25 for text in seen)
    monkeypatch.setenv("CAVMAE_OPS", "torch")
    assert configuration.fingerprint("cpu") == "torch"


def test_the_search_space_fits_the_kernels(own):
    """Every entry names a kernel, its options are those of the kernel, and something is left to try."""
    known = kernels()
    for kernel, patterns in configuration.search_space().items():
        for words, changes in patterns.items():
            for change in changes:
                launched = known["attention_one_pass"] | ONE_PASS if "ONE_PASS" in change else known[kernel]
                assert set(change) - OPTIONS <= launched, f"{kernel}, {words}"
    others = configuration.alternatives("attention_forward", "sm_90", torch.bfloat16, "long 32")
    present = dict(configuration.launch("attention_forward", "sm_90", torch.bfloat16, "long 32"))
    assert len(others) >= 5 and present not in others and all(set(present) <= set(other) for other in others)
    assert {"maxnreg": 168, **present} in others
    for dtype in (torch.bfloat16, torch.float32):
        assert configuration.alternatives("stream_layer_norm_forward", "sm_90", dtype)


def test_launches_are_recorded():
    with configuration.recorded_launches() as seen:
        configuration.launch("take_rows", "sm_90", torch.float32)
    assert seen == [("take_rows", torch.float32, "")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold 'implementations' and 'launches'"),
        ('{"launches": {}}', "must hold 'implementations' and 'launches'"),
        ('{"implementations": {"attention": {"bf16": "triton"}}, "launches": {}}', "gives attention in bf16"),
        ('{"implementations": {"attention": {"float32": 3}}, "launches": {}}', "the implementation 3"),
        ('{"implementations": {}, "launches": {}, "more": {}}', "must hold"),
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
