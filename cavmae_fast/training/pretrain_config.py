"""The options of a pretraining run, and what stands in for those that are not given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cavmae_fast.models import PRESETS
from cavmae_fast.training.precision import choose_dtype, find_device
from cavmae_fast.training.recipes import PRETRAINING, Recipe

ALIASES = {"base": "cav-mae-base", "scale+": "cav-mae-scale+", "scale++": "cav-mae-scale++"}
LOG_EVERY_ON_GPU = 20


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a CAV-MAE. Without --data it generates its own clips, in which sound and picture are related."""

    data: tuple[Path, ...] = ()
    """What to train on: a folder that `cavmae-fast prepare` wrote, or folders, media files, lists."""
    eval_data: tuple[Path, ...] = ()
    """Held out for retrieval, named like --data; with generated clips, their held-out split."""
    out: Path = Path("runs/pretrain")
    """Folder for checkpoint, metrics and figures."""
    model: str = "small"
    """System to train: small, base, scale+, scale++, cav, av-mae or vanilla-av-mae."""
    steps: int | None = None
    """Training steps; default: --epochs."""
    epochs: int | None = None
    """Passes over the clips; default: the system's recipe."""
    batch_size: int | None = None
    """Clips per step; default: the system's recipe."""
    learning_rate: float | None = None
    """Default: the system's recipe."""
    mask_ratio: float | None = None
    """Share of the patches of each modality that is removed; default: the system's (published: 0.75)."""
    mask_mode: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    """How audio patches are masked."""
    mae_loss_weight: float | None = None
    """Default: the system's."""
    contrast_loss_weight: float | None = None
    """Default: the system's."""
    init: Path | None = None
    """Checkpoint to start from: .pth, .safetensors or a folder written by save_pretrained."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the matrix products; auto: bfloat16 where the device multiplies it fast (`doctor` says so), else float32."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """What decodes the clips: worker processes (torch), or DALI on the GPU."""
    workers: int | None = None
    """Decoding processes; 0 decodes in this one. Default: 0 for up to 2000 clips, which stay decoded in memory, else one
    per core."""
    log_every: int | None = None
    """Steps whose losses are read from the device together; default: 20 on a GPU, which else would wait at every step, and
    1 on a CPU."""
    seed: int = 0
    save_every: int | None = None
    """Write a checkpoint every so many steps, too; the same command goes on from the newest one."""
    save_minutes: float = 10.0
    """Write a checkpoint when so many minutes have passed since the last one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    overwrite: bool = False
    """Begin anew in a folder that holds a run, which is removed."""


def resolve(config: PretrainConfig, begun: dict[str, Any] | None = None) -> PretrainConfig:
    """`config` with every default filled in: from the run that was `begun` in its folder, where one was, else from the
    system's recipe and the machine. ValueError names a bad value."""
    if begun is not None and config.dtype == "auto":
        config = replace(config, dtype=begun.get("dtype", "auto"))  # a second measurement could come out otherwise
    name = ALIASES.get(config.model, config.model)
    if name not in PRESETS:
        raise ValueError(f"--model is {config.model!r}; it must be one of {', '.join([*ALIASES, *PRESETS])}")
    for option in (
        "steps",
        "epochs",
        "batch_size",
        "learning_rate",
        "log_every",
        "save_every",
        "save_minutes",
        "keep_checkpoints",
    ):
        value = getattr(config, option)
        if value is not None and not value > 0:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be above 0")
    for option in ("mae_loss_weight", "contrast_loss_weight"):
        value = getattr(config, option)
        if value is not None and not value >= 0:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be 0 or more")
    preset, recipe, device = PRESETS[name], PRETRAINING[name], find_device(config.device)
    defaults = {
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "mask_ratio": preset.mask_ratio,
        "mae_loss_weight": preset.mae_loss_weight,
        "contrast_loss_weight": preset.contrast_loss_weight,
        "log_every": LOG_EVERY_ON_GPU if device.type == "cuda" else 1,
    }
    chosen = {option: value for option, value in defaults.items() if getattr(config, option) is None}
    dtype = choose_dtype(device)[0] if config.dtype == "auto" else config.dtype
    config = replace(config, model=name, device=str(device), dtype=dtype, **chosen)
    if config.mae_loss_weight == config.contrast_loss_weight == 0:
        raise ValueError("--mae-loss-weight and --contrast-loss-weight are both 0; one of them must be above 0")
    return config


def recipe_of(config: PretrainConfig) -> Recipe:
    """The system's recipe with what the (resolved) configuration changes."""
    return replace(
        PRETRAINING[config.model],
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        epochs=config.epochs,
    )
