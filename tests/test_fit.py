"""The training loop and what it stands on: recipes, state, numbers that arrive late, steps that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from cavmae_fast import compat
from cavmae_fast.models import PRESETS, precision
from cavmae_fast.models.precision import Precision, choose_dtype, find_device
from cavmae_fast.training.fit import TrainingError, fit
from cavmae_fast.training.readback import Readback
from cavmae_fast.training.recipes import PRETRAINING, Recipe
from cavmae_fast.training.schedules import StepDecay
from cavmae_fast.training.state import RunState

STEPS_PER_EPOCH = 4
CPU = torch.device("cpu")


class Numbers:
    """A loader of numbers that follow from epoch and position alone; `broken` names the (epoch, position) that holds NaN."""

    waited = 0.0

    def __init__(self, broken: tuple[int, int] | None = None) -> None:
        self.epoch = self.position = 0
        self.broken = broken

    def batch_at(self, epoch: int, position: int) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(100 * epoch + position)
        x = torch.randn(8, 3, generator=generator)
        if (epoch, position) == self.broken:
            x[2] = float("nan")
        ids = [f"clip {epoch}.{position}.{row}" for row in range(len(x))]
        return SimpleNamespace(audio=x, image=x.new_zeros(8, 1), ids=ids, epoch=epoch, position=position)

    def __iter__(self) -> Iterator[SimpleNamespace]:
        if self.position == STEPS_PER_EPOCH:
            self.epoch, self.position = self.epoch + 1, 0
        while self.position < STEPS_PER_EPOCH:
            self.position += 1
            yield self.batch_at(self.epoch, self.position - 1)
        self.epoch, self.position = self.epoch + 1, 0

    @property
    def epoch_done(self) -> bool:
        return self.position == STEPS_PER_EPOCH

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Regression:
    """Half of the inputs are dropped at random, so that the random state counts."""

    def __init__(self, poison: int | None = None) -> None:
        self.poison, self.calls = poison, 0

    def losses(self, model: nn.Module, batch: SimpleNamespace) -> dict[str, Tensor]:
        self.calls += 1
        x = torch.nn.functional.dropout(batch.audio, 0.5)
        loss = (model(x) - batch.audio.sum(1, keepdim=True)).square().mean()
        if self.calls == self.poison:  # a finite loss whose gradient is not: the slope of the root at 0
            loss = loss.detach() + (model.weight * 0).sum().sqrt()
        return {"loss": loss, "half": loss / 2}


def start(broken: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32) -> RunState:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    recipe = Recipe(1e-2, batch_size=8, epochs=3, schedule=StepDecay(start=1, every=1, end=3))
    return RunState.start(model, recipe, Numbers(broken), Precision(CPU, dtype))


def weights(state: RunState) -> list[Tensor]:
    return [p.detach().clone() for p in state.model.parameters()]


# ---------------------------------------------------------------------------------------------------------------- loop


def test_every_step_is_recorded():
    state, rows = start(), []
    fit(Regression(), state, 10, rows.append)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["epoch"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 2
    assert [row["learning_rate"] for row in rows] == [1e-2] * 4 + [5e-3] * 4 + [2.5e-3] * 2
    assert all(row["half"] == row["loss"] / 2 and row["clips_per_s"] > 0 for row in rows)
    assert state.step == 10


def test_the_end_of_an_epoch_is_told_when_its_rows_are_recorded():
    state, rows, told = start(), [], []
    fit(Regression(), state, 9, rows.append, log_every=3, epoch_done=lambda epoch: told.append((epoch, len(rows))))
    assert told == [(0, 4), (1, 8)]


@pytest.mark.parametrize("before", [1, 4, 5, 8], ids=lambda n: f"{n}-steps")
def test_a_run_goes_on_bit_for_bit(before):
    """Stopped in mid-epoch and at the end of one, and gone on with in another process's stead."""
    whole, rows = start(), []
    fit(Regression(), whole, 11, rows.append)

    first, head = start(), []
    fit(Regression(), first, before, head.append)
    saved = copy.deepcopy(first.state_dict())
    torch.manual_seed(99)
    second, tail = start(), []
    torch.rand(5)
    second.load_state_dict(saved)
    fit(Regression(), second, 11, tail.append)

    timeless = [[(r["step"], r["epoch"], r["loss"], r["learning_rate"]) for r in part] for part in (rows, head + tail)]
    assert timeless[0] == timeless[1]
    assert all(map(torch.equal, weights(whole), weights(second)))
    moments = [[s["exp_avg_sq"] for s in state.optimizer.state.values()] for state in (whole, second)]
    assert all(map(torch.equal, *moments))


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run():
    clean = start()
    fit(Regression(), clean, 5, lambda row: None)
    state, rows = start(broken=(1, 1)), []
    with pytest.raises(TrainingError, match=r"step 6: loss, half not finite because the audio of clip 1\.1\.2 is"):
        fit(Regression(), state, 12, rows.append)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(map(torch.equal, weights(clean), weights(state)))
    assert all(s["step"] == 5 for s in state.optimizer.state.values())


