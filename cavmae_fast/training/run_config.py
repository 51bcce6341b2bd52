"""The options that every training run has, and what stands in for those that are not given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from cavmae_fast.models.precision import Precision, choose_dtype, find_device
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedule_options import schedule_in_force, schedule_options
from cavmae_fast.training.trackers import check_trackers

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
    adapt_positions: bool = False
    """Cut or interpolate the positions of --init where the model takes another audio length or image size."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    """Of the matrix products; auto: bfloat16 where the device multiplies it fast (`doctor` says so), else float32. fp8:
    bfloat16 with the blocks' products of 8-bit numbers, on GPUs that have units for them (Ada, Hopper, Blackwell)."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """What decodes the clips: worker processes (torch), or DALI on the GPU."""
    workers: int | None = None
    """Decoding processes; 0 decodes in this one. Default: 0 for up to 2000 clips, which stay decoded in memory, else one
    per core."""
    log_every: int | None = None
    """Steps whose losses are read from the device together; default: 20 on a GPU, which else would wait at every step, and
    1 on a CPU."""
    seed: int = 0
    optimizer: Literal["adam", "adamw", "fast-adam", "fast-adamw", "fused-adam"] | None = None
    """adam (published: L2 regularization) or adamw of PyTorch; fast-adam or fast-adamw, which keep the weights rounded for
    16-bit products, too; or fused-adam of NVIDIA's apex; default: the recipe's."""
    betas: tuple[float, float] | None = None
    """Of the optimizer; default: the recipe's."""
    weight_decay: float | None = None
    """Default: the recipe's."""
    schedule: Literal["step", "cosine", "constant"] | None = None
    """How the learning rate falls: by --decay-factor at epochs, along a cosine, or not at all; default: the recipe's."""
    decay_start: int | None = None
    """First epoch, from 0, with a smaller learning rate, for --schedule step; default: the recipe's."""
    decay_every: int | None = None
    """Epochs from one fall of the learning rate to the next, for --schedule step; default: the recipe's."""
    decay_factor: float | None = None
    """What the learning rate is multiplied by at each fall, for --schedule step; default: the recipe's, else 0.5."""
    end_factor: float | None = None
    """Share of the learning rate that is left at the end, for --schedule cosine; default: the recipe's, else 0."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises from 0; default: the recipe's."""
    warmup_share: float | None = None
    """Share of all steps over which it rises, in place of --warmup-steps; default: the recipe's."""
    head_lr_factor: float | None = None
    """What the learning rate of a classifier's head is multiplied by; default: the recipe's."""
    layer_decay: float | None = None
    """What the learning rate is multiplied by for each layer below the top; 1: all learn alike. Default: the recipe's."""
    clip_grad: float | None = None
    """Scale gradients down to this norm; 0: not. Default: the recipe's."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is evaluated and exported; 0: none. Default: the recipe's."""
    drop_path: float | None = None
    """Chance that a clip leaves out a branch of the last block, less in blocks before; 0: none. Default: the recipe's."""
    accumulate: int | None = None
    """Compute a batch in so many parts, which takes less memory and gives the whole batch's gradients. Default: the
    recipe's."""
    recompute: Literal["none", "elementwise", "mlp", "block"] = "none"
    """What the backward pass forms again instead of keeping it, for less memory and the same results: results of LayerNorms
    and GELUs (elementwise), what GELUs take as well (mlp), or whole blocks; `doctor --model` says what each needs."""
    compile: bool = False
    """Compile the model with torch.compile, which takes minutes at the start."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the whole step as a CUDA graph; auto: where it computes what the step without one computes."""
    max_skipped: int = 5
    """End the run when so many steps in a row were skipped, because a loss or gradient was not finite."""
    save_every: int | None = None
    """Write a checkpoint every so many steps, too; the same command goes on from the newest one."""
    save_minutes: float = 10.0
    """Write a checkpoint when so many minutes have passed since the last one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    shard: bool = False
    """Under torchrun: keep a shard of parameters and moments on each process (FSDP2) instead of all on each (DDP)."""
    overwrite: bool = False
    """Begin anew in a folder that holds a run, which is removed."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Show the run's numbers in these, too; metrics.jsonl holds them always."""
    config: Path | None = None
    """Take the options from this file, such as the config.json of an earlier run; options that are typed beside it count
    more."""
    dry_run: bool = False
    """Read one batch, compute a small step, say what the run would take, and write nothing."""


Config = TypeVar("Config", bound=RunConfig)

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            "steps",
            "epochs",
            "batch_size",
            "learning_rate",
            "log_every",
            "save_every",
            "save_minutes",
            "keep_checkpoints",
            "decay_every",
            "decay_factor",
            "head_lr_factor",
            "accumulate",
            "max_skipped",
        ),
        (lambda value: value > 0, "above 0"),
    ),
    **dict.fromkeys(("weight_decay", "decay_start", "warmup_steps", "clip_grad"), (lambda value: value >= 0, "0 or more")),
    **dict.fromkeys(("ema", "drop_path", "warmup_share"), (lambda value: 0 <= value < 1, "at least 0 and below 1")),
    "layer_decay": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "end_factor": (lambda value: 0 <= value <= 1, "in 0 to 1"),
    "betas": (lambda value: all(0 <= beta < 1 for beta in value), "two numbers, each at least 0 and below 1"),
}
"Which values an option may have, and in words."
_OF_RECIPE = (
    "epochs",
    "batch_size",
    "learning_rate",
    "optimizer",
    "betas",
    "weight_decay",
    "head_lr_factor",
    "layer_decay",
    "clip_grad",
    "ema",
    "drop_path",
    "accumulate",
)
"The options that are named like the recipe's fields."


def resolve_run(config: Config, recipe: Recipe, begun: dict[str, Any] | None = None) -> Config:
    """`config` with the defaults of the shared options filled in: from the run that was `begun` in its folder, where one
    was, else from the recipe and the machine. ValueError names a bad value."""
    if begun is not None and config.dtype == "auto":
        config = replace(config, dtype=begun.get("dtype", "auto"))  # a second measurement could come out otherwise
    for option, (allowed, words) in _RANGES.items():
        value = getattr(config, option)
        if value is not None and not allowed(value):
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be {words}")
    check_trackers(config.track)
    device = find_device(config.device)
    defaults = {option: getattr(recipe, option) for option in _OF_RECIPE}
    defaults |= schedule_options(config, recipe.schedule)
    defaults["log_every"] = LOG_EVERY_ON_GPU if device.type == "cuda" else 1
    chosen = {option: value for option, value in defaults.items() if getattr(config, option) is None}
    dtype = choose_dtype(device)[0] if config.dtype == "auto" else config.dtype
    Precision.named(device, dtype)  # refuses what the device has no units for
    config = replace(config, device=str(device), dtype=dtype, **chosen)
    if config.accumulate > config.batch_size:
        raise ValueError(
            f"--accumulate is {config.accumulate}; it must be at most the batch size, which is {config.batch_size}"
        )
    return config


def recipe_in_force(config: RunConfig, recipe: Recipe) -> Recipe:
    """`recipe` with what the (resolved) configuration changes."""
    schedule = schedule_in_force(config, recipe.schedule)
    return replace(recipe, schedule=schedule, **{option: getattr(config, option) for option in _OF_RECIPE})
