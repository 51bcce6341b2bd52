"""The pretraining run behind `cavmae-fast pretrain`: clips in, checkpoint, metrics and figures out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from cavmae_fast.data.features import image_features
from cavmae_fast.data.sets.opening import Clips
from cavmae_fast.evaluation.reconstruction import draw_reconstructions
from cavmae_fast.training.cavmae_task import PretrainTask as PretrainTask  # earlier versions had it here
from cavmae_fast.training.clips import RejectList
from cavmae_fast.training.dry_run import DryRun, dry_run
from cavmae_fast.training.figures import loss_curve
from cavmae_fast.training.joining import joined
from cavmae_fast.training.pretrain_config import PretrainConfig, recipe_of, resolve
from cavmae_fast.training.pretrain_setup import PretrainingTask, prepared, training_loader, with_cached_targets
from cavmae_fast.training.ranks import Ranks
from cavmae_fast.training.rounds import chain
from cavmae_fast.training.run import last_taken, open_data, open_loader, precision_of, train
from cavmae_fast.training.run_config import recipe_in_force
from cavmae_fast.training.run_folder import RunFolder
from cavmae_fast.training.sharding import gathered, whole_state


def pretrain(config: PretrainConfig) -> dict[str, Any] | DryRun:
    """Runs the whole job and returns the summary that is also written to `summary.json`; or what it would take, if that is
    all that is asked for. Under torchrun, all ranks do. With `rounds`, a chain of runs, one after the other.

    Raises ValueError for a bad option, MediaError (a ValueError) naming the file when no clip can be used, TrainingError
    when no step can be taken any more, CheckpointError for `init`, TeacherError for `teacher`, TargetCacheError for
    `cache_targets`; RanksError when another rank failed.
    """
    if config.dry_run:
        return _dry_run(config)
    with joined(config.device) as ranks:
        if config.rounds is not None:
            return chain(config, ranks, _one_run)
        return _one_run(config, ranks, config.out / "clips")


def _one_run(config: PretrainConfig, ranks: Ranks, generated: Path) -> dict[str, Any]:
    with RunFolder(config.out, config.overwrite) as folder:
        return _pretrain(config, folder, ranks, generated)


def _pretrain(config: PretrainConfig, folder: RunFolder, ranks: Ranks, generated: Path) -> dict[str, Any]:
    """One run; clips that have to be generated for it lie in the folder `generated`."""
    config = ranks.from_first(lambda: resolve(config, folder.unfinished()))
    train_clips, held_out = open_data(config, generated)
    config, task, model, teacher = with_cached_targets(prepared(config, train_clips, held_out), train_clips)
    # Only now, when options, data and weights have been found good, may an earlier run be removed.
    going_on = ranks.from_first(lambda: folder.begin(config))
    with RejectList(folder.rejects, ranks) as rejects:
        rows = train(
            config,
            task,
            model,
            recipe_in_force(config, recipe_of(config)),
            training_loader(config, train_clips, model),
            folder,
            rejects,
            going_on=going_on,
            describe=lambda row: described(task, row),
        )
        if teacher is not None:
            teacher.check_unchanged()
        weights = whole_state(model)
        if ranks.first:
            model.save_pretrained(folder.model, weights)
            loss_curve(rows, task.panels, folder.losses)
        with gathered(model), precision_of(config).autocast():
            if ranks.first and task.reconstructs:
                _draw(config, model, held_out or train_clips, rejects, folder.reconstruction)
            metrics = {}
            if held_out:
                held_out_loader = open_loader(config, held_out, model.clip_spec, training=False)
                metrics = task.evaluate(model, rejects.watch(held_out_loader))
        rejects.share()

    def close() -> dict[str, Any]:
        last = last_taken(rows)
        summary = {"steps": len(rows), **{k: last[k] for k in task.recorded}, "clips_per_s": rows[-1]["clips_per_s"]}
        return folder.finish(summary | metrics, rows, rejects.count, config.device)

    return ranks.from_first(close)


def _dry_run(config: PretrainConfig) -> DryRun:
    """What the run would take; clips that have to be generated for it are removed again."""
    if config.rounds is not None:
        raise ValueError("--dry-run is for one run; leave out --rounds to see stage 1, or name a --teacher to see a round")
    with tempfile.TemporaryDirectory() as generated:
        config = resolve(config)
        train_clips, held_out = open_data(config, Path(generated))
        config, task, model, teacher = prepared(config, train_clips, held_out)
        loader = training_loader(config, train_clips, model)
        beside = 0 if teacher is None else teacher.size
        return dry_run(config, task, model, loader, precision_of(config), config.epochs, beside)


def described(task: PretrainingTask, row: dict[str, Any]) -> str:
    """A step's losses, for the progress bar and the closing text; what is not computed is not shown."""
    parts = [f"{name} {row[loss]:.3f}" for name, loss in task.shown.items() if row[loss] != 0]
    return f"loss {row['loss']:.3f} " + " ".join(parts)


def _draw(config: PretrainConfig, model: nn.Module, clips: Clips, rejects: RejectList, figure: Path) -> None:
    """Draws what the model fills in of the first four clips that can be used; one process does it alone."""
    loader = open_loader(config, clips, model.clip_spec, training=False, rank=0, world_size=1)
    batch = next(rejects.watch(loader))
    loader.close()
    imgs = image_features(batch.image[:4], model.clip_spec.image_mean, model.clip_spec.image_std)
    draw_reconstructions(model, batch.audio[:4], imgs, config.mask_ratio, figure)
