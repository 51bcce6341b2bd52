"""The whole training step as a CUDA graph: recorded once, replayed for every batch without the launches' cost on the host.

What a graph replays are kernels with the addresses they had. So batches are copied into buffers of their own, the learning
rate lies on the device, and nothing in a step may depend on a number that the host reads. PyTorch advances the generator of
its random numbers with every replay, so masks differ from step to step and a run goes on from a checkpoint as ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.errors import first_line
from cavmae_fast.models.rounded import refresh
from cavmae_fast.training.guard import TrainingError
from cavmae_fast.training.random_state import random_state, set_random_state
from cavmae_fast.training.state import RunState

Step = Callable[[Batch], dict[str, Tensor]]
WARM_UP = 3
"Steps before the recording, so that everything is there that is made at first use."
NUMBERS, UPDATE = 1e-3, 0.05
"""How far a replayed step may be from one without a graph: each number, relatively, and the change of the weights, in norm.
Both run the same kernels, of which some sum in an order that varies."""


class Capture(Protocol):
    """What records a function's work on the device and does it again; `CudaCapture`, or a stand-in where there is no GPU."""

    def warm_up(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Runs `run` where it will be recorded."""

    def record(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Records `run`; what it returns is written anew by every replay."""

    def replay(self) -> None:
        """Does the recorded work again."""


class CudaCapture:
    """`torch.cuda.graph`, recorded on a stream of its own. Other threads, such as the loader's, may allocate meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()

    def warm_up(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = run()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def record(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        self.graph.replay()


def graphed(run: Step, state: RunState, batch: Batch, required: bool, report: Callable[[str], None]) -> Step:
    """`run` as replays of a CUDA graph where that computes the same; else `run` itself, and the reason is reported.

    Args:
        run: a step, without side effects on the host.
        state: of the run, whose next step is that of `batch`; it is left as it is.
        batch: says the shapes.
        required: a step that cannot be recorded is an error.
        report: is told which it is, on a GPU.

    Raises:
        TrainingError: it is required, and cannot be.
    """
    reason = unsuitable(state)
    if reason is None:
        try:
            step = ReplayedStep(run, state, batch, CudaCapture(state.precision.device))
        except RuntimeError as error:
            reason = first_line(error)
        else:
            report("the step is replayed as a CUDA graph, which was found to compute what the step without one does")
            return step
    if required:
        raise TrainingError(f"--cuda-graph is on, but the step cannot be replayed as a CUDA graph: {reason}")
    if state.precision.device.type == "cuda":
        report(f"no CUDA graph: {reason}")
    return run


def unsuitable(state: RunState) -> str | None:
    """Why no graph is tried for this run, or None."""
    if state.precision.device.type != "cuda":
        return "the device is not a GPU"
    if state.recipe.accumulate > 1:
        return "--accumulate goes back to earlier random states on the host"
    if state.recipe.optimizer == "fused-adam":
        return "apex's FusedAdam lets the host decide whether a step is taken"
    if dist.is_available() and dist.is_initialized():
        return "several processes exchange gradients"
    return None


class ReplayedStep:
    """A step recorded by `capture` and held against `run`. The state is left as it was.

    Raises:
        RuntimeError: it cannot be recorded, or does not compute what `run` does; the state is as it was, too.
    """

    def __init__(self, run: Step, state: RunState, batch: Batch, capture: Capture) -> None:
        self._run, self._capture = run, capture
        self._inputs = {f.name: x.clone() for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
        static = replace(batch, **self._inputs)
        groups = state.optimizer.param_groups
        before = _Snapshot(state)
        own = [{name: group[name] for name in ("lr", "capturable")} for group in groups]
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=state.precision.device)
            group["capturable"] = True
        try:
            for _ in range(WARM_UP):
                before.restore()
                numbers = capture.warm_up(lambda: run(static))
            expected = {name: value.cpu() for name, value in numbers.items()}  # waits for the step
            after = _Snapshot(state)
            before.restore()
            self._outputs = capture.record(lambda: run(static))
            before.restore()
            capture.replay()
            _hold_against(self._outputs, expected, before, after)
        except BaseException:
            for group, values in zip(groups, own):
                group.update(values)
            raise
        finally:
            before.restore()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Takes the step; what it returns is written over by the next one. A batch of other shapes is computed as ever."""
        inputs = {name: getattr(batch, name) for name in self._inputs}
        if any(x.shape != self._inputs[name].shape or x.dtype != self._inputs[name].dtype for name, x in inputs.items()):
            return self._run(batch)
        for name, x in inputs.items():
            self._inputs[name].copy_(x, non_blocking=True)
        self._capture.replay()
        return self._outputs


class _Snapshot:
    """All that a step changes, copied to the host, which has room where the device may have none."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.values = [(x, x.detach().to("cpu", copy=True)) for x in _changed_by_steps(state)]
        self.weights = self.values[: len(list(state.model.parameters()))]
        self.scaler = state.scaler.state_dict()
        self.random = random_state(state.precision.device)

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the values back where they were. Moments that were made since begin at 0, as an optimizer makes them."""
        for x, value in self.values:
            x.copy_(value)
        known = {id(x) for x, _ in self.values}
        for x in _changed_by_steps(self.state):
            if id(x) not in known:
                x.zero_()
        refresh(self.state.model.parameters())
        self.state.scaler.load_state_dict(self.scaler)
        set_random_state(self.state.precision.device, self.random)


def _changed_by_steps(state: RunState) -> Iterator[Tensor]:
    """Weights first, in the model's order."""
    yield from itertools.chain(state.model.parameters(), state.model.buffers())
    for moments in state.optimizer.state.values():
        yield from (x for x in moments.values() if isinstance(x, Tensor))
    if state.average is not None:
        yield from state.average.state_dict().values()


def _hold_against(outputs: dict[str, Tensor], expected: dict[str, Tensor], before: _Snapshot, after: _Snapshot) -> None:
    """RuntimeError unless the replayed numbers and the change of the weights are those of the step without a graph."""
    for name, value in expected.items():
        got = outputs[name].cpu()
        if not torch.isclose(got.double(), value.double(), rtol=NUMBERS, atol=1e-6, equal_nan=True):
            raise RuntimeError(f"replayed, {name} is {float(got):g}, and {float(value):g} without a graph")
    off = change = 0.0
    for (x, old), (_, new) in zip(before.weights, after.weights, strict=True):
        off += float((x.detach().cpu().double() - new.double()).square().sum())
        change += float((new.double() - old.double()).square().sum())
    if not off <= UPDATE**2 * change:
        raise RuntimeError("replayed, the step changes the weights in another way than without a graph")
