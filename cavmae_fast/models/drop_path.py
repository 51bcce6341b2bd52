"""Drop path (Huang et al., 2016): in training, a clip passes a block by at random, attention and MLP each by itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.reference.own_rows import own_rows


class DropPath:
    """A model with `drop_path`: beside `nn.Module`, its modalities, and the blocks that a token passes (`depth`)."""

    drop_path = 0.0
    "Chance that a clip leaves out a branch of the last block in training; it falls linearly to 0 in the first. 0: no drop."
    modalities: ClassVar[str]
    depth: int
    training: bool

    def draw_paths(self, batch: int, device: torch.device) -> Tensor | None:
        """What the blocks' updates are multiplied by in a pass over `batch` clips, `[depth, 2, streams, batch]`: the streams
        are the modalities, each alone, and all of them together. None, and nothing drawn, unless some are left out.

        Raises ValueError when `drop_path` is out of range.
        """
        if not (self.training and self.drop_path):
            return None
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be at least 0 and below 1")
        return draw_paths(self.drop_path, self.depth, len(self.modalities) + 1, batch, device)


def draw_paths(rate: float, depth: int, streams: int, batch: int, device: torch.device) -> Tensor:
    """What the two branches of every block are multiplied by, `[depth, 2, streams, batch]` float32: 0 where a clip leaves a
    branch out, else 1 over the chance that it does not, so that the expectation is that of the whole network.

    The chance of leaving out rises linearly from 0 in the first block to `rate` in the last. All numbers of a pass are
    drawn at once, so that a pass that computes fewer streams draws the same ones.
    """
    rates = torch.linspace(0.0 if depth > 1 else rate, rate, depth, device=device).view(-1, 1, 1)
    drawn = own_rows(lambda clips: torch.rand(clips, depth, 2, streams, device=device), batch)
    kept = drawn >= rates
    return (kept / (1 - rates)).permute(1, 2, 3, 0)


def on_path(delta: Tensor, factors: Tensor | None, layout: StreamLayout) -> Tensor:
    """A branch's update `[R, D]`, times the factor `[streams, batch]` of each stream's clips; None leaves it as it is."""
    if factors is None:
        return delta
    rows = [factor.repeat_interleave(length) for factor, length in zip(factors, layout.lengths)]
    return delta * torch.cat(rows).unsqueeze(1).to(delta.dtype)
