"""Recipes of fine-tuning, as published: loss, learning rates, sampling, augmentation, and which epochs are averaged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cavmae_fast.data.draws import Augmentation
from cavmae_fast.evaluation.predicting import Activation
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedules import StepDecay

Loss = Literal["bce", "ce"]
"""Binary cross-entropy for each class by itself (any number of labels per clip), or cross-entropy over the classes (one)."""
ACTIVATIONS: dict[str, Activation] = {"bce": "sigmoid", "ce": "softmax"}
"What makes scores of the logits of a model that was trained with a loss."
NO_END = 999
"The published schedules have milestones up to an epoch that no run reaches."


@dataclass(frozen=True)
class FineTuning:
    """How a classifier is fine-tuned.

    Attributes:
        optimization: learning rates, schedule, batch, epochs.
        loss: what is minimized.
        metric: the figure by which the best epoch is chosen, one of `Classification.figures`.
        balanced: draw clips of rare classes more often.
        augmentation: of the training clips.
        average_epochs: first and last epoch, counted from 1, whose weights are averaged in the end.
        frozen_base: train the head alone.
    """

    optimization: Recipe
    loss: Loss
    metric: Literal["mAP", "accuracy"]
    balanced: bool
    augmentation: Augmentation
    average_epochs: tuple[int, int]
    frozen_base: bool = False


_AS20K = FineTuning(
    Recipe(5e-5, batch_size=36, epochs=15, schedule=StepDecay(5, 1, NO_END), head_lr_factor=100),
    loss="bce",
    metric="mAP",
    balanced=False,
    augmentation=Augmentation.FINE_TUNE,
    average_epochs=(3, 15),
)
FINE_TUNING = {
    "as20k": _AS20K,
    "as2m": replace(
        _AS20K,
        optimization=Recipe(1e-5, batch_size=48, epochs=10, schedule=StepDecay(2, 1, NO_END), head_lr_factor=50),
        balanced=True,
        average_epochs=(1, 10),
    ),
    "vggsound": replace(
        _AS20K,
        optimization=Recipe(1e-4, batch_size=48, epochs=10, schedule=StepDecay(2, 1, NO_END), head_lr_factor=10),
        loss="ce",
        metric="accuracy",
        balanced=True,
        average_epochs=(3, 10),
    ),
    "esc50": FineTuning(
        Recipe(1e-4, batch_size=48, epochs=25, schedule=StepDecay(5, 1, NO_END, factor=0.85), head_lr_factor=10),
        loss="ce",
        metric="accuracy",
        balanced=False,
        augmentation=Augmentation(freq_mask=24, time_mask=96),
        average_epochs=(16, 25),
    ),
    "speechcommands": FineTuning(
        Recipe(2.5e-4, batch_size=128, epochs=30, schedule=StepDecay(5, 1, NO_END, factor=0.85), head_lr_factor=10),
        loss="bce",
        metric="accuracy",
        balanced=False,
        augmentation=Augmentation(mixup=0.6, freq_mask=48, time_mask=48, noise=True),
        average_epochs=(21, 30),
    ),
    "linear-probe": replace(_AS20K, frozen_base=True),
    "small": FineTuning(
        Recipe(4e-4, batch_size=32, epochs=6, schedule=StepDecay(3, 1, NO_END), head_lr_factor=10),
        loss="bce",
        metric="mAP",
        balanced=False,
        augmentation=Augmentation(freq_mask=16, time_mask=32, label_smoothing=0.1, noise=True),
        average_epochs=(4, 6),
    ),
}
"""Recipe by name. `small` is for the generated clips and two CPU cores. The settings of `linear-probe` are those of `as20k`,
which the published script has with its option to freeze the base.

`esc50` and `speechcommands` are ours: neither CAV-MAE nor MAViL says how it was fine-tuned on sound alone. Batches, epochs,
masks, mixup, loss and learning rates are close to those of AST (Gong et al., Interspeech 2021), which is another model; the
faster head and the averaged epochs, the last ten, are our choice, and nothing was tried on the data sets themselves."""
