"""The training loop and what it stands on: recipes, state, numbers that arrive late, steps that are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cavmae_fast import compat
from cavmae_fast.models import PRESETS, precision
from cavmae_fast.models.precision import Precision, choose_dtype, find_device
from cavmae_fast.training.fit import TrainingError, fit, take_step
from cavmae_fast.training.guard import Guard
from cavmae_fast.training.readback import Readback
from cavmae_fast.training.recipes import PRETRAINING, Recipe
from cavmae_fast.training.schedules import Cosine, StepDecay, WarmUp
from cavmae_fast.training.state import SMALLEST_SCALE, RunState

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


def start(broken: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> RunState:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    recipe = Recipe(1e-2, batch_size=8, epochs=3, schedule=StepDecay(start=1, every=1, end=3))
    recipe = replace(recipe, **changes)
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


def test_a_loss_that_is_not_finite_is_skipped_and_the_run_goes_on():
    clean = start()
    fit(Regression(), clean, 5, lambda row: None)
    state, rows, written, said = start(broken=(1, 1)), [], [], []
    guard = Guard(write=written.append, report=said.append)
    fit(Regression(), state, 6, rows.append, guard=guard)
    assert all(map(torch.equal, weights(clean), weights(state)))
    assert all(s["step"] == 5 for s in state.optimizer.state.values())
    assert math.isnan(rows[5]["loss"])
    (row,) = written
    assert row["reason"] == "loss, half not finite because the audio of clip 1.1.2 is not finite"
    assert (row["step"], row["epoch"], row["position"]) == (6, 1, 1)
    assert row["clips"] == [f"clip 1.1.{number}" for number in range(8)]
    fit(Regression(), state, 12, rows.append, guard=guard)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["skipped"] for row in rows] == [0] * 5 + [1] * 7
    assert not torch.equal(weights(clean)[0], weights(state)[0]) and state.skipped_in_a_row == 0
    assert len(written) == 1 and len(said) == 1 and said[0].startswith("step 6 was skipped: loss, half not finite")


def test_a_gradient_that_is_not_finite_changes_nothing():
    clean = start()
    fit(Regression(), clean, 2, lambda row: None)
    state, rows, written = start(), [], []
    fit(Regression(poison=3), state, 3, rows.append, guard=Guard(write=written.append))
    assert all(map(torch.equal, weights(clean), weights(state)))
    assert written[0]["reason"].startswith("the gradient not finite though the inputs are")
    assert math.isfinite(rows[2]["loss"]) and not math.isfinite(rows[2]["grad_norm"])


class Hopeless(Regression):
    """No loss is finite from the third step on, but for the fifth."""

    def losses(self, model: nn.Module, batch: SimpleNamespace) -> dict[str, Tensor]:
        losses = super().losses(model, batch)
        return {name: x * float("inf") if self.calls not in (1, 2, 5) else x for name, x in losses.items()}


def test_skipped_steps_in_a_row_end_the_run():
    state, rows, written = start(), [], []
    guard = Guard(3, written.append, kept=lambda: "the last good checkpoint is step-2.pt")
    words = r"3 steps in a row were skipped, the last of them step 8: .* not finite .*; the last good checkpoint is step-2"
    with pytest.raises(TrainingError, match=words):
        fit(Hopeless(), state, 20, rows.append, guard=guard)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["step"] for row in written] == [3, 4, 6, 7, 8]


def test_skipped_steps_are_counted_across_a_stop():
    state = start()
    task = Hopeless()
    fit(task, state, 7, lambda row: None, guard=Guard(3))
    again = start()
    again.load_state_dict(copy.deepcopy(state.state_dict()))
    assert (again.skipped, again.skipped_in_a_row) == (4, 2)
    with pytest.raises(TrainingError, match="the last of them step 8"):
        fit(task, again, 20, lambda row: None, guard=Guard(3))


class Greedy(Regression):
    """Memory runs out in the fourth step."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def losses(self, model: nn.Module, batch: SimpleNamespace) -> dict[str, Tensor]:
        if self.calls == 3:
            raise self.error
        return super().losses(model, batch)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("DefaultCPUAllocator: can't allocate")],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_is_one_sentence(error):
    rows, guard = [], Guard(kept=lambda: "the last good checkpoint is step-2.pt")
    with pytest.raises(TrainingError) as told:
        fit(Greedy(error), start(), 9, rows.append, log_every=100, guard=guard)
    text = str(told.value)
    assert text.startswith(
        "out of memory on cpu in step 4, of 8 clips (audio [8, 3], imgs [8, 1]); the last good checkpoint"
    )
    assert all(option in text for option in ("--batch-size", "--accumulate", "--dtype")) and "\n" not in text
    assert len(rows) == 3


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="something else"):
        fit(Greedy(RuntimeError("something else")), start(), 9, lambda row: None)


