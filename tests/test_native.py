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
HEADERS = importlib.util.find_spec("cutlass_library")
NO_HEADERS = "CUTLASS's headers are not here: pip install nvidia-cutlass"
KERNELS = {"sm_80": 2, "sm_90a": 6}
"Architecture -> kernels that are compiled for it."
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
    if HEADERS is None:
        pytest.skip(NO_HEADERS)
    output = tmp_path_factory.mktemp("native") / "libcavmae.so"
    run = setup("1", output)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^CUDA library: built .* for sm_80, sm_90a, PTX of compute_80", run.stdout, re.M), run.stdout
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


def test_exports_and_version(built, library):
    header = (ROOT / "csrc" / "cavmae.h").read_text()
    assert int(re.search(r"#define CAVMAE_ABI_VERSION (\d+)", header)[1]) == native.ABI_VERSION
    assert library.cavmae_abi_version() == native.ABI_VERSION
    declared = re.findall(r"^CAVMAE_API .*?(\w+)\(", header, re.M)
    symbols = subprocess.run(["nm", "-D", "--defined-only", built], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines() if line.split()[1] in "TDB"}
    assert exported == set(declared)
    assert {library.cavmae_error_string(code) for code in range(-5, 0)}.isdisjoint({b"", None})


def machine_code(library: Path, architecture: str, *options: str) -> str:
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "-arch", architecture, *options, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("architecture", KERNELS)
def test_no_spills(built, architecture):
    """Shared memory is not seen from outside: the sources assert that it is within the limits."""
    usage = machine_code(built, architecture, "-res-usage")
    kernels = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) == KERNELS[architecture], usage
    assert all(int(stack) == int(local) == 0 for _, stack, local in kernels), usage


@pytest.mark.parametrize(("architecture", "words"), [("sm_80", ("HMMA", "LDGSTS")), ("sm_90a", ("HGMMA", "UTMALDG"))])
def test_products_run_on_the_matrix_units(built, architecture, words):
    """With tiles that travel past the registers, on Hopper by TMA. A call of a function would make the compiler wait after
    every wgmma."""
    code = machine_code(built, architecture, "-sass")
    others = ("add_splits", "attention_backward")
    products = [part for part in code.split("Function : ")[1:] if not any(name in part.splitlines()[0] for name in others)]
    assert len(products) >= 2
    assert all(word in part for part in products for word in words)
    assert not any(re.search(r"\bCALL\.", part) for part in products)


def test_code_for_later_gpus(built):
    assert re.search(r"\.target sm_80", machine_code(built, "sm_80", "-ptx"))


