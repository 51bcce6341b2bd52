"""Random numbers of a training step under several ranks: every rank draws them for all, and takes its own rows."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


def own_rows(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """`draw(rows of all ranks)`, `[ranks * rows, ...]`, cut to this rank's rows `[rows, ...]`; alone: `draw(rows)`.

    With the same generator on every rank, a clip's numbers then depend on its place in the step and not on how many ranks
    share the step, and every rank's generator moves on equally far. Whatever a model draws for each sample in training
    (masks, dropped paths) is drawn through this function, with as many rows on each rank. It costs the numbers of all
    ranks on each; these are few beside a step's arithmetic.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return draw(rows)
    return draw(dist.get_world_size() * rows)[dist.get_rank() * rows :][:rows]
