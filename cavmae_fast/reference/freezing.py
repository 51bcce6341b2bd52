"""What no loss reaches is frozen: the machinery behind `train_losses` and `train_with` of all models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Freezing(nn.Module):
    """A model that freezes its parameters by name."""

    _frozen_unreached: tuple[str, ...] = ()

    def freeze_unreached(self, unreached: Callable[[str], object]) -> None:
        """Freezes the parameters for whose names `unreached` is true, and drops their gradients.

        Plain DistributedDataParallel would wait for the gradient of such a parameter. What an earlier call froze and is now
        reached is trained again; what was frozen by anyone else stays as it is.
        """
        for name in self._frozen_unreached:
            self.get_parameter(name).requires_grad_(True)
        frozen = [name for name, parameter in self.named_parameters() if unreached(name) and parameter.requires_grad]
        for name in frozen:
            parameter = self.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None
        self._frozen_unreached = tuple(frozen)


class LossesInForce(Freezing):
    """A model with several losses. A new one trains all of them."""

    _out_of_force: frozenset[str] = frozenset()

    def put_in_force(self, in_force: dict[str, bool], unreached: Callable[[str], object]) -> None:
        """Puts the losses of `in_force` into force or out of it, and freezes what is `unreached`, see `freeze_unreached`.
        Raises ValueError when no loss is left."""
        if not any(in_force.values()):
            *names, last = in_force
            all_of_them = "both" if len(in_force) == 2 else "all"
            raise ValueError(f"{', '.join(names)} and {last} are {all_of_them} False; at least one loss must be trained")
        self._out_of_force = frozenset(loss for loss, trained in in_force.items() if not trained)
        self.freeze_unreached(unreached)

    def check_in_force(self, **weights: tuple[str, float]) -> None:
        """ValueError when a training step would report a loss that is out of force: the parameters that it alone trains are
        frozen, at random values in a new model. Evaluation may compute every loss.

        `weights`: for each loss the name of the argument that holds its weight, and the weight.
        """
        if not (self.training and torch.is_grad_enabled()):
            return
        for loss, (name, weight) in weights.items():
            if weight != 0 and loss in self._out_of_force:
                raise ValueError(
                    f"{name} is {weight}, but this model's train_losses() froze what that loss trains; it must be 0, or "
                    f"train_losses be called again with {loss}=True"
                )
