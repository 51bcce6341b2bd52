"""Full training step (forward, backward, AdamW): the published model, its obvious improvements, and ours.

    python benchmarks/throughput.py --device cuda --batch 128 --dtype bf16
    python benchmarks/throughput.py --model mavil              the first stage; also mavil-stage-2, a-mae, v-mae

Of models that nobody published, 'published' is the reference with eager attention.

All variants start from the same weights and see the same batch and masks. Before any is timed, its loss after no and
one step and the direction of some gradients are compared with the float32 reference; a variant that differs is not
timed, and the exit code is 1. Variants are timed in turn, round after round. Writes
`results/<device>/throughput-*.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.common import (
    DTYPES,
    BenchmarkError,
    add_arguments,
    device_name,
    error_text,
    find_device,
    first_line,
    provenance,
    write_json,
)
from benchmarks.render import step_table
from benchmarks.timing import ceilings, elapsed, spin, summary, synchronize
from cavmae_fast.models.precision import fp8_products
from cavmae_fast.models.rounded import refresh
from cavmae_fast.models.systems import CAVMAESystem, MAESystem, MAViLStage2System, MAViLSystem, System
from cavmae_fast.ops import dispatch
from cavmae_fast.ops.fp8 import Fp8Error, check_fp8
from cavmae_fast.training.adam import AdamW
from cavmae_fast.tuning.plan import MODELS

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SEED, LEARNING_RATE, WARM_UP, MOST_SKIPS = 1, 1e-4, 2, 20
TOWER_PROBES = ("blocks.0.attn.qkv.weight", "mask_token", "decoder_blocks.0.mlp.fc1.weight")
PROBES: dict[type, tuple[str, ...]] = {
    CAVMAESystem: (
        "patch_embed_v.proj.weight",
        "blocks_a.0.attn.qkv.weight",
        "blocks_u.0.norm1_v.weight",
        "mask_token",
        "decoder_blocks.0.mlp.fc1.weight",
        "decoder_blocks.-1.attn.qkv.weight",
        "decoder_pred_a.weight",
    ),
    MAESystem: ("patch_embed.proj.weight", *TOWER_PROBES, "decoder_blocks.-1.attn.qkv.weight", "decoder_pred.weight"),
    MAViLSystem: (
        "video.patch_embed.proj.weight",
        *(f"audio.{name}" for name in TOWER_PROBES),
        "video.norm.weight",
        "fusion.blocks.0.attn.qkv.weight",
        "video.decoder_blocks.-1.attn.qkv.weight",
        "video.decoder_pred.weight",
    ),
    MAViLStage2System: (
        "student.video.patch_embed.proj.weight",
        *(f"student.audio.{name}" for name in TOWER_PROBES),
        "student.fusion.blocks.0.attn.qkv.weight",
        "student.video.decoder_blocks.-1.attn.qkv.weight",
        "student.target_pred_v.weight",
    ),
}
"Parameters whose gradients are compared, by the kind of system; -1 is the last block."
LOSS_TOLERANCE = {"bf16": 2e-3, "fp16": 1e-3, "fp32": 1e-5, "fp8": 2e-3}
"Relative error of the loss against float32. The published model on a CPU is off by 2e-4 in bf16."
GRADIENT_TOLERANCE = {"bf16": 0.06, "fp16": 0.03, "fp32": 1e-3, "fp8": 0.5}
"""Distance of a gradient's direction from the float32 gradient's (both of norm 1), in the worst of the probes. The
published model on a CPU is off by 0.014 in bf16; fp8, whose numbers have 3 bits of mantissa instead of 8, and 2 in
gradients, makes 0.19 of it in a tiny model."""


@dataclass(frozen=True)
class Variant:
    """How one contender computes the step."""

    model: str
    "'reference' or 'fast'"
    attention: str | None = None
    published_autocast: bool = False
    "fp16 with a gradient scaler on CUDA, as the published code trains; bf16 on a CPU"
    compiled: bool = False
    graph: bool = False
    ops: str | None = None
    "mode of the operators where it is not the setting's"
    optimizer: str = "adamw"
    "'adamw', PyTorch's fused one, or 'fast-adamw', this package's"
    recompute: str = "none"
    residual_gradient: str = "full"
    fp8: bool = False


VARIANTS = {
    "published": Variant("reference", "eager", published_autocast=True),
    "sdpa": Variant("reference", "sdpa"),
    "sdpa-compile": Variant("reference", "sdpa", compiled=True),
    "fast-torch": Variant("fast", ops="torch"),
    "fast": Variant("fast"),
    "fast-graph": Variant("fast", graph=True),
    "fast-adam": Variant("fast", optimizer="fast-adamw"),
    "fast-adam-graph": Variant("fast", optimizer="fast-adamw", graph=True),
    "fast-low": Variant("fast", residual_gradient="low"),
    "fast-fp8": Variant("fast", fp8=True),
    "fast-elementwise": Variant("fast", recompute="elementwise"),
    "fast-mlp": Variant("fast", recompute="mlp"),
    "fast-all": Variant("fast", optimizer="fast-adamw", graph=True, residual_gradient="low", fp8=True),
}
DEFAULT_VARIANTS = ("published", "sdpa", "sdpa-compile", "fast", "fast-graph")


@dataclass(frozen=True)
class Settings:
    """What is measured. `batch` samples a step, `steps` steps a sample of time, `rounds` samples."""

    model: str = "base"
    batch: int = 32
    dtype: str = "bf16"
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    steps: int = 10
    rounds: int = 5
    compile_mode: str = "default"
    ops: str = "auto"


# --------------------------------------------------------------------------------------------------- a training step


class Step:
    """One variant: its model, optimizer and a training step on a fixed batch."""

    def __init__(self, variant: Variant, settings: Settings, task: Task, device: torch.device) -> None:
        self.device, self.task = device, task
        self.dtype = settings.dtype
        if variant.published_autocast:
            self.dtype = "fp16" if device.type == "cuda" else "bf16"
        self.arithmetic = "fp8" if variant.fp8 else self.dtype
        self.system = system_of(settings)
        with device:
            self.model = self.system.create(plain=variant.model == "reference", attention=variant.attention).to(device)
        self.model.load_state_dict(task.state)
        for name in ("recompute", "residual_gradient") if variant.model == "fast" else ():
            setattr(self.model, name, getattr(variant, name))
        self.ops = variant.ops or settings.ops
        self.call: Callable = self.model
        if variant.compiled:
            self.call = torch.compile(self.model, mode=settings.compile_mode, dynamic=False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.cache_casts = not variant.graph  # a captured graph must make its own casts
        self.products = fp8_products if variant.fp8 else contextlib.nullcontext
        options = {"lr": LEARNING_RATE, "betas": (0.95, 0.999), "weight_decay": 5e-7}
        if variant.optimizer == "fast-adamw":
            self.optimizer: torch.optim.Optimizer = AdamW(
                self.parameters, rounded=torch.bfloat16, low_gradients=True, **options
            )
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, fused=True, capturable=variant.graph, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == "fp16")

    def run(self) -> Tensor:
        """Forward, backward, AdamW -> the loss, without a graph."""
        self.optimizer.zero_grad(set_to_none=True)
        dtype = DTYPES[self.dtype]
        with dispatch.override(self.ops):
            mixed = dtype != torch.float32
            autocast = torch.autocast(self.device.type, dtype, enabled=mixed, cache_enabled=self.cache_casts)
            with autocast, self.products():
                loss = self.system.step_loss(self.call, *self.task.inputs)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    @torch.no_grad()
    def restore(self) -> None:
        """The weights and the optimizer as they were before the first step, in place."""
        for name, value in self.model.state_dict().items():
            value.copy_(self.task.state[name])
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        refresh(self.parameters)  # a replay does not see that they were changed

    def applied(self) -> Tensor:
        """Restores, seeds and runs until the gradient scaler lets a step through (it skips those that overflow)."""
        for _ in range(MOST_SKIPS):
            self.restore()
            before = self.scaler.get_scale()
            loss = self.seeded()
            if self.scaler.get_scale() >= before:
                return loss
        raise BenchmarkError(f"the gradients overflowed at each of {MOST_SKIPS} scales")

    def seeded(self) -> Tensor:
        torch.manual_seed(SEED)
        return self.run().clone()

    def probes(self) -> dict[str, Tensor]:
        """The gradients of the last step that are compared, each of norm 1, in float32."""
        found = {}
        for name in PROBES[type(self.system)]:
            parameter = functools.reduce(_child, name.split("."), self.model)
            gradient = parameter.grad.detach().float()
            found[name] = gradient / gradient.norm()
        return found

    def peak_bytes(self) -> int | None:
        """Peak of allocated memory since it was last reset; None on a CPU, where a process has one peak for all."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


