"""The options of a pretraining run, and what stands in for those that are not given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cavmae_fast.models import PRESETS
from cavmae_fast.models.mavil_presets import TOWER_PRESETS
from cavmae_fast.training.pretrain_options import MAVIL_LOSSES, check_family, defaults, family_of, flag
from cavmae_fast.training.recipes import PRETRAINING, TOWER_PRETRAINING, Recipe
from cavmae_fast.training.run_config import RunConfig, resolve_run

ALIASES = {"base": "cav-mae-base", "scale+": "cav-mae-scale+", "scale++": "cav-mae-scale++"}


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrain a CAV-MAE, a MAViL or a masked autoencoder of one modality. Without --data it generates its own clips, in
    which sound and picture are related."""

    out: Path = Path("runs/pretrain")
    """Folder for checkpoints, metrics and figures."""
    model: str = "small"
    """System to train: small, base, scale+, scale++, cav, av-mae or vanilla-av-mae; mavil, mavil-inter, mavil-av-mae, a-mae
    or v-mae; mavil-small, a-mae-small or v-mae-small."""
    mask_ratio: float | None = None
    """Share of the patches of each modality that is removed; default: the system's (published: 0.75, MAViL and MAE 0.8)."""
    mask_mode: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    """CAV-MAE: how audio patches are masked."""
    mae_loss_weight: float | None = None
    """CAV-MAE: default: the system's."""
    contrast_loss_weight: float | None = None
    """CAV-MAE: default: the system's."""
    teacher: Path | None = None
    """MAViL: train stage 2, in which a frozen model, in this checkpoint or folder of a run, says what is regressed."""
    teacher_hash: str | None = None
    """MAViL: SHA-256 that the teacher's weights must have, as a run's config.json notes it; default: whatever they have."""
    rounds: int | None = None
    """MAViL: train stage 1 and then so many rounds of stage 2, each with the one before as its teacher, in folders inside
    of --out. How many were published is not certain: two at least, probably three."""
    cache_targets: Path | None = None
    """MAViL, stage 2: keep the teacher's tokens in this folder, and compute none in training. Every clip is then seen by its
    middle crop, in every epoch. Of ViT-B 2 MB per clip in 16 bits; several runs with the same teacher can share it."""
    raw_loss_weight: float | None = None
    """MAViL: of the reconstruction of pixels. Default: 1 in stage 1, 0 in stage 2 (certain)."""
    inter_loss_weight: float | None = None
    """MAViL: of the contrast between sound and pictures. Default: 0.1 (remembered from the paper, not checked)."""
    intra_loss_weight: float | None = None
    """MAViL: of the contrast between two masked views of each. Default: 0.01 (remembered)."""
    regression_loss_weight: float | None = None
    """MAViL: of the regression of the teacher's tokens, in stage 2. Default: 1 (remembered)."""
    inter_temperature: float | None = None
    """MAViL: of the contrast between sound and pictures. Default: 0.1 (remembered)."""
    intra_temperature: float | None = None
    """MAViL: of the contrast between views. Default: 1 (remembered)."""
    pool_class_token: Literal["on", "off"] | None = None
    """MAViL: count the class token in the mean that is contrasted. Default: off (ours; not known)."""
    normalize_targets: Literal["on", "off"] | None = None
    """MAViL: normalize each of the teacher's tokens once more before it is regressed. Default: off (ours; not known)."""
    norm_pix_loss: Literal["on", "off"] | None = None
    """MAViL and MAE: normalize each patch that is reconstructed by itself. Default: on (likely); small systems: off."""
    fusion: Literal["joint", "bottleneck"] | None = None
    """MAViL: how sound and pictures are fused. Default: joint, plain blocks over all tokens (certain)."""
    fusion_depth: int | None = None
    """MAViL: blocks of the fusion encoder. Default: 2 (certain)."""
    bottleneck_tokens: int | None = None
    """MAViL: of --fusion bottleneck. Default: 4 (that of its own paper; MAViL's is not known)."""
    noise: Literal["on", "off"] | None = None
    """MAViL and MAE: add noise to the spectrogram and roll it in time, as CAV-MAE's pretraining does. Default: off (ours;
    not known), because a sound that is rolled does not begin with the pictures."""
    init_audio: Path | None = None
    """MAViL and MAE: checkpoint of an audio MAE, or of a MAViL, for the encoder of sound, after --init."""
    init_video: Path | None = None
    """MAViL and MAE: checkpoint of an image MAE, of a v-mae or of a MAViL, for the encoder of pictures, after --init."""


