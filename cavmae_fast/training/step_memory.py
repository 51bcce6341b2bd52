"""How much memory a training step takes: computed without computing the step, at its full batch, for any device.

The step runs on tensors that have shapes and no contents (PyTorch's fake tensors), and the bytes of all that live at a time
are added up. Not counted: what PyTorch's own kernels and allocator take beside that, and the CUDA context, about half a GB.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cavmae_fast import compat
from cavmae_fast.models.packed import RECOMPUTE
from cavmae_fast.models.systems import SYSTEMS, inputs

RESERVE = 1.5e9
"Bytes of a GPU that are left for the CUDA context, its libraries and what the allocator cannot use."
LARGE_BATCH = 128
"Of so many clips the peak grows in proportion to them; of few, it is reached where all gradients are there."
MOMENTS = 2
"Copies of a trained parameter that the optimizer holds: Adam's two moments."


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Attributes:
        model: weights, and the optimizer's moments.
        kept: what the forward pass leaves for the backward pass, weights rounded for autocast included.
        peak: the most at any time.
    """

    model: int
    kept: int
    peak: int


class LiveBytes(compat.operator_mode()):
    """While it is entered, counts the bytes of all storages that operators made and that still live (`now`), and the most
    there were (`peak`). Those of the tensors `known` do not count."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._storages: dict[int, weakref.ref | None] = {id(storage): None for storage in self._known}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = id(storage), storage.nbytes()
        if place in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            del self._storages[place]
            self.now -= size

        self._storages[place] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def step_memory(
    model: nn.Module, dtype: torch.dtype, loss_of: Callable[[nn.Module], Tensor], kind: str = "cpu"
) -> StepMemory:
    """The memory of the step that takes the gradients of `loss_of(model)`.

    `loss_of` is given a copy of the model without contents (itself, where it has none), and makes inputs of any contents.
    `dtype`: of the matrix products; `kind` of device, 'cpu' or 'cuda', whose autocast rules hold. The model stays as it is.
    """
    with compat.fake_tensors():
        light = model if any(map(compat.is_fake, model.parameters())) else copy.deepcopy(model)
        with LiveBytes(light.parameters()) as live:
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                loss = loss_of(light)
            kept = live.now
            loss.backward()
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) + MOMENTS * trained
    return StepMemory(weights, kept, weights + live.peak)


def pretraining_memory(system: str, recompute: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> StepMemory:
    """The memory of a training step of one of `SYSTEMS`, whose model is made without contents either; in MAViL's second
    stage with the teacher."""
    with compat.fake_tensors():
        model = SYSTEMS[system].create(recompute=recompute)
        return step_memory(model, dtype, lambda light: SYSTEMS[system].step_loss(light, *inputs(light, batch, empty=True)))


def memory_table(
    system: str, batch: int, choices: Sequence[str] = RECOMPUTE, gigabytes: Sequence[float] = (24, 80)
) -> list[tuple[str, str]]:
    """(choice of `recompute`, what a pretraining step in bfloat16 takes with it, and the largest batch for GPUs of so many
    GB), a line each. `system`: of `SYSTEMS`. ValueError for a batch below 2."""
    if batch < 2:
        raise ValueError(f"--batch is {batch}; it must be at least 2")
    lines = []
    large = max(batch, LARGE_BATCH)
    for recompute in choices:
        found = {count: pretraining_memory(system, recompute, count) for count in {batch, large // 2, large}}
        asked, many = found[batch], found[large]
        per_clip = (many.peak - found[large // 2].peak) / (large - large // 2)
        fits = (
            f"{size:g} GB take {max(0, int(large + (size * 1e9 - RESERVE - many.peak) / per_clip)):,} clips"
            for size in gigabytes
        )
        kept = f"{asked.kept / batch / 2**20:,.0f} MiB per clip kept for backward"
        lines.append((f"--recompute {recompute}", f"{asked.peak / 1e9:,.1f} GB ({kept}); {', '.join(fits)}"))
    return lines
