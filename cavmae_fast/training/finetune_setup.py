"""What a fine-tuning run starts from, looked at before anything is trained: labeled clips, and a classifier with pretrained
weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cavmae_fast.data.media.synthetic import MANIFEST, generate_clips
from cavmae_fast.data.media.synthetic_lists import write_lists
from cavmae_fast.data.sets.labels import LabelError, LabelSet, balance_weights, check_labels, class_counts
from cavmae_fast.data.sets.opening import Clips, clip_labels, clip_weights, frames_of, labels_of, open_clips
from cavmae_fast.models.classifiers import ENCODERS, Classifier, make_classifier
from cavmae_fast.models.opening import open_model
from cavmae_fast.training.finetune_config import FinetuneConfig
from cavmae_fast.training.ranks import current


class LabeledData(NamedTuple):
    """What is trained on and judged by. `weights [clips]` of balanced sampling, or None."""

    train: Clips
    held_out: Clips
    label_set: LabelSet
    weights: np.ndarray | None


def with_data(config: FinetuneConfig, folder: Path) -> FinetuneConfig:
    """`config` with generated clips, and their classes, as its data where none is named.

    They are those that pretraining left beside the checkpoint, where they are there; else they are made in `folder`, where
    their lists and classes are written in any case.
    """
    if config.data:
        return config
    ranks = current()
    beside = config.init.parent / "clips"
    clips = beside if (beside / MANIFEST).is_file() else folder / "clips"
    ranks.say(f"no --data: generated clips in {clips}; what they show and play are the classes")
    # One after the other: the first makes them, and who does not share its disk makes its own.
    ranks.in_turn(lambda: generate_clips(clips, seed=0))
    lists = ranks.in_turn(lambda: write_lists(clips, folder / "lists"))
    return replace(config, data=(lists.train,), eval_data=(lists.test,), labels=config.labels or lists.labels)


def open_labeled(config: FinetuneConfig) -> LabeledData:
    """The labeled clips that the (resolved) options name.

    Raises:
        LabelError: the classes are not known, a clip has a label that is none of them, or no clip has one.
        MediaError, ValueError: data, classes or weights cannot be used.
    """
    train, held_out = open_clips(config.data), open_clips(config.eval_data)
    label_set = clip_labels(config.labels, train)
    if label_set is None:
        raise LabelError("--labels is not given, and the training clips are no shards with classes; name the labels CSV")
    if config.loss == "ce" and len(label_set) == 1:
        raise LabelError("the labels CSV holds 1 class, among which --loss ce has nothing to choose; use --loss bce")
    found = labels_of(train)
    for option, labels in (("--data", found), ("--eval-data", labels_of(held_out))):
        check_labels(option, labels, label_set)
    counts = class_counts(found, label_set)
    if empty := [label_set.mids[index] for index in np.flatnonzero(counts == 0)]:
        names = ", ".join(empty[:8]) + ", ..." * (len(empty) > 8)
        current().say(f"{len(empty)} of {len(label_set)} classes have no training clip and will not be learned: {names}")
    weights = None
    if config.balanced == "on":
        given = config.weights is not None
        weights = clip_weights(config.weights, train) if given else balance_weights(found, label_set)
    return LabeledData(train, held_out, label_set, weights)


class Start(NamedTuple):
    """A classifier with the weights that it starts from, the options that follow from the checkpoint, and what is to be said
    of how it was loaded."""

    model: Classifier
    config: FinetuneConfig
    said: list[str]


def start_classifier(config: FinetuneConfig, classes: int) -> Start:
    """The classifier that the options describe, of the checkpoint's sizes, with its weights; a new head is drawn at random.

    The checkpoint says of which family it is, and so which class its classifier is and what input modes that has.

    Raises:
        CheckpointError: it cannot be read or does not fit.
        ValueError: it has not these encoders, another number of classes or not that mode, or the sizes asked for do not go
            with the model.
    """
    source = open_model(config.init)
    asked = {"audio_length": config.audio_length, "img_size": config.image_size}
    sizes = {name: value for name, value in asked.items() if value is not None}
    model, adapted = make_classifier(
        source,
        classes,
        config.model,
        new_head=config.new_head,
        adapt_positions=config.adapt_positions,
        origin=f"--init {config.init}",
        **sizes,
    )
    mode = config.mode or model.modes[0]
    if mode not in model.modes:
        raise ValueError(
            f"--mode is {mode}, and --init {config.init} becomes a {type(model).__name__}, which takes --mode "
            f"{' or '.join(model.modes)} alone; other encoders of the checkpoint are named with --model"
        )
    encoders = next(option for option, modalities in ENCODERS.items() if modalities == model.modalities)
    return Start(model, replace(config, model=encoders, mode=mode), [f"adapted {line}" for line in adapted])


def check_pictures(data: LabeledData, model: Classifier) -> None:
    """ValueError when the clips have not the pictures that the model takes."""
    for clips in (data.train, data.held_out):
        frames_of(clips, model.clip_spec)


def check_masks(config: FinetuneConfig, model: Classifier) -> None:
    """ValueError when SpecAugment might mask more than the model's spectrogram has."""
    spec = model.clip_spec
    for option, value, most in (
        ("--freq-mask", config.freq_mask, spec.mel_bins),
        ("--time-mask", config.time_mask, spec.audio_length),
    ):
        if not 0 <= value <= most:
            raise ValueError(f"{option} is {value}; for this model's spectrogram it must be in 0 to {most}")
