"""`cavmae-fast doctor`: the device, the versions, and which implementation each operator uses here, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from typing import Literal

import torch

from cavmae_fast.models.packed import RECOMPUTE
from cavmae_fast.models.precision import choose_dtype
from cavmae_fast.ops import configuration, dispatch, native
from cavmae_fast.ops.attention import available_backends, resolve_backend

OPTIONAL = {
    "flash-attn": "attention back end flash_attn",
    "xformers": "attention back end xformers",
    "nvidia-dali-cuda130": "loader back end dali: decoding on the GPU",
    "miniaudio": "decoding FLAC",
    "av": "reading clips",
    "tyro": "the command line",
    "matplotlib": "figures",
    "safetensors": "checkpoints",
}

TRITON_OF_TORCH = {"2.11": "3.6.0", "2.12": "3.7.0", "2.13": "3.7.1"}
"The tested releases of torch, and the Triton that PyPI's CUDA build of each requires (docs/support.md)."


@dataclass(frozen=True)
class DoctorConfig:
    """Report device, versions, and which implementation each operator uses here, and why."""

    model: str | None = None
    """Say how much memory pretraining this system takes, instead: base, mavil or any other name that pretrain takes."""
    batch: int = 256
    """Clips per step of it."""
    recompute: Literal["none", "elementwise", "mlp", "block"] | None = None
    """With this choice of pretrain's --recompute; default: with each."""
    gpu: tuple[float, ...] = (24.0, 80.0)
    """Memory of GPUs in GB for which to say the largest batch."""


def examine(config: DoctorConfig) -> str:
    """The report as text: the job of the command."""
    if config.model is None:
        return render()
    from cavmae_fast.models.systems import STAGE_2, SYSTEMS
    from cavmae_fast.training.pretrain_config import ALIASES
    from cavmae_fast.training.step_memory import memory_table

    choices = RECOMPUTE if config.recompute is None else [config.recompute]
    name = ALIASES.get(config.model, config.model)
    if name not in SYSTEMS:
        raise ValueError(f"--model is {config.model!r}; it must be one of {', '.join([*ALIASES, *SYSTEMS])}")
    stages = {name: ""} | ({name + STAGE_2: "stage 2, with its teacher: "} if name + STAGE_2 in SYSTEMS else {})
    return "\n".join(
        _section(
            f"{stage}a step of {config.batch} clips in bfloat16, by its tensors",
            memory_table(system, config.batch, choices, config.gpu),
        )
        for system, stage in stages.items()
    )


def report() -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (name, what is so) lines."""
    return [
        ("machine", _machine()),
        ("packages", _packages()),
        ("tuning", _tuning()),
        ("operators in bf16", _operators()),
        ("attention back ends", list(available_backends(_device()).items())),
        ("csrc", [("libcavmae.so", native.status())]),
    ]


def render() -> str:
    """The report as text."""
    return "\n".join(_section(title, rows) for title, rows in report())


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:<28} {value}" for name, value in rows)])


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _machine() -> list[tuple[str, str]]:
    rows = [("python", platform.python_version()), ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    rows.append(("triton", _version("triton") or "missing"))
    if warning := version_warning(torch.__version__, _version("triton")):
        rows.append(("WARNING", warning))
    if not torch.cuda.is_available():
        rows.append(("device", f"CPU ({torch.backends.cpu.get_cpu_capability()}); PyTorch finds no CUDA device"))
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        architecture = configuration.gpu_architecture(index)
        rows.append((f"cuda:{index}", f"{p.name}, {architecture}, {p.total_memory / 2**30:.0f} GiB"))
    rows.append(("--dtype auto", ": ".join(choose_dtype(_device()))))
    return rows


def version_warning(torch_version: str, triton_version: str | None) -> str | None:
    """One line where this torch is not tested, or Triton is there and is not the one that belongs to it; else None."""
    release = ".".join(torch_version.split(".")[:2])
    if release not in TRITON_OF_TORCH:
        return f"torch {release} is not among the tested releases: {', '.join(TRITON_OF_TORCH)}"
    wanted = TRITON_OF_TORCH[release]
    if triton_version in (None, wanted):
        return None
    return f"triton {triton_version} does not belong to torch {release}: pip install triton=={wanted}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[tuple[str, str]]:
    rows = [(name, f"{_version(name) or 'not installed'} ({use})") for name, use in OPTIONAL.items()]
    # The package called apex on PyPI is another project: NVIDIA's is known by its optimizers.
    found = importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None
    rows.append(("apex (NVIDIA's)", "installed" if found else "not installed (FusedAdam; torch's fused Adam is used)"))
    return rows


def _tuning() -> list[tuple[str, str]]:
    """Where the choices below come from."""
    device = _device()
    target = configuration.target_of(device)
    own, architecture = configuration.user_file(target), target.partition(" ")[0]
    rows = [("choices in force", configuration.fingerprint(device))]
    rows.append(("your own", str(own) if own.exists() else f"none for {target}: run `cavmae-fast tune`"))
    shipped = configuration.shipped_file(architecture)
    proven = shipped.exists() and any(configuration.read(shipped)["implementations"].values())
    rows.append(("shipped", f"for {architecture}" if proven else f"nothing is proven for {architecture}"))
    rows += [("not used", f"{path}: measured with other releases") for path in configuration.stale_files(target)]
    return rows


def _operators() -> list[tuple[str, str]]:
    """What runs in bfloat16, and in float32 where that is another implementation; with keys, one line for each."""
    device, rows = _device(), []
    target = configuration.target_of(device)
    for name in sorted(dispatch.operators):
        default = str(dispatch.choose(name, device, torch.bfloat16))
        rows.append((name, default))
        for dtype, words in ((torch.bfloat16, ""), (torch.float32, " in float32")):
            for key in configuration.keys(target, name, dtype) or [""]:
                choice = str(dispatch.choose(name, device, dtype, key=key))
                if choice != default and not (key == "" and choice.split(":")[0] == default.split(":")[0]):
                    rows.append((f"{name}{words}{', ' + key if key else ''}", choice))
    rows.append(("attention='auto'", resolve_backend("auto", device, torch.bfloat16)))
    return rows
