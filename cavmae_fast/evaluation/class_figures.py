"""The figure of a classifier: a confusion matrix where a clip has one label, else curves of precision over recall."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cavmae_fast.evaluation.classification import Classification
from cavmae_fast.evaluation.drawing import new_figure
from cavmae_fast.evaluation.predicting import Predictions

NAMED = 40
"Up to this many classes are named beside a confusion matrix."
CURVES = 5
"Classes that are drawn and named from either end of the list by average precision."


def draw_classes(predictions: Predictions, result: Classification, path: Path) -> None:
    """Draws the figure that fits the labels of `predictions`, whose figures are `result`, into the PNG `path`."""
    single = bool((predictions.targets.sum(axis=1) == 1).all()) and len(result.classes) > 1
    (draw_confusion if single else draw_precision_recall)(predictions, result, path)


def draw_confusion(predictions: Predictions, result: Classification, path: Path) -> None:
    """What clips of each class (rows) were taken for (columns), as shares of the row."""
    from sklearn.metrics import confusion_matrix

    count = len(result.classes)
    true, taken = predictions.targets.argmax(axis=1), predictions.scores.argmax(axis=1)
    shares = confusion_matrix(true, taken, labels=np.arange(count), normalize="true")  # a row without clips is 0
    size = float(np.clip(count * 0.3, 6, 16))
    figure, axes = new_figure(1, 1, (size + 2, size))
    axis = axes[0, 0]
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axis, label="share of the clips of a class")
    title = "no label" if result.accuracy is None else f"accuracy {result.accuracy:.1%}"
    axis.set(title=f"{result.clips} clips, {title}", xlabel="taken for", ylabel="label")
    if count <= NAMED:
        names = [row.name or row.mid for row in result.classes]
        axis.set_xticks(range(count), names, rotation=90)
        axis.set_yticks(range(count), names)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_parse_math(False)  # names come with the data: a dollar sign is one
    figure.savefig(path, dpi=110)


def draw_precision_recall(predictions: Predictions, result: Classification, path: Path) -> None:
    """Precision over recall: of all classes thin, of the best and worst named, and of all (clip, class) pairs together."""
    from sklearn.metrics import precision_recall_curve

    figure, axes = new_figure(1, 1, (9, 6))
    axis = axes[0, 0]
    ranked = sorted((row for row in result.classes if row.ap is not None), key=lambda row: -row.ap)
    named = {row.index for row in (*ranked[:CURVES], *ranked[-CURVES:])}
    for row in ranked:
        precision, recall, _ = precision_recall_curve(predictions.targets[:, row.index], predictions.scores[:, row.index])
        style = {"linewidth": 1.2} if row.index in named else {"linewidth": 0.4, "color": "0.7", "zorder": 1}
        (line,) = axis.plot(recall, precision, **style)
        if row.index in named:
            line.set_label(f"{row.ap:.2f}  {row.name or row.mid}")
    if predictions.targets.any():
        precision, recall, _ = precision_recall_curve(predictions.targets.ravel(), predictions.scores.ravel())
        axis.plot(recall, precision, color="black", linewidth=2, label="all classes together")
    mean = "no class has a clip" if result.map is None else f"mAP {result.map:.3f}"
    axis.set(title=f"{result.clips} clips, {mean}", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside right upper", title="average precision", fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.savefig(path, dpi=110)
