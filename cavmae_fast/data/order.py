"""Which clips come when: an epoch's global sequence, and each rank's part of every step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a data set's clips, a function of (seed, epoch) alone.

    The sequence of an epoch is cut into steps of `world_size * batch_size` positions, each step into one piece a rank. So
    the ranks' pieces of a step are neighbors, neither overlap nor leave a gap, and a run can go on from any position
    with another number of ranks.

    Attributes:
        clips: of the data set.
        batch_size: clips a step, on each rank.
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
