"""The moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class MovingAverage:
    """The exponential moving average of the weights that are trained, in float32 beside the model, from their first values
    on. What is not trained has no average."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self._weights.items()
        }

    @torch.no_grad()
    def update(self, taken: Tensor) -> None:
        """Moves the averages towards the weights; not at all where `taken`, a scalar on the device, is false."""
        share = (1 - self.decay) * taken
        for name, weight in self._weights.items():
            average = _own_part(self._averages[name])
            average.lerp_(_own_part(weight).to(average.dtype), share.to(average.dtype))

    @torch.no_grad()
    def give(self) -> None:
        """Writes the averages over the model's weights."""
        for name, weight in self._weights.items():
            weight.copy_(self._averages[name])

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Within the block the model has the averages for its weights."""
        own = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.give()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name; the run's own tensors, not copies."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes the averages over."""
        for name, average in self._averages.items():
            average.copy_(state[name])


def _own_part(x: Tensor) -> Tensor:
    """`x`, or this rank's shard of it."""
    return x.to_local() if isinstance(x, DTensor) else x
