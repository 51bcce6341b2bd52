"""The pretraining run behind `cavmae-fast pretrain`: clips in, checkpoint, metrics and figures out."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.decoder import Reject, UnusableDataError
from cavmae_fast.data.features import image_features
from cavmae_fast.data.sets.opening import Clips
from cavmae_fast.evaluation.reconstruction import draw_reconstructions
from cavmae_fast.evaluation.retrieval import embed, retrieval_metrics
from cavmae_fast.models import CAVMAE, PRESETS, PretrainOutput, PretrainParts, load_checkpoint
from cavmae_fast.models.flops import forward_macs
from cavmae_fast.training.clips import RejectList
from cavmae_fast.training.dry_run import DryRun, dry_run
from cavmae_fast.training.figures import loss_curve
from cavmae_fast.training.joining import joined
from cavmae_fast.training.pretrain_config import PretrainConfig, resolve
from cavmae_fast.training.ranks import Ranks, current
from cavmae_fast.training.recipes import PRETRAINING
from cavmae_fast.training.run import last_taken, open_data, open_loader, precision_of, train
from cavmae_fast.training.run_config import recipe_in_force
from cavmae_fast.training.run_folder import RunFolder
from cavmae_fast.training.sharding import gathered, whole_state

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
        output = self._forward(model, batch, self.mae_loss_weight)
        return {name: getattr(output, name) for name in (*LOSSES, "c_acc")}

    def step_flops(self, model: CAVMAE) -> float:
        """As the fast model computes it; what a loss of weight 0 would need is not computed."""
        losses = {"reconstruction": self.mae_loss_weight != 0, "contrast": self.contrast_loss_weight != 0}
        return 6 * sum(forward_macs(model, self.mask_ratio, self.mask_ratio, **losses).values())

    @property
    def contrasts(self) -> bool:
        """Whether there is a contrastive loss in force."""
        return self.contrast_loss_weight != 0

    def embed(self, model: CAVMAE, batch: Batch) -> tuple[Tensor, ...]:
        """The embeddings of audio and video, without reconstruction; masks as in `part`."""
        return self._forward(model, batch, 0.0, parts=True).embeddings

    def part(self, model: CAVMAE, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The reconstruction losses, and the embeddings of audio and video."""
        output = self._forward(model, batch, self.mae_loss_weight, parts=True)
        losses = {name: getattr(output, name) for name in ("loss_mae", "loss_mae_a", "loss_mae_v")}
        return {"loss": output.loss_mae, **losses}, output.embeddings

    def contrast(self, model: CAVMAE, embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
        """The contrastive loss of a batch's embeddings, weighted, and its accuracy."""
        nce, c_acc = model.contrast(*embeddings)
        loss_c = self.contrast_loss_weight * nce
        return {"loss": loss_c, "loss_c": loss_c, "c_acc": c_acc}

    def _forward(
        self, model: CAVMAE, batch: Batch, mae_loss_weight: float, **options: Any
    ) -> PretrainOutput | PretrainParts:
        ratios = self.mask_ratio, self.mask_ratio
        weights = mae_loss_weight, self.contrast_loss_weight
        return model(batch.audio, batch.image, *ratios, *weights, self.mask_mode, **options)

    def evaluate(self, model: CAVMAE, batches: Iterable[Batch]) -> dict[str, float]:
        """`held_out_clips`, and recall and median rank of retrieval in both directions, over the clips of all ranks."""
        numbers: list[np.ndarray] = []

        def inputs() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches:
                numbers.append(batch.clips)
                yield batch.audio, batch.image

        own = inputs()
        first = next(own, None)
        embedded = None if first is None else embed(model, itertools.chain([first], own))
        parts = [part for part in current().gather(embedded and (np.concatenate(numbers), *embedded)) if part]
        if not parts:
            raise UnusableDataError([Reject("the held-out clips", "of the held-out clips, none can be used")])
        # In the data's order, so that the figures do not depend on how the clips were shared.
        order = torch.from_numpy(np.argsort(np.concatenate([clips for clips, _, _ in parts]), kind="stable"))
        audio, video = (torch.cat([part[place] for part in parts])[order] for place in (1, 2))
        return {"held_out_clips": len(audio), **retrieval_metrics(audio, video)}


def pretrain(config: PretrainConfig) -> dict[str, Any] | DryRun:
    """Runs the whole job and returns the summary that is also written to `summary.json`; or what it would take, if that is
    all that is asked for. Under torchrun, all ranks do.

    Raises ValueError for a bad option, MediaError (a ValueError) naming the file when no clip can be used, TrainingError
    when no step can be taken any more, CheckpointError for `init`; RanksError when another rank failed.
    """
    if config.dry_run:
        return _dry_run(config)
    with joined(config.device) as ranks, RunFolder(config.out, config.overwrite) as folder:
        return _pretrain(config, folder, ranks)


def _pretrain(config: PretrainConfig, folder: RunFolder, ranks: Ranks) -> dict[str, Any]:
    config = ranks.from_first(lambda: resolve(config, folder.unfinished()))
    train_clips, held_out = open_data(config, config.out / "clips")
    config, task, model = _prepared(config, train_clips, held_out)
    # Only now, when options, data and weights have been found good, may an earlier run be removed.
    going_on = ranks.from_first(lambda: folder.begin(config))
    with RejectList(folder.rejects, ranks) as rejects:
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
        weights = whole_state(model)
        if ranks.first:
            model.save_pretrained(folder.model, weights)
            loss_curve(rows, folder.losses)
        with gathered(model), precision_of(config).autocast():
            if ranks.first:
                _draw(config, model, held_out or train_clips, rejects, folder.reconstruction)
            metrics = {}
            if held_out:
                held_out_loader = open_loader(config, held_out, model.clip_spec, training=False)
                metrics = task.evaluate(model, rejects.watch(held_out_loader))
        rejects.share()

    def close() -> dict[str, Any]:
        last = last_taken(rows)
        summary = {"steps": len(rows), **{k: last[k] for k in LOSSES}, "clips_per_s": rows[-1]["clips_per_s"]}
        return folder.finish(summary | metrics, rows, rejects.count)

    return ranks.from_first(close)


def _prepared(config: PretrainConfig, train_clips: Clips, held_out: Clips) -> tuple[PretrainConfig, PretrainTask, CAVMAE]:
    """The model with its weights, on its device, and what it is trained for; no batch is larger than the data."""
    ranks = current()
    config = replace(config, batch_size=min(config.batch_size, len(train_clips)))
    ranks.share(config.batch_size)
    torch.manual_seed(config.seed)
    model = PRESETS[config.model].create(recompute=config.recompute)
    if config.init is not None:
        for line in load_checkpoint(model, config.init, adapt_positions=config.adapt_positions).adapted:
            ranks.say(f"adapted {line}")
    model.to(config.device).train()
    ranks.say(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.device}, "
        f"{config.dtype}; {len(train_clips)} clips, batch {config.batch_size}, held out {len(held_out)}"
        + (f"; {ranks.world_size} processes" if ranks.world_size > 1 else "")
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


def _draw(config: PretrainConfig, model: CAVMAE, clips: Clips, rejects: RejectList, figure: Path) -> None:
    """Draws what the model fills in of the first four clips that can be used; one process does it alone."""
    loader = open_loader(config, clips, model.clip_spec, training=False, rank=0, world_size=1)
    batch = next(rejects.watch(loader))
    loader.close()
    imgs = image_features(batch.image[:4], model.clip_spec.image_mean, model.clip_spec.image_std)
    draw_reconstructions(model, batch.audio[:4], imgs, config.mask_ratio, figure)
