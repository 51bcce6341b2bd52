"""The end of a fine-tuning run: the average of its epochs, judged in every input mode, as files and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.sets.opening import views_of
from cavmae_fast.evaluation.class_figures import draw_classes
from cavmae_fast.evaluation.classification import evaluate_scores, write_classes
from cavmae_fast.evaluation.predicting import predict
from cavmae_fast.models.averaging import average_states
from cavmae_fast.models.classifiers import Classifier
from cavmae_fast.training.clips import RejectList
from cavmae_fast.training.figures import fine_tuning_curves
from cavmae_fast.training.finetune_config import FinetuneConfig
from cavmae_fast.training.finetune_folder import FinetuneFolder
from cavmae_fast.training.finetune_recipes import ACTIVATIONS
from cavmae_fast.training.finetune_setup import LabeledData
from cavmae_fast.training.ranks import current
from cavmae_fast.training.run import last_taken, precision_of
from cavmae_fast.training.sharding import gathered, load_whole, whole_state


def conclude(
    config: FinetuneConfig,
    model: Classifier,
    data: LabeledData,
    folder: FinetuneFolder,
    rows: list[dict[str, Any]],
    passes: Callable[[int | None], Iterator[Batch]],
    rejects: RejectList,
) -> dict[str, Any]:
    """Averages the epochs, judges the average with one and with all pictures of each clip, and writes everything down. Every
    rank has to call it.

    Args:
        config: resolved.
        model: after the last step; it gets the average.
        data, folder, rejects: of the run.
        rows: of the steps.
        passes: the held-out clips with the middle picture (None) or a certain one.

    Returns:
        The summary, which is written last: a run that has one is finished.
    """
    ranks = current()
    evaluations = ranks.from_first(folder.evaluations)
    averaged = averaged_epochs(config, evaluations)
    if averaged:
        load_whole(model, average_states([folder.epoch(epoch - 1) for epoch in averaged]))
    weights = whole_state(model)
    if ranks.first:
        model.save_pretrained(folder.model, weights)
    frames = views_of(data.held_out, model.clip_spec)
    results: dict[str, dict[str, Any]] = {mode: {} for mode in model.modes}
    # The most pictures come last, so that what is left is theirs.
    for count, chosen in ((1, [None]), (frames, range(frames))) if frames > 1 else ((1, [None]),):
        with gathered(model), precision_of(config).autocast():
            found = predict(model, map(passes, chosen), model.modes, ACTIVATIONS[config.loss])
        for mode, predictions in found.items():
            judged = evaluate_scores(predictions.scores, predictions.targets, data.label_set)
            results[mode][str(count)] = judged.figures()
            if mode == config.mode:
                last, last_predictions = judged, predictions
    rejects.share()

    def close() -> dict[str, Any]:
        write_classes(folder.classes, last)
        draw_classes(last_predictions, last, folder.figure)
        fine_tuning_curves(rows, evaluations, config.metric, folder.curves)
        summary = {
            "steps": len(rows),
            "loss": last_taken(rows)["loss"],
            "clips_per_s": rows[-1]["clips_per_s"],
            "mode": config.mode,
            "metric": config.metric,
            "frames": frames,
            **last.summary(),
            "averaged_epochs": averaged,
            "best_epoch": _best(evaluations, config.metric),
            "modes": results,
        }
        return folder.finish(summary, rows, rejects.count, config.device)

    return ranks.from_first(close)


def averaged_epochs(config: FinetuneConfig, evaluations: list[dict[str, Any]]) -> list[int]:
    """The epochs that are averaged, counted from 1: those of the recipe that were done. None where there are none: then the
    last step's weights stay."""
    first, last = config.average_epochs
    return [row["epoch"] + 1 for row in evaluations if first <= row["epoch"] + 1 <= last]


def _best(evaluations: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best epoch, counted from 1, and its figure; None where no epoch has one."""
    known = [row for row in evaluations if row["evaluation"][metric] is not None]
    if not known:
        return None
    best = max(known, key=lambda row: row["evaluation"][metric])  # the first of equals, as is kept in best/
    return {"epoch": best["epoch"] + 1, metric: best["evaluation"][metric]}
