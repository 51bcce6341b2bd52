from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cavmae_fast.ops import native

ROOT = Path(__file__).parents[1]
PRODUCTS = ["cavmae_linear_gelu", "cavmae_product_tile_rows", "cavmae_hidden_gradient"]
WITH_PRODUCTS = importlib.util.find_spec("cutlass_library") is not None
needs_products = pytest.mark.skipif(not WITH_PRODUCTS, reason="CUTLASS's headers are not here: pip install nvidia-cutlass")
NO_CUDA_HOME = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"}


def setup(mode: str, output: Path, **environment: str) -> subprocess.CompletedProcess:
    """`setup.py build_native` in an environment of its own."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", f"--output={output}"],
        cwd=ROOT,
        env={**NO_CUDA_HOME, "CAVMAE_BUILD_CUDA": mode, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH: the CUDA library cannot be built here")
    output = tmp_path_factory.mktemp("native") / "libcavmae.so"
    run = setup("1", output)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^CUDA library: built .* for .*sm_90a.*PTX", run.stdout, re.M), run.stdout
    return output


@pytest.fixture
def library(built) -> ctypes.CDLL:
    return native.load(built)


@pytest.fixture
def found(monkeypatch):
    """Makes `native` look for the library elsewhere: `found(path)`."""

    def look_at(path: Path) -> None:
        monkeypatch.setattr(native, "LIBRARY", path)
        native.library.cache_clear()

    yield look_at
    native.library.cache_clear()


def test_builds_once(built):
    before = built.stat().st_mtime_ns
    assert "up to date" in setup("1", built).stdout
    assert built.stat().st_mtime_ns == before


def test_exports_and_version(library):
    header = (ROOT / "csrc" / "cavmae.h").read_text()
    assert int(re.search(r"#define CAVMAE_ABI_VERSION (\d+)", header)[1]) == native.ABI_VERSION
    assert library.cavmae_abi_version() == native.ABI_VERSION
    declared = re.findall(r"^CAVMAE_API .*?(\w+)\(", header, re.M)
    assert len(declared) == 4 + len(PRODUCTS)
    missing = [name for name in declared if not hasattr(library, name)]
    assert missing == ([] if WITH_PRODUCTS else PRODUCTS)


def test_no_spills(built):
    triton = pytest.importorskip("triton")
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([cuobjdump, "-res-usage", built], capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) >= 3 * 3 + 2 * WITH_PRODUCTS, usage  # three dtypes, three architectures; two products
    assert all(int(stack) == int(local) == 0 for _, stack, local in kernels), usage


@needs_products
def test_products_run_on_the_matrix_units(built):
    """Those of Hopper (HGMMA), with tiles that travel by TMA (UTMALDG, UTMASTG). A call of a function would make the
    compiler wait after every one of them."""
    triton = pytest.importorskip("triton")
    code = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-sass", "-arch", "sm_90a", built], capture_output=True, text=True, check=True
    ).stdout
    products = [part for part in code.split("Function : ")[1:] if "cutlass" in part.splitlines()[0]]
    assert len(products) == 2
    assert all(word in part for part in products for word in ("HGMMA", "UTMALDG", "UTMASTG"))
    assert not any(re.search(r"\bCALL\.", part) for part in products)


@needs_products
def test_bad_arguments_of_products_return_codes(library):
    """Refused before anything is launched, as above."""
    sizes = {"rows": 8, "width": 64, "depth": 32, "dtype": 2}
    for function, optional in ((library.cavmae_linear_gelu, 1), (library.cavmae_hidden_gradient, None)):

        def code(position=None, address=None, function=function, **changes):
            pointers = [4096] * 5
            if position is not None:
                pointers[position] = address
            return function(*pointers, *(sizes | changes).values(), None)

        assert [code(i) for i in range(5) if i != optional] == [-1] * (5 if optional is None else 4)
        assert [code(i, 4104) for i in range(5)] == [-4] * 5
        assert [code(rows=0), code(width=12), code(depth=-8), code(rows=2**40)] == [-2] * 4
        assert [code(dtype=0), code(dtype=1), code(dtype=9)] == [-3] * 3
        if not torch.cuda.is_available():
            assert code() > 0  # CUDA's own error: no device
    assert library.cavmae_product_tile_rows() == 128


def test_bad_arguments_return_codes(library):
    """Refused before anything is launched: none of the addresses is ever read, and no device is needed."""

    def code(dpre=4096, partial=4096, dact=4096, pre=4096, rows=8, width=64, dtype=2):
        return library.cavmae_dgelu_bias(dpre, partial, dact, pre, rows, width, dtype, None)

    assert [code(**{name: None}) for name in ("dpre", "partial", "dact", "pre")] == [-1] * 4
    assert [code(rows=0), code(rows=-1), code(width=0), code(width=12), code(width=6, dtype=0)] == [-2] * 5
    assert [code(rows=2**40), code(width=2**30)] == [-2] * 2
    assert [code(dtype=3), code(dtype=-1)] == [-3] * 2
    assert [code(**{name: 4104}) for name in ("dpre", "dact", "pre")] == [-4] * 3
    messages = {library.cavmae_error_string(c) for c in range(-5, 0)}
    assert len(messages) == 5
    if not torch.cuda.is_available():
        assert code() > 0  # the arguments are fine, the device is missing: CUDA's own error


def test_gelu_derivative_on_the_host(tmp_path):
    """csrc/gelu.cuh, compiled as C++, against fp64: at most twice the error of PyTorch's erf in fp32."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    source = tmp_path / "gelu.cpp"
    source.write_text(
        "#include <cmath>\n#define __device__\n#define __expf expf\n#define __fdividef(a, b) ((a) / (b))\n"
        "using std::fabs;\n#define fabsf(x) std::fabs(x)\n#define fmaf(a, b, c) std::fma(a, b, c)\n"
        f'#include "{ROOT / "csrc" / "gelu.cuh"}"\n'
        'extern "C" void derivative(const float* z, float* d, int n)'
        " { for (int i = 0; i < n; ++i) d[i] = gelu_derivative(z[i]); }\n"
    )
    output = tmp_path / "gelu.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", f"-o{output}", source], check=True)
    z = torch.cat([torch.linspace(-12, 12, 100001), torch.tensor([0.0, -0.0, 40.0, -40.0, 3e-39])])
    got = torch.empty_like(z)
    run = ctypes.CDLL(str(output)).derivative
    run(ctypes.c_void_p(z.data_ptr()), ctypes.c_void_p(got.data_ptr()), z.numel())
    exact = z.double()
    want = torch.special.ndtr(exact) + exact * (-0.5 * exact**2).exp() / (2 * torch.pi) ** 0.5
    baseline = torch.ops.aten.gelu_backward(torch.ones_like(z), z)
    assert float((got.double() - want).abs().max()) <= 2 * float((baseline.double() - want).abs().max())


