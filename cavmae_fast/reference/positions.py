"""Sine-cosine position embeddings: in two dimensions (MAE, arXiv:2111.06377, appendix A.1) and in three."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(width: int, grid_height: int, grid_width: int) -> Tensor:
    """Positions `[grid_height * grid_width, width]` in float32, row after row.

    The first half of `width` encodes the column, the second half the row; each half is sines, then cosines, of
    `position / 10000^(i / (width/4))`. Raises ValueError when 4 does not divide `width`.
    """
    if width % 4:
        raise ValueError(f"the embedding width is {width}; sine-cosine positions need a multiple of 4")
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(grid_height, dtype=torch.float64), torch.arange(grid_width, dtype=torch.float64), indexing="ij"
    )
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def separable_positions(width: int, grid_frames: int, grid_height: int, grid_width: int) -> Tensor:
    """Positions `[grid_frames * grid_height * grid_width, width]` in float32, frame after frame, row after row.

    The first quarter of `width` encodes the time, as sines and then cosines of `time / 10000^(i / (width/8))`, the others
    the place, as `sincos_positions` (Feichtenhofer et al., arXiv:2205.09113). Raises ValueError when 16 does not divide
    `width`.
    """
    if width % 16:
        raise ValueError(f"the embedding width is {width}; separable positions need a multiple of 16")
    eighth = width // 8
    omega = 10000.0 ** (-torch.arange(eighth, dtype=torch.float64) / eighth)
    angle = torch.arange(grid_frames, dtype=torch.float64).unsqueeze(1) * omega
    time = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    place = sincos_positions(width - width // 4, grid_height, grid_width)
    return torch.cat([time.repeat_interleave(len(place), dim=0), place.repeat(grid_frames, 1)], dim=1)
