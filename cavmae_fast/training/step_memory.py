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
from cavmae_fast.models import PRESETS, create_model
from cavmae_fast.models.packed import RECOMPUTE

RESERVE = 1.5e9
"Bytes of a GPU that are left for the CUDA context, its libraries and what the allocator cannot use."
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


def pretraining_memory(preset: str, recompute: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> StepMemory:
    """The memory of a pretraining step of the preset's model, made without contents either."""
    with compat.fake_tensors():
        model = create_model(preset, recompute=recompute)
        clip, weights = model.clip_spec, PRESETS[preset]

        def loss_of(light: nn.Module) -> Tensor:
            audio = torch.empty(batch, clip.audio_length, clip.mel_bins)
            imgs = torch.empty(batch, 3, *clip.image_size, dtype=torch.uint8)
            ratios = (weights.mask_ratio, weights.mask_ratio)
            return light(audio, imgs, *ratios, weights.mae_loss_weight, weights.contrast_loss_weight).loss

        return step_memory(model, dtype, loss_of)


def memory_table(
    preset: str, batch: int, choices: Sequence[str] = RECOMPUTE, gigabytes: Sequence[float] = (24, 80)
) -> list[tuple[str, str]]:
    """(choice of `recompute`, what a pretraining step in bfloat16 takes with it, and the largest batch for GPUs of so many
    GB), a line each. ValueError for a batch below 2, or an unknown preset."""
    if batch < 2:
        raise ValueError(f"--batch is {batch}; it must be at least 2")
    lines = []
    for recompute in choices:
        few, many = (pretraining_memory(preset, recompute, count) for count in (batch // 2, batch))
        per_clip = (many.peak - few.peak) / (batch - batch // 2)
        fits = (
            f"{size:g} GB take {max(0, int(batch + (size * 1e9 - RESERVE - many.peak) / per_clip)):,} clips"
            for size in gigabytes
        )
        kept = f"{many.kept / batch / 2**20:,.0f} MiB per clip kept for backward"
        lines.append((f"--recompute {recompute}", f"{many.peak / 1e9:,.1f} GB ({kept}); {', '.join(fits)}"))
    return lines
