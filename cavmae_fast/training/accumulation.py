"""A batch computed in parts, one after the other, with the gradients of the whole batch."""

from __future__ import annotations

import contextlib
import itertools

import torch
from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.training.random_state import random_state, set_random_state
from cavmae_fast.training.state import RunState
from cavmae_fast.training.task import Contrastive, Task


def split(batch: Batch, count: int) -> list[Batch]:
    """`batch` in `count` parts of almost as many clips, in order; fewer where it has fewer clips."""
    clips = len(batch.ids)
    count = min(count, clips)
    bounds = [clips * part // count for part in range(count + 1)]
    return [batch[first:last] for first, last in itertools.pairwise(bounds)]


def accumulate(task: Task, state: RunState, batch: Batch) -> dict[str, Tensor]:
    """Adds the gradients of the losses of `batch`, computed in parts, and returns the losses of the whole.

    A loss that is a mean over clips is the mean of the parts' losses, each with the weight of its clips. A contrastive loss
    is not, because its negatives are the other clips of the batch. Its gradient with respect to the embeddings needs no
    network, though, so it takes two passes (GradCache: Gao et al., 2021). The first computes the embeddings of all parts
    without a graph; from these come the loss and its gradient. The second pass computes each part again, from the same
    random state and so with the same masks, and sends the gradient of its embeddings back through the network.
    """
    parts = split(batch, state.recipe.accumulate)
    if isinstance(task, Contrastive) and task.contrasts:
        return _contrasted(task, state, parts)
    totals: dict[str, Tensor] = {}
    for part, share, sync in _shares(task, parts, state):
        with sync:
            with state.precision.autocast():
                losses = task.losses(state.model, part)
            state.backward(losses["loss"] * share)
        _add(totals, losses, share)
    return totals


def _contrasted(task: Contrastive, state: RunState, parts: list[Batch]) -> dict[str, Tensor]:
    """Both passes for a task with a contrastive loss."""
    device = state.precision.device
    states, embeddings = [], []
    for part in parts:
        states.append(random_state(device))
        with torch.no_grad(), state.precision.autocast():
            embeddings.append(task.embed(state.model, part))
    cached = [torch.cat(parts_of_one).requires_grad_() for parts_of_one in zip(*embeddings)]
    with state.precision.autocast():
        contrast = task.contrast(state.model, cached)
    state.backward(contrast["loss"])
    sizes = [len(part.ids) for part in parts]
    gradients = zip(*(whole.grad.split(sizes) for whole in cached))
    totals = {name: value.detach() for name, value in contrast.items()}
    for (part, share, sync), drawn, gradient in zip(_shares(task, parts, state), states, gradients):
        set_random_state(device, drawn)
        with sync:
            with state.precision.autocast():
                losses, own = task.part(state.model, part)
            roots = [(state.scaler.scale(losses["loss"] * share), None), *zip(own, gradient)]
            roots = [(root, value) for root, value in roots if root.requires_grad]
            torch.autograd.backward([root for root, _ in roots], [value for _, value in roots])
        _add(totals, losses, share)
    return totals


def _shares(task: Task, parts: list[Batch], state: RunState) -> list[tuple[Batch, float, contextlib.AbstractContextManager]]:
    """Each part, its share of the clips, and a context without the exchange of gradients between ranks for all but the last
    (`no_sync` of the task, or of a model in DistributedDataParallel)."""
    clips = sum(len(part.ids) for part in parts)
    quiet = getattr(task, "no_sync", None) or getattr(state.model, "no_sync", contextlib.nullcontext)
    return [(p, len(p.ids) / clips, contextlib.nullcontext() if p is parts[-1] else quiet()) for p in parts]


def _add(totals: dict[str, Tensor], losses: dict[str, Tensor], share: float) -> None:
    for name, value in losses.items():
        value = value.detach() * share
        totals[name] = totals[name] + value if name in totals else value
