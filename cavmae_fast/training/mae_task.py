"""What a masked autoencoder of one modality is pretrained for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.models import MAE
from cavmae_fast.models.mavil_flops import mae_macs
from cavmae_fast.training.held_out import none_usable
from cavmae_fast.training.random_state import random_state, set_random_state
from cavmae_fast.training.ranks import current


@dataclass(frozen=True)
class MAETask:
    """Masked reconstruction of sound ('a') or of pictures ('v'); judged by that of held-out clips."""

    mask_ratio: float
    modality: str

    recorded: ClassVar = ("loss",)
    shown: ClassVar = {}
    panels: ClassVar = {"reconstruction": {"removed patches": "loss"}}

    @property
    def reconstructs(self) -> bool:
        """It is all that it learns."""
        return True

    def prepare(self, model: MAE) -> None:
        """The loss reaches every parameter. ValueError when nothing would be left to reconstruct."""
        model.check_removed(self.mask_ratio, "mask_ratio")

    def losses(self, model: MAE, batch: Batch) -> dict[str, Tensor]:
        """The mean squared error on removed patches."""
        return {"loss": model(batch.audio if self.modality == "a" else batch.image, self.mask_ratio).loss}

    def step_flops(self, model: MAE) -> float:
        """As the fast model computes it."""
        return 6 * sum(mae_macs(model, self.mask_ratio).values())

    @torch.no_grad()
    def evaluate(self, model: MAE, batches: Iterable[Batch]) -> dict[str, float]:
        """`held_out_clips`, and `held_out_loss`, the mean over the clips of all ranks. Masks are drawn from a fixed seed;
        the random state stays as it was."""
        device = next(model.parameters()).device
        before, was_training = random_state(device), model.training
        torch.manual_seed(0)
        model.eval()
        total, clips = 0.0, 0
        for batch in batches:
            total += float(self.losses(model, batch)["loss"]) * len(batch.ids)
            clips += len(batch.ids)
        model.train(was_training)
        set_random_state(device, before)
        totals, counts = zip(*current().gather((total, clips)))
        if not sum(counts):
            raise none_usable()
        return {"held_out_clips": sum(counts), "held_out_loss": sum(totals) / sum(counts)}
