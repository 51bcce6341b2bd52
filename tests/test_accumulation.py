"""A batch in parts has the gradients of the whole batch: also with a contrastive loss, and with negatives of all ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from cavmae_fast.models import CAVMAE
from cavmae_fast.models.precision import Precision
from cavmae_fast.reference.masking import Masking
from cavmae_fast.training.accumulation import split
from cavmae_fast.training.fit import fit, take_step
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedules import Constant
from cavmae_fast.training.state import RunState
from tests.clips_at_hand import ClipsAtHand, batch_of
from tests.tiny import TINY, gradients, inputs, one_thread, randomize, relative  # noqa: F401

CPU = torch.device("cpu")
RECIPE = Recipe(1e-3, batch_size=7, epochs=1, schedule=Constant())
BOTH = PretrainTask(0.5, "unstructured", 1.0, 0.7)


def model_of(**config) -> CAVMAE:
    model = randomize(CAVMAE(**TINY | {"norm_pix_loss": True} | config)).to(torch.float64)
    return model.train()


def state_of(model: nn.Module, **changes) -> RunState:
    return RunState.start(model, replace(RECIPE, **changes), ClipsAtHand(), Precision(CPU, torch.float32))


def masks_by_clip(model: CAVMAE, monkeypatch, batch: int) -> None:
    """Every clip has masks of its own, whatever part it is computed in: those that the whole batch would draw, given out in
    turn, once for each pass over the batch."""
    torch.manual_seed(5)
    whole = model.draw_masks(batch, CPU, 0.5, 0.5, "unstructured")
    place = [0]

    def draw(count: int, *_) -> tuple[Masking, Masking]:
        first = place[0] % batch
        place[0] += count
        return tuple(Masking(*(x[first : first + count] for x in masking)) for masking in whole)

    monkeypatch.setattr(model, "draw_masks", draw)


def losses_and_gradients(task, model, batch, monkeypatch, **changes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of one step, caught before the optimizer."""
    state, caught = state_of(model, **changes), {}

    def update(self, loss: Tensor) -> dict[str, Tensor]:
        caught.update({name: g.clone() for name, g in gradients(model).items()}, loss=loss.detach())
        model.zero_grad(set_to_none=True)
        return {}

    monkeypatch.setattr(RunState, "update", update)
    return take_step(task, state, batch), caught


@pytest.mark.parametrize("parts", [2, 3, 7, 20])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
def test_gradients_are_the_whole_batchs(parts, bidirectional, monkeypatch):
    model = model_of(bidirect_contrast=bidirectional)
    batch = batch_of(*inputs(batch=7))
    masks_by_clip(model, monkeypatch, 7)
    want, expected = losses_and_gradients(BOTH, model, batch, monkeypatch)
    got, found = losses_and_gradients(BOTH, model, batch, monkeypatch, accumulate=parts)
    assert got.keys() == want.keys() and found.keys() == expected.keys()
    for name, value in want.items():
        assert relative(got[name], value) < 1e-12, name
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-10, name


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["reconstruction-alone", "contrast-alone"])
def test_with_one_loss(weights, monkeypatch):
    model, batch = model_of(), batch_of(*inputs(batch=7))
    masks_by_clip(model, monkeypatch, 7)
    task = PretrainTask(0.5, "unstructured", *weights)
    task.prepare(model)
    want, expected = losses_and_gradients(task, model, batch, monkeypatch)
    got, found = losses_and_gradients(task, model, batch, monkeypatch, accumulate=3)
    assert got.keys() == want.keys() and found.keys() == expected.keys()
    assert all(relative(got[name], value) < 1e-12 for name, value in want.items())
    assert all(relative(found[name], value) < 1e-10 for name, value in expected.items())


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_both_passes_draw_the_same(drop_path, monkeypatch):
    """Masks and paths are not fixed here: the second pass goes back to the random state of the first, so its embeddings are
    those that were contrasted; the next step draws others."""
    seen: list[Tensor] = []
    model = model_of()
    compute = model.compute

    def watched(*args):
        losses, means = compute(*args)
        seen.append(means[0].detach())
        return losses, means

    monkeypatch.setattr(model, "compute", watched)
    state = state_of(model, accumulate=2, drop_path=drop_path, learning_rate=1e-9)
    batch = batch_of(*inputs(batch=6))
    torch.manual_seed(0)
    for _ in range(2):
        take_step(BOTH, state, batch)
    first, second, next_first = seen[:2], seen[2:4], seen[4:6]
    assert all(relative(a, b) < 1e-12 for a, b in zip(first, second))
    assert not torch.equal(first[0], first[1])
    assert relative(next_first[0], first[0]) > 1e-3


