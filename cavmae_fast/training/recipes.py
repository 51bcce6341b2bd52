"""Recipes: how a system is optimized, as published. Which losses it has is its preset's business (`models.presets`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class StepDecay:
    """The learning rate is multiplied by `factor` at epoch `start` and after every `every` epochs from there, up to `end`.

    A function of the epoch alone, without a state: a run goes on from any step with the learning rate that belongs there.
    """

    start: int
    every: int
    end: int
    factor: float = 0.5

    def scale(self, epoch: int) -> float:
        """What the learning rate is multiplied by in `epoch`, from 0."""
        passed = sum(milestone <= epoch for milestone in range(self.start, self.end + 1, self.every))
        return self.factor**passed


@dataclass(frozen=True)
class Recipe:
    """How a system is optimized: Adam with L2 regularization, fused, and a decay by epochs."""

    learning_rate: float
    batch_size: int
    "Clips per step, of all ranks together."
    epochs: int
    schedule: StepDecay
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 5e-7

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam over those of `parameters` that are trained."""
        trained = [p for p in parameters if p.requires_grad]
        return torch.optim.Adam(trained, self.learning_rate, betas=self.betas, weight_decay=self.weight_decay, fused=True)


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
"Recipe by preset."
