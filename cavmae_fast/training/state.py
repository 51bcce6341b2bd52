"""`RunState`: all that a run needs to go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cavmae_fast import compat
from cavmae_fast.data.loader import Loader
from cavmae_fast.models.precision import Precision
from cavmae_fast.training.optimizers import make_optimizer
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.sharding import whole


@dataclass(eq=False)
class RunState:
    """All that a run needs to go on: `state_dict` after a step and `load_state_dict` into a run that was made in the same
    way give, bit for bit, the steps that would have followed.

    Attributes:
        model: on the run's device, what is trained already decided.
        recipe: how it is optimized.
        loader: of the training clips.
        precision: device and dtype.
        optimizer, scaler: made by `start`.
        step: steps taken.
        learning_rate: of the last step, where nothing has a learning rate of its own.
    """

    model: nn.Module
    recipe: Recipe
    loader: Loader
    precision: Precision
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    learning_rate: float = 0.0

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, loader: Loader, precision: Precision) -> RunState:
        """A run before its first step."""
        return cls(model, recipe, loader, precision, make_optimizer(recipe, model), precision.scaler())

    def set_learning_rate(self, epoch: int, total: int) -> None:
        """Sets what belongs to the next step, in `epoch`, of `total` steps."""
        self.learning_rate = self.recipe.learning_rate * self.recipe.schedule.scale(epoch, self.step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["scale"]

    def update(self, loss: Tensor) -> Tensor:
        """Backward and one step of the optimizer; returns whether loss and gradients were finite, a scalar on the device.

        When they were not, the optimizer leaves parameters and moments as they are. That is decided on the device, so
        the host need not wait. (In float16 the scaler decides in the same way, and lowers its scale.)
        """
        self.scaler.scale(loss).backward()
        finite = loss.detach().isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            finite = finite & whole(nn.utils.get_total_norm(gradients)).isfinite()
            compat.step_unless(self.optimizer, ~finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return finite

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, place in the data and random states; tensors are the run's own, not copies."""
        random = {"cpu": torch.get_rng_state()}
        if self.precision.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.precision.device)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "random": random,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken. ValueError when the data or the order is another."""
        self.loader.load_state_dict(state["loader"])
        self.model.load_state_dict(state["model"])
        scales = [group["scale"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, scale in zip(self.optimizer.param_groups, scales):  # not in checkpoints of earlier versions
            group["scale"] = scale
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"].cpu(), self.precision.device)
        self.step = state["step"]