class Classification:
    """A loss that is a mean over clips, without the clips of the batch being compared."""

    def losses(self, model: nn.Module, batch) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(model(batch.audio.mean(dim=1)), batch.labels)
        return {"loss": loss, "twice": 2 * loss}


def test_without_contrast_parts_are_weighed_by_their_clips(monkeypatch):
    model = nn.Linear(128, 4).to(torch.float64)
    batch = batch_of(*inputs(batch=7), labels=torch.tensor([0, 1, 2, 3, 3, 1, 0]))
    want, expected = losses_and_gradients(Classification(), model, batch, monkeypatch)
    got, found = losses_and_gradients(Classification(), model, batch, monkeypatch, accumulate=3)
    assert all(relative(got[name], value) < 1e-14 for name, value in want.items())
    assert all(relative(found[name], value) < 1e-13 for name, value in expected.items())


def test_parts_hold_all_clips_in_order():
    batch = batch_of(*inputs(batch=7), labels=torch.arange(7))
    for count, sizes in ((1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (9, [1] * 7)):
        parts = split(batch, count)
        assert [len(part.ids) for part in parts] == sizes
        assert [clip for part in parts for clip in part.ids] == batch.ids
        assert torch.equal(torch.cat([part.audio for part in parts]), batch.audio)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
        assert [number for part in parts for number in part.clips] == list(range(7))


def test_ranks_do_not_exchange_gradients_before_the_last_part():
    """`no_sync` of DistributedDataParallel, for all parts but the last."""
    quiet = []

    class Wrapped(nn.Linear):
        def no_sync(self):
            quiet.append(len(quiet))
            return torch.enable_grad()

    model = Wrapped(128, 4).to(torch.float64)
    batch = batch_of(*inputs(batch=6), labels=torch.arange(6) % 4)
    take_step(Classification(), state_of(model, accumulate=3), batch)
    assert len(quiet) == 2


def test_a_run_in_parts_goes_on_bit_for_bit():
    def run(first: int) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        model, rows = CAVMAE(**TINY), []
        recipe = replace(RECIPE, accumulate=2)
        state = RunState.start(model, recipe, ClipsAtHand(steps=3), Precision(CPU, torch.float32))
        fit(BOTH, state, first, rows.append)
        saved = state.state_dict()
        torch.manual_seed(77)
        other = RunState.start(CAVMAE(**TINY), recipe, ClipsAtHand(steps=3), Precision(CPU, torch.float32))
        other.load_state_dict(saved)
        fit(BOTH, other, 5, rows.append)
        return [row["loss"] for row in rows], other.model.state_dict()

    (losses, weights), (again, same) = run(2), run(5)
    assert losses == again and all(torch.equal(weights[name], same[name]) for name in weights)


# --------------------------------------------------------------------------------------------------------------- ranks


def rank_gradients(rank: int, world: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    model = model_of()
    audio, imgs = inputs(batch=8)
    per_rank = 8 // world
    own = slice(rank * per_rank, (rank + 1) * per_rank)
    torch.manual_seed(5)
    whole = model.draw_masks(8, CPU, 0.5, 0.5, "unstructured")  # of all ranks; among ranks it would give this one's
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    place = [0]

    def draw(count: int, *_) -> tuple[Masking, Masking]:
        first = rank * per_rank + place[0] % per_rank
        place[0] += count
        return tuple(Masking(*(x[first : first + count] for x in masking)) for masking in whole)

    model.draw_masks = draw
    caught = {}
    RunState.update = lambda self, loss: caught.update(gradients(self.model)) or {}
    losses = take_step(BOTH, state_of(model, accumulate=2 if world > 1 else 1), batch_of(audio[own], imgs[own]))
    for gradient in caught.values():  # what DistributedDataParallel does
        dist.all_reduce(gradient)
        gradient /= world
    if rank == 0:
        torch.save({"gradients": caught, "loss_c": losses["loss_c"]}, results)
    dist.destroy_process_group()


def test_negatives_of_all_ranks(tmp_path):
    """Two ranks of two parts each have the gradients of one rank with all clips in one part."""
    results = []
    for world in (1, 2):
        path = str(tmp_path / f"{world}.pt")
        mp.start_processes(
            rank_gradients, (world, str(tmp_path / f"store{world}"), path), nprocs=world, start_method="spawn"
        )
        results.append(SimpleNamespace(**torch.load(path)))
    one, two = results
    assert relative(two.loss_c, one.loss_c) < 1e-12
    assert one.gradients.keys() == two.gradients.keys()
    for name, value in one.gradients.items():
        assert relative(two.gradients[name], value) < 1e-10, name