def preset_name(model: str) -> str:
    """The preset that `model` names, or its alias. ValueError for an unknown name."""
    name = ALIASES.get(model, model)
    if name not in PRESETS and name not in TOWER_PRESETS:
        raise ValueError(f"--model is {model!r}; it must be one of {', '.join([*ALIASES, *PRESETS, *TOWER_PRESETS])}")
    return name


def recipe_of(config: PretrainConfig) -> Recipe:
    """The recipe of the system that `config` names."""
    return (PRETRAINING | TOWER_PRETRAINING)[preset_name(config.model)]


def resolve(config: PretrainConfig, begun: dict[str, Any] | None = None) -> PretrainConfig:
    """`config` with every default filled in: from the run that was `begun` in its folder, where one was, else from the
    system's recipe and the machine. ValueError names a bad value."""
    name = preset_name(config.model)
    check_family(name, vars(config))
    weights = ("mae_loss_weight", "contrast_loss_weight", *(f"{loss}_loss_weight" for loss in MAVIL_LOSSES))
    for option in weights:
        value = getattr(config, option)
        if value is not None and not value >= 0:
            raise ValueError(f"{flag(option)} is {value}; it must be 0 or more")
    _check_towers(config, name)
    stand_ins = defaults(name, 1 if config.teacher is None else 2)
    chosen = {option: value for option, value in stand_ins.items() if getattr(config, option) is None}
    config = resolve_run(replace(config, model=name, **chosen), recipe_of(config), begun)
    if config.mae_loss_weight == config.contrast_loss_weight == 0:
        raise ValueError("--mae-loss-weight and --contrast-loss-weight are both 0; one of them must be above 0")
    if family_of(name) == "MAViL":
        _check_stage(config)
    if config.cache_targets is not None:
        config = replace(config, cuda_graph="off")  # a graph cannot read files
    return config


def _check_towers(config: PretrainConfig, name: str) -> None:
    """ValueError for what models of towers do not have."""
    if family_of(name) == "CAV-MAE":
        return
    if config.mask_mode != "unstructured":
        raise ValueError(f"--mask-mode is for CAV-MAE; --model is {name}, which masks each patch by itself")
    if family_of(name) != "MAViL":
        other = {"a": "init_video", "v": "init_audio"}[TOWER_PRESETS[name].model["modality"]]
        if getattr(config, other) is not None:
            raise ValueError(f"{flag(other)} is given, but --model is {name}, which has no such encoder")


def _check_stage(config: PretrainConfig) -> None:
    """ValueError where the (resolved) options of a stage of MAViL contradict each other."""
    losses = [f"{loss}_loss_weight" for loss in MAVIL_LOSSES]
    if config.teacher is None:
        for option in ("teacher_hash", "cache_targets"):
            if getattr(config, option) is not None:
                raise ValueError(f"{flag(option)} is for stage 2, which needs --teacher")
        if config.regression_loss_weight != 0:
            raise ValueError(
                f"--regression-loss-weight is {config.regression_loss_weight}; without --teacher, in stage 1, it must be 0"
            )
    elif config.teacher.resolve().is_relative_to(config.out.resolve()):
        raise ValueError(f"--teacher {config.teacher} lies in --out, whose run is another one; name another --out")
    elif config.regression_loss_weight == 0:
        raise ValueError("--regression-loss-weight is 0, but --teacher is given; it must be above 0, or there is no teacher")
    if all(getattr(config, option) == 0 for option in losses):
        raise ValueError(f"{', '.join(map(flag, losses))} are all 0; one of them must be above 0")
    if config.cache_targets is not None:
        if config.noise == "on":
            raise ValueError("--noise is on, but with --cache-targets a clip is the same in every epoch; it must be off")
        if config.cuda_graph == "on":
            raise ValueError("--cuda-graph is on, but with --cache-targets every step reads files; it must be auto or off")
