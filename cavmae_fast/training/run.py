"""One run in its folder, the same for every task: loaders, checkpoints, rows, the progress bar.

Under torchrun every rank runs all of this, and only the first one writes and shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.opening import Clips, open_clips
from cavmae_fast.models.precision import Precision, product_rate
from cavmae_fast.training.checkpoint import CheckpointWriter, Saver, checkpoints, read_newest
from cavmae_fast.training.clips import RejectList, make_loader
from cavmae_fast.training.compiling import compile_model
from cavmae_fast.training.fit import fit
from cavmae_fast.training.guard import Guard
from cavmae_fast.training.metrics import JsonLines, read_rows, write_rows
from cavmae_fast.training.preemption import Preemption
from cavmae_fast.training.progress import Progress
from cavmae_fast.training.ranks import current
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.run_config import RunConfig
from cavmae_fast.training.run_folder import RunFolder
from cavmae_fast.training.sharding import RanksTask, gathered, laid_out, shard
from cavmae_fast.training.state import RunState
from cavmae_fast.training.task import Task
from cavmae_fast.training.trackers import Recorder, open_trackers


def open_data(config: RunConfig, generated: Path) -> tuple[Clips, Clips]:
    """Training and held-out clips; where none are named, clips that are generated in the folder `generated`."""
    ranks = current()
    if config.data:
        train_clips, held_out = open_clips(config.data), []
    else:
        ranks.say("no --data: generating clips in which sound and picture are related")
        # One after the other: the first makes them, and who does not share its disk makes its own.
        train_clips, held_out = map(open_clips, ranks.in_turn(lambda: generate_clips(generated, seed=0)))
    return train_clips, open_clips(config.eval_data) if config.eval_data else held_out


def precision_of(config: RunConfig) -> Precision:
    """Where and in which dtype a run with these (resolved) options computes."""
    return Precision.named(torch.device(config.device), config.dtype)


def open_loader(config: RunConfig, clips: Clips, spec: ClipSpec, training: bool, **options: Any) -> Loader:
    """A loader of `clips` as the run's options say; `options` are further arguments of `Loader`."""
    return make_loader(
        clips,
        config.batch_size,
        spec,
        training=training,
        backend=config.loader,
        device=torch.device(config.device),
        workers=config.workers,
        seed=config.seed,
        **options,
    )


def train(
    config: RunConfig,
    task: Task,
    model: nn.Module,
    recipe: Recipe,
    loader: Loader,
    folder: RunFolder,
    rejects: RejectList,
    *,
    going_on: bool,
    describe: Callable[[dict[str, Any]], str],
    after_epoch: Callable[[int], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Trains the model under a progress bar, from the newest checkpoint on where there is one, and closes the loader.
    Where the recipe averages the weights, the model has the averages for its weights then, and in `after_epoch`.

    Args:
        config: resolved.
        task, model, recipe: what is trained and how; `task.prepare` has been called.
        loader: of the training clips.
        folder, rejects: where things are recorded.
        going_on: whether the run was begun before.
        describe: a row's losses, for the progress bar.
        after_epoch: called, on every rank, with the number of each epoch that is done, from 0, before a checkpoint is due;
            the model is whole then. What it returns is recorded as `{"step", "epoch", "evaluation": {...}}`. It must leave
            the random state as it was. A run that is killed meanwhile goes on from the checkpoint before.

    Returns:
        A row per step, in order, those of earlier processes of this run included.
    """
    ranks = current()
    ranks.say(f"loader {loader.backend}: {loader.reason}")
    if recipe.accumulate > loader.order.batch_size:
        raise ValueError(
            f"--accumulate is {recipe.accumulate}; it must be at most the clips of a step on each process, which are "
            f"{loader.order.batch_size}"
        )
    flops = task.step_flops(model)
    if config.compile:
        compile_model(model)
    if config.shard and ranks.world_size > 1:
        shard(model, ranks, torch.device(config.device))
    state = RunState.start(model, recipe, loader, precision_of(config))
    total = config.steps or recipe.epochs * len(loader)
    if going_on and (saved := read_newest(folder.checkpoints, ranks)) is not None:
        state.load_state_dict(laid_out(saved, model, state.optimizer))
        ranks.say(f"going on after step {state.step}, the newest checkpoint in {folder.checkpoints}")
    recorded = [row for row in read_rows(folder.metrics) if row["step"] <= state.step and not row.get("final")]
    skipped_before = [row for row in read_rows(folder.skipped) if row["step"] <= state.step]
    ranks.barrier()  # all have read the rows
    if ranks.first:
        write_rows(folder.metrics, recorded)  # what came after the checkpoint is computed again
        write_rows(folder.skipped, skipped_before)
    rows = [row for row in recorded if "learning_rate" in row]
    rate = ranks.world_size * product_rate(state.precision.device, state.precision.dtype)

    def shown(row: dict[str, Any]) -> str:
        share = f" ({row['product_share']:.0%} of the product rate)" if "product_share" in row else ""
        speed = f"{row['clips_per_s']:.0f} clips/s{share}, data wait {row['data_wait']:.0%}, rejected {rejects.count}"
        return f"{describe(row)} | {speed}"

    writer = CheckpointWriter(folder.checkpoints, config.keep_checkpoints, ranks.report, ranks)
    trackers = open_trackers(config.track, folder.path, asdict(config), state.step) if ranks.first else []
    with (
        Progress(total, state.step, shown, silent=not ranks.first) as progress,
        Recorder(JsonLines(folder.metrics, writes=ranks.first), trackers) as metrics,
        JsonLines(folder.skipped, writes=ranks.first) as skipped,
        Preemption() as preemption,
    ):
        saver = Saver(writer, total, config.save_every, config.save_minutes, preemption, ranks)

        def record(row: dict[str, Any]) -> None:
            row["clips_per_s"] *= ranks.world_size  # `fit` counts this rank's
            if flops is not None:
                row["product_share"] = flops * row["clips_per_s"] / rate
            rows.append(row)
            metrics.write(row)
            progress.show(row)

        def epoch_done(epoch: int) -> None:
            rejects.share()
            if after_epoch is not None:
                with state.averaged(), gathered(model):
                    metrics.write({"step": state.step, "epoch": epoch, "evaluation": after_epoch(epoch)})

        def kept() -> str:
            writer.wait()
            saved = checkpoints(folder.checkpoints)
            return f"the last good checkpoint is {saved[-1][1]}" if saved else "no checkpoint was written before"

        try:
            fit(
                RanksTask(task, model, ranks) if ranks.world_size > 1 else task,
                state,
                total,
                record,
                batches=rejects.watch,
                log_every=config.log_every,
                stepped=progress.step,
                epoch_done=epoch_done,
                saver=saver,
                guard=Guard(config.max_skipped, skipped.write, ranks.say, kept),
                cuda_graph=config.cuda_graph,
                report=ranks.say,
            )
        finally:
            writer.wait()
    writer.close()
    rejects.share()
    loader.close()
    if state.average is not None:
        state.average.give()
    return rows


def last_taken(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the last step that was not skipped; the last row where all were."""
    taken = (row for row in reversed(rows) if row["loss"] is not None and math.isfinite(row["loss"]))
    return next(taken, rows[-1])
