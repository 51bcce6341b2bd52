"""Two-dimensional sine-cosine position embedding (MAE, arXiv:2111.06377, appendix A.1)."""

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
