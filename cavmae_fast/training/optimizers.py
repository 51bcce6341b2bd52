"""The optimizer of a recipe: which parameters learn how fast, and who updates them."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cavmae_fast.errors import CavmaeError
from cavmae_fast.training.adam import Adam, AdamW
from cavmae_fast.training.recipes import Recipe

OPTIMIZERS = ("adam", "adamw", "fast-adam", "fast-adamw", "fused-adam")
HEAD = "mlp_head."
"How the names of a classifier's head begin."
_FIRST = re.compile(r"(audio\.|video\.)?(patch_embed|pos_embed|modality_|cls_token)")
"How the names of what comes before the first block begin."


class OptimizerError(CavmaeError, RuntimeError):
    """An optimizer that is asked for by name and is not there; the message says what to install."""


def make_optimizer(recipe: Recipe, model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """The optimizer that `recipe` names, over those parameters of `model` that are trained. `dtype`: of the products.

    Its groups carry `scale`, what the recipe's learning rate is multiplied by for them, besides the schedule.

    'adam' and 'adamw' are PyTorch's, fused: Adam with L2 regularization, as published, or with decoupled weight decay.
    'fast-adam' and 'fast-adamw' are this package's, the same updates (`training.adam`); with 16-bit products they also write
    the weights rounded, and in bfloat16 take gradients in it, where a step has one backward pass on one rank.
    'fused-adam' is FusedAdam of NVIDIA's apex, with L2 regularization: the same update as 'adam'.

    Raises:
        OptimizerError: apex is asked for and not installed.
    """
    options: dict[str, Any] = {"lr": recipe.learning_rate, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    groups = parameter_groups(recipe, model)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True, **options)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    if recipe.optimizer == "fused-adam":
        return _apex()(groups, adam_w_mode=False, **options)
    if recipe.optimizer in ("fast-adam", "fast-adamw"):
        alone = recipe.accumulate == 1 and not (dist.is_available() and dist.is_initialized())
        options["rounded"] = dtype if dtype.itemsize == 2 else None
        options["low_gradients"] = alone and dtype == torch.bfloat16
        return {"fast-adam": Adam, "fast-adamw": AdamW}[recipe.optimizer](groups, **options)
    raise ValueError(f"the recipe's optimizer is {recipe.optimizer!r}; it must be one of {', '.join(OPTIMIZERS)}")


def _apex() -> type[torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise OptimizerError(
            "--optimizer is fused-adam, but NVIDIA's apex is not installed; build it from https://github.com/NVIDIA/apex "
            "(the PyPI package apex is another project), or take --optimizer adam, which is fused, too"
        ) from error
    return FusedAdam


def parameter_groups(recipe: Recipe, model: nn.Module) -> list[dict[str, Any]]:
    """Those parameters of `model` that are trained, in its order, in groups of one learning rate each: `params`, `scale`."""
    groups: dict[float, list[nn.Parameter]] = {}
    last = layers(model) + 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = recipe.head_lr_factor if name.startswith(HEAD) else 1.0
            groups.setdefault(scale * recipe.layer_decay ** (last - layer_of(name, model)), []).append(parameter)
    return [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]


def layers(model: nn.Module) -> int:
    """Blocks that a token passes in the encoder of `model`, in all stages of its `stacks`; 0 for other models."""
    return sum(_lengths(model))


def _lengths(model: nn.Module) -> list[int]:
    """Blocks that a token passes in each stage."""
    return [len(model.get_submodule(stage[0])) for stage in getattr(model, "stacks", ())]


def layer_of(name: str, model: nn.Module) -> int:
    """The depth of a parameter: 0 before the first block, 1 in it, ..., `layers(model) + 1` behind the last.

    Layer-wise decay multiplies the learning rate once for each layer that a parameter lies below the top (BEiT, MAE). What
    follows the encoder (final norms, decoder, head) is the top.
    """
    if _FIRST.match(name):
        return 0
    below = 0
    for stage, length in zip(getattr(model, "stacks", ()), _lengths(model)):
        for stack in stage:
            if name.startswith(f"{stack}."):
                return below + int(name.removeprefix(f"{stack}.").split(".")[0]) + 1
        below += length
    return below + 1
