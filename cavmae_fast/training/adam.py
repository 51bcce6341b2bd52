"""Adam and AdamW in few launches, which also write the weights rounded for the next step's products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cavmae_fast.models.rounded import copies_of, keep_rounded, mark_written
from cavmae_fast.ops.adam_update import adam_update


class _OneUpdate(torch.optim.Adam):
    """What both classes are: PyTorch's groups, state and checkpoints, and a step of our own."""

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        rounded: torch.dtype | None = None,
        low_gradients: bool = False,
    ) -> None:
        if rounded not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"rounded is {rounded}; it must be torch.bfloat16, torch.float16 or None")
        if low_gradients and rounded != torch.bfloat16:
            raise ValueError(
                "low_gradients is for rounded=torch.bfloat16: gradients in float16 overflow when they are summed"
            )
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, fused=True)
        if rounded is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            keep_rounded(parameters, rounded, low_gradients)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of any of PyTorch's forms of the same optimizer. ValueError for one with `amsgrad`."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("state_dict is of an optimizer with amsgrad=True, which this one does not have")
        groups = [group | {"fused": True, "foreach": None} for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict | {"param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of all parameters that have a gradient.

        As with PyTorch's fused optimizers, `torch.amp.GradScaler` may hand over `grad_scale` and `found_inf`, scalars on the
        device, as attributes of the optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batches: dict[tuple, list[Tensor]] = {}
            parameters = [p for p in group["params"] if p.grad is not None]
            for p, copy in zip(parameters, copies_of(parameters)):
                key = (p.device, p.grad.dtype, None if copy is None else copy.dtype)
                batches.setdefault(key, []).append((p, copy))
            for (*_, low), pairs in batches.items():
                self._update(group, [p for p, _ in pairs], [copy for _, copy in pairs] if low else [])
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], copies: list[Tensor]) -> None:
        """The update of parameters on one device, with gradients of one dtype."""
        states = [self._state_of(p) for p in parameters]
        exp_avgs, exp_avg_sqs, steps = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        lr, device = group["lr"], parameters[0].device
        rate = lr.to(device, non_blocking=True) if isinstance(lr, Tensor) else None
        scale, found_inf = (
            None if value is None else value.to(device, non_blocking=True)
            for value in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        tensors = ([_laid_out_as(p, p.grad) for p in parameters], parameters, exp_avgs, exp_avg_sqs)
        adam_update(
            *([_own_part(x) for x in each] for each in tensors), steps, copies, rate,
            0.0 if rate is not None else lr, *group["betas"], group["eps"], group["weight_decay"],
            group["decoupled_weight_decay"], group["maximize"], scale, found_inf,
        )  # fmt: skip
        mark_written(parameters)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p) for _ in range(2))
            if state["exp_avg"].stride() != p.stride():
                raise ValueError(
                    f"a parameter of shape {list(p.shape)} has strides {p.stride()}; parameters must be dense in memory"
                )
        return state


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, with its elements in the order of the parameter's."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _own_part(x: Tensor) -> Tensor:
    """`x`, or this rank's shard of it."""
    return x.to_local() if hasattr(x, "to_local") else x


class Adam(_OneUpdate):
    """Adam with L2 regularization, as in published CAV-MAE training; a `torch.optim.Adam` with a step of its own.

    Parameters in float32 (the masters; float64 is taken, too), gradients in float32 or 16 bits, moments in float32. On a GPU
    the step is one kernel for all parameters of a group and a dtype, where `cavmae-fast tune` found it faster, else
    PyTorch's fused one. It can be captured in a CUDA graph after one step: let `lr` be a tensor on the device then.
    `state_dict` and `load_state_dict` are those of `torch.optim.Adam`.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in `torch.optim.Adam`. Without `amsgrad`.
        rounded: keep the weights that this package's models use under autocast rounded to its dtype (float16 or bfloat16),
            written by the step; the models then need not convert them. 2 bytes per parameter.
        low_gradients: with `rounded=torch.bfloat16`, leave the gradients of these weights in bfloat16, in which they are
            computed. For steps of one backward pass, without DistributedDataParallel.

    Raises:
        ValueError: an argument is not as described.
    """


class AdamW(_OneUpdate, torch.optim.AdamW):
    """`Adam` with decoupled weight decay; a `torch.optim.AdamW` with a step of its own."""

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)
