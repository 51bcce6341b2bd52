"""One call of an operator, described without being made: what runs, what it is compared with, and what it must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cavmae_fast.ops.layout import StreamLayout

LOW_AND_FULL = (torch.bfloat16, torch.float16, torch.float32)


class Draw:
    """Random inputs of a case, from one seed, drawn on their device. `dtype` is that of the matrix products."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        # The meta device has shapes alone: nothing is drawn there.
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def fixed(self, *shape: int) -> Tensor:
        """Normal numbers in float32, without a gradient."""
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def low(self, *shape: int, scale: float = 1.0) -> Tensor:
        """An activation or the weight of a product: in `dtype`, with a gradient."""
        return (self.fixed(*shape) * scale).to(self.dtype).requires_grad_()

    def full(self, *shape: int, shift: float = 0.0) -> Tensor:
        """A parameter that stays in float32, with a gradient."""
        return (self.fixed(*shape) + shift).requires_grad_()

    def bytes(self, *shape: int) -> Tensor:
        """uint8."""
        return torch.randint(256, shape, device=self.device, generator=self.generator, dtype=torch.uint8)

    def order(self, batch: int, length: int) -> Tensor:
        """A permutation of 0..length-1 for each sample: `[batch, length]`, int64."""
        return torch.rand(batch, length, device=self.device, generator=self.generator).argsort(1)


@dataclass(frozen=True)
class Case:
    """A call of an operator. `ours`, `reference` and `baseline` take the inputs that `inputs` draws."""

    operator: str
    "Its name in `dispatch.operators`."
    name: str
    "Which call of it: 'shared-qkv'."
    ours: Callable
    "The public function."
    reference: Callable
    "The same in plain, differentiable PyTorch, in any dtype: with the inputs in float64, the truth."
    baseline: Callable
    """An explicit low-precision implementation: float32 arithmetic, rounded where the operator hands a tensor on. Its error
    is the measure of the error allowed (see `parity`)."""
    draw: Callable[[Draw], list] = field(repr=False)
    moved: Callable[..., tuple[int, int]] = field(repr=False)
    """Inputs -> bytes that forward and backward must move at least: every input read once, every output written once; in
    the backward pass also what forward must have kept."""
    forward_flops: float = 0.0
    "Operations of the products: 2 m k n for `[m, k]` and `[k, n]`. The backward pass has twice as many."
    attention_of: tuple[StreamLayout, StreamLayout, int] | None = None
    "For attention: (layout of the queries, layout of keys and values, heads)."
    head_width: int = 0
    "For attention: the width of its heads."
    plain: Callable | None = field(default=None, repr=False)
    "What is timed as `eager`, where the reference is not it."
    dtypes: tuple[torch.dtype, ...] = LOW_AND_FULL
    "Those that make a difference to the call. Sound has one dtype, whatever that of the products."
    differentiable: bool = True
    "Whether there are gradients (features need none)."
    capture: bool = True
    "False: PyTorch's version copies from the host, which a CUDA graph cannot hold."

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"

    @property
    def eager(self) -> Callable:
        """What one would write in plain PyTorch, in the dtypes of a training step; it returns the dtypes of `ours`."""
        return self.plain or self.reference

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> list:
        """The arguments, drawn anew: tensors, lists of tensors, None and dtypes."""
        return self.draw(Draw(dtype, torch.device(device), seed))


def outputs_of(result: Tensor | tuple) -> list[Tensor]:
    """What a function returned, as a list."""
    return list(result) if isinstance(result, tuple) else [result]


def size(*tensors: Tensor | None) -> int:
    """Bytes of the tensors; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def rounded(function: Callable, dtypes: Callable[..., list[torch.dtype]]) -> Callable:
    """`function` computed in float32, with only its results rounded, to `dtypes(*inputs)`: as exact as an operator with
    such results can be."""

    def in_float32(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.float() if item.is_floating_point() else item
        return [in_float32(i) for i in item] if isinstance(item, list | tuple) else item

    def explicit(*inputs: Any) -> tuple[Tensor, ...]:
        results = outputs_of(function(*in_float32(inputs)))
        return tuple(result.to(dtype) for result, dtype in zip(results, dtypes(*inputs), strict=True))

    return explicit


def of_first(first: Tensor, *_: Any) -> list[torch.dtype]:
    """For `rounded`: the result has the first input's dtype."""
    return [first.dtype]


def in_float32(*_: Any) -> list[torch.dtype]:
    """For `rounded`: the result is in float32, whatever the inputs are."""
    return [torch.float32]
