"""The pretraining run behind `cavmae-fast pretrain`: clips in, checkpoint, metrics and figures out."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.features import image_features
from cavmae_fast.data.sets.opening import Clips
from cavmae_fast.data.sets.shards import write_whole
from cavmae_fast.evaluation.reconstruction import draw_reconstructions
from cavmae_fast.evaluation.retrieval import embed, retrieval_metrics
from cavmae_fast.models import CAVMAE, PRESETS, load_checkpoint
from cavmae_fast.models.flops import forward_macs
from cavmae_fast.training.clips import RejectList
from cavmae_fast.training.dry_run import DryRun, dry_run
from cavmae_fast.training.figures import loss_curve
from cavmae_fast.training.metrics import JsonLines
from cavmae_fast.training.pretrain_config import PretrainConfig, resolve
from cavmae_fast.training.recipes import PRETRAINING
from cavmae_fast.training.run import open_data, open_loader, precision_of, train
from cavmae_fast.training.run_config import recipe_in_force
from cavmae_fast.training.run_folder import RunFolder

LOSSES = ("loss", "loss_mae", "loss_mae_a", "loss_mae_v", "loss_c")


@dataclass(frozen=True)
class PretrainTask:
    """Masked reconstruction and audio-visual contrast, each by its weight; judged by retrieval between sound and picture."""

    mask_ratio: float
    mask_mode: str
    mae_loss_weight: float
    contrast_loss_weight: float

    def prepare(self, model: CAVMAE) -> None:
        """The losses in force decide what is trained. Raises ValueError when nothing would be left to reconstruct."""
        model.train_losses(reconstruction=self.mae_loss_weight != 0, contrast=self.contrast_loss_weight != 0)
        if self.mae_loss_weight != 0:
            model.check_removed(self.mask_ratio, self.mask_ratio)

    def losses(self, model: CAVMAE, batch: Batch) -> dict[str, Tensor]:
        """The model's losses, both already weighted, and the share of videos whose own audio ranks first in the batch."""
        output = model(
            batch.audio,
            batch.image,
            self.mask_ratio,
            self.mask_ratio,
            self.mae_loss_weight,
            self.contrast_loss_weight,
            self.mask_mode,
        )
        return {name: getattr(output, name) for name in (*LOSSES, "c_acc")}

    def step_flops(self, model: CAVMAE) -> float:
        """As the fast model computes it; what a loss of weight 0 would need is not computed."""
        losses = {"reconstruction": self.mae_loss_weight != 0, "contrast": self.contrast_loss_weight != 0}
        return 6 * sum(forward_macs(model, self.mask_ratio, self.mask_ratio, **losses).values())

    def evaluate(self, model: CAVMAE, batches: Iterable[Batch]) -> dict[str, float]:
        """`held_out_clips`, and recall and median rank of retrieval in both directions."""
        audio, video = embed(model, ((batch.audio, batch.image) for batch in batches))
        return {"held_out_clips": len(audio), **retrieval_metrics(audio, video)}


def pretrain(config: PretrainConfig) -> dict[str, Any] | DryRun:
    """Runs the whole job and returns the summary that is also written to `summary.json`; or what it would take, if that is
    all that is asked for.

    Raises ValueError for a bad option, MediaError (a ValueError) naming the file when no clip can be used, TrainingError
    when a loss is not finite, CheckpointError for `init`.
    """
    if config.dry_run:
        return _dry_run(config)
    folder = RunFolder(config.out, config.overwrite)
    config = resolve(config, folder.unfinished())
    train_clips, held_out = open_data(config, config.out / "clips")
    config, task, model = _prepared(config, train_clips, held_out)
    # Only now, when options, data and weights have been found good, may an earlier run be removed.
    going_on = folder.begin(json.loads(json.dumps(asdict(config), default=str)))
    with RejectList(folder.rejects) as rejects:
        rows = train(
            config,
            task,
            model,
            recipe_in_force(config, PRETRAINING[config.model]),
            open_loader(config, train_clips, model.clip_spec, training=True),
            folder,
            rejects,
            going_on=going_on,
            describe=_describe,
        )
        model.save_pretrained(folder.model)
        loss_curve(rows, folder.losses)
        summary = {"steps": len(rows), **{k: rows[-1][k] for k in LOSSES}, "clips_per_s": rows[-1]["clips_per_s"]}
        summary |= _judge(config, task, model, train_clips, held_out, rejects, folder.reconstruction)
        if held_out:
            with JsonLines(folder.metrics) as metrics:
                metrics.write({"step": len(rows), "final": True, **summary})
        summary["rejected_clips"] = rejects.count
    write_whole(folder.summary, json.dumps(summary, indent=2) + "\n")
    return summary


def _prepared(config: PretrainConfig, train_clips: Clips, held_out: Clips) -> tuple[PretrainConfig, PretrainTask, CAVMAE]:
    """The model with its weights, on its device, and what it is trained for; no batch is larger than the data."""
    from tqdm import tqdm

    config = replace(config, batch_size=min(config.batch_size, len(train_clips)))
    torch.manual_seed(config.seed)
    model = PRESETS[config.model].create()
    if config.init is not None:
        for line in load_checkpoint(model, config.init, adapt_positions=config.adapt_positions).adapted:
            tqdm.write(f"adapted {line}")
    model.to(config.device).train()
    tqdm.write(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.device}, "
        f"{config.dtype}; {len(train_clips)} clips, batch {config.batch_size}, held out {len(held_out)}"
    )
    task = PretrainTask(config.mask_ratio, config.mask_mode, config.mae_loss_weight, config.contrast_loss_weight)
    task.prepare(model)
    return config, task, model


def _dry_run(config: PretrainConfig) -> DryRun:
    """What the run would take; clips that have to be generated for it are removed again."""
    with tempfile.TemporaryDirectory() as generated:
        config = resolve(config)
        train_clips, held_out = open_data(config, Path(generated))
        config, task, model = _prepared(config, train_clips, held_out)
        loader = open_loader(config, train_clips, model.clip_spec, training=True)
        return dry_run(config, task, model, loader, precision_of(config), config.epochs)


def _describe(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.3f} audio {row['loss_mae_a']:.3f} video {row['loss_mae_v']:.3f} contrast {row['loss_c']:.3f}"


def _judge(
    config: PretrainConfig,
    task: PretrainTask,
    model: CAVMAE,
    train_clips: Clips,
    held_out: Clips,
    rejects: RejectList,
    figure: Path,
) -> dict[str, Any]:
    """Draws what the model fills in into `figure`, of held-out clips where there are some -> the task's metrics on these."""
    batches = rejects.watch(open_loader(config, held_out or train_clips, model.clip_spec, training=False))
    first = next(batches)
    imgs = image_features(first.image[:4], model.clip_spec.image_mean, model.clip_spec.image_std)
    with precision_of(config).autocast():
        draw_reconstructions(model, first.audio[:4], imgs, config.mask_ratio, figure)
        return task.evaluate(model, itertools.chain([first], batches)) if held_out else {}
