"""Which of the options of `pretrain` belong to which family of models, and what stands in for those that are not given."""

from __future__ import annotations

import inspect
from typing import Any

from cavmae_fast.models import MAE, PRESETS, MAViL
from cavmae_fast.models.mavil_presets import TOWER_PRESETS, MAEPreset, MAViLPreset

SWITCHES = ("norm_pix_loss", "pool_class_token", "normalize_targets")
"Arguments of the models that are true or false: as options they are 'on' or 'off', and None where they are not given."
CAV_MAE = ("mae_loss_weight", "contrast_loss_weight")
TOWERS = ("norm_pix_loss", "noise", "init_audio", "init_video")
MAVIL_MODEL = (
    "fusion",
    "fusion_depth",
    "bottleneck_tokens",
    "inter_temperature",
    "intra_temperature",
    "pool_class_token",
    "normalize_targets",
)
MAVIL_LOSSES = ("raw", "inter", "intra", "regression")
"In the order of `LossWeights`; the options end in `_loss_weight`."
MAVIL = (
    *TOWERS,
    *MAVIL_MODEL,
    *(f"{loss}_loss_weight" for loss in MAVIL_LOSSES),
    "teacher",
    "teacher_hash",
    "rounds",
    "cache_targets",
)
FAMILIES = {"CAV-MAE": CAV_MAE, "single-modality MAE": TOWERS, "MAViL": MAVIL}
"The options that not every family takes, by family."


def family_of(name: str) -> str:
    """The family of a preset, one of `FAMILIES`."""
    if name in PRESETS:
        return "CAV-MAE"
    return "MAViL" if isinstance(TOWER_PRESETS[name], MAViLPreset) else "single-modality MAE"


def check_family(name: str, given: dict[str, Any]) -> None:
    """ValueError when one of the options that are `given` (by name; None: it is not) is not for the preset's family."""
    own = FAMILIES[family_of(name)]
    for option in dict.fromkeys(option for options in FAMILIES.values() for option in options):
        if option not in own and given[option] is not None:
            takers = " and ".join(family for family, options in FAMILIES.items() if option in options)
            raise ValueError(f"{flag(option)} is for {takers}; --model is {name}")


def defaults(name: str, stage: int) -> dict[str, Any]:
    """What the options of the preset's family are where they are not given; `stage` of MAViL, 1 or 2."""
    if name in PRESETS:
        preset = PRESETS[name]
        return {
            "mask_ratio": preset.mask_ratio,
            "mae_loss_weight": preset.mae_loss_weight,
            "contrast_loss_weight": preset.contrast_loss_weight,
        }
    tower_preset = TOWER_PRESETS[name]
    chosen = {"mask_ratio": tower_preset.mask_ratio, "noise": "off"}
    if isinstance(tower_preset, MAEPreset):
        return chosen | _arguments(MAE, tower_preset.model, ("norm_pix_loss",))
    weights = {f"{loss}_loss_weight": weight for loss, weight in tower_preset.weights(stage)._asdict().items()}
    return chosen | weights | _arguments(MAViL, tower_preset.model, ("norm_pix_loss", *MAVIL_MODEL))


def _arguments(kind: type, given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of a model as options: what the preset gives, else the model's own defaults."""
    parameters = inspect.signature(kind).parameters
    values = {name: given.get(name, parameters[name].default) for name in names}
    return {name: _SWITCH[value] if name in SWITCHES else value for name, value in values.items()}


_SWITCH = {True: "on", False: "off"}


def flag(option: str) -> str:
    """The option as it is typed."""
    return f"--{option.replace('_', '-')}"
