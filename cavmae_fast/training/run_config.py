"""The options that every training run has, and what stands in for those that are not given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from cavmae_fast.models.precision import choose_dtype, find_device
from cavmae_fast.training.recipes import Recipe

LOG_EVERY_ON_GPU = 20


@dataclass(frozen=True)
class RunConfig:
    """The options that pretraining and fine-tuning share."""

    data: tuple[Path, ...] = ()
    """What to train on: a folder that `cavmae-fast prepare` wrote, or folders, media files, lists."""
    eval_data: tuple[Path, ...] = ()
    """Held-out clips, named like --data; with generated clips, their held-out split."""
    out: Path = Path("runs/run")
    """Folder for checkpoints, metrics and figures."""
    steps: int | None = None
    """Training steps; default: --epochs."""
    epochs: int | None = None
    """Passes over the clips; default: the recipe's."""
    batch_size: int | None = None
    """Clips per step; default: the recipe's."""
    learning_rate: float | None = None
    """Default: the recipe's."""
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


Config = TypeVar("Config", bound=RunConfig)


def resolve_run(config: Config, recipe: Recipe, begun: dict[str, Any] | None = None) -> Config:
    """`config` with the defaults of the shared options filled in: from the run that was `begun` in its folder, where one
    was, else from the recipe and the machine. ValueError names a bad value."""
    if begun is not None and config.dtype == "auto":
        config = replace(config, dtype=begun.get("dtype", "auto"))  # a second measurement could come out otherwise
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
    device = find_device(config.device)
    defaults = {
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "log_every": LOG_EVERY_ON_GPU if device.type == "cuda" else 1,
    }
    chosen = {option: value for option, value in defaults.items() if getattr(config, option) is None}
    dtype = choose_dtype(device)[0] if config.dtype == "auto" else config.dtype
    return replace(config, device=str(device), dtype=dtype, **chosen)


def recipe_in_force(config: RunConfig, recipe: Recipe) -> Recipe:
    """`recipe` with what the (resolved) configuration changes."""
    return replace(recipe, learning_rate=config.learning_rate, batch_size=config.batch_size, epochs=config.epochs)
