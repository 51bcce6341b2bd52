"""Random masking of patches: which are kept, which removed (MAE; CAV-MAE section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cavmae_fast.reference.own_rows import own_rows

MASK_MODES = ("unstructured", "time", "freq", "tf")


class Masking(NamedTuple):
    """What is kept and what removed of `L` patches in each of `B` samples; ids in shuffled order."""

    ids_keep: Tensor
    """`[B, K]` int64"""
    ids_removed: Tensor
    """`[B, L - K]` int64"""
    ids_restore: Tensor
    """`[B, L]` int64: where each patch stands in the shuffled order; smaller than K for the kept ones"""
    mask: Tensor
    """`[B, L]` float32, 1 = removed"""


def kept_tokens(length: int, ratio: float, name: str) -> int:
    """How many of `length` tokens remain at mask `ratio`. ValueError, naming the argument `name`, when none would."""
    if not 0 <= ratio < 1:
        raise ValueError(f"{name} is {ratio}; it must be at least 0 and below 1")
    keep = int(length * (1 - ratio))
    if keep < 1:
        raise ValueError(f"{name} is {ratio}, which keeps none of {length} patches; it must keep at least one")
    return keep


def random_masking(
    batch: int,
    grid: tuple[int, int],
    ratio: float,
    device: torch.device,
    mode: str = "unstructured",
    name: str = "mask_ratio",
) -> Masking:
    """Masks a `grid` (rows, columns) of patches in each of `batch` samples.

    'unstructured' draws one uniform number per patch from torch's generator of `device` and removes the largest, exactly
    as the published code does, so the same seed gives the same mask. 'time' first marks `int(columns * ratio)` whole
    columns for removal, 'freq' as many rows, 'tf' 0.7 times as many of both; unstructured noise fills up the rest. Under
    several ranks `batch` is this rank's, and the masks are its rows of those of all (`own_rows`).
    """
    if mode not in MASK_MODES:
        raise ValueError(f"mask_mode is {mode!r}; it must be one of {', '.join(MASK_MODES)}")
    rows, columns = grid
    keep = kept_tokens(rows * columns, ratio, name)
    noise = own_rows(lambda samples: torch.rand(samples, rows * columns, device=device), batch)
    if mode != "unstructured":
        factor = 0.7 if mode == "tf" else 1.0
        noise = noise.view(batch, rows, columns)
        if mode in ("time", "tf"):
            chosen = _choose(batch, columns, int(columns * ratio * factor), device)
            noise = noise + chosen.unsqueeze(1)
        if mode in ("freq", "tf"):
            chosen = _choose(batch, rows, int(rows * ratio * factor), device)
            noise = noise + chosen.unsqueeze(2)
        noise = noise.flatten(1)
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= keep).to(torch.float32)
    return Masking(ids_shuffle[:, :keep], ids_shuffle[:, keep:], ids_restore, mask)


def _choose(batch: int, count: int, chosen: int, device: torch.device) -> Tensor:
    """`[batch, count]` bool with `chosen` random entries of each row set."""
    order = own_rows(lambda samples: torch.rand(samples, count, device=device), batch).argsort(dim=1)
    return order.argsort(dim=1) < chosen
