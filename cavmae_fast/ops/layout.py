"""`StreamLayout`: where the token streams of a batch lie in one packed `[rows, width]` buffer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StreamLayout:
    """Streams packed one after the other: stream `s` holds `batch` samples of `lengths[s]` tokens each.

    Row of token `l` of sample `b` in stream `s`: `sum(rows_per_stream[:s]) + b * lengths[s] + l`.
    """

    batch: int
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        if not 1 <= len(self.lengths) <= 3 or min(self.lengths) < 1:
            raise ValueError(f"lengths is {self.lengths}; it must hold one to three lengths of at least 1 token")

    @property
    def rows_per_stream(self) -> list[int]:
        return [self.batch * length for length in self.lengths]

    @property
    def rows(self) -> int:
        return self.batch * sum(self.lengths)

    def streams(self, x: Tensor) -> list[Tensor]:
        """The streams of a packed `[rows, width]` tensor as views `[batch, length, width]`."""
        parts = x.split(self.rows_per_stream)
        return [part.unflatten(0, (self.batch, length)) for part, length in zip(parts, self.lengths)]

    def check(self, name: str, x: Tensor) -> None:
        """Raises ValueError unless `x` is a `[rows, width]` tensor of this layout."""
        if x.dim() != 2 or x.shape[0] != self.rows:
            raise ValueError(f"{name} has shape {list(x.shape)}; {self} needs [{self.rows}, width]")
