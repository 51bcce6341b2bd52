"""Builds csrc/*.cu into cavmae_fast/_native/libcavmae.so with nvcc; everything else is in pyproject.toml.

The environment variable CAVMAE_BUILD_CUDA decides: `auto` (default) builds when nvcc is found in $CUDA_HOME/bin or on
PATH, and an install goes through without the library when that fails; `1` makes both an error; `0` builds nothing.
The library links neither torch nor Python, so it is built without them and outlives their updates. Its kernels need the
headers of CUTLASS (pip install nvidia-cutlass), which `build_backend/` asks pip for under `1`. A file whose name ends in
an architecture is compiled for that one alone; the files are compiled side by side.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("cavmae_fast", "_native", "libcavmae.so")
#: how a file's name ends -> what it is compiled for. `a` has the instructions of that generation alone (wgmma, TMA); the
#: PTX of sm_80 is for later GPUs, which compile it when the library is loaded.
TARGETS = {
    "_sm80": "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "_sm90": "-gencode=arch=compute_90a,code=sm_90a",
}
NAMES = "sm_80, sm_90a, PTX of compute_80"


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers in the package nvidia-cutlass."""
    package = importlib.util.find_spec("cutlass_library")
    folder = Path(package.origin).parent / "source" / "include" if package and package.origin else None
    return folder if folder is not None and (folder / "cutlass" / "cutlass.h").exists() else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")


def compile_library(nvcc: str, cutlass: Path, sources: list[Path], output: Path) -> None:
    """Compiles each source to an object of its own, as many at once as there are processors, and links them."""
    # Without assertions: a call of any function makes the compiler wait after every wgmma.
    options = ["-O3", "-std=c++17", "-ftz=true", "-DNDEBUG", "--expt-relaxed-constexpr", f"-I{cutlass}"]
    options += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:

        def compiled(source: Path) -> str:
            target = [code for end, code in TARGETS.items() if source.stem.endswith(end)]
            _run(nvcc, *options, *target, "-c", f"-o={folder}/{source.stem}.o", str(source))
            return f"{folder}/{source.stem}.o"

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        unfinished = Path(folder, output.name)
        _run(nvcc, "-shared", f"-o={unfinished}", *objects)
        unfinished.replace(output)


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
        cutlass = find_cutlass()
        if cutlass is None:
            if mode == "1":
                sys.exit("CAVMAE_BUILD_CUDA=1, but CUTLASS's headers are not here: pip install nvidia-cutlass")
            return "not built (CUTLASS's headers are not here: pip install nvidia-cutlass)"
        try:
            compile_library(nvcc, cutlass, [path for path in sources if path.suffix == ".cu"], self.output)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            if mode == "1":
                sys.exit(f"{nvcc} failed to build the CUDA library:\n{reason}")
            return f"not built ({nvcc} failed: {reason.splitlines()[-1]})"
        return f"built {self.output} with {nvcc} for {NAMES}"


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
