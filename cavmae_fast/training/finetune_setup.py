"""What a fine-tuning run starts from, looked at before anything is trained: labeled clips, and a classifier with pretrained
weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from cavmae_fast.data.media.synthetic import MANIFEST, generate_clips
from cavmae_fast.data.media.synthetic_lists import write_lists
from cavmae_fast.data.sets.labels import LabelError, LabelSet, balance_weights, check_labels, class_counts
from cavmae_fast.data.sets.opening import Clips, clip_labels, clip_weights, labels_of, open_clips
from cavmae_fast.models import CAVMAE, CAVMAEFT, PRETRAINED_TO_FINE_TUNED, CAVMAEFTAudio, load_checkpoint
from cavmae_fast.models.opening import open_model
from cavmae_fast.training.finetune_config import FinetuneConfig
from cavmae_fast.training.ranks import current

CLASSIFIERS = {"av": CAVMAEFT, "audio": CAVMAEFTAudio}


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
    """A classifier with the weights that it starts from, and what is to be said of how they were loaded."""

    model: CAVMAEFT | CAVMAEFTAudio
    said: list[str]


def start_classifier(config: FinetuneConfig, classes: int) -> Start:
    """The classifier that the options describe, of the checkpoint's sizes, with its weights; a new head is drawn at random.

    A pretraining checkpoint gives the encoder; one that is already fine-tuned the head as well, unless `new_head`.

    Raises:
        CheckpointError: it cannot be read or does not fit.
        ValueError: it has a head for another number of classes, or the sizes asked for do not go with the model.
    """
    source = open_model(config.init)
    kind = CLASSIFIERS[config.model]
    sizes = {name: value for name, value in _arguments(source).items() if name in inspect.signature(kind).parameters}
    sizes |= {"label_dim": classes, "tr_pos": True}
    asked = {"audio_length": config.audio_length, "img_size": config.image_size}
    sizes |= {name: value for name, value in asked.items() if value is not None}
    if "clip" in sizes:  # where it is not CAV-MAE's own
        image_size = _square(sizes["img_size"])
        sizes["clip"] = replace(source.clip_spec, audio_length=sizes["audio_length"], image_size=image_size)
    state = source.state_dict()
    own_head = not isinstance(source, CAVMAE)
    if own_head and config.new_head:
        state = {name: value for name, value in state.items() if not name.startswith("mlp_head.")}
    elif own_head and len(state["mlp_head.1.bias"]) != classes:
        raise ValueError(
            f"--init {config.init} has a head for {len(state['mlp_head.1.bias'])} classes, and the labels CSV {classes}; "
            "give the CSV that it was trained with, or --new-head"
        )
    elif not own_head and config.new_head:
        raise ValueError(f"--new-head is given, but --init {config.init} has no head: it is a {type(source).__name__}")
    model = kind(**sizes)
    allowed = PRETRAINED_TO_FINE_TUNED if not own_head or config.new_head else {"allow_unexpected": ("*_v", "*_v.*")}
    report = load_checkpoint(model, state, **allowed, adapt_positions=config.adapt_positions)
    return Start(model, [f"adapted {line}" for line in report.adapted])


def _arguments(model: nn.Module) -> dict[str, object]:
    """The constructor arguments that a model was made with, and its norms' epsilon as `norm_layer`."""
    arguments = dict(model.config)
    arguments["norm_layer"] = functools.partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
    return arguments


def _square(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_masks(config: FinetuneConfig, model: CAVMAEFT | CAVMAEFTAudio) -> None:
    """ValueError when SpecAugment might mask more than the model's spectrogram has."""
    spec = model.clip_spec
    for option, value, most in (
        ("--freq-mask", config.freq_mask, spec.mel_bins),
        ("--time-mask", config.time_mask, spec.audio_length),
    ):
        if not 0 <= value <= most:
            raise ValueError(f"{option} is {value}; for this model's spectrogram it must be in 0 to {most}")
