"""What a training step must at least take on a GPU, launch by launch, and what it is predicted to take: no GPU is needed.

    python benchmarks/roofline.py --gpu H200 --batch 256

The step is the real one. Its forward and backward pass run on the CPU with two clips and with three, every operator with its
Triton implementation; each launch is noted, PyTorch's with what they compute, Triton's without running them. What a launch
takes at the batch that is asked for follows from the two, because it grows in proportion to the clips.

Counted of a launch: bytes, each tensor that it is given or makes once; floating-point operations of its products,
those of 8-bit numbers apart; its exponentials. Its floor is the longest that one of these takes at the GPU's rates; a
prediction takes the share of each rate that kernels reach. The update of the weights is added as the one launch that
it is on a GPU, with what it reads and writes: PyTorch's AdamW, or with `--optimizer fast-adamw` this package's, which
takes gradients in bfloat16 and also writes the weights rounded, so that the step converts neither.

    python benchmarks/roofline.py --published     the reference's eager step beside it, as autocast on a CPU runs it
    python benchmarks/roofline.py --model mavil   another system: mavil-stage-2, a-mae, v-mae
    python benchmarks/roofline.py --dtype fp8     with the blocks' products in fp8

(Autocast on a GPU computes more of the published step in float32, so there it moves more than is counted here.)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from cavmae_fast import compat
from cavmae_fast.models import rounded as weights
from cavmae_fast.models.abilities import Embeds
from cavmae_fast.models.packed import RECOMPUTE
from cavmae_fast.models.precision import Precision
from cavmae_fast.models.systems import System
from cavmae_fast.ops import dispatch, fp8_products
from cavmae_fast.ops.fp8 import Quantized
from cavmae_fast.tuning.plan import IN_FP8, MODELS

OPTIMIZERS = ("adamw", "fast-adamw")
STATE_BYTES = 24
"Per parameter, what AdamW reads and writes besides the gradient: weight and two moments, both ways, in float32."
SHARES = {"bytes": 0.76, "flops": 0.65, "exponentials": 0.4, "fp8_flops": 0.5}
"""Of a GPU's stated rates, what kernels are taken to reach: 85 % of the copies that were measured on an H200 (4.3 of
4.8 TB/s), 82 % of the products that were (788 of 989 TFLOP/s), an estimate from the attention kernels' machine code,
and one for fp8, whose products of these depths (512 to 3072) end sooner and wait for memory more."""
LAUNCH_SECONDS = 1e-6
"Between two launches, in a CUDA graph."


PRODUCTS = ("mm", "addmm", "bmm", "matmul", "_linear_pointwise")
ATTENTION = {"attention_forward_kernel": (2, 1), "attention_backward_kernel": (7, 2), "attention_one_pass_kernel": (5, 1)}
"""Kernel -> products and exponentials of each score. The backward pass of two kinds of program forms scores and their
gradients twice."""
EXPONENTIAL = ("_softmax", "gelu", "gelu_", "gelu_backward")
PROBES = (2, 3)
"Clips of the two steps that are computed; a single one would be copied less."


BASE = MODELS["base"].system


class Gpu(NamedTuple):
    """Stated rates per second; exponentials: 16 per clock and multiprocessor."""

    bytes: float
    flops: float
    exponentials: float
    fp8_flops: float = 0.0
    "0: it has no fp8 units."


GPUS = {
    "A100": Gpu(2.04e12, 312e12, 16 * 108 * 1.41e9),
    "L40S": Gpu(0.864e12, 362e12, 16 * 142 * 2.52e9, 733e12),
    "RTX4090": Gpu(1.008e12, 165e12, 16 * 128 * 2.52e9, 330e12),
    "H100": Gpu(3.35e12, 989e12, 16 * 132 * 1.83e9, 1979e12),
    "H200": Gpu(4.8e12, 989e12, 16 * 132 * 1.83e9, 1979e12),
    "B200": Gpu(8.0e12, 2250e12, 16 * 148 * 1.85e9, 4500e12),
}


class Launch(NamedTuple):
    """One launch: of which kernel, and what it must do."""

    name: str
    bytes: float
    flops: float = 0.0
    exponentials: float = 0.0
    fp8_flops: float = 0.0


# ------------------------------------------------------------------------------------------------------ what is noted


class Launches(TorchDispatchMode):
    """Notes the launches of everything that runs while it is entered; Triton's kernels are noted and not run."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._without_autocast = compat.without_autocast

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != dispatch.NAMESPACE and (launch := _of_pytorch(func, args, kwargs or {}, result)):
            self.launches.append(launch)
        return result

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Every operator of ours runs its implementation within this: what that launches is noted as well."""
        with self._without_autocast(), self:
            yield

    def _on_units(self, a: Quantized, b: Quantized, bias: Tensor | None, out: Tensor) -> None:
        """In place of a product on fp8 units, which is not made."""
        moved = _once(t for t in (*a, *b, bias, out) if t is not None)
        self.launches.append(Launch("scaled_mm", moved, fp8_flops=2.0 * out.numel() * a.rows.shape[1]))

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        def note(kernel: Any, *args: Any, grid: Any, warmup: Any, **options: Any) -> None:
            names = dict(zip(kernel.arg_names, args)) | options
            self.launches.append(_of_triton(kernel.fn.__name__, names))

        with (
            mock.patch.object(compat, "without_autocast", self._inside),
            mock.patch.object(JITFunction, "run", note),
            mock.patch.object(InterpretedFunction, "run", note),
            # The interpreter rounds to fp8 wrongly, but nothing is computed here.
            mock.patch.dict(dispatch._limits, dict.fromkeys(IN_FP8, lambda *_: None)),
            mock.patch.object(fp8_products, "has_units", lambda device: True),
            mock.patch.object(fp8_products, "on_units", self._on_units),
            mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),  # so that CPU tensors take the Triton implementations
            self,
        ):
            yield


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; one that is expanded has no more than its memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for part in item:
            yield from _tensors(part)


def _once(tensors: Iterator[Tensor]) -> float:
    """Bytes of the tensors, each place in memory once."""
    return float(sum({(t.data_ptr(), _size(t)): _size(t) for t in tensors}.values()))


def _of_pytorch(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Launch | None:
    """What a call of PyTorch's launches; None for views, and for what makes memory without touching it."""
    name = func.overloadpacket.__name__
    given = [*_tensors(args), *_tensors(list(kwargs.values()))]
    made = list(_tensors(result))
    changed = func._schema.is_mutable
    if not made or name.startswith(("empty", "new_empty", "detach")):
        return None
    memory = {t.untyped_storage().data_ptr() for t in given}
    if not changed and all(t.untyped_storage().data_ptr() in memory for t in made):
        return None
    exponentials = float(made[0].numel()) if name in EXPONENTIAL else 0.0
    return Launch(name, _once(iter([*given, *made])), _products(name, given, made[0]), exponentials)


