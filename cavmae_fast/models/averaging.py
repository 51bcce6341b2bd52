"""The mean of the weights of several checkpoints, as published for the last epochs of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cavmae_fast.models.weights import CheckpointError, read_state


def average_states(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the states in these checkpoints (see `read_state`), name by name.

    Floating-point tensors are averaged in float64 and given back in the dtype of the first checkpoint; others must be equal.
    Checkpoints are read one after the other, so two of them are in memory at most.

    Raises:
        ValueError: `paths` is empty.
        CheckpointError: one cannot be read, or does not fit the first; the message names the file and the key.
    """
    if not paths:
        raise ValueError("paths is empty; it must name at least one checkpoint")
    first = read_state(paths[0])
    total = {name: value.double() if value.is_floating_point() else value for name, value in first.items()}
    for path in paths[1:]:
        state = read_state(path)
        if odd := sorted(first.keys() ^ state.keys()):
            holder = paths[0] if odd[0] in first else path
            raise CheckpointError(f"checkpoint {path} does not fit {paths[0]}: {odd[0]} is in {holder} alone")
        for name, value in state.items():
            if value.shape != first[name].shape:
                shapes = f"{list(value.shape)}, there {list(first[name].shape)}"
                raise CheckpointError(f"checkpoint {path} does not fit {paths[0]}: {name} has shape {shapes}")
            if value.is_floating_point():
                total[name] += value
            elif not torch.equal(value, first[name]):
                raise CheckpointError(f"checkpoint {path} does not fit {paths[0]}: {name} differs and is no float")
    return {
        name: (value / len(paths)).to(first[name].dtype) if value.is_floating_point() else value
        for name, value in total.items()
    }
