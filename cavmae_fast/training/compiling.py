"""torch.compile for the models of this package."""

from __future__ import annotations

import torch
from torch import nn


def compile_model(model: nn.Module, backend: str = "inductor") -> None:
    """Has the heavy part of the model's forward pass, its method `compute`, compiled when it is first called.

    What `forward` checks and draws stays outside: its errors are its own and not the compiler's, and random numbers are
    those of the model that is not compiled. Names of parameters stay as they are. Once for each shape of the inputs.

    Raises ValueError when the model has no `compute`.
    """
    if not hasattr(model, "compute"):
        raise ValueError(f"--compile: {type(model).__name__} has no method compute that could be compiled")
    model.compute = torch.compile(model.compute, backend=backend, dynamic=False)