def test_another_version_is_refused(built, found, monkeypatch):
    found(built)
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(RuntimeError, match=r"was built for version 2 of its interface.*needs version 3"):
        native.library()
    assert native.status().startswith("unusable: ")


def test_status(built, found, tmp_path):
    found(tmp_path / "missing.so")
    assert native.library() is None
    assert native.status().startswith("not built")
    (tmp_path / "broken.so").write_text("not a library")
    found(tmp_path / "broken.so")
    assert native.status().startswith("unusable")
    found(built)
    products = "with" if WITH_PRODUCTS else "without"
    assert native.status() == (f"{built}, interface version {native.ABI_VERSION}, {products} the products that need CUTLASS")
    assert native.has_products() == WITH_PRODUCTS


def test_a_failed_call_says_why(built, found):
    found(built)
    with pytest.raises(RuntimeError, match=r"cavmae_dgelu_bias failed: a pointer is null \(code -1\)"):
        native.call("cavmae_dgelu_bias", None, None, None, None, 1, 8, 2, None)


def test_build_modes_without_nvcc(tmp_path):
    output = tmp_path / "libcavmae.so"
    empty = str(tmp_path)
    asked = setup("1", output, PATH=empty)
    assert asked.returncode != 0
    assert asked.stderr.strip().splitlines()[-1] == (
        "CAVMAE_BUILD_CUDA=1, but there is no nvcc in $CUDA_HOME/bin or on PATH."
    )
    automatic = setup("auto", output, PATH=empty)
    assert automatic.returncode == 0 and "not built (no nvcc" in automatic.stdout
    never = setup("0", output)
    assert never.returncode == 0 and "not built (CAVMAE_BUILD_CUDA=0)" in never.stdout
    wrong = setup("yes", output)
    assert wrong.returncode != 0 and "CAVMAE_BUILD_CUDA is 'yes'; it must be auto, 0 or 1" in wrong.stderr
    assert not output.exists()


def test_failing_nvcc(tmp_path):
    """An nvcc that does not work is an error only where the library was asked for."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'no host compiler' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    output = tmp_path / "libcavmae.so"
    automatic = setup("auto", output, CUDA_HOME=str(tmp_path))
    assert automatic.returncode == 0 and "failed: no host compiler)" in automatic.stdout
    asked = setup("1", output, CUDA_HOME=str(tmp_path))
    assert asked.returncode != 0 and asked.stderr.rstrip().endswith("no host compiler")
    assert not output.exists()
