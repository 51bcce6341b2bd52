"""Schedules of the learning rate: functions of the epoch and the step alone.

None has a state, so a run goes on from any step with the learning rate that belongs there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """What the learning rate is multiplied by."""

    def scale(self, epoch: int, step: int = 0, total: int = 1) -> float:
        """The factor in `epoch`, from 0, for the step that follows after `step` of `total` steps."""


@dataclass(frozen=True)
class Constant:
    """The learning rate stays as it is."""

    def scale(self, epoch: int, step: int = 0, total: int = 1) -> float:
        return 1.0


@dataclass(frozen=True)
class StepDecay:
    """The learning rate is multiplied by `factor` at epoch `start` and then after every `every` epochs, up to `end`."""

    start: int
    every: int
    end: int
    factor: float = 0.5

    def scale(self, epoch: int, step: int = 0, total: int = 1) -> float:
        passed = sum(milestone <= epoch for milestone in range(self.start, self.end + 1, self.every))
        return self.factor**passed


@dataclass(frozen=True)
class Cosine:
    """Half a cosine over the run's steps, from 1 down to `end_factor`, which the step after the last would have."""

    end_factor: float = 0.0

    def scale(self, epoch: int, step: int = 0, total: int = 1) -> float:
        falling = (1 + math.cos(math.pi * min(step / max(total, 1), 1.0))) / 2
        return self.end_factor + (1 - self.end_factor) * falling


@dataclass(frozen=True)
class WarmUp:
    """A straight line over the first `steps` steps, the last of which has the whole learning rate; then `schedule`, to which
    the warm-up's steps do not count. (Epochs do: a decay by epochs comes when it would without a warm-up.) `share`: of all
    steps, rounded, in place of `steps`, where it is not 0."""

    steps: int
    schedule: Schedule
    share: float = 0.0

    def scale(self, epoch: int, step: int = 0, total: int = 1) -> float:
        steps = round(self.share * total) if self.share else self.steps
        rising = min((step + 1) / steps, 1.0) if steps else 1.0
        return rising * self.schedule.scale(epoch, max(step - steps, 0), total - steps)
