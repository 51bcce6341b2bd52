"""Importing costs next to nothing, loads no library before it is used, queries no device and prints nothing."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import pytest

OPTIONAL = (
    "av",
    "tyro",
    "matplotlib",
    "nvidia.dali",
    "PIL",
    "soundfile",
    "torchaudio",
    "torchvision",
    "timm",
    "flash_attn",
    "xformers",
    "kaldi_native_fbank",
    "pytest",
)
NO_DEVICE = """
import torch
def refuse(*args, **kwargs):
    raise AssertionError("a device was queried")
for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_name",
             "get_device_properties", "init", "_lazy_init", "synchronize", "mem_get_info"):
    setattr(torch.cuda, name, refuse)
if hasattr(torch._C, "_cuda_getDeviceCount"):
    torch._C._cuda_getDeviceCount = refuse
"""
HIDE_TRITON = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """The code in a new interpreter, warnings shown; its last line of standard output is JSON."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CAVMAE_OPS")} | environment
    variables["OMP_NUM_THREADS"] = "1"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=60)


def result(code: str, **environment: str):
    process = run(code, **environment)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert len(lines) == 1, process.stdout
    return json.loads(lines[0])


def test_import_is_fast():
    """Less than 0.15 s on top of torch, median of five."""
    code = """
import torch, time, json
begin = time.perf_counter()
import cavmae_fast
print(json.dumps(time.perf_counter() - begin))
"""
    assert statistics.median(result(code) for _ in range(5)) < 0.15


@pytest.mark.parametrize("use", ["", "cavmae_fast.CAVMAE", "cavmae_fast.load_checkpoint", "cavmae_fast.ops"])
def test_nothing_is_loaded_before_it_is_used(use):
    code = f"""
import json, sys
import cavmae_fast
{use}
print(json.dumps(sorted(sys.modules)))
"""
    loaded = result(code)
    assert [name for name in OPTIONAL if name in loaded] == []
    assert "cavmae_fast" in loaded
    if not use:
        assert [name for name in loaded if name.startswith(("cavmae_fast.", "torch", "triton", "numpy"))] == []
    else:
        above = ("data", "training", "evaluation", "cli")
        assert [name for name in loaded if name.startswith("cavmae_fast.") and name.split(".")[1] in above] == []
        tools = "cavmae_fast.ops.catalogue", "cavmae_fast.ops.parity"
        assert [name for name in loaded if name.startswith(tools)] == []


def test_no_device_is_queried_and_nothing_drawn_or_configured():
    code = (
        NO_DEVICE
        + """
import json
def state():
    return [torch.get_num_threads(), torch.get_default_dtype().__repr__(), torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.get_rng_state().sum().item()]
before = state()
import cavmae_fast
cavmae_fast.CAVMAE, cavmae_fast.CAVMAEFT, cavmae_fast.load_checkpoint
assert state() == before
with torch.device("meta"):
    cavmae_fast.CAVMAE()
print(json.dumps(torch.cuda._initialized))
"""
    )
    assert result(code) is False


def test_the_environment_is_left_alone():
    code = """
import json, os
before = dict(os.environ)
import cavmae_fast
cavmae_fast.CAVMAE
print(json.dumps(dict(os.environ) == before))
"""
    assert result(code) is True


def test_without_triton_the_package_imports():
    code = (
        HIDE_TRITON
        + """
import json
import cavmae_fast
import cavmae_fast.reference.cavmae
print(json.dumps([cavmae_fast.__version__, "triton" in sys.modules]))
"""
    )
    assert result(code)[1] is False


def test_without_triton_the_models_say_what_is_missing():
    """Where Triton is absent (not Linux) the models either work or name it; nothing else may go wrong."""
    process = run(HIDE_TRITON + "import cavmae_fast\ncavmae_fast.CAVMAE\n")
    assert process.returncode == 0 or "No module named 'triton" in process.stderr


def test_every_module_of_the_models_imports_by_itself():
    """In a new interpreter each, so that no import cycle hides behind another's order."""
    code = """
import importlib, json, pkgutil, sys
import cavmae_fast.models, cavmae_fast.reference, cavmae_fast.ops
packages = cavmae_fast.models, cavmae_fast.reference, cavmae_fast.ops
names = [m.name for p in packages for m in pkgutil.iter_modules(p.__path__, p.__name__ + ".")]
import torch
for name in names:
    if ".ops." in name:
        importlib.import_module(name)  # registers operators, which torch allows once
        continue
    for loaded in [n for n in sys.modules if n.startswith("cavmae_fast") and ".ops" not in n]:
        del sys.modules[loaded]
    importlib.import_module(name)
print(json.dumps(len(names)))
"""
    assert result(code) > 15
