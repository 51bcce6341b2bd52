"""Tables of positions for inputs of another size: cut or interpolated, frequency and time each by itself."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Adaptation = Literal["cut", "center", "interpolate"]
"""What becomes of a table of audio positions with more time columns than the model takes: its first columns are kept, its
middle columns, or all are interpolated. A table with fewer columns, and a picture's, is always interpolated."""


class Adapted(NamedTuple):
    """A table for the model's grid, and in words what was done to it."""

    table: Tensor
    said: str


def adapt_tower(name: str, table: Tensor, modality: str, grid: tuple[int, ...], how: Adaptation = "cut") -> Adapted:
    """As `adapt`, of the positions `[1, 1 + L, width]` of a tower: a class token's before those of its patches.

    The tokens of a tower's sound come moment by moment, those of its pictures frame by frame, of which each is a table of
    its own; the number of frames stays.

    Args:
        name, table, how: as in `adapt`.
        modality: 'a', sound, or 'v', pictures.
        grid: the tower's patches: moments and frequency rows, or (frames,) rows and columns.
    """
    first, places = table[:, :1], table[:, 1:]
    if modality == "a":
        moments, rows = grid
        if places.shape[1] % rows:
            raise ValueError(f"{name} holds {places.shape[1]} positions, which fill no grid of {rows} rows")
        by_frequency = places.unflatten(1, (-1, rows)).transpose(1, 2).flatten(1, 2)
        moved, said = adapt(name, by_frequency, rows, (rows, moments), how)
        places = moved.unflatten(1, (rows, moments)).transpose(1, 2).flatten(1, 2)
    else:
        *frames, rows, columns = grid
        count = frames[0] if frames else 1
        if places.shape[1] % count:
            raise ValueError(f"{name} holds {places.shape[1]} positions, which are not those of {count} frames")
        moved, said = adapt(name, places[0].unflatten(0, (count, -1)), None, (rows, columns), how)
        places = moved.flatten(0, 1).unsqueeze(0)
    return Adapted(torch.cat([first, places], dim=1), said)


def adapt(name: str, table: Tensor, rows: int | None, grid: tuple[int, int], how: Adaptation = "cut") -> Adapted:
    """The positions `table [1, L, width]` of one grid of patches, for the grid `(rows, columns)` of a model.

    The tokens of a spectrogram come frequency by frequency: 512 positions are 8 rows (frequency) of 64 columns (time). A row
    and a column keep their meaning when the other direction changes. Clips begin where their sound begins, so by default a
    shorter spectrogram gets the first columns. Of sine-cosine tables these are exactly what a model of that length is made
    with. `center` is what AST does (Gong et al., Interspeech 2021); tables that grow are interpolated there, too.

    Args:
        name: of the table, for the message.
        table: `[1, L, width]`.
        rows: of the table's own grid, where they are known (audio's frequency rows); None: the grid is square.
        grid: the model's rows and columns.
        how: what to do with time columns that are too many; only for audio.

    Raises:
        ValueError: `how` is not known, or `L` positions do not fill a grid of these rows.
    """
    if how not in get_args(Adaptation):
        raise ValueError(f"adapt_positions is {how!r}; it must be one of True, False, {', '.join(get_args(Adaptation))}")
    length, audio = table.shape[1], rows is not None
    rows = rows or math.isqrt(length)
    if length % rows or (not audio and rows * rows != length):
        raise ValueError(f"{name} holds {length} positions, which fill no {f'grid of {rows} rows' if audio else 'square'}")
    here = (rows, length // rows)
    if here == tuple(grid):
        return Adapted(table, f"{name}: as it was")
    places = table.unflatten(1, here)  # [1, rows, columns, width]
    words = f"{name}: {here[0]} x {here[1]} -> {grid[0]} x {grid[1]}"
    if audio and how != "interpolate" and here[0] == grid[0] and grid[1] < here[1]:
        start = 0 if how == "cut" else (here[1] - grid[1]) // 2
        kept = places[:, :, start : start + grid[1]]
        return Adapted(kept.flatten(1, 2).clone(), f"{words}, time columns {start} to {start + grid[1] - 1} kept")
    images = places.permute(0, 3, 1, 2).float()
    # Linear where only time is stretched, as in AST; bicubic for pictures, as in DeiT and MAE.
    mode = "bilinear" if audio else "bicubic"
    moved = F.interpolate(images, size=tuple(grid), mode=mode, align_corners=False)
    done = moved.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return Adapted(done.contiguous(), f"{words}, interpolated ({mode})")
