"""Figures without a window system."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mosaic(pictures: np.ndarray) -> np.ndarray:
    """A picture `[H, W, 3]` as it is; several `[F, H, W, 3]` as one, in a grid that is at least as wide as high, row by row
    (black where there is none)."""
    if pictures.ndim == 3:
        return pictures
    count, height, width, channels = pictures.shape
    rows = math.isqrt(count)
    columns = -(-count // rows)
    grid = np.zeros((rows * columns, height, width, channels), pictures.dtype)
    grid[:count] = pictures
    grid = grid.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches and its axes `[rows, columns]`. It shares no state with the user's own figures, as pyplot's
    would."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