def _products(name: str, given: list[Tensor], made: Tensor) -> float:
    """Operations of a matrix product, from one of its factors and its result. The patch projection, a convolution in the
    reference and less than one part in two hundred, does not count."""
    if name not in PRODUCTS:
        return 0.0
    left = next(t for t in given if t.dim() > 1 and t.shape[:-1] == made.shape[:-1] and t is not made)
    return 2.0 * made.numel() * left.shape[-1]


def _of_triton(name: str, values: dict[str, Any]) -> Launch:
    """What a kernel moves, and for attention what it computes: its arguments say how many queries and keys there are."""
    moved = _once(iter([v for v in values.values() if isinstance(v, Tensor)]))
    if name == "dgelu_bias_kernel":
        return Launch(name, moved, 0.0, float(values["pre"].numel()))
    if values.get("GELU"):
        return Launch(name, moved, 0.0, float(values["x"].numel()))
    if name not in ATTENTION:
        return Launch(name, moved)
    scores = sum(float(values[f"q{i}"]) * values[f"k{i}"] for i in range(3)) * values["batch"] * values["HEADS"]
    products, exponentials = ATTENTION[name]
    return Launch(name, moved, 2 * products * scores * values["W"], exponentials * scores)


# ----------------------------------------------------------------------------------------------------------- the step


