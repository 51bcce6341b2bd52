"""The step as a CUDA graph. Everything but the recording itself runs here, with a stand-in that calls the step again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cavmae_fast.models import CAVMAE
from cavmae_fast.models.precision import Precision
from cavmae_fast.ops import configuration, dispatch
from cavmae_fast.ops.stream_linear import SIDE_BY_SIDE
from cavmae_fast.training import graph
from cavmae_fast.training.fit import fit, take_step
from cavmae_fast.training.graph import ReplayedStep, graphed, unsuitable
from cavmae_fast.training.guard import TrainingError
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedules import StepDecay, WarmUp
from cavmae_fast.training.state import RunState
from tests.clips_at_hand import ClipsAtHand, batch_of
from tests.tiny import TINY, inputs, one_thread  # noqa: F401

TASK = PretrainTask(0.5, "unstructured", 1.0, 0.1)
RECIPE = Recipe(2**-10, batch_size=4, epochs=2, schedule=WarmUp(2, StepDecay(1, 1, 2)), clip_grad=5.0, ema=0.9)
"Its learning rates are float32 numbers, as they are on the device."


class CalledAgain:
    """In place of a graph: a replay calls the recorded function and writes its results where the first ones lie."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.replays = 0

    def warm_up(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return run()

    def record(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        self.run, self.outputs = run, run()
        return self.outputs

    def replay(self) -> None:
        self.replays += 1
        for name, value in self.run().items():
            self.outputs[name].copy_(value)


def start(dtype: torch.dtype = torch.float32, **changes) -> RunState:
    torch.manual_seed(0)
    loader = ClipsAtHand(steps=4)
    state = RunState.start(CAVMAE(**TINY), replace(RECIPE, **changes), loader, Precision(torch.device("cpu"), dtype))
    state.set_learning_rate(0, 8)
    return state


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """As if there were one: nothing is unsuitable, and the stand-in records."""
    monkeypatch.setattr(graph, "unsuitable", lambda state: None)
    monkeypatch.setattr(graph, "CudaCapture", CalledAgain)


@pytest.mark.parametrize("before", [0, 3], ids=["from the start", "in mid-run"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_replayed_run_is_the_run(on_gpu, before, dtype):
    """Losses, learning rates, weights and moments of every step, also when the run goes on from a checkpoint."""
    results = []
    for mode in ("off", "on"):
        first, rows = start(dtype), []
        fit(TASK, first, before, rows.append)
        saved, state = copy.deepcopy(first.state_dict()), start(dtype)
        state.load_state_dict(saved)
        fit(TASK, state, 7, rows.append, cuda_graph=mode, report=rows.append)
        numbers = [[row[n] for n in ("loss", "grad_norm", "learning_rate")] for row in rows if isinstance(row, dict)]
        results.append((numbers, state))
    (numbers, plain), (again, replayed) = results
    assert numbers == again
    for one, other in zip(plain.model.parameters(), replayed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    saved, same = plain.state_dict(), replayed.state_dict()
    assert saved["optimizer"]["param_groups"] == same["optimizer"]["param_groups"]
    assert torch.equal(saved["random"]["cpu"], same["random"]["cpu"]) and saved["scaler"] == same["scaler"]
    for name, average in saved["average"].items():
        assert torch.equal(average, same["average"][name])


def test_rounded_weights_are_those_of_the_replayed_step(on_gpu):
    """The copies that the optimizer keeps are the present weights' when the step is recorded, so none is rounded in it."""
    results = []
    for mode in ("off", "on"):
        state, rows = start(torch.bfloat16, optimizer="fast-adam", weight_decay=0.1), []
        fit(TASK, state, 4, rows.append, cuda_graph=mode, report=lambda text: None)
        results.append(([row["loss"] for row in rows], state.model.state_dict()))
    (losses, weights), (again, same) = results
    assert losses == again and all(torch.equal(a, b) for a, b in zip(weights.values(), same.values(), strict=True))


def test_recording_leaves_the_state_as_it_was():
    state, plain = start(), start()
    batch = state.loader.batch_at(0, 0)
    capture = CalledAgain()
    torch.manual_seed(7)
    step = ReplayedStep(lambda b: take_step(TASK, state, b), state, batch, capture)
    assert all(torch.equal(a, b) for a, b in zip(state.model.parameters(), plain.model.parameters(), strict=True))
    assert all(not x.any() for moments in state.optimizer.state.values() for x in moments.values())
    assert capture.replays == 1
    got = {name: value.clone() for name, value in step(batch).items()}
    torch.manual_seed(7)
    want = take_step(TASK, plain, batch)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_every_batch_reaches_the_buffers():
    state = start()
    seen: list[Tensor] = []

    def run(batch) -> dict[str, Tensor]:
        seen.append(batch.audio)
        return take_step(TASK, state, batch)

    step = ReplayedStep(run, state, state.loader.batch_at(0, 0), CalledAgain())
    addresses = {x.data_ptr() for x in seen}
    losses = [float(step(state.loader.batch_at(0, position))["loss"]) for position in range(3)]
    assert {x.data_ptr() for x in seen} == addresses and len(addresses) == 1 and len(set(losses)) == 3
    audio, imgs = inputs(batch=2, dtype=torch.float32)
    step(batch_of(audio, imgs))  # of another shape: computed as ever
    assert seen[-1] is audio


class Wrong(CalledAgain):
    """A replay that computes something else."""

    def __init__(self, numbers: bool, state: RunState) -> None:
        super().__init__()
        self.numbers, self.state = numbers, state

    def replay(self) -> None:
        super().replay()
        if self.numbers:
            self.outputs["loss_mae"] *= 1.01
        else:
            with torch.no_grad():
                self.state.model.norm.weight += 0.01


@pytest.mark.parametrize(
    ("numbers", "words"), [(True, "replayed, loss_mae is"), (False, "changes the weights in another way")]
)
def test_a_replay_that_computes_something_else_is_not_taken(numbers, words):
    state = start()
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(RuntimeError, match=words):
        ReplayedStep(lambda b: take_step(TASK, state, b), state, state.loader.batch_at(0, 0), Wrong(numbers, state))
    after = state.state_dict()
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    assert after["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    assert torch.equal(before["random"]["cpu"], after["random"]["cpu"])


class Refused(CalledAgain):
    def record(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_is_said(on_gpu, monkeypatch):
    monkeypatch.setattr(graph, "CudaCapture", Refused)
    state, said = start(), []
    state.precision = Precision(torch.device("cpu"), torch.float32)

    def run(batch) -> dict[str, Tensor]:
        return take_step(TASK, state, batch)

    batch = state.loader.batch_at(0, 0)
    with pytest.raises(TrainingError, match=r"--cuda-graph is on, but .*: CUDA error: operation not .* capturing$"):
        graphed(run, state, batch, True, said.append)
    assert graphed(run, state, batch, False, said.append) is run
    assert state.optimizer.param_groups[0]["lr"] == state.learning_rate  # a number again


def test_runs_without_a_graph():
    state = start()
    assert unsuitable(state) == "the device is not a GPU"
    with pytest.raises(TrainingError, match="the device is not a GPU"):
        fit(TASK, state, 1, lambda row: None, cuda_graph="on")
    rows, said = [], []
    fit(TASK, state, 1, rows.append, cuda_graph="auto", report=said.append)
    assert len(rows) == 1 and said == []  # nobody expects a graph on a CPU


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"accumulate": 2}, "--accumulate goes back"), ({"optimizer": "fused-adam"}, "apex's FusedAdam"), ({}, None)],
)
def test_what_a_graph_cannot_hold(changes, words):
    state = start()
    state.recipe = replace(state.recipe, **changes)
    state.precision = Precision(torch.device("cuda"), torch.float32)
    reason = unsuitable(state)
    assert reason is None if words is None else words in reason


SIDE = {name: dict.fromkeys(("bfloat16", "float32"), SIDE_BY_SIDE) for name in ("stream_linear", "linear_gelu")}
UPDATE = {"adam_update": dict.fromkeys(("bfloat16", "float32"), "triton")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "optimizer", "chosen"),
    [
        (torch.float32, "adam", {}),
        (torch.bfloat16, "adam", {}),
        (torch.float16, "adam", {}),
        (torch.bfloat16, "fast-adamw", {}),
        (torch.bfloat16, "fast-adamw", UPDATE),
        (torch.bfloat16, "adam", SIDE),
    ],
    ids=["fp32", "bf16", "fp16", "bf16-adamw", "bf16-adamw-one-launch", "bf16-side-by-side"],
)
def test_on_a_gpu(dtype, optimizer, chosen):
    """The recording itself: the same losses as without a graph, from the same seed."""
    with dispatch.override("auto"), configuration.trial({"implementations": chosen, "launches": {}}):
        check_on_a_gpu(dtype, optimizer)


def check_on_a_gpu(dtype: torch.dtype, optimizer: str) -> None:
    losses, said = [], []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        device = torch.device("cuda", 0)

        class OnGpu(ClipsAtHand):
            def batch_at(self, epoch: int, position: int):
                batch = super().batch_at(epoch, position)
                return replace(batch, audio=batch.audio.cuda(), image=batch.image.cuda())

        recipe = replace(RECIPE, optimizer=optimizer)
        state = RunState.start(CAVMAE(**TINY).cuda(), recipe, OnGpu(steps=4), Precision(device, dtype))
        rows: list[dict] = []
        fit(TASK, state, 12, rows.append, cuda_graph=mode, report=said.append)
        losses.append([row["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and "is replayed as a CUDA graph" in said[0]
