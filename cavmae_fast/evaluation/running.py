"""How a model is run over clips: where it computes, in which dtype, and what decodes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from cavmae_fast.data.decode.choosing import choose_backend
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.data.sets.opening import Clips
from cavmae_fast.evaluation.sharing import gather
from cavmae_fast.models.opening import Model, open_model
from cavmae_fast.models.precision import DTYPES, Precision, choose_dtype, find_device

FEW_CLIPS = 200
"Up to this many clips are decoded by this process: to start workers would take longer."


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a model is run; every command of evaluation has these options."""

    batch_size: int = 32
    """Clips per step (of each process, where torchrun has started several)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the matrix products; auto: bfloat16 where the device multiplies it fast (`doctor` says so), else float32."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """What decodes the clips: worker processes (torch), or DALI on the GPU."""
    workers: int | None = None
    """Decoding processes; 0 decodes in this one. Default: 0 for up to 200 clips, else one per core."""

    def precision(self) -> Precision:
        """Device and dtype, with 'auto' resolved. ValueError names a bad option."""
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}; it must be 1 or more")
        device = find_device(self.device)
        return Precision(device, DTYPES[choose_dtype(device)[0] if self.dtype == "auto" else self.dtype])

    def settled(self) -> Running:
        """With what 'auto' stands for in place of that dtype: on every rank what the first one takes, for each measures."""
        if self.dtype != "auto":
            return self
        return replace(self, dtype=gather(choose_dtype(find_device(self.device))[0])[0])

    def open_loader(
        self,
        clips: Clips,
        model: Model,
        device: torch.device,
        frame: int | None = None,
        labels: LabelSet | None = None,
    ) -> Loader:
        """Every clip once, in order, as `model` takes it; `frame` and `labels` as in `Loader`."""
        few = choose_backend(self.loader, clips, device, model.clip_spec)[0] == "torch" and len(clips) <= FEW_CLIPS
        return Loader(
            clips,
            min(self.batch_size, len(clips)),
            model.clip_spec,
            backend=self.loader,
            device=device,
            workers=0 if self.workers is None and few else self.workers,
            frame=frame,
            labels=labels,
        )


def ready_model(model: Model | str | PathLike, precision: Precision) -> Model:
    """The model, opened where it is a path, on its device, in evaluation mode. Raises CheckpointError."""
    opened = open_model(model) if isinstance(model, str | Path | PathLike) else model
    return opened.to(precision.device).eval()
