"""The options of a pretraining run, and what stands in for those that are not given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cavmae_fast.models import PRESETS
from cavmae_fast.training.recipes import PRETRAINING
from cavmae_fast.training.run_config import RunConfig, resolve_run

ALIASES = {"base": "cav-mae-base", "scale+": "cav-mae-scale+", "scale++": "cav-mae-scale++"}


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrain a CAV-MAE. Without --data it generates its own clips, in which sound and picture are related."""

    out: Path = Path("runs/pretrain")
    """Folder for checkpoints, metrics and figures."""
    model: str = "small"
    """System to train: small, base, scale+, scale++, cav, av-mae or vanilla-av-mae."""
    mask_ratio: float | None = None
    """Share of the patches of each modality that is removed; default: the system's (published: 0.75)."""
    mask_mode: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    """How audio patches are masked."""
    mae_loss_weight: float | None = None
    """Default: the system's."""
    contrast_loss_weight: float | None = None
    """Default: the system's."""


def preset_name(model: str) -> str:
    """The preset that `model` names, or its alias. ValueError for an unknown name."""
    name = ALIASES.get(model, model)
    if name not in PRESETS:
        raise ValueError(f"--model is {model!r}; it must be one of {', '.join([*ALIASES, *PRESETS])}")
    return name


def resolve(config: PretrainConfig, begun: dict[str, Any] | None = None) -> PretrainConfig:
    """`config` with every default filled in: from the run that was `begun` in its folder, where one was, else from the
    system's recipe and the machine. ValueError names a bad value."""
    name = preset_name(config.model)
    for option in ("mae_loss_weight", "contrast_loss_weight"):
        value = getattr(config, option)
        if value is not None and not value >= 0:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be 0 or more")
    preset = PRESETS[name]
    defaults = {
        "mask_ratio": preset.mask_ratio,
        "mae_loss_weight": preset.mae_loss_weight,
        "contrast_loss_weight": preset.contrast_loss_weight,
    }
    chosen = {option: value for option, value in defaults.items() if getattr(config, option) is None}
    config = resolve_run(replace(config, model=name, **chosen), PRETRAINING[name], begun)
    if config.mae_loss_weight == config.contrast_loss_weight == 0:
        raise ValueError("--mae-loss-weight and --contrast-loss-weight are both 0; one of them must be above 0")
    return config
