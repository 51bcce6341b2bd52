"""Two processes under plain DistributedDataParallel against one process: gloo on the CPU, in float64."""

from __future__ import annotations

import functools
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from tiny import TINY, gradients, inputs, one_thread, randomize  # noqa: F401
from torch.nn.parallel import DistributedDataParallel

from cavmae_fast.models import CAVMAE, PretrainOutput, distributed
from cavmae_fast.models.distributed import gather_rows
from cavmae_fast.reference import cavmae as reference
from cavmae_fast.reference.masking import Masking, random_masking

RANKS, PER_RANK = 2, 2
CASES = [("all", 1.0, 0.5), ("rank", 1.0, 0.5), ("all", 0.0, 0.5), ("all", 1.0, 0.0)]
"(negatives, weight of the reconstruction loss, weight of the contrastive loss)"


def build(kind: type = CAVMAE, mae: float = 1.0, contrast: float = 0.5) -> torch.nn.Module:
    model = randomize(kind(**TINY | {"norm_pix_loss": True})).double()
    model.train_losses(reconstruction=mae != 0, contrast=contrast != 0)
    return model


@functools.cache
def masks() -> tuple[Masking, Masking]:
    """The masks of the whole batch; each rank takes its rows. To be called first while nothing is distributed."""
    torch.manual_seed(11)
    device = torch.device("cpu")
    return tuple(random_masking(RANKS * PER_RANK, grid, 0.75, device) for grid in ((8, 4), (2, 2)))


def step(model: torch.nn.Module, part: slice, mae: float = 1.0, contrast: float = 0.5, wrap=lambda model: model):
    """Forward and backward on some rows of the batch, with their rows of the fixed masks."""
    rows = tuple(Masking(*(field[part] for field in masking)) for masking in masks())
    model.draw_masks = lambda *_: rows
    audio, imgs = (x[part] for x in inputs(batch=RANKS * PER_RANK))
    out = wrap(model)(audio, imgs, mae_loss_weight=mae, contrast_loss_weight=contrast)
    assert type(out) is PretrainOutput
    out.loss.backward()
    return [x.detach() for x in out], gradients(model)


def refusal(x: torch.Tensor) -> str:
    """How `gather_rows` refuses."""
    with pytest.raises(ValueError) as error:
        gather_rows(x)
    return str(error.value)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    masks()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        results = {}
        part = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        for negatives, mae, contrast in CASES:
            model = build(CAVMAE, mae, contrast)
            model.negatives = negatives
            wrapped = DistributedDataParallel(model)  # without find_unused_parameters
            out, grads = step(model, part, mae, contrast, lambda _, wrapped=wrapped: wrapped)
            results[negatives, mae, contrast] = out, {key: gradient.clone() for key, gradient in grads.items()}
            # A second step works only if the first left no parameter waiting. It adds to the gradients.
            step(model, part, mae, contrast, lambda _, wrapped=wrapped: wrapped)
        gathered = gather_rows(torch.full((2, 3), float(rank), requires_grad=True))
        results["gathered"] = gathered.detach()
        distributed.LATER = timedelta(seconds=2)
        results["unequal"] = [refusal(torch.zeros(3 + rank, 3))]  # both ranks' rows have changed in number
        if rank == 0:  # and now one rank's alone; the other would go on into the collective operation
            results["unequal"].append(refusal(torch.zeros(7, 3)))
        else:
            distributed._check_rows.calls += 1
        dist.barrier()
        gathered = gather_rows(torch.full((5, 3), float(rank)))  # equal again
        results["equal again"] = gathered.shape
        torch.manual_seed(5)
        results["own rows"] = random_masking(PER_RANK, (4, 4), 0.75, torch.device("cpu"), "tf")
        results["random state"] = torch.get_rng_state()
        torch.save(results, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.0, 0.5), (1.0, 0.0)])
def test_negatives_of_all_ranks_give_the_gradient_of_the_whole_batch(ranks, weights):
    whole = slice(0, RANKS * PER_RANK)
    for kind in (CAVMAE, reference.CAVMAE):  # the reference knows nothing of ranks
        out, want = step(build(kind, *weights), whole, *weights)
        for result in ranks:
            got_out, got = result["all", *weights]
            assert_same(got, want)
            torch.testing.assert_close(got_out[4], out[4])  # every rank reports the loss over all rows
            torch.testing.assert_close(got_out[7], out[7])
        torch.testing.assert_close(sum(result["all", *weights][0][0] for result in ranks) / RANKS, out[0])


def test_negatives_of_one_rank_give_the_mean_of_the_ranks(ranks):
    losses, sums = [], {}
    for rank in range(RANKS):
        out, grads = step(build(), slice(rank * PER_RANK, (rank + 1) * PER_RANK))
        for mine, alone in zip(ranks[rank]["rank", 1.0, 0.5][0], out, strict=True):
            torch.testing.assert_close(mine, alone)
        losses.append(out[0])
        sums = {key: sums.get(key, 0) + gradient / RANKS for key, gradient in grads.items()}
    for result in ranks:
        assert_same(result["rank", 1.0, 0.5][1], sums)


def test_the_two_kinds_of_negatives_differ(ranks):
    """Else the tests above could not tell them apart."""
    all_ranks, per_rank = ranks[0]["all", 1.0, 0.5][1], ranks[0]["rank", 1.0, 0.5][1]
    key = "blocks_a.0.mlp.fc1.weight"
    assert (all_ranks[key] - per_rank[key]).norm() > 1e-3 * all_ranks[key].norm()
    assert abs(ranks[0]["all", 1.0, 0.5][0][4] - ranks[0]["rank", 1.0, 0.5][0][4]) > 1e-3


def test_rows_come_rank_after_rank(ranks):
    want = torch.tensor([0.0, 0.0, 1.0, 1.0]).unsqueeze(1).expand(4, 3)
    assert all(torch.equal(result["gathered"], want) for result in ranks)


def test_unequal_rows_are_an_error(ranks):
    """On every rank whose number of rows has changed, before any of them are sent."""
    assert ranks[0]["unequal"][0] == ranks[1]["unequal"][0]
    assert (
        "the ranks hold rows of shapes [3, 3], [4, 3], in the order of the ranks; they must be equal"
        in (ranks[0]["unequal"][0])
    )
    assert "[7, 3], [3, 3]" in ranks[0]["unequal"][1]  # the other rank is taken to hold what both held
    assert all(result["equal again"] == (RANKS * 5, 3) for result in ranks)


def test_masks_do_not_depend_on_the_number_of_ranks(ranks):
    torch.manual_seed(5)
    whole = random_masking(RANKS * PER_RANK, (4, 4), 0.75, torch.device("cpu"), "tf")
    for field, together in zip(whole, zip(*(result["own rows"] for result in ranks), strict=True), strict=True):
        assert torch.equal(field, torch.cat(together))
    assert all(torch.equal(result["random state"], torch.get_rng_state()) for result in ranks)


def test_alone_nothing_is_gathered():
    x = torch.randn(3, 4, requires_grad=True)
    assert gather_rows(x) is x
    out = {}
    for negatives in ("all", "rank"):
        model = build()
        model.negatives = negatives
        out[negatives] = step(model, slice(0, 4))
    assert torch.equal(out["all"][0][0], out["rank"][0][0])
    assert_same(out["all"][1], out["rank"][1])
