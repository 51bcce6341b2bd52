"""The fine-tuning run behind `cavmae-fast finetune`: labeled clips and a checkpoint in, classifier and figures out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.sets.shards import put_whole
from cavmae_fast.evaluation.classification import Classification, evaluate_scores
from cavmae_fast.evaluation.predicting import logits, predict
from cavmae_fast.models.classifiers import Classifier, family_of
from cavmae_fast.training.clips import RejectList
from cavmae_fast.training.dry_run import DryRun, dry_run
from cavmae_fast.training.finetune_closing import shown_figures
from cavmae_fast.training.finetune_config import FinetuneConfig, fine_tuning_in_force, resolve
from cavmae_fast.training.finetune_folder import FinetuneFolder
from cavmae_fast.training.finetune_folds import FoldsFolder, cross_validate, folds_in_turn, with_splits
from cavmae_fast.training.finetune_recipes import ACTIVATIONS, Loss
from cavmae_fast.training.finetune_results import conclude
from cavmae_fast.training.finetune_setup import (
    LabeledData,
    check_masks,
    check_pictures,
    open_labeled,
    start_classifier,
    with_data,
)
from cavmae_fast.training.joining import joined
from cavmae_fast.training.optimizers import HEAD
from cavmae_fast.training.ranks import Ranks, current
from cavmae_fast.training.run import open_loader, precision_of, train
from cavmae_fast.training.sharding import whole_state


@dataclass(frozen=True)
class FineTuneTask:
    """Classification of clips in one input mode; judged by average precision, AUC, d' and accuracy.

    Attributes:
        mode: what of a clip the model is given.
        loss: 'bce' or 'ce', see `finetune_recipes.Loss`.
        data: gives the classes.
        frozen_base: train the head alone.
    """

    mode: str
    loss: Loss
    data: LabeledData
    frozen_base: bool = False

    def prepare(self, model: Classifier) -> None:
        """Freezes what the mode does not reach, and everything but the head where the base is frozen."""
        model.train_with(self.mode)
        if self.frozen_base:
            for name, parameter in model.named_parameters():
                if not name.startswith(HEAD):
                    parameter.requires_grad_(False)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss, as published: over all classes and clips (bce), or over clips, with smoothed and mixed targets (ce)."""
        function = F.binary_cross_entropy_with_logits if self.loss == "bce" else F.cross_entropy
        return {"loss": function(logits(model, batch, self.mode).float(), batch.labels)}

    def step_flops(self, model: Classifier) -> float:
        """A forward pass, and two backward ones through what is trained: nothing goes back through a frozen base."""
        base, head = family_of(model).macs(model, self.mode), model.mlp_head[-1].weight.numel()
        return (2 if self.frozen_base else 6) * base + 6 * head

    def judge(self, model: nn.Module, batches: Iterable[Batch]) -> Classification:
        """The figures on these batches, one picture per clip."""
        found = predict(model, [batches], [self.mode], ACTIVATIONS[self.loss])[self.mode]
        return evaluate_scores(found.scores, found.targets, self.data.label_set)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """The means over classes, and which classes are left out of them."""
        return self.judge(model, batches).summary()


def finetune(config: FinetuneConfig) -> dict[str, Any] | DryRun:
    """Runs the whole job and returns the summary that is also written to `summary.json`; or what it would take, if that is
    all that is asked for. Of a data set in folds, one run for each fold. Under torchrun, all ranks do.

    Raises ValueError for a bad option, LabelError and MediaError for data that cannot be used, CheckpointError for `init`,
    TrainingError when no step can be taken any more; RanksError when another rank failed. The first three come before
    anything is trained.
    """
    folds = folds_in_turn(config)
    if config.dry_run:
        return _dry_run(replace(config, fold=int(folds[0])) if folds else config)
    with joined(config.device) as ranks:

        def run(one: FinetuneConfig) -> dict[str, Any]:
            with FinetuneFolder(one.out, one.overwrite) as folder:
                return _finetune(one, folder, ranks)

        def look(one: FinetuneConfig, begun: dict[str, Any] | None) -> FinetuneConfig:
            return _prepared(ranks.from_first(lambda: resolve(with_splits(one), begun)))[0]

        if not folds:
            return run(config)
        with FoldsFolder(config.out, config.overwrite) as folder:
            return cross_validate(config, folds, folder, ranks, look, run)


