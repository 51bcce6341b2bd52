"""A classifier's scores on clips: one or several pictures of each, in any of the input modes, every clip once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cavmae_fast.data.batches import Batch
from cavmae_fast.evaluation.sharing import gather
from cavmae_fast.models import CAVMAEFTAudio
from cavmae_fast.models.classifiers import Classifier
from cavmae_fast.reference.cavmae_parameters import MODES

Activation = Literal["sigmoid", "softmax"]
"What makes scores of logits: the sigmoid of each class (any number of labels per clip), or the softmax over classes (one)."


class Predictions(NamedTuple):
    """Scores of some clips, in the order of the data set.

    Attributes:
        ids: names of the clips.
        scores: `[clips, classes]` float64 in [0, 1], the mean over a clip's pictures.
        targets: `[clips, classes]` bool, the labels.
    """

    ids: list[str]
    scores: np.ndarray
    targets: np.ndarray


def logits(model: nn.Module, batch: Batch, mode: str) -> Tensor:
    """Logits `[B, classes]` of a batch; `model` is a classifier, or one in DistributedDataParallel. ValueError for a mode
    that it does not have."""
    own = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if mode not in own.modes:
        raise ValueError(f"mode is {mode!r}; for {type(own).__name__} it must be one of {', '.join(own.modes)}")
    if isinstance(own, CAVMAEFTAudio):  # whose forward, which DistributedDataParallel has to see, gives tokens
        return own.mlp_head(model(batch.audio).mean(dim=1))
    return model(batch.audio, batch.image, mode)


@torch.no_grad()
def predict(
    model: Classifier,
    passes: Iterable[Iterable[Batch]],
    modes: Sequence[str] = ("multimodal",),
    activation: Activation = "sigmoid",
) -> dict[str, Predictions]:
    """Scores by input mode.

    Args:
        model: on the device of the batches. It is as it was afterwards: training or not.
        passes: one pass over the clips for each picture that is looked at, batches with labels.
        modes: of `model.modes`; those that see no picture are computed in one pass alone.
        activation: of the logits, before the mean over a clip's pictures, as published.

    Raises:
        ValueError: a mode that the model does not have, batches without labels, or no clip at all.
    """
    scores_by_mode = {mode: _Scores() for mode in modes}
    was_training = model.training
    model.eval()
    try:
        for batches in passes:
            for batch in batches:
                if batch.labels is None:
                    raise ValueError("the batches have no labels; the loader must be given the classes")
                for mode, scores in scores_by_mode.items():
                    if "v" not in MODES[mode] and scores.know(batch):
                        continue
                    scores.add(batch, _activated(logits(model, batch, mode), activation))
    finally:
        model.train(was_training)
    return {mode: scores.of_all_ranks() for mode, scores in scores_by_mode.items()}


def _activated(x: Tensor, activation: Activation) -> np.ndarray:
    """Scores in float64, in which two float32 logits that differ stay different: ties would change the ranking."""
    x = x.double()
    return (x.sigmoid() if activation == "sigmoid" else x.softmax(dim=1)).cpu().numpy()


class _Clip(NamedTuple):
    """What is known of one clip: its name, its targets, the sum of its scores and how many they are."""

    id: str
    targets: np.ndarray
    total: np.ndarray
    count: int


@dataclass
class _Scores:
    """Sums of scores, by the clip's number in the data set."""

    clips: dict[int, _Clip] = field(default_factory=dict)

    def know(self, batch: Batch) -> bool:
        """Whether all clips of the batch are here."""
        return all(number in self.clips for number in batch.clips.tolist())

    def add(self, batch: Batch, scores: np.ndarray) -> None:
        targets = batch.labels.cpu().numpy() > 0.5
        for row, number in enumerate(batch.clips.tolist()):
            known = self.clips.get(number)
            if known is None:
                self.clips[number] = _Clip(batch.ids[row], targets[row], scores[row], 1)
            else:
                self.clips[number] = known._replace(total=known.total + scores[row], count=known.count + 1)

    def of_all_ranks(self) -> Predictions:
        """The clips of all ranks, each once, on every rank."""
        clips = dict(sorted((number, clip) for part in gather(self.clips) for number, clip in part.items()))
        if not clips:
            raise ValueError("there is no clip to evaluate on")
        rows = list(clips.values())
        scores = np.stack([row.total / row.count for row in rows])
        return Predictions([row.id for row in rows], scores, np.stack([row.targets for row in rows]))
