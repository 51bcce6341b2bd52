"""Weights that an optimizer keeps rounded to the dtype of the products, in place of a conversion at every use.

Under autocast a model multiplies with its float32 weights rounded to 16 bits, and their gradients come back in 16 bits. So
every step converts all weights and all gradients: 12 bytes per parameter, in two small kernels for each. An optimizer that
writes the rounded weights when it writes the weights spares both:

    keep_rounded(parameters, ...)    says, once, which weights an optimizer keeps rounded
    rounded(weight, dtype)           gives a model the copy, made at its first use, or else converts
    copies_of(parameters)            gives the optimizer the copies that were asked for so far, to be written
    mark_written(parameters)         says that they are

A copy counts only for the values of the weight that it was made of. Weights that were changed in place since (a checkpoint
was loaded, an average put in their place) are rounded anew; changes through `weight.data`, which PyTorch does not count, are
seen by `refresh` alone. Copies are no part of a model: they are neither saved nor copied with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class Copy:
    """A weight's copy, and what it was made of."""

    dtype: torch.dtype
    low_gradient: bool
    tensor: Tensor | None = None
    "None until a model asks for it."
    made_of: tuple[int, int] = (0, 0)
    "Version and address of the weight that it is rounded from."

    def write(self, parameter: Tensor) -> None:
        """Rounds the weight again."""
        with torch.no_grad():
            self.tensor.copy_(parameter)
        self.made_of = _values_of(parameter)


_copies = WeakTensorKeyDictionary()


def _values_of(parameter: Tensor) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()


class _Rounded(torch.autograd.Function):
    """The copy of a parameter, whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Copy) -> Tensor:
        return copy.tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rounded(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """`parameter` in `dtype`: the copy that an optimizer keeps, where one keeps it in this dtype, else converted."""
    if parameter.dtype == dtype or not _copies or torch.compiler.is_compiling():
        return parameter.to(dtype)
    copy = _copies.get(parameter)
    if copy is None or copy.dtype != dtype:
        return parameter.to(dtype)
    if copy.tensor is None:
        copy.tensor = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        copy.write(parameter)
        if copy.low_gradient:
            parameter.grad_dtype = dtype
    elif copy.made_of != _values_of(parameter):
        copy.write(parameter)
    return _Rounded.apply(parameter, copy)


def keep_rounded(parameters: Iterable[Tensor], dtype: torch.dtype, low_gradients: bool = False) -> None:
    """From now on the caller keeps those of `parameters` that a model uses in `dtype` rounded to it.

    `low_gradients`: their gradients stay in `dtype`. That changes nothing where a step has one backward pass: there they are
    computed in it, and only their sum over several passes would be rounded. Not with DistributedDataParallel, which wants
    gradients in the parameters' own dtype.
    """
    for parameter in parameters:
        if parameter.dtype != dtype:
            _copies[parameter] = Copy(dtype, low_gradients)


def copies_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The copies that are in use, to be written together with the parameters; None where there is none."""
    found = [_copies.get(parameter) for parameter in parameters]
    return [None if copy is None else copy.tensor for copy in found]


def mark_written(parameters: Iterable[Tensor]) -> None:
    """Says that the copies of `parameters` hold their present values."""
    for parameter in parameters:
        if (copy := _copies.get(parameter)) is not None:
            copy.made_of = _values_of(parameter)


def refresh(parameters: Iterable[Tensor]) -> None:
    """Rounds again those of `parameters` whose copies are in use."""
    for parameter in parameters:
        if (copy := _copies.get(parameter)) is not None and copy.tensor is not None:
            copy.write(parameter)