# function -> how many pointers to the GPU's memory it takes, the places of those that may be null, and how many arrays
FUNCTIONS = {
    "cavmae_linear_gelu": (3, (1,), 2),
    "cavmae_hidden_gradient": (4, (), 1),
    "cavmae_weight_gradient": (5, (1,), 0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_arguments_return_codes(library, name):
    """Refused before anything is launched: none of the addresses is ever read, and no device is needed."""
    count, optional, arrays = FUNCTIONS[name]
    sizes = {"rows": (8, 300), "streams": 2, "width": 64, "depth": 32, "dtype": 2}

    def code(position=None, address=None, **changes):
        pointers = [4096] * count + [(4096, 8192)] * arrays
        if position is not None:
            pointers[position] = address
        rows, *numbers = (sizes | changes).values()
        values = [(ctypes.c_void_p * 2)(*p) if isinstance(p, tuple) else p for p in pointers]
        if name == "cavmae_weight_gradient":
            values.insert(3, 2**40)  # bytes of the workspace
        return getattr(library, name)(*values, rows and native.sizes(rows), *numbers, None)

    required = [i for i in range(count + arrays) if i not in optional]
    assert [code(i) for i in required] == [-1] * len(required)
    assert [code(i, (4096, None)) for i in range(count, count + arrays)] == [-1] * arrays
    assert code(rows=None) == -1
    assert [code(i, 4104) for i in range(count)] == [-4] * count
    assert [code(i, (4096, 4104)) for i in range(count, count + arrays)] == [-4] * arrays
    assert [code(rows=rows) for rows in ((0, 8), (8, -1), (8, 2**40))] == [-2] * 3
    assert [code(streams=streams) for streams in (0, 4, -1)] == [-2] * 3
    assert [code(width=12), code(depth=-8), code(width=0), code(depth=2**40)] == [-2] * 4
    assert [code(dtype=0), code(dtype=1), code(dtype=9)] == [-3] * 3
    if not torch.cuda.is_available():
        assert code() > 0  # the arguments are fine, the device is missing: CUDA's own error


def test_partial_sums_are_over_the_rows_of_a_tile(library):
    assert library.cavmae_product_tile_rows() == 128


def test_workspace_of_the_weight_gradient(library):
    needed = ctypes.c_int64()

    def code(*changes):
        pointer, rows, *sizes = changes
        return library.cavmae_weight_gradient_workspace(pointer, rows and native.sizes(rows), *sizes)

    assert code(None, (8, 300), 2, 64, 32) == code(ctypes.byref(needed), None, 2, 64, 32) == -1
    assert code(ctypes.byref(needed), (8, 0), 2, 64, 32) == code(ctypes.byref(needed), (8, 9), 2, 64, 31) == -2
    if not torch.cuda.is_available():
        assert code(ctypes.byref(needed), (8, 300), 2, 64, 32) > 0


def compiled_for_the_host(folder: Path, text: str) -> ctypes.CDLL:
    """What csrc/ has of plain arithmetic, compiled as C++."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    source, output = folder / "host.cpp", folder / "host.so"
    source.write_text(text)
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-o{output}", source], check=True
    )
    return ctypes.CDLL(str(output))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """rows, width, depth, clusters -> (the plan's units, bytes of results), as csrc/weight_gradient_plan.h makes them."""
    library = compiled_for_the_host(
        tmp_path_factory.mktemp("plan"),
        """
        #include <initializer_list>
        #include "weight_gradient_plan.h"
        using namespace cavmae;
        extern "C" int units(int* out, int64_t* bytes, const int64_t* rows, int streams, int64_t width, int64_t depth,
                             int clusters, int most) {
            const Plan plan = make_plan(rows, streams, width, depth, clusters);
            *bytes = plan.results() * 4;
            const int count = plan.units();
            for (int i = 0; i < count && i < most; ++i) {
                const Unit u = plan.unit(i);
                for (int value : {u.stream, u.split, u.slot, u.tile_m, u.tile_n, u.first_step, u.steps}) *out++ = value;
            }
            return count;
        }
        """,
    )
    library.units.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int, *[ctypes.c_int64] * 2, ctypes.c_int, ctypes.c_int]

    def units(rows, width, depth, clusters=66):
        values, most, needed = torch.empty(20000, 7, dtype=torch.int32), 20000, ctypes.c_int64()
        sizes = (native.sizes(rows), len(rows), width, depth, clusters, most)
        count = library.units(values.data_ptr(), ctypes.byref(needed), *sizes)
        assert 0 < count <= most
        return values[:count].tolist(), needed.value

    return units


@pytest.mark.parametrize("rows", [(1,), (64,), (65, 3000), (32768, 12544), (181248,), (7, 181248, 64)], ids=str)
@pytest.mark.parametrize(
    ("width", "depth"), [(8, 8), (768, 768), (3072, 768), (768, 3072), (512, 2048), (264, 520)], ids=str
)
def test_weight_gradients_are_divided_completely(plan, rows, width, depth):
    """Every tile gets every step of its stream once, in the order in which the splits are added up."""
    units, needed = plan(rows, width, depth)
    tiles = {(m, n) for m in range(-(-width // 256)) for n in range(-(-depth // 256))}
    slots = {}
    for stream, split, slot, m, n, first, steps in units:
        assert steps > 0
        slots.setdefault((stream, split), (slot, first, steps, set()))
        assert slots[stream, split][:3] == (slot, first, steps)
        assert (m, n) not in slots[stream, split][3]
        slots[stream, split][3].add((m, n))
    assert all(entry[3] == tiles for entry in slots.values())
    assert [entry[0] for _, entry in sorted(slots.items())] == list(range(len(slots)))
    for stream, count in enumerate(rows):
        end = 0
        for (_, _), (_, first, steps, _) in sorted(item for item in slots.items() if item[0][0] == stream):
            assert first == end
            end += steps
        assert end == -(-count // 64)
    assert needed <= 64 << 20 or len(slots) == len(rows)


@pytest.mark.parametrize(
    ("rows", "width", "depth"), [((181248,), 512, 2048), ((32768, 12544), 3072, 768), ((45312,), 768, 768)], ids=str
)
def test_weight_gradients_keep_a_gpu_busy(plan, rows, width, depth):
    """With the 66 pairs of multiprocessors of an H200: at least 85 % of what they could multiply at the same time."""
    units, _ = plan(rows, width, depth)
    work = [0] * 66
    for index, unit in enumerate(units):
        work[index % 66] += unit[-1]
    assert sum(work) / 66 >= 0.85 * max(work)


def test_gelu_derivative_on_the_host(tmp_path):
    """csrc/gelu.cuh, compiled as C++, against fp64: at most twice the error of PyTorch's erf in fp32."""
    library = compiled_for_the_host(
        tmp_path,
        "#include <cmath>\n#define __device__\n#define __expf expf\n#define __fdividef(a, b) ((a) / (b))\n"
        "using std::fabs;\n#define fabsf(x) std::fabs(x)\n#define fmaf(a, b, c) std::fma(a, b, c)\n"
        '#include "gelu.cuh"\n'
        'extern "C" void derivative(const float* z, float* d, int n)'
        " { for (int i = 0; i < n; ++i) d[i] = gelu_derivative(z[i]); }\n",
    )
    z = torch.cat([torch.linspace(-12, 12, 100001), torch.tensor([0.0, -0.0, 40.0, -40.0, 3e-39])])
    got = torch.empty_like(z)
    library.derivative(ctypes.c_void_p(z.data_ptr()), ctypes.c_void_p(got.data_ptr()), z.numel())
    exact = z.double()
    want = torch.special.ndtr(exact) + exact * (-0.5 * exact**2).exp() / (2 * torch.pi) ** 0.5
    baseline = torch.ops.aten.gelu_backward(torch.ones_like(z), z)
    assert float((got.double() - want).abs().max()) <= 2 * float((baseline.double() - want).abs().max())


def test_another_version_is_refused(built, found, monkeypatch):
    found(built)
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(RuntimeError, match=r"was built for version 4 of its interface.*needs version 5"):
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
    assert native.status() == f"{built}, interface version {native.ABI_VERSION}"


def test_a_failed_call_says_why(built, found):
    found(built)
    with pytest.raises(RuntimeError, match=r"cavmae_hidden_gradient failed: a pointer is null \(code -1\)"):
        native.call("cavmae_hidden_gradient", *[None] * 6, 1, 8, 8, 2, None)


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


def test_build_modes_without_cutlass(tmp_path):
    output = tmp_path / "libcavmae.so"
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 0\n")
    nvcc.chmod(0o755)
    (tmp_path / "cutlass_library").mkdir()  # a package of that name without headers hides the real one
    (tmp_path / "cutlass_library" / "__init__.py").touch()
    there = {"CUDA_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    asked = setup("1", output, **there)
    assert asked.returncode != 0
    assert asked.stderr.strip().splitlines()[-1] == (
        "CAVMAE_BUILD_CUDA=1, but CUTLASS's headers are not here: pip install nvidia-cutlass"
    )
    automatic = setup("auto", output, **there)
    assert automatic.returncode == 0 and "not built (CUTLASS's headers are not here" in automatic.stdout
    assert not output.exists()


def test_failing_nvcc(tmp_path):
    """An nvcc that does not work is an error only where the library was asked for."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'no host compiler' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    output = tmp_path / "libcavmae.so"
    headers = tmp_path / "cutlass_library" / "source" / "include" / "cutlass" / "cutlass.h"
    headers.parent.mkdir(parents=True)
    headers.touch()
    (tmp_path / "cutlass_library" / "__init__.py").touch()
    there = {"CUDA_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    automatic = setup("auto", output, **there)
    assert automatic.returncode == 0 and "failed: no host compiler)" in automatic.stdout
    asked = setup("1", output, **there)
    assert asked.returncode != 0 and asked.stderr.rstrip().endswith("no host compiler")
    assert not output.exists()
