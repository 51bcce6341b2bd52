"""Recipes: how a system is optimized, as published. Which losses it has is its preset's business (`models.presets`)."""

from __future__ import annotations

from dataclasses import dataclass

from cavmae_fast.training.schedules import Cosine, Schedule, StepDecay, WarmUp


@dataclass(frozen=True)
class Recipe:
    """How a system is optimized. The defaults are those of the published code: Adam with L2 regularization, and no more."""

    learning_rate: float
    batch_size: int
    "Clips per step, of all ranks together."
    epochs: int
    schedule: Schedule
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 5e-7
    optimizer: str = "adam"
    "One of `optimizers.OPTIMIZERS`."
    head_lr_factor: float = 1.0
    "What the learning rate of a classifier's head is multiplied by."
    layer_decay: float = 1.0
    "What the learning rate is multiplied by for each layer that a parameter lies below the top; 1: all learn alike."
    clip_grad: float = 0.0
    "Gradients are scaled down to this norm, of all of them together; 0: they are not."
    ema: float = 0.0
    "Decay of the moving average of the weights, which is evaluated and exported in their place; 0: there is none."
    drop_path: float = 0.0
    "Chance that a clip leaves out a branch of the last block, less in the blocks before; 0: none is left out."
    accumulate: int = 1
    "Parts that a batch is computed in, one after the other, for the gradients of the whole batch."


def _published(learning_rate: float, batch_size: int) -> Recipe:
    return Recipe(learning_rate, batch_size, epochs=25, schedule=StepDecay(start=10, every=5, end=25))


PRETRAINING = {
    "small": Recipe(6e-4, batch_size=32, epochs=30, schedule=StepDecay(start=20, every=4, end=30)),
    "cav": _published(5e-5, 48),
    "vanilla-av-mae": _published(5e-5, 48),
    "av-mae": _published(5e-5, 48),
    "cav-mae-base": _published(5e-5, 48),
    "cav-mae-scale+": _published(1e-4, 120),
    "cav-mae-scale++": _published(2e-4, 256),
}
"Recipe by preset, for CAV-MAE."


def _tower(learning_rate: float, batch_size: int, epochs: int, warm_up: float) -> Recipe:
    """AdamW and half a cosine after a warm-up of so many epochs."""
    schedule = WarmUp(0, Cosine(), share=warm_up / epochs)
    adamw = {"optimizer": "adamw", "betas": (0.9, 0.95), "weight_decay": 0.05}
    return Recipe(learning_rate, batch_size, epochs, schedule, **adamw)


_FULL = _tower(2e-4 * 512 / 256, 512, epochs=33, warm_up=3)
"""Optimizer, learning rate, batch size, epochs and warm-up are certain of the same lead author's audio model; of MAViL they
are not known. The cosine and the weight decay are those of published MAEs."""
_SMALL = _tower(1e-3, 32, epochs=20, warm_up=2)
TOWER_PRETRAINING = {
    "a-mae": _FULL,
    "v-mae": _FULL,
    "mavil-av-mae": _FULL,
    "mavil-inter": _FULL,
    "mavil": _FULL,
    "a-mae-small": _SMALL,
    "v-mae-small": _SMALL,
    "mavil-small": _SMALL,
}
"Recipe by preset, for models of towers, in both stages."
