"""Judging a fine-tuned model on labeled clips, from the checkpoint to the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, NamedTuple

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.decoder import Reject
from cavmae_fast.data.sets.labels import LabelError, LabelSet, check_labels
from cavmae_fast.data.sets.opening import Clips, clip_labels, labels_of, open_clips, views_of
from cavmae_fast.evaluation.classification import Classification, evaluate_scores
from cavmae_fast.evaluation.predicting import Activation, Predictions, predict
from cavmae_fast.evaluation.running import Model, Running, ready_model
from cavmae_fast.evaluation.sharing import gather


class Classified(NamedTuple):
    """What `classify` found.

    Attributes:
        results: figures by input mode.
        predictions: scores and labels by input mode.
        activation: what made the scores.
        frames: pictures that were looked at of each clip.
        rejects: the clips that could not be used, and why.
    """

    results: dict[str, Classification]
    predictions: dict[str, Predictions]
    activation: Activation
    frames: int
    rejects: list[Reject]


def classify(
    model: Model | str | PathLike,
    data: str | Path | Sequence[str | Path] | Clips,
    labels: LabelSet | str | Path | None = None,
    *,
    frames: Literal[1, 10] = 1,
    modes: Sequence[str] = ("multimodal",),
    activation: Literal["auto", "sigmoid", "softmax"] = "auto",
    running: Running | None = None,
) -> Classified:
    """Judges a fine-tuned model on labeled clips. The ranks of `torch.distributed`, where it is initialized, share the
    clips, and all of them have the whole result.

    Args:
        model: a classifier, or a checkpoint of one.
        data: a folder that `cavmae-fast prepare` wrote, or folders, media files, lists: with labels.
        labels: the classes, or their CSV; default: those of the shards.
        frames: 1, the middle picture (or crop) of a clip, or 10: the scores are the mean over all the pictures that it was
            cut into (10 unless shards were prepared with another number), as published; for models of one picture.
        modes: input modes, of `model.modes`.
        activation: 'sigmoid' for clips with any number of labels, 'softmax' for those with one; 'auto' looks at the labels.
        running: device, dtype, batch size; default: `Running()`.

    Raises:
        CheckpointError, LabelError, MediaError: a file cannot be used.
        ValueError: the model has no head, another number of classes or not that mode, or an argument is out of range.
    """
    running = (running or Running()).settled()
    precision = running.precision()
    model = ready_model(model, precision)
    if not hasattr(model, "modes"):
        kind = type(model).__name__
        raise ValueError(f"the checkpoint is a {kind}, which has no classes; allowed: one that `cavmae-fast finetune` made")
    for mode in modes:
        if mode not in model.modes:
            raise ValueError(f"mode is {mode!r}; for {type(model).__name__} it must be one of {', '.join(model.modes)}")
    if frames not in (1, 10):
        raise ValueError(f"frames is {frames}; it must be 1 or 10")
    clips = open_clips(data)
    views = views_of(clips, model.clip_spec)
    if frames > 1 and model.clip_spec.frames != 1:
        taken = f"{model.clip_spec.frames} pictures of a clip at once" if model.clip_spec.frames else "no picture"
        raise ValueError(f"frames is {frames}, but a {type(model).__name__} takes {taken}; it must be 1")
    label_set = clip_labels(labels, clips)
    if label_set is None:
        raise LabelError("labels is not given, and the clips are no shards with classes; name the labels CSV")
    head = model.mlp_head[-1].out_features
    if head != len(label_set):
        raise ValueError(f"the checkpoint has a head for {head} classes, and the labels CSV {len(label_set)}; they must fit")
    found = labels_of(clips)
    check_labels("data", found, label_set)
    if activation == "auto":
        activation = "softmax" if all(len(set(ids)) == 1 for ids in found) else "sigmoid"
    elif activation not in ("sigmoid", "softmax"):
        raise ValueError(f"activation is {activation!r}; it must be one of auto, sigmoid, softmax")
    rejects: dict[str, Reject] = {}

    def one_pass(frame: int | None) -> Iterator[Batch]:
        loader = running.open_loader(clips, model, precision.device, frame, label_set)
        try:
            yield from loader
        finally:
            rejects.update(loader.rejects)
            loader.close()

    chosen = [None] if frames == 1 else list(range(views))
    with precision.autocast():
        predictions = predict(model, map(one_pass, chosen), modes, activation)
    results = {mode: evaluate_scores(one.scores, one.targets, label_set) for mode, one in predictions.items()}
    rejects = {path: reject for part in gather(rejects) for path, reject in part.items()}
    return Classified(results, predictions, activation, len(chosen), list(rejects.values()))
