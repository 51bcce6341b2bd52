"""What a pretraining run starts from: a model with its first weights, and what it is trained for, by family of models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from cavmae_fast.data.draws import Augmentation
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.sets.opening import Clips
from cavmae_fast.models import MAE, PRESETS, MAViL, load_checkpoint, load_mae, load_tower
from cavmae_fast.models.mavil import LossWeights
from cavmae_fast.models.mavil_presets import TOWER_PRESETS
from cavmae_fast.models.weights import CheckpointError, LoadReport, read_state
from cavmae_fast.training.cavmae_task import PretrainTask
from cavmae_fast.training.clips import make_loader
from cavmae_fast.training.mae_task import MAETask
from cavmae_fast.training.mavil_task import MAViLTask
from cavmae_fast.training.pretrain_config import PretrainConfig
from cavmae_fast.training.pretrain_options import MAVIL_LOSSES, MAVIL_MODEL, SWITCHES, family_of, flag
from cavmae_fast.training.ranks import current
from cavmae_fast.training.run import open_loader, precision_of
from cavmae_fast.training.target_cache import FIXED_CROPS, STEP_CLIPS, fill
from cavmae_fast.training.task import Task
from cavmae_fast.training.teacher import Teacher, open_teacher

TASKS = {"CAV-MAE": PretrainTask, "single-modality MAE": MAETask, "MAViL": MAViLTask}
"By family."


class PretrainingTask(Task, Protocol):
    """What the job of pretraining asks of a task besides.

    Attributes:
        recorded: names of the losses that the summary has, `loss` first.
        shown: those that the progress bar and the closing text show, by what they are called there.
        panels: those that are plotted, see `figures.loss_curve`.
        reconstructs: whether the model learns to fill in pixels, so that there is something to draw.
    """

    recorded: ClassVar[tuple[str, ...]]
    shown: ClassVar[dict[str, str]]
    panels: ClassVar[dict[str, dict[str, str]]]

    @property
    def reconstructs(self) -> bool: ...


class Prepared(NamedTuple):
    """A run before its first step. `teacher`: of stage 2, unless its targets are cached."""

    config: PretrainConfig
    task: PretrainingTask
    model: nn.Module
    teacher: Teacher | None = None


def prepared(config: PretrainConfig, train_clips: Clips, held_out: Clips) -> Prepared:
    """The model with its weights, on its device, and what it is trained for; no batch is larger than the data.

    Args:
        config: resolved. Where it names a teacher, what comes back notes its hash.
        train_clips, held_out: the data.

    Raises:
        CheckpointError, TeacherError: a checkpoint cannot be read or does not fit.
        ValueError: an option does not fit the system.
    """
    ranks = current()
    config = replace(config, batch_size=min(config.batch_size, len(train_clips)))
    ranks.share(config.batch_size)
    torch.manual_seed(config.seed)
    model = _model(config)
    for line in _initialized(config, model):
        ranks.say(line)
    model.to(config.device).train()
    ranks.say(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.device}, "
        f"{config.dtype}; {len(train_clips)} clips, batch {config.batch_size}, held out {len(held_out)}"
        + (f"; {ranks.world_size} processes" if ranks.world_size > 1 else "")
    )
    teacher = None
    if config.teacher is not None:
        with torch.random.fork_rng(devices=[]):  # what is drawn in training does not depend on how a teacher is opened
            teacher = open_teacher(config.teacher, model, config.teacher_hash)
        config = replace(config, teacher_hash=teacher.hash)
        ranks.say(f"stage 2; the teacher is {config.teacher}, {teacher.hash[:12]}")
    task = _task(config, teacher)
    task.prepare(model)
    return Prepared(config, task, model, teacher)


def with_cached_targets(run: Prepared, train_clips: Clips) -> Prepared:
    """`run` with targets from the cache that its options name, which is filled first; the teacher is let go. As it is,
    where they name none. TargetCacheError when the folder holds something else."""
    config, task, model, teacher = run
    if config.cache_targets is None:
        return run
    ranks = current()
    spec, device = model.clip_spec, torch.device(config.device)

    def loader_of(piece: Clips) -> Loader:
        return make_loader(
            piece,
            STEP_CLIPS * ranks.world_size,
            spec,
            training=False,
            backend=config.loader,
            device=device,
            workers=config.workers,
            seed=config.seed,
            rank=0,
            world_size=1,
        )

    cache = fill(config.cache_targets, teacher, train_clips, spec, precision_of(config), ranks, loader_of)
    teacher.check_unchanged()
    return Prepared(config, replace(task, teacher=cache), model)


def training_loader(config: PretrainConfig, clips: Clips, model: nn.Module) -> Loader:
    """The loader of the training clips, with what is done to them as the (resolved) options say."""
    options: dict[str, Any] = {}
    if family_of(config.model) != "CAV-MAE":
        fixed = config.cache_targets is not None
        options["augmentation"] = FIXED_CROPS if fixed else Augmentation(noise=config.noise == "on")
    return open_loader(config, clips, model.clip_spec, training=True, **options)


def _model(config: PretrainConfig) -> nn.Module:
    """With the weights of the seed."""
    if family_of(config.model) == "CAV-MAE":
        return PRESETS[config.model].create(recompute=config.recompute)
    names = ("norm_pix_loss", *(MAVIL_MODEL if family_of(config.model) == "MAViL" else ()))
    arguments = {name: getattr(config, name) for name in names}
    arguments |= {name: arguments[name] == "on" for name in SWITCHES if name in arguments}
    return TOWER_PRESETS[config.model].create(**arguments, recompute=config.recompute)


def _task(config: PretrainConfig, teacher: Teacher | None) -> PretrainingTask:
    family = family_of(config.model)
    if family == "CAV-MAE":
        return PretrainTask(config.mask_ratio, config.mask_mode, config.mae_loss_weight, config.contrast_loss_weight)
    if family == "MAViL":
        weights = LossWeights(*(getattr(config, f"{loss}_loss_weight") for loss in MAVIL_LOSSES))
        return MAViLTask(config.mask_ratio, weights, teacher)
    return MAETask(config.mask_ratio, TOWER_PRESETS[config.model].model["modality"])


def _initialized(config: PretrainConfig, model: nn.Module) -> Iterable[str]:
    """Loads the checkpoints that the options name; yields what is to be said of it."""
    if isinstance(model, MAE | MAViL):
        for option in ("init", "init_audio", "init_video"):
            if (path := getattr(config, option)) is not None:
                part = {"init": model, "init_audio": _tower(model, "audio"), "init_video": _tower(model, "video")}[option]
                report = _from_towers(part, path, config.adapt_positions)
                yield from (f"adapted {line}" for line in report.adapted)
                for names, what in ((report.missing, "not found, so as drawn"), (report.unexpected, "not used")):
                    if names:
                        yield f"{flag(option)} {path}: {what}: {', '.join(names)}"
    elif config.init is not None:
        for line in load_checkpoint(model, config.init, adapt_positions=config.adapt_positions).adapted:
            yield f"adapted {line}"


def _tower(model: nn.Module, name: str) -> nn.Module:
    return getattr(model, name) if isinstance(model, MAViL) else model


def _from_towers(model: nn.Module, path: Path, adapt_positions: bool) -> LoadReport:
    """Loads a checkpoint of the model's own class, of a MAViL into one of its towers, or of an image or audio MAE. Positions
    are brought to the model's size in a checkpoint of its own class alone; ValueError for another one."""
    state, own = read_state(path), model.state_dict()
    kernels = [name for name in own if name.endswith("patch_embed.proj.weight")]
    if state.keys() == own.keys() and all(state[name].shape == own[name].shape for name in kernels):
        return load_checkpoint(model, path, adapt_positions=adapt_positions)
    if adapt_positions:
        raise ValueError(f"--adapt-positions is given, but {path} is of another class than {type(model).__name__}")
    of_mavil = any(name.startswith("fusion.") for name in state)
    try:
        if of_mavil:
            return load_checkpoint(model, state) if isinstance(model, MAViL) else load_tower(model, state)
        return load_mae(model, state)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("the state dict", f"checkpoint {path}", 1)) from error
