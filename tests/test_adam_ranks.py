"""This package's AdamW on two ranks, with whole models (DDP) and in shards (FSDP2): PyTorch's bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from clips_at_hand import ClipsAtHand
from tiny import TINY

from cavmae_fast.models import CAVMAE
from cavmae_fast.models.precision import Precision
from cavmae_fast.models.rounded import copies_of
from cavmae_fast.training.fit import fit
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.ranks import Ranks
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedules import Constant
from cavmae_fast.training.sharding import RanksTask, shard, whole_state
from cavmae_fast.training.state import RunState

RANKS, STEPS = 2, 3
KINDS, OPTIMIZERS = ("ddp", "shards"), ("adamw", "fast-adamw")


class OwnClips(ClipsAtHand):
    """Each rank has clips of its own."""

    def batch_at(self, epoch, position):
        return super().batch_at(dist.get_rank(), position)


def train(kind: str, optimizer: str, ranks: Ranks) -> dict:
    torch.manual_seed(0)
    model = CAVMAE(**TINY)
    if kind == "shards":
        shard(model, ranks, torch.device("cpu"))
    recipe = Recipe(0.002, batch_size=4, epochs=1, schedule=Constant(), optimizer=optimizer, weight_decay=0.1)
    state = RunState.start(model, recipe, OwnClips(steps=STEPS), Precision(torch.device("cpu"), torch.bfloat16))
    rows: list[dict] = []
    fit(RanksTask(PretrainTask(0.5, "unstructured", 1.0, 0.1), model, ranks), state, STEPS, rows.append)
    kept = sum(copy is not None for copy in copies_of(list(model.parameters())))
    return {"losses": [row["loss"] for row in rows], "weights": whole_state(model), "kept": kept}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        ranks = Ranks(rank, RANKS, rank, RANKS, dist.group.WORLD)
        found = {(kind, name): train(kind, name, ranks) for kind in KINDS for name in OPTIMIZERS}
        torch.save(found, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(found, kind):
    for results in found:
        plain, fast = (results[kind, name] for name in OPTIMIZERS)
        assert len(plain["losses"]) == STEPS and len(set(plain["losses"])) == STEPS
        assert fast["losses"] == plain["losses"]
        assert all(torch.equal(fast["weights"][name], value) for name, value in plain["weights"].items())
    first, second = (results[kind, "fast-adamw"]["weights"] for results in found)
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_whole_models_keep_their_weights_rounded(found):
    """In shards there is nothing to keep: a block is used as it was gathered for this pass."""
    kept = {key: value["kept"] for key, value in found[0].items()}
    assert kept["ddp", "fast-adamw"] > 20 and kept["ddp", "adamw"] == kept["shards", "adamw"] == 0
    assert kept["shards", "fast-adamw"] == 0
