"""Batches for tests of training: random clips of a tiny model's size, without any file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.data.batches import Batch
from tests.tiny import inputs


def batch_of(audio: Tensor, image: Tensor, epoch: int = 0, position: int = 0, labels: Tensor | None = None) -> Batch:
    """The batch of these clips, which are called `clip 0`, `clip 1`, ..."""
    ids = [f"clip {row}" for row in range(len(audio))]
    return Batch(ids, audio, image, labels, np.arange(len(audio)), epoch, position, [])


class ClipsAtHand:
    """A loader of `steps` batches per epoch that follow from epoch and position alone: clips of two kinds, with noise."""

    waited = 0.0

    def __init__(self, batch: int = 4, steps: int = 10, dtype: torch.dtype = torch.float32) -> None:
        self.epoch = self.position = 0
        self.batch, self.steps, self.dtype = batch, steps, dtype

    def batch_at(self, epoch: int, position: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * epoch + position)
        audio, image = (
            x + 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            for x in inputs(batch=self.batch, dtype=self.dtype)
        )
        return batch_of(audio, image, epoch, position)

    def __iter__(self) -> Iterator[Batch]:
        if self.epoch_done:
            self.epoch, self.position = self.epoch + 1, 0
        while self.position < self.steps:
            self.position += 1
            yield self.batch_at(self.epoch, self.position - 1)

    @property
    def epoch_done(self) -> bool:
        return self.position == self.steps

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
