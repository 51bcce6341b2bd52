"""The families of models: which classifier the encoders of a checkpoint become, and what of its weights that takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from cavmae_fast.models.cavmae import CAVMAE
from cavmae_fast.models.cavmae_ft import CAVMAEFT, CAVMAEFTAudio
from cavmae_fast.models.flops import classifier_macs
from cavmae_fast.models.mae import MAE, MAEFT
from cavmae_fast.models.mavil import MAViL, MAViLFT
from cavmae_fast.models.mavil_flops import tower_classifier_macs
from cavmae_fast.models.opening import Model
from cavmae_fast.models.tower_weights import TOWERS_TO_FINE_TUNED, tower_state
from cavmae_fast.models.weights import PRETRAINED_TO_FINE_TUNED, load_checkpoint

Classifier = CAVMAEFT | CAVMAEFTAudio | MAEFT | MAViLFT
ENCODERS = {"av": "av", "audio": "a", "video": "v"}
"How options name the encoders that a classifier has, and the modalities that these are."


class Family(NamedTuple):
    """Models that share their encoders.

    Attributes:
        members: pretraining models and classifiers.
        classifiers: by the modalities that they have encoders of.
        loading: arguments of `load_checkpoint` that take a pretraining model into a classifier.
        macs: (classifier, input mode) -> multiply-adds of one sample's forward pass without the head.
    """

    members: tuple[type, ...]
    classifiers: dict[str, type[Classifier]]
    loading: Mapping[str, Any]
    macs: Callable[[Any, str], float]


FAMILIES = (
    Family(
        (CAVMAE, CAVMAEFT, CAVMAEFTAudio),
        {"av": CAVMAEFT, "a": CAVMAEFTAudio},
        PRETRAINED_TO_FINE_TUNED,
        classifier_macs,
    ),
    Family(
        (MAE, MAEFT, MAViL, MAViLFT),
        {"av": MAViLFT, "a": MAEFT, "v": MAEFT},
        TOWERS_TO_FINE_TUNED,
        lambda model, mode: tower_classifier_macs(model),
    ),
)


def family_of(model: nn.Module) -> Family:
    """The family that a model belongs to. ValueError for a model of none."""
    for family in FAMILIES:
        if isinstance(model, family.members):
            return family
    raise ValueError(f"model is a {type(model).__name__}, which is of no family that has classifiers")


class Made(NamedTuple):
    """A classifier with the weights that it begins with, and a line for each table of positions that was adapted to it."""

    model: Classifier
    adapted: tuple[str, ...]


def make_classifier(
    source: Model,
    classes: int,
    encoders: str | None = None,
    *,
    new_head: bool = False,
    adapt_positions: bool = False,
    origin: str = "the checkpoint",
    **sizes: Any,
) -> Made:
    """The classifier of `classes` classes that is made of the encoders of `source`.

    Args:
        source: a pretrained model, whose classifier gets a random head; or a classifier, which gives its own head, too.
        encoders: 'av', 'audio' or 'video', those that it is to have; None: all that the source has.
        new_head: leave the head of a classifier, for other classes.
        adapt_positions: as in `load_checkpoint`.
        origin: what errors call the source.
        sizes: `audio_length` and `img_size`, where they are not the source's.

    Raises:
        ValueError: the source has not these encoders, or a head of another number of classes, or none to leave.
        CheckpointError: its weights do not fit the sizes.
    """
    family, name = family_of(source), type(source).__name__
    modalities = source.modalities if encoders is None else ENCODERS[encoders]
    if modalities not in family.classifiers or not set(modalities) <= set(source.modalities):
        there = (m for m in family.classifiers if set(m) <= set(source.modalities))
        allowed = ", ".join(option for m in there for option, named in ENCODERS.items() if named == m)
        raise ValueError(f"--model is {encoders}, but of {origin}, a {name}, it must be one of {allowed}")
    kind = family.classifiers[modalities]
    state = source.state_dict()
    if isinstance(source, MAViL | MAViLFT) and len(modalities) == 1:
        state = tower_state(state, modalities)
    bias = state.get("mlp_head.1.bias")
    if bias is None and new_head:
        raise ValueError(f"--new-head is given, but {origin} has no head that could be left: it is a {name}")
    keeps_head = bias is not None and not new_head
    if keeps_head and len(bias) != classes:
        raise ValueError(
            f"{origin} has a head for {len(bias)} classes, and the labels CSV {classes}; give the CSV that it was trained "
            "with, or --new-head"
        )
    if not keeps_head:
        state = {key: value for key, value in state.items() if not key.startswith("mlp_head.")}
    model = kind(**_arguments(source, kind, classes, modalities, sizes))
    loading = family.loading | ({"allow_missing": ()} if keeps_head else {})
    return Made(model, load_checkpoint(model, state, **loading, adapt_positions=adapt_positions).adapted)


def _arguments(
    source: Model, kind: type[Classifier], classes: int, modalities: str, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """The constructor arguments of `kind`: those that the source was made with, with `sizes` changed."""
    found = dict(source.config) | dict(sizes)
    found["norm_layer"] = functools.partial(nn.LayerNorm, eps=found.pop("norm_eps"))
    if "clip" in found:  # where it is not the class's own
        size = _square(found["img_size"])
        found["clip"] = replace(source.clip_spec, audio_length=found["audio_length"], image_size=size)
    found |= {"label_dim": classes, "modality": modalities, "tr_pos": True}
    return {name: value for name, value in found.items() if name in inspect.signature(kind).parameters}


def _square(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
