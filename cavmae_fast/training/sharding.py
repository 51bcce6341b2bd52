"""One model on several ranks: DistributedDataParallel, or parameters and moments in shards (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cavmae_fast.data.batches import Batch
from cavmae_fast.reference.layers import Block
from cavmae_fast.training.ranks import Ranks
from cavmae_fast.training.task import Task


def shard(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Cuts the parameters of `model` into a shard per rank, in place. They must be the same on every rank.

    Each block is gathered when it is used; blocks of audio and video at one depth are used together (`models.packed`), and
    so are gathered together. (Not in a classifier, which can be given one of the two alone.) What lies outside blocks is
    gathered for the whole pass.
    """
    mesh = torch.distributed.init_device_mesh(device.type, (ranks.world_size,))
    together = [] if hasattr(model, "modes") else [[*blocks] for pair in _side_by_side(model) for blocks in zip(*pair)]
    known = {block for blocks in together for block in blocks}
    together += [[block] for block in model.modules() if isinstance(block, Block) and block not in known]
    for blocks in together:
        fully_shard(blocks if len(blocks) > 1 else blocks[0], mesh=mesh)
    fully_shard(model, mesh=mesh)


def _side_by_side(model: nn.Module) -> list[tuple[nn.ModuleList, ...]]:
    """The stacks of blocks of audio and of video that are computed together, depth by depth."""
    named = dict(model.named_modules())
    pairs = (
        ("blocks_a", "blocks_v"),
        ("audio.blocks", "video.blocks"),
        ("audio.decoder_blocks", "video.decoder_blocks"),
        ("fusion.blocks_a", "fusion.blocks_v"),
    )
    return [tuple(named[name] for name in pair) for pair in pairs if all(name in named for name in pair)]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has cut the model's parameters."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """The model with all of its parameters whole on every rank, for a block in which it may be used in any way: each rank
    for itself, as often as it likes. Every rank has to enter it. A model that is not sharded is given as it is."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield model
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict with whole tensors, on the CPU where it is sharded. Every rank has to call it."""
    return {
        name: value.full_tensor().cpu() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict of whole tensors, which every rank has, into the model, sharded or not."""
    own = dict(model.named_parameters())
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def laid_out(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A `RunState.state_dict()` of whole tensors, laid out for the model: what belongs to a parameter in shards is cut as
    that parameter is. (Weights and averages are found by the parameter's name, moments by its number in the optimizer.)"""
    if not is_sharded(model):
        return state
    named = dict(model.named_parameters())
    numbered = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def cut(value: Any, own: Tensor | None, known: dict[Any, Tensor]) -> Any:
        if isinstance(value, dict):
            return {key: cut(item, known.get(key, own), known) for key, item in value.items()}
        return _like(value, own) if isinstance(value, Tensor) and own is not None and value.shape == own.shape else value

    return {key: cut(value, None, numbered if key == "optimizer" else named) for key, value in state.items()}


def _like(value: Tensor, own: Tensor | None) -> Tensor:
    """`value` in shards where `own`, of the same shape, is; every rank cuts its own shard out."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def whole(value: Tensor) -> Tensor:
    """`value` where it is whole; else what the ranks' parts make together. Every rank has to call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


class RanksTask:
    """A task whose steps are shared by ranks: each computes the losses of its clips, and all record their means.

    Args:
        task: whose losses they are.
        model: what `fit` gives to `losses`.
        ranks: that share the steps.
    """

    def __init__(self, task: Task, model: nn.Module, ranks: Ranks) -> None:
        self.task, self._ranks = task, ranks
        device = next(model.parameters()).device
        self._parallel = model
        if ranks.world_size > 1 and not is_sharded(model):
            ids = [device.index] if device.type == "cuda" else None
            self._parallel = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def prepare(self, model: nn.Module) -> None:
        """As the task's own."""
        self.task.prepare(model)

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The means over the ranks; a gradient of one reaches this rank's part of it."""
        return self._ranks.mean(self.task.losses(self._parallel, batch))

    def no_sync(self) -> contextlib.AbstractContextManager:
        """A context in which whole models keep their gradients to themselves, for all but the last part of a batch. Shards
        exchange theirs each time, because nobody has room for all of them."""
        whole_models = isinstance(self._parallel, DistributedDataParallel)
        return self._parallel.no_sync() if whole_models else contextlib.nullcontext()

    @property
    def contrasts(self) -> bool:
        """Whether the task has a contrastive loss that can be computed apart, as for batches in parts."""
        return getattr(self.task, "contrasts", False)

    def embed(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """What this rank's clips are contrasted by."""
        return self.task.embed(self._parallel, batch)

    def part(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The losses that are means over clips, as in `losses`, and this rank's embeddings."""
        losses, embeddings = self.task.part(self._parallel, batch)
        return self._ranks.mean(losses), embeddings

    def contrast(self, model: nn.Module, embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
        """The contrastive losses of all ranks' embeddings, or their mean where each rank has its own."""
        return self._ranks.mean(self.task.contrast(model, embeddings))

    def step_flops(self, model: nn.Module) -> float | None:
        """As the task's own."""
        return self.task.step_flops(model)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        """As the task's own."""
        return self.task.evaluate(model, batches)