def launches_of(model: nn.Module, batch: int, system: System = BASE, fp8: bool = False) -> list[Launch]:
    """The launches of a training step in bfloat16, or `fp8`, of a model of `system`, fast or the reference; the last is the
    update.

    Weights that an optimizer keeps rounded (`keep_weights_rounded`) are taken as it left them."""
    audio, imgs = (torch.randn(batch, *shape) for shape in model.clip_spec.shapes)
    noted = Launches()
    ours = any(isinstance(module, Embeds) for module in model.modules())
    # A CPU writes a transposed factor out before some products; a GPU need not.
    factor = mock.patch("cavmae_fast.ops.linear_products._as_left_factor", lambda dout, x: dout.t())
    kept = mock.patch.object(weights.Copy, "write", lambda copy, parameter: None)  # the optimizer's launch wrote it
    with dispatch.override("triton" if ours else "torch"), factor, kept, noted.noting():
        with Precision(torch.device("cpu"), torch.bfloat16, fp8).autocast():
            loss = system.step_loss(model, audio, imgs)
        loss.backward()
    update = update_of([p for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return [*noted.launches, update]


def update_of(parameters: Sequence[Tensor]) -> Launch:
    """AdamW's update: it reads each gradient in the dtype that it has, and writes the rounded copies that are kept."""
    copies = weights.copies_of(parameters)
    moved = sum(_size(p.grad) + STATE_BYTES * p.numel() + (0 if c is None else _size(c)) for p, c in zip(parameters, copies))
    return Launch("adamw", float(moved))


def keep_weights_rounded(model: nn.Module) -> None:
    """Has `model` used as it is with `cavmae_fast.AdamW`, in a step of one backward pass."""
    weights.keep_rounded([p for p in model.parameters() if p.requires_grad], torch.bfloat16, low_gradients=True)


def step_launches(model: nn.Module, batch: int, system: System = BASE, fp8: bool = False) -> list[Launch]:
    """The launches of a training step of `batch` clips, the update included."""
    few, more = (launches_of(model, clips, system, fp8) for clips in PROBES)
    if [launch.name for launch in few] != [launch.name for launch in more]:
        raise RuntimeError(f"steps of {PROBES} clips launch different kernels; nothing can be concluded for other batches")
    clips = batch - PROBES[0]
    return [
        Launch(a.name, *(x + clips * (y - x) for x, y in zip(a[1:], b[1:], strict=True)))
        for a, b in zip(few, more, strict=True)
    ]


def seconds(launch: Launch, gpu: Gpu, shares: dict[str, float] | None = None) -> float:
    """The longest that bytes, operations or exponentials take at the GPU's rates, or at a share of them."""
    shares = shares or dict.fromkeys(SHARES, 1.0)
    work = {kind: getattr(launch, kind) for kind in shares}
    return max(amount / (getattr(gpu, kind) * shares[kind]) for kind, amount in work.items() if amount)


def table(launches: list[Launch], gpu: Gpu, batch: int) -> str:
    """A line for each kernel, the longest first, and their sum."""
    groups: dict[str, list[Launch]] = defaultdict(list)
    for launch in launches:
        groups[launch.name].append(launch)
    lines = []
    for name, group in groups.items():
        totals = [sum(getattr(launch, kind) for launch in group) for kind in SHARES]
        floor = sum(seconds(launch, gpu) for launch in group)
        predicted = sum(seconds(launch, gpu, SHARES) + LAUNCH_SECONDS for launch in group)
        lines.append((name, len(group), *totals, floor, predicted))
    lines.sort(key=lambda line: -line[-1])
    lines.append(("all", *(sum(column) for column in list(zip(*lines))[1:])))
    text = [
        f"{'kernel':<40}{'launches':>9}{'GB':>9}{'TFLOP':>8}{'G exp':>8}{'fp8 TFLOP':>11}"
        f"{'floor ms':>10}{'predicted ms':>14}"
    ]
    for name, count, moved, flops, exponentials, fp8_flops, floor, predicted in lines:
        numbers = f"{moved / 1e9:>9.2f}{flops / 1e12:>8.2f}{exponentials / 1e9:>8.2f}{fp8_flops / 1e12:>11.2f}"
        numbers += f"{1e3 * floor:>10.2f}"
        text.append(f"{name:<40}{count:>9}{numbers}{1e3 * predicted:>14.2f}")
    floor, predicted = lines[-1][-2:]
    text.append(f"at most {batch / floor:,.0f} clips/s; predicted {batch / predicted:,.0f} clips/s")
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--recompute", default="none", choices=RECOMPUTE)
    parser.add_argument(
        "--optimizer", default="adamw", choices=OPTIMIZERS, help="of our step; the published one has PyTorch's"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "fp8"))
    parser.add_argument("--published", action="store_true", help="the reference's eager step beside it")
    options = parser.parse_args(arguments)
    if options.dtype == "fp8" and not GPUS[options.gpu].fp8_flops:
        parser.error(f"--gpu is {options.gpu}, which has no fp8 units; --dtype fp8 needs them")
    system = MODELS[options.model].system
    model = system.create(recompute=options.recompute)
    if options.optimizer == "fast-adamw":
        keep_weights_rounded(model)
    ours = step_launches(model, options.batch, system, options.dtype == "fp8")
    print(table(ours, GPUS[options.gpu], options.batch))
    if options.published:
        theirs = step_launches(system.create(plain=True, attention="eager"), options.batch, system)
        share = sum(launch.bytes for launch in ours) / sum(launch.bytes for launch in theirs)
        print(f"\npublished, eager\n{table(theirs, GPUS[options.gpu], options.batch)}")
        print(f"\nours moves {share:.1%} of the bytes of the published step")


if __name__ == "__main__":
    main()
