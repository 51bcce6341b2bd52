"""Steps before anything is read: which clips, and every decision about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cavmae_fast.data.augment import Augmentation, Draws, draw
from cavmae_fast.data.order import Order


class Want(NamedTuple):
    """A clip that a step needs: its place in the epoch, whether it is to be mixed into another, its number, its frame."""

    position: int
    partner: bool
    clip: int
    frame: int


@dataclass(frozen=True)
class Step:
    """One rank's clips of one step, and the decisions about them.

    Attributes:
        epoch, position: where the step begins.
        draws: a row for each clip.
        wants: the clips, then the partners of those that are mixed.
    """

    epoch: int
    position: int
    draws: Draws
    wants: list[Want]


@dataclass(frozen=True)
class Plan:
    """The steps of a loader, a function of its options alone.

    Attributes:
        order: whose clips come when.
        augmentation: what is drawn for them.
        num_frames: of a clip.
        audio_length: of the spectrograms, in frames.
        training: go on from epoch to epoch, and replace clips that cannot be used.
        frame: use this frame instead of the drawn one.
    """

    order: Order
    augmentation: Augmentation
    num_frames: int
    audio_length: int
    training: bool
    frame: int | None = None

    def __post_init__(self) -> None:
        self.draw(0, range(0))  # masks wider than the spectrogram are an error now, not in the first step

    def draw(self, epoch: int, span: range) -> Draws:
        """The decisions for these positions."""
        return draw(
            self.augmentation, seed=self.order.seed, epoch=epoch, position=span.start, rows=len(span),
            num_clips=self.order.clips, num_frames=self.num_frames, audio_length=self.audio_length,
        )  # fmt: skip

    def steps(self, epoch: int, position: int) -> Iterator[Step]:
        """This rank's steps from there on: to the end of the epoch or, in training, without end."""
        while True:
            sequence = self.order.sequence(epoch)
            for _ in range(self.order.steps(position)):
                step = self.step(epoch, position, sequence)
                if step.wants:
                    yield step
                position += self.order.stride
            if not self.training:
                return
            epoch, position = epoch + 1, 0

    def step(self, epoch: int, position: int, sequence: np.ndarray) -> Step:
        """The step at `position` of an epoch whose sequence this is."""
        span = self.order.span(position)
        draws = self.draw(epoch, span)
        frames = draws.frame if self.frame is None else np.full(len(span), self.frame)
        wants = [Want(p, False, int(sequence[p]), int(frame)) for p, frame in zip(span, frames, strict=True)]
        for row in np.flatnonzero(draws.mixed):
            wants.append(Want(span[row], True, int(draws.partner[row]), int(draws.partner_frame[row])))
        return Step(epoch, position, draws, wants)

    def substitute(self, want: Want, attempt: int) -> int | None:
        """The clip that takes the place of one that cannot be used, when `attempt` clips have failed there; None in
        evaluation, which leaves the place empty."""
        if not self.training:
            return None
        return self.order.substitute(want.position, want.partner, want.clip, attempt)
