"""The plan of a run: which clips come when, and every decision about them, before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.draws import Augmentation, Draws, draw


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a data set's clips, a function of (seed, epoch) alone.

    The sequence of an epoch is cut into steps of `world_size * batch_size` positions, each step into one piece per rank.
    So the ranks' pieces of a step lie side by side, without overlap or gap, and a run can go on from any position with
    another number of ranks.

    Attributes:
        clips: of the data set.
        batch_size: clips per step, on each rank.
        seed: of the shuffle.
        shuffle: a new permutation each epoch; else the data set's order.
        weights: `[clips]`, 0 or more: draw `clips` clips with replacement, each as often as its weight says, instead of
            a permutation (balanced sampling).
        rank, world_size: of this process and of all.
        drop_last: leave out the last step when it is not full, so that all ranks take as many full steps.
    """

    clips: int
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    weights: np.ndarray | None = None
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed is {self.seed}; allowed: integers of 0 or more")
        if self.clips < 1 or self.batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"clips={self.clips}, batch_size={self.batch_size}, rank={self.rank}, world_size={self.world_size}; "
                "allowed: clips and batch_size >= 1, 0 <= rank < world_size"
            )
        if self.weights is not None and (
            self.weights.shape != (self.clips,)
            or not np.isfinite(self.weights).all()
            or self.weights.min() < 0
            or self.weights.sum() <= 0
        ):
            raise ValueError(
                f"weights has shape {list(self.weights.shape)}; allowed: [{self.clips}] finite numbers of 0 or more, "
                "not all 0"
            )

    def sequence(self, epoch: int) -> np.ndarray:
        """The clip at each position of the epoch, `[clips]` int64."""
        generator = np.random.default_rng([self.seed, epoch])
        if self.weights is not None:
            bounds = np.cumsum(self.weights, dtype=np.float64)
            drawn = np.searchsorted(bounds, generator.random(self.clips) * bounds[-1], side="right")
            return np.minimum(drawn, np.flatnonzero(self.weights)[-1])  # a product may round up to the last bound
        return generator.permutation(self.clips) if self.shuffle else np.arange(self.clips)

    @property
    def stride(self) -> int:
        """Positions a step takes on all ranks together."""
        return self.world_size * self.batch_size

    def steps(self, start: int = 0) -> int:
        """Steps from position `start` to the epoch's end."""
        left = max(0, self.clips - start)
        return left // self.stride if self.drop_last else -(-left // self.stride)

    def span(self, position: int) -> range:
        """This rank's positions of the step that begins at `position`; of a last step that is not full, its share."""
        count = min(self.stride, self.clips - position)
        if count == self.stride:
            return range(position + self.rank * self.batch_size, position + (self.rank + 1) * self.batch_size)
        first, last = (count * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(position + first, position + last)

    def substitute(self, position: int, partner: bool, clip: int, attempt: int) -> int:
        """The clip that takes the place of `clip`, which cannot be used, when `attempt` clips have failed there."""
        generator = np.random.default_rng([self.seed, position, partner, clip, attempt])
        return int(generator.integers(self.clips) if self.weights is None else generator.choice(self._drawable))

    @cached_property
    def _drawable(self) -> np.ndarray:
        return np.flatnonzero(self.weights)


class Want(NamedTuple):
    """A clip that a step needs.

    Attributes:
        position: its place in the epoch.
        partner: whether it is to be mixed into the clip of that place.
        clip: its number in the data set.
        moment: where in it the picture or the crop is taken, in [0, 1) (`crop_at`).
    """

    position: int
    partner: bool
    clip: int
    moment: float


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
        clip: what the model takes of a clip.
        training: go on from epoch to epoch, and replace clips that cannot be used.
        moment: use this one instead of those that are drawn.
    """

    order: Order
    augmentation: Augmentation
    clip: ClipSpec
    training: bool
    moment: float | None = None

    def __post_init__(self) -> None:
        self.draw(0, range(0))  # masks wider than the spectrogram are an error now, not in the first step

    def draw(self, epoch: int, span: range) -> Draws:
        """The decisions for these positions."""
        return draw(
            self.augmentation,
            seed=self.order.seed,
            epoch=epoch,
            position=span.start,
            rows=len(span),
            num_clips=self.order.clips,
            audio_length=self.clip.audio_length,
            num_mel_bins=self.clip.mel_bins,
        )

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
        moments = draws.moment if self.moment is None else np.full(len(span), self.moment)
        wants = [Want(p, False, int(sequence[p]), float(moment)) for p, moment in zip(span, moments, strict=True)]
        for row in np.flatnonzero(draws.mixed):
            wants.append(Want(span[row], True, int(draws.partner[row]), float(draws.partner_moment[row])))
        return Step(epoch, position, draws, wants)

    def substitute(self, want: Want, attempt: int) -> int | None:
        """The clip that takes the place of one that cannot be used, when `attempt` clips have failed there; None in
        evaluation, which leaves the place empty."""
        if not self.training:
            return None
        return self.order.substitute(want.position, want.partner, want.clip, attempt)