class GraphStep(Step):
    """The whole step, AdamW included, captured once in a CUDA graph; `run` replays it. Masks differ at each replay."""

    def __init__(self, variant: Variant, settings: Settings, task: Task, device: torch.device) -> None:
        super().__init__(variant, settings, task, device)
        eager = super().run
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                eager()
        torch.cuda.current_stream().wait_stream(stream)
        release(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.loss = eager()
        self.captured_peak = super().peak_bytes()

    def run(self) -> Tensor:
        self.graph.replay()
        return self.loss

    def peak_bytes(self) -> int | None:
        """The peak while capturing: replays allocate nothing."""
        return self.captured_peak


def system_of(settings: Settings) -> System:
    return MODELS[settings.model].system


def _child(module: Any, name: str) -> Any:
    return module[int(name)] if name.lstrip("-").isdigit() else getattr(module, name)


def unavailable(variant: Variant, settings: Settings, device: torch.device) -> str | None:
    """Why a variant cannot run, or None."""
    if variant.graph and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if variant.graph and settings.dtype == "fp16":
        return "the gradient scaler of fp16 is not captured"
    if (variant.fp8 or variant.optimizer == "fast-adamw") and settings.dtype != "bf16":
        return "it is measured in bf16"
    if variant.fp8:
        try:
            check_fp8(device)
        except Fp8Error as error:
            return str(error)
    return None


# -------------------------------------------------------------------------------------------------------- the check


@dataclass(frozen=True)
class Task:
    """Initial weights (on the CPU), the batch, and what the float32 reference makes of them."""

    state: dict[str, Tensor]
    inputs: tuple[Tensor, Tensor]
    losses: tuple[float, float] = (0.0, 0.0)
    probes: dict[str, Tensor] | None = None


def make_task(settings: Settings, device: torch.device) -> Task:
    """Weights and batch from one seed; losses of two steps and gradients by the float32 reference.

    Its blocks are recomputed in the backward pass, so that it fits where a variant fits.
    """
    torch.manual_seed(SEED)
    model = system_of(settings).create(plain=True)
    audio, imgs = (torch.randn(settings.batch, *shape) for shape in model.clip_spec.shapes)
    task = Task(model.state_dict(), (audio.to(device), imgs.to(device)))
    step = Step(Variant("reference", "sdpa"), Settings(settings.model, settings.batch, "fp32"), task, device)
    for module in step.model.modules():
        if type(module).__name__ == "Block":
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    first = step.applied()
    probes = step.probes()
    return Task(task.state, task.inputs, (first.item(), step.seeded().item()), probes)


def check(step: Step) -> dict[str, Any]:
    """Losses of two steps and the gradients of the first against the reference: errors and whether they are allowed."""
    first = step.applied().item()
    probes = step.probes()
    errors = {name: float((probes[name] - want).norm()) for name, want in step.task.probes.items()}
    if step.device.type == "cuda":  # the first step compiled, tuned and made the optimizer's state
        torch.cuda.reset_peak_memory_stats(step.device)
    second = step.seeded().item()
    losses = [abs(got - want) / abs(want) for got, want in zip((first, second), step.task.losses)]
    # NaN must not pass, so it is asked whether the errors are small.
    good = all(e <= LOSS_TOLERANCE[step.arithmetic] for e in losses)
    good = good and all(e <= GRADIENT_TOLERANCE[step.arithmetic] for e in errors.values())
    return {"losses": [first, second], "loss_errors": losses, "gradient_errors": errors, "right": good}


# ---------------------------------------------------------------------------------------------------- measurement


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prepare(
    name: str, settings: Settings, task: Task, device: torch.device, verbose: bool = True
) -> tuple[dict[str, Any], Step | None]:
    """Builds and checks a variant: its row so far, and the step to time unless there is none.

    Whatever a variant raises is recorded, and the others go on.
    """
    variant = VARIANTS[name]
    row: dict[str, Any] = {"name": name, **asdict(variant), "status": "ok"}
    reason = unavailable(variant, settings, device)
    if reason:
        return row | {"status": "not available", "reason": reason}, None
    release(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        step = (GraphStep if variant.graph else Step)(variant, settings, task, device)
        row["dtype"] = step.dtype
        row["check"] = check(step)
    except torch.OutOfMemoryError as error:
        row |= {"status": "out of memory", "reason": first_line(error)}
    except Exception as error:
        row |= {"status": "failed", "reason": first_line(error), "error": error_text(error)}
    else:
        peak = step.peak_bytes()
        row["peak_bytes"] = None if peak is None else peak - before
        if row["check"]["right"]:
            return row, step
        row |= {"status": "wrong", "reason": wrong(name, step, row["check"])}
    if verbose:
        print(f"{name}: {row['status']}: {row['reason']}", file=sys.stderr, flush=True)
    return row, None


def wrong(name: str, step: Step, found: dict[str, Any]) -> str:
    losses = " and ".join(f"{loss:.6g}" for loss in found["losses"])
    wanted = " and ".join(f"{loss:.6g}" for loss in step.task.losses)
    worst = max(found["gradient_errors"], key=found["gradient_errors"].get)
    return (
        f"variant {name!r} gives losses {losses} where the float32 reference gives {wanted} (allowed in {step.arithmetic}:"
        f" {LOSS_TOLERANCE[step.arithmetic]:.0e}), and a gradient of {worst} off by {found['gradient_errors'][worst]:.1e}"
        f" (allowed: {GRADIENT_TOLERANCE[step.arithmetic]:.0e})"
    )


def time_steps(steps: dict[str, Step], rows: dict[str, dict], settings: Settings, device: torch.device) -> None:
    """Rounds of all variants in turn; fills in their rows. One that no longer fits beside the others is left out."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    spin(device)
    for turn in range(settings.rounds + 1):  # the first one warms up
        for name, step in list(steps.items()):
            torch.manual_seed(SEED + turn)
            try:
                ms = elapsed(step.run, settings.steps if turn else min(WARM_UP, settings.steps), device)
            except torch.OutOfMemoryError as error:
                rows[name] |= {"status": "out of memory", "reason": first_line(error)}
                del steps[name]
                release(device)
                continue
            if turn:
                samples[name].append(ms)
    for name in steps:
        rows[name]["time"] = summary(samples[name], settings.steps)


def measure(settings: Settings, device: torch.device, limits: dict[str, Any]) -> dict[str, Any]:
    """All variants of `settings`: rows with check, time, rates and peak memory. `limits`: the machine's ceilings."""
    with exact_float32():
        task = make_task(settings, device)
        release(device)
        rows, steps = {}, {}
        for name in settings.variants:
            rows[name], step = prepare(name, settings, task, device)
            if step is not None:
                steps[name] = step
            del step
        time_steps(steps, rows, settings, device)
        synchronize(device)
    system = system_of(settings)
    with torch.device("meta"):
        model = system.create()
    useful = system.step_flops(model)
    for row in rows.values():
        if row["status"] == "ok":
            seconds = row["time"]["median_ms"] / 1e3
            row["samples_per_s"] = settings.batch / seconds
            row["tflops"] = useful * settings.batch / seconds / 1e12
            row["gemm_share"] = row["tflops"] / limits["gemm_tflops"][row["dtype"]]
    steps.clear()
    torch._dynamo.reset()
    release(device)
    return {
        "settings": asdict(settings),
        "flops_per_sample": {"useful": useful, "published": system.step_flops(model, plain=True)},
        "reference_losses": task.losses,
        "variants": list(rows.values()),
    }


@contextlib.contextmanager
def exact_float32():
    """Float32 means float32 (no TF32), and compiled code draws the same masks as eager code."""
    import torch._inductor.config as inductor

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, inductor.fallback_random
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    inductor.fallback_random = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, inductor.fallback_random = before


def dtypes_of(settings: Settings, device: torch.device) -> list[str]:
    """The dtypes whose GEMM rate the shares are of."""
    return list(dict.fromkeys([settings.dtype, "fp16" if device.type == "cuda" else "bf16"]))


# ------------------------------------------------------------------------------------------------------------ output


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings, torch.device]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--batch", type=int, help="samples a step (default: 128 on CUDA, 2 on a CPU)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of all variants but the published one")
    parser.add_argument("--variants", default=",".join(DEFAULT_VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, help="steps a round (default: 10 on CUDA, 1 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default="default")
    parser.add_argument("--ops", choices=dispatch.MODES, default="auto", help="implementation of the fast operators")
    args = parser.parse_args(arguments)
    device = find_device(parser, args.device)
    variants = tuple(args.variants.split(","))
    for name in variants:
        if name not in VARIANTS:
            parser.error(f"--variants names {name!r}; it must be of {', '.join(VARIANTS)}")
    on_gpu = device.type == "cuda"
    batch = args.batch if args.batch is not None else 128 if on_gpu else 2
    steps = args.steps if args.steps is not None else 10 if on_gpu else 1
    for name, value in (("--batch", batch), ("--steps", steps), ("--rounds", args.rounds)):
        if value < 1:
            parser.error(f"{name} is {value}; it must be at least 1")
    chosen = Settings(args.model, batch, args.dtype, variants, steps, args.rounds, args.compile_mode, args.ops)
    return args, chosen, device


def main(arguments: list[str] | None = None) -> int:
    args, settings, device = parse(arguments)
    command = [__file__, *(sys.argv[1:] if arguments is None else arguments)]
    record = {"kind": "throughput", "provenance": provenance(device, command, args.commit)}
    record["ceilings"] = ceilings(device, dtypes_of(settings, device), tiny=settings.model.startswith("tiny"))
    record |= measure(settings, device, record["ceilings"])
    name = f"throughput-{settings.model}-b{settings.batch}-{settings.dtype}.json"
    path: Path = args.out / device_name(device) / name
    write_json(path, record)
    print(step_table(record))
    bad = [row for row in record["variants"] if row["status"] == "wrong" or unexpected(row)]
    for row in bad:
        print(f"throughput: {row['name']} was not timed: {row['reason']}", file=sys.stderr)
    return 1 if bad else 0


def unexpected(row: dict[str, Any]) -> bool:
    """A failure other than that PyTorch could not compile the reference, which is recorded and no fault of ours."""
    return row["status"] == "failed" and not row["compiled"]


if __name__ == "__main__":
    sys.exit(main())