def test_a_step_reads_nothing_from_the_device():
    """Whatever makes the host wait for a GPU asks for a number: `item`, `bool`, `nonzero`."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            reading = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
            assert function.__name__.split(".")[0] not in reading, f"a step reads from the device: {function}"
            return function(*arguments, **(options or {}))

    state = start(clip_grad=0.1, ema=0.9, schedule=WarmUp(3, Cosine()))
    half = start(dtype=torch.float16)
    with NoReading():
        for one in (state, half):
            for batch in one.loader:
                one.set_learning_rate(batch.epoch, 12)
                take_step(Regression(), one, batch)
        with pytest.raises(AssertionError, match="reads from the device"):
            bool(torch.ones(1) > 0)


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


def overflow(state: RunState) -> dict[str, Tensor]:
    """An update whose loss is finite and whose scaled gradient is not."""
    loss = state.model(torch.full((1, 3), 60000.0)).square().mean() * 1e25
    state.backward(loss)
    return state.update(loss)


def test_float16_overflow_is_the_scalers_business():
    """The first scaled gradients overflow: the scale is halved, no step is taken, and the run goes on."""
    state = start(dtype=torch.float16)
    assert state.scaler.is_enabled()
    before, scale = weights(state), state.scaler.get_scale()
    measured = overflow(state)
    assert bool(measured["finite"]) and measured["loss_scale"] == scale
    assert state.scaler.get_scale() == scale / 2
    assert all(map(torch.equal, before, weights(state)))


class Steep(Regression):
    """A finite loss whose gradient never is: the slope of the root at 0."""

    def losses(self, model: nn.Module, batch: SimpleNamespace) -> dict[str, Tensor]:
        loss = super().losses(model, batch)["loss"]
        return {"loss": loss.detach() + (model.weight * 0).sum().sqrt()}


def test_a_loss_scale_that_collapses_ends_the_run():
    """At the smallest scale an overflow is no longer the scaler's business: the step counts; the reason names the scale."""
    state, rows, written = start(dtype=torch.float16), [], []
    with pytest.raises(TrainingError, match=r"2 steps in a row were skipped.* step 18: the gradient .* loss scale of 0\.5"):
        fit(Steep(), state, 40, rows.append, guard=Guard(2, written.append))
    assert [row["loss_scale"] for row in rows] == [65536 / 2**step for step in range(18)]
    assert rows[16]["loss_scale"] == SMALLEST_SCALE and [row["step"] for row in written] == [17, 18]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_clipping(dtype):
    """Against PyTorch's own, after the scale is taken out; the norm that is recorded is the one before."""
    state, plain = start(dtype=dtype, clip_grad=0.5), start(dtype=dtype)
    x = torch.randn(4, 3)
    for one in (state, plain):
        loss = one.model(x).square().mean()
        one.backward(loss)
    want = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5 * plain.scaler.get_scale())
    measured = state.update(loss)
    assert want > 0.5 * plain.scaler.get_scale()
    torch.testing.assert_close(measured["grad_norm"], want / plain.scaler.get_scale())
    plain.update(loss)
    torch.testing.assert_close(weights(state), weights(plain))


def test_clipping_changes_nothing_below_the_norm():
    runs = []
    for clip_grad in (0.0, 1e6):
        state = start(clip_grad=clip_grad)
        fit(Regression(), state, 5, lambda row: None)
        runs.append(weights(state))
    assert all(map(torch.equal, *runs))


def test_rows_hold_what_can_be_rendered():
    rows = []
    fit(Regression(), start(dtype=torch.float16), 2, rows.append)
    assert {"grad_norm", "loss_scale", "skipped", "memory", "clips_per_s"} <= rows[0].keys()
    assert rows[1]["memory"] > 10e6


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