def _finetune(config: FinetuneConfig, folder: FinetuneFolder, ranks: Ranks) -> dict[str, Any]:
    config = ranks.from_first(lambda: resolve(with_splits(config), folder.unfinished()))
    config = with_data(config, config.out)
    config, task, model = _prepared(config)
    data = task.data
    # Only now, when options, data and weights have been found good, may an earlier run be removed.
    going_on = ranks.from_first(lambda: folder.begin(config))
    with RejectList(folder.rejects, ranks) as rejects:

        def passes(frame: int | None) -> Iterator[Batch]:
            """The held-out clips, each with one of its pictures: the middle one, or a certain one."""
            options = {"labels": data.label_set, "frame": frame}
            loader = open_loader(config, data.held_out, model.clip_spec, training=False, **options)
            try:
                yield from rejects.watch(loader)
            finally:
                loader.close()

        def after_epoch(epoch: int) -> dict[str, Any]:
            with precision_of(config).autocast():
                figures = task.evaluate(model, passes(None))
            weights = whole_state(model)  # of all ranks, and the first writes it
            if ranks.first:
                _keep(config, epoch, figures, model, weights, folder)
            ranks.say(f"epoch {epoch + 1}: {shown_figures(figures, config.metric)}")
            return figures

        rows = train(
            config,
            task,
            model,
            fine_tuning_in_force(config).optimization,
            _training_loader(config, task, model),
            folder,
            rejects,
            going_on=going_on,
            describe=lambda row: f"loss {row['loss']:.4f}",
            after_epoch=after_epoch,
        )
        return conclude(config, model, data, folder, rows, passes, rejects)


def _keep(
    config: FinetuneConfig,
    epoch: int,
    figures: dict[str, Any],
    model: Classifier,
    weights: dict[str, Tensor],
    folder: FinetuneFolder,
) -> None:
    """Writes the weights after an epoch where they will be averaged, and the model where it is the best so far."""
    first, last = config.average_epochs
    if first <= epoch + 1 <= last:
        state = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        put_whole(folder.epoch(epoch), lambda file: file.write(save(state)))
    if _better(figures[config.metric], [row["evaluation"][config.metric] for row in folder.evaluations()]):
        model.save_pretrained(folder.best, weights)


def _prepared(config: FinetuneConfig) -> tuple[FinetuneConfig, FineTuneTask, Classifier]:
    """The model with its weights, on its device, and what it is trained for; no batch is larger than the data."""
    ranks = current()
    recipe = fine_tuning_in_force(config)
    data = open_labeled(config)
    config = replace(config, batch_size=min(config.batch_size, len(data.train)))
    ranks.share(config.batch_size)
    torch.manual_seed(config.seed)
    model, config, said = start_classifier(config, len(data.label_set))
    check_pictures(data, model)
    check_masks(config, model)
    model.to(config.device).train()
    model.recompute = config.recompute
    task = FineTuneTask(config.mode, config.loss, data, recipe.frozen_base)
    task.prepare(model)
    for line in said:
        ranks.say(line)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks.say(
        f"{config.recipe}, {config.mode}: {len(data.label_set)} classes, {trained / 1e6:.1f} M parameters trained, "
        f"{config.device}, {config.dtype}; {len(data.train)} clips, batch {config.batch_size}, held out {len(data.held_out)}"
        + (f"; {ranks.world_size} processes" if ranks.world_size > 1 else "")
    )
    return config, task, model


def _training_loader(config: FinetuneConfig, task: FineTuneTask, model: Classifier) -> Loader:
    augmentation = fine_tuning_in_force(config).augmentation
    options = {"augmentation": augmentation, "labels": task.data.label_set, "weights": task.data.weights}
    return open_loader(config, task.data.train, model.clip_spec, training=True, **options)


def _dry_run(config: FinetuneConfig) -> DryRun:
    """What the run would take; what has to be generated for it is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        config, task, model = _prepared(with_data(resolve(with_splits(config)), Path(folder)))
        loader = _training_loader(config, task, model)
        return dry_run(config, task, model, loader, precision_of(config), config.epochs)


def _better(figure: float | None, before: list[float | None]) -> bool:
    """Whether a figure is above all before it. The first counts as the best, whatever it is."""
    known = [value for value in before if value is not None]
    return not before or (figure is not None and (not known or figure > max(known)))
