"""Builds csrc/*.cu into cavmae_fast/_native/libcavmae.so with nvcc; everything else is in pyproject.toml.

The environment variable CAVMAE_BUILD_CUDA decides: `auto` (default) builds when nvcc is found in $CUDA_HOME/bin or on
PATH, and an install goes through without the library when that fails; `1` makes both an error; `0` builds nothing.
The library links neither torch nor Python, so it is built without them and outlives their updates. `csrc/products.cu`
needs the headers of CUTLASS (pip install nvidia-cutlass), which `build_backend/` asks pip for under `1`; without them the
library is built without that file, and the build says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("cavmae_fast", "_native", "libcavmae.so")
#: virtual architecture -> machine code for it; `a` has the instructions of that generation alone (wgmma, TMA)
ARCHITECTURES = {"compute_80": "sm_80", "compute_90a": "sm_90a", "compute_100": "sm_100"}

PRODUCTS = "products.cu"
#: the one source that needs CUTLASS and is for one architecture alone
PRODUCTS_TARGET = "-gencode=arch=compute_90a,code=sm_90a"


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers in the package nvidia-cutlass."""
    package = importlib.util.find_spec("cutlass_library")
    folder = Path(package.origin).parent / "source" / "include" if package and package.origin else None
    return folder if folder is not None and (folder / "cutlass" / "cutlass.h").exists() else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


def compile_library(nvcc: str, sources: list[Path], output: Path) -> str:
    """Compiles for what this nvcc knows of ARCHITECTURES, plus PTX of the newest for later GPUs; returns the names."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = {virtual: real for virtual, real in ARCHITECTURES.items() if virtual.rstrip("a") in listed}
    newest = list(targets)[-1].rstrip("a")
    codes = [f"-gencode=arch={virtual},code={real}" for virtual, real in targets.items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished, products = output.with_suffix(".tmp"), output.with_suffix(".products.o")
    options = ["-O3", "-std=c++17", "-ftz=true", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    inputs = [str(path) for path in sources if path.name != PRODUCTS]
    cutlass = find_cutlass()
    with_products = cutlass is not None and "compute_90a" in targets
    if with_products:
        source = next(str(path) for path in sources if path.name == PRODUCTS)
        # Without its assertions: a call of any function makes the compiler wait after every wgmma.
        cutlass_options = ["-DNDEBUG", "--expt-relaxed-constexpr", PRODUCTS_TARGET, f"-I{cutlass}", "-c", f"-o={products}"]
        _run(nvcc, *options, *cutlass_options, source)
        inputs.append(str(products))
    newest_code = f"-gencode=arch={newest},code={newest}"
    _run(nvcc, *options, "-shared", "--threads=4", *codes, newest_code, f"-o={unfinished}", *inputs)
    products.unlink(missing_ok=True)
    unfinished.replace(output)
    missing = [] if with_products else ["without the products of CUTLASS (pip install nvidia-cutlass)"]
    return ", ".join([*targets.values(), f"PTX of {newest}", *missing])


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class BuildNative(Command):
    description = "build the CUDA library"
    user_options = [("output=", "o", "where to write the library")]  # noqa: RUF012  (setuptools' interface)

    def initialize_options(self) -> None:
        self.output = None

    def finalize_options(self) -> None:
        self.output = Path(self.output or ROOT / LIBRARY)

    def get_source_files(self) -> list[str]:
        """Relative to the project: an sdist takes them along."""
        return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in (".cu", ".cuh", ".h"))

    def run(self) -> None:
        print(f"CUDA library: {self.build()}", flush=True)

    def build(self) -> str:
        mode = os.environ.get("CAVMAE_BUILD_CUDA", "auto")
        if mode not in ("auto", "0", "1"):
            sys.exit(f"CAVMAE_BUILD_CUDA is {mode!r}; it must be auto, 0 or 1")
        if mode == "0":
            return "not built (CAVMAE_BUILD_CUDA=0)"
        nvcc = find_nvcc()
        if nvcc is None:
            if mode == "1":
                sys.exit("CAVMAE_BUILD_CUDA=1, but there is no nvcc in $CUDA_HOME/bin or on PATH.")
            return "not built (no nvcc in $CUDA_HOME/bin or on PATH)"
        sources = [ROOT / name for name in self.get_source_files()]
        newest = max(path.stat().st_mtime for path in [*sources, Path(__file__)])
        if self.output.exists() and self.output.stat().st_mtime > newest:
            return f"{self.output} is up to date"
        try:
            names = compile_library(nvcc, [path for path in sources if path.suffix == ".cu"], self.output)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            if mode == "1":
                sys.exit(f"{nvcc} failed to build the CUDA library:\n{reason}")
            return f"not built ({nvcc} failed: {reason.splitlines()[-1]})"
        return f"built {self.output} with {nvcc} for {names}"


class Build(build):
    sub_commands = [("build_native", None), *build.sub_commands]  # noqa: RUF012  (setuptools' interface)


class BdistWheel(bdist_wheel):
    """A wheel with the library in it is for this platform; it is for any Python, because the library links none."""

    def run(self) -> None:
        self.run_command("build_native")
        if (ROOT / LIBRARY).exists():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel})
