"""`--dry-run`: what a run would take, from one batch that is read and one small step that is computed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.loader import Loader
from cavmae_fast.models.precision import Precision
from cavmae_fast.training.progress import duration
from cavmae_fast.training.run_config import RunConfig
from cavmae_fast.training.step_memory import StepMemory, step_memory
from cavmae_fast.training.task import Task

PROBE_FLOPS = 1e12
"Operations of the step that is computed: as many clips as these suffice for, two at least. It takes seconds on a CPU."
TIMED_STEPS = 3
"Steps that are timed, of which the shortest counts."


@dataclass(frozen=True)
class DryRun:
    """What a run would take. Bytes and seconds are of one process.

    Attributes:
        parameters, trained: numbers of them.
        batch: clips per step.
        steps: of the whole run.
        flops: operations of a step, per clip; None where they are not counted.
        memory: of a step of a full batch.
        read_seconds: until the first batch was there.
        clip_seconds: of a step, per clip, as a small step took them.
        device_bytes: memory of the device; None on a CPU.
        shapes: of the batch's audio and image.
    """

    parameters: int
    trained: int
    batch: int
    steps: int
    flops: float | None
    memory: StepMemory
    read_seconds: float
    clip_seconds: float
    device_bytes: int | None
    shapes: tuple[list[int], list[int]]

    def render(self) -> str:
        """The report, a line for each question."""
        count = f"{self.parameters / 1e6:,.1f} M parameters, {self.trained / 1e6:,.1f} M of them trained"
        operations = "" if self.flops is None else f", {self.flops / 1e9:,.1f} GFLOP per clip and step"
        batch = f"{self.batch} clips, audio {self.shapes[0]}, images {self.shapes[1]}"
        device = "" if self.device_bytes is None else f" of the device's {_gigabytes(self.device_bytes)}"
        fixed = f"{_gigabytes(self.memory.model)} for weights and moments"
        kept = f"{self.memory.kept / self.batch / 2**20:,.1f} MiB per clip from the forward to the backward pass"
        step = self.batch * self.clip_seconds
        pace = f"{self.steps:,} steps of {step:,.2f} s, if a full batch takes as long per clip as a small one does here"
        disk = f"{_gigabytes(12 * self.parameters)} per checkpoint, {_gigabytes(4 * self.parameters)} for the model"
        return "\n".join(
            (
                f"model     {count}{operations}",
                f"batch     {batch}; the first was there after {duration(self.read_seconds)}",
                f"memory    about {_gigabytes(self.memory.peak)}{device} at the most: {fixed}, {kept}",
                f"time      about {duration(self.steps * step)} for {pace}",
                f"disk      {disk}",
                "this was a dry run: nothing was written",
            )
        )


def dry_run(
    config: RunConfig,
    task: Task,
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    epochs: int,
    teacher_bytes: int = 0,
) -> DryRun:
    """Reads a batch, computes a few small steps with it, and reports. The model's weights stay as they are.

    Args:
        config: resolved.
        task, model: prepared.
        loader: of the training clips; it is closed.
        precision: of the run.
        epochs: of the run, where its options do not name steps.
        teacher_bytes: weights of a teacher that the task asks, beside those of the model.

    Raises:
        MediaError: no clip can be used.
    """
    begin = time.perf_counter()
    steps = config.steps or epochs * len(loader)
    batch = next(iter(loader))
    read = time.perf_counter() - begin
    loader.close()
    flops = task.step_flops(model)
    few = batch[: 2 if flops is None else max(2, int(PROBE_FLOPS / flops))]
    _timed_step(task, model, few, precision)  # loads what the first step has to wait for
    seconds = min(_timed_step(task, model, few, precision) for _ in range(TIMED_STEPS))
    model.zero_grad(set_to_none=True)
    memory = step_memory(
        model, precision.dtype, lambda light: task.losses(light, _empty(batch))["loss"], precision.device.type
    )
    memory = replace(memory, model=memory.model + teacher_bytes, peak=memory.peak + teacher_bytes)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = torch.cuda.get_device_properties(precision.device).total_memory if precision.device.type == "cuda" else None
    return DryRun(
        parameters=parameters,
        trained=trained,
        batch=len(batch.ids),
        steps=steps,
        flops=flops,
        memory=memory,
        read_seconds=read,
        clip_seconds=seconds / len(few.ids),
        device_bytes=total,
        shapes=(list(batch.audio.shape), list(batch.image.shape)),
    )


def _empty(batch: Batch) -> Batch:
    """A batch like this one, of tensors that are made here."""
    return replace(batch, audio=torch.empty_like(batch.audio), image=torch.empty_like(batch.image))


def _timed_step(task: Task, model: nn.Module, batch: Batch, precision: Precision) -> float:
    """Seconds of a step."""
    begin = time.perf_counter()
    with precision.autocast():
        loss = task.losses(model, batch)["loss"]
    loss.backward()
    if precision.device.type == "cuda":
        torch.cuda.synchronize(precision.device)
    return time.perf_counter() - begin


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB"