def test_a_gradient_that_is_not_finite_changes_nothing():
    clean = start()
    fit(Regression(), clean, 2, lambda row: None)
    state = start()
    with pytest.raises(TrainingError, match=r"step 3: the gradient not finite though the inputs are"):
        fit(Regression(poison=3), state, 9, lambda row: None)
    assert all(map(torch.equal, weights(clean), weights(state)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [True, False])
def test_a_step_is_left_out_with_any_optimizer(fused, bad):
    """Fused ones decide on the device; for others the host looks."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], 0.1, fused=fused)
    parameter.grad = torch.ones(2)
    compat.step_unless(optimizer, torch.tensor(bad))
    assert torch.equal(parameter.detach(), torch.ones(2)) == bad
    assert not hasattr(optimizer, "found_inf")


def test_rows_are_not_lost_when_the_data_ends_the_run():
    def until_the_sixth(loader):
        for batch in loader:
            if (batch.epoch, batch.position) == (1, 1):
                raise OSError("the disk is gone")
            yield batch

    rows = []
    with pytest.raises(OSError, match="the disk is gone"):
        fit(Regression(), start(), 9, rows.append, batches=until_the_sixth, log_every=100)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_float16_overflow_is_the_scalers_business():
    """The first scaled gradients overflow: the scale is halved, no step is taken, and the run goes on."""
    state = start(dtype=torch.float16)
    assert state.scaler.is_enabled()
    before, scale = weights(state), state.scaler.get_scale()
    loss = state.model(torch.full((1, 3), 60000.0)).square().mean() * 1e30
    assert bool(state.update(loss))
    assert state.scaler.get_scale() == scale / 2
    assert all(map(torch.equal, before, weights(state)))


# ------------------------------------------------------------------------------------------------------------ readback


class Late:
    """A CUDA event that has happened when `now` says so."""

    def __init__(self) -> None:
        self.now = self.waited = False

    def query(self) -> bool:
        return self.now

    def synchronize(self) -> None:
        self.waited = self.now = True


def test_readback_does_not_wait_unless_asked():
    readback = Readback(every=2)
    for step in range(5):
        readback.put({"step": step}, {"loss": torch.tensor(float(step))})
    events = [Late() for _ in readback._copies]
    readback._copies.extend(copy._replace(done=event) for copy, event in zip(list(readback._copies), events))
    for _ in events:
        readback._copies.popleft()
    assert readback.take() == [] and not any(event.waited for event in events)
    events[0].now = True
    assert readback.take() == [{"step": 0, "loss": 0.0}]
    assert [row["step"] for row in readback.take(wait=True)] == [1, 2, 3, 4]
    assert events[1].waited and readback.take(wait=True) == []


# ------------------------------------------------------------------------------------------------- recipes, precision


@pytest.mark.parametrize("name", PRETRAINING)
def test_schedule_is_the_published_one(name):
    """Against PyTorch's MultiStepLR, whose milestones the published script sets."""
    recipe = PRETRAINING[name]
    schedule = recipe.schedule
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    milestones = list(range(schedule.start, schedule.end + 1, schedule.every))
    published = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.5)
    for epoch in range(40):
        assert published.get_last_lr() == [recipe.learning_rate * schedule.scale(epoch)]
        optimizer.step()
        published.step()


def test_every_preset_has_a_recipe():
    assert PRETRAINING.keys() == PRESETS.keys()
    base = PRETRAINING["cav-mae-base"]
    assert (base.learning_rate, base.batch_size, base.epochs) == (5e-5, 48, 25)
    assert (base.schedule.start, base.schedule.every) == (10, 5)


@pytest.mark.parametrize(("low", "full", "wanted"), [(1.0, 2.0, "bfloat16"), (1.0, 1.1, "float32"), (3.0, 1.0, "float32")])
def test_dtype_follows_the_measurement(monkeypatch, low, full, wanted):
    monkeypatch.setattr(precision, "product_seconds", lambda: (1e-3 * low, 1e-3 * full))
    name, reason = choose_dtype(CPU)
    assert name == wanted
    assert f"{low:.2f} ms in bfloat16, {full:.2f} ms in float32" in reason


@pytest.mark.parametrize("name", ["tpu", "", "mps", "cuda:99", "meta"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=f"--device is {name!r}; it must be auto, cpu, cuda or cuda:N"):
        find_device(name)
