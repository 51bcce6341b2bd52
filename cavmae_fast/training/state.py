"""`RunState`: all that a run needs to go on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cavmae_fast import compat
from cavmae_fast.data.loader import Loader
from cavmae_fast.models.precision import Precision
from cavmae_fast.training.ema import MovingAverage
from cavmae_fast.training.optimizers import make_optimizer
from cavmae_fast.training.random_state import random_state, set_random_state
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.sharding import whole

SMALLEST_SCALE = 1.0
"""In float16 the loss is scaled up, against gradients that vanish. At this scale it is not: gradients that still overflow do
so by themselves, and to lower the scale further would cure nothing."""


@dataclass(eq=False)
class RunState:
    """All that a run needs to go on: `state_dict` after a step and `load_state_dict` into a run that was made in the same
    way give, bit for bit, the steps that would have followed.

    Attributes:
        model: on the run's device, what is trained already decided.
        recipe: how it is optimized.
        loader: of the training clips.
        precision: device and dtype.
        optimizer, scaler, average: made by `start`; no average without the recipe's `ema`.
        step: steps taken or skipped.
        skipped, skipped_in_a_row: steps that were skipped, in all and just now, as far as their numbers have arrived.
        learning_rate: of the step, where nothing has a learning rate of its own.
    """

    model: nn.Module
    recipe: Recipe
    loader: Loader
    precision: Precision
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: MovingAverage | None = None
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    learning_rate: float = 0.0

    @classmethod
    def start(cls, model: nn.Module, recipe: Recipe, loader: Loader, precision: Precision) -> RunState:
        """A run before its first step. ValueError when the recipe asks for drop path and the model has none."""
        if recipe.drop_path:
            if not hasattr(model, "drop_path"):
                raise ValueError(f"--drop-path is {recipe.drop_path}, but {type(model).__name__} has no drop path")
            model.drop_path = recipe.drop_path
        average = MovingAverage(model, recipe.ema) if recipe.ema else None
        optimizer = make_optimizer(recipe, model, precision.dtype)
        return cls(model, recipe, loader, precision, optimizer, precision.scaler(), average)

    def set_learning_rate(self, epoch: int, total: int) -> None:
        """Sets what belongs to the next step, in `epoch`, of `total` steps."""
        self.learning_rate = self.recipe.learning_rate * self.recipe.schedule.scale(epoch, self.step, total)
        for group in self.optimizer.param_groups:
            rate = self.learning_rate * group["scale"]
            if isinstance(group["lr"], Tensor):  # a CUDA graph reads it from the device
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` (scaled, in float16)."""
        self.scaler.scale(loss).backward()

    def update(self, loss: Tensor) -> dict[str, Tensor]:
        """One step of the optimizer with the gradients that `backward` left, which are dropped then. `loss`: what the
        gradients are of.

        Where loss or gradients are not finite, parameters, moments and averages stay as they are. That is decided on the
        device, so the host need not wait.

        Returns scalars on the device: `finite`; `grad_norm`, the norm of all gradients together before they are clipped; in
        float16 `loss_scale`. In float16 large scaled gradients overflow now and then; such a step is not taken, the scale
        is lowered, and all is as it should be: `finite` is false only when the scale is as low as it may be.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        parts_norm = nn.utils.get_total_norm(_in_float32([p.grad for p in parameters]))
        norm = whole(parts_norm)
        computed = loss.detach().isfinite()
        taken = computed & norm.isfinite()
        measured = {"finite": taken, "grad_norm": norm}
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones_like(norm))
            measured |= {"finite": computed & (taken | (scale > SMALLEST_SCALE)), "loss_scale": scale}
        if self.recipe.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip_grad, parts_norm)
        compat.step_unless(self.optimizer, ~taken)
        self.scaler.update()
        if self.average is not None:
            self.average.update(taken)
        for parameter in parameters:  # apex's zero_grad takes no arguments
            parameter.grad = None
        return measured

    def averaged(self) -> contextlib.AbstractContextManager:
        """Within the block the model has the weights that are evaluated: the averages where there are some."""
        return contextlib.nullcontext() if self.average is None else self.average.in_force()

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, averages, place in the data and random states; tensors are the run's own, not copies."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer_state(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "loader": self.loader.state_dict(),
            "random": random_state(self.precision.device),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state as it is without a CUDA graph, so that the run may go on without one."""
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            if isinstance(group["lr"], Tensor):
                group |= {"lr": self.learning_rate * group["scale"], "capturable": False}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken. ValueError when the data or the order is another."""
        self.loader.load_state_dict(state["loader"])
        self.model.load_state_dict(state["model"])
        groups = [{name: group[name] for name in ("lr", "scale")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, groups):
            group.update(own)  # the rate is set at every step; the scale is not in checkpoints of earlier versions
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        set_random_state(self.precision.device, state["random"])
        self.step = state["step"]
        self.skipped = state.get("skipped", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)


def _in_float32(gradients: list[Tensor]) -> list[Tensor]:
    """Tensors with the norms of `gradients`, in float32 at least: a gradient in 16 bits is stood for by its norm, which
    PyTorch would round to 16 bits."""
    return [g if g.dtype.itemsize > 2 else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
