"""How good a classifier's scores are: average precision, AUC, d' and accuracy, as scikit-learn and the published code define
them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from cavmae_fast.data.sets.labels import LabelSet


class ClassScore(NamedTuple):
    """One class: its label, how many clips have it, and its figures.

    `ap` is None for a class that no clip has; `auc` also for one that every clip has.
    """

    index: int
    mid: str
    name: str
    clips: int
    ap: float | None
    auc: float | None


@dataclass(frozen=True)
class Classification:
    """Figures over some clips. Each is None where nothing defines it, never -1 or NaN.

    Attributes:
        clips: how many.
        map: mean average precision over the classes that have one.
        auc: mean area under the ROC curve, likewise.
        d_prime: sqrt(2) times the inverse normal distribution at `auc`; None where that is infinite, too.
        accuracy: share of the clips with a label whose highest score is that of their (first) label.
        classes: every class, in the order of the model's outputs.
    """

    clips: int
    map: float | None
    auc: float | None
    d_prime: float | None
    accuracy: float | None
    classes: tuple[ClassScore, ...]

    @property
    def without_positives(self) -> tuple[str, ...]:
        """Labels of the classes that no clip has; they are left out of the means."""
        return tuple(row.mid for row in self.classes if not row.clips)

    @property
    def chance(self) -> float | None:
        """The mAP that random scores reach on many clips: the mean share of the clips that have a class, over the classes
        that have an average precision."""
        return _mean(row.clips / self.clips if row.clips else None for row in self.classes)

    def figures(self) -> dict[str, float | None]:
        """The means by the names that reports use: mAP, AUC, d_prime, accuracy."""
        return {"mAP": self.map, "AUC": self.auc, "d_prime": self.d_prime, "accuracy": self.accuracy}

    def summary(self) -> dict[str, Any]:
        """The figures, the number of clips, and the names of the classes that were left out, for a JSON file."""
        left_out = list(self.without_positives)
        return {"clips": self.clips, **self.figures(), "chance_mAP": self.chance, "classes_without_positives": left_out}


def evaluate_scores(scores: np.ndarray, targets: np.ndarray, label_set: LabelSet) -> Classification:
    """The figures of `scores [clips, classes]` for the labels `targets [clips, classes]` (bool).

    Raises:
        ValueError: the shapes differ or do not fit the classes, there is no clip, or a score is not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if scores.shape != targets.shape or scores.ndim != 2 or scores.shape[1] != len(label_set) or not len(scores):
        raise ValueError(
            f"scores {list(scores.shape)} and targets {list(targets.shape)} must both be [clips >= 1, {len(label_set)}]"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity; they must be finite to be ranked")
    targets = targets.astype(bool)
    classes = []
    for index, (mid, name) in enumerate(zip(label_set.mids, label_set.names, strict=True)):
        own, score = targets[:, index], scores[:, index]
        positives = int(own.sum())
        ap = float(average_precision_score(own, score)) if positives else None
        auc = float(roc_auc_score(own, score)) if 0 < positives < len(own) else None
        classes.append(ClassScore(index, mid, name, positives, ap, auc))
    auc = _mean(row.auc for row in classes)
    labelled = targets.any(axis=1)
    right = scores[labelled].argmax(axis=1) == targets[labelled].argmax(axis=1)
    return Classification(
        clips=len(scores),
        map=_mean(row.ap for row in classes),
        auc=auc,
        d_prime=d_prime(auc),
        accuracy=float(right.mean()) if labelled.any() else None,
        classes=tuple(classes),
    )


def d_prime(auc: float | None) -> float | None:
    """sqrt(2) times the inverse of the normal distribution at `auc`; None where that is infinite (0 and 1) or undefined."""
    return math.sqrt(2) * NormalDist().inv_cdf(auc) if auc is not None and 0 < auc < 1 else None


def _mean(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def write_classes(path: Path, result: Classification) -> None:
    """Writes the figures of each class as CSV, whole or not at all: index, mid, display_name, clips, AP, AUC (empty where
    there is none)."""
    import csv
    import io

    from cavmae_fast.data.sets.shards import write_whole

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "mid", "display_name", "clips", "AP", "AUC"])
    writer.writerows(["" if value is None else value for value in row] for row in result.classes)
    write_whole(path, text.getvalue())
