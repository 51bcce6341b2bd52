"""A tensor that the backward pass needs, formed again there instead of kept since the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor


class Origin(NamedTuple):
    """How a tensor is formed again: `form(*tensors)` gives it, bit for bit.

    An operator that is given the origin of its input keeps `tensors` in place of the input. That saves memory where they
    are kept anyway, for the backward pass of what made the input. Gradients flow through the input, not through them.
    """

    form: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def itself(x: Tensor) -> Tensor:
    """The form of a tensor that is kept."""
    return x


def origin_or_itself(x: Tensor, origin: Origin | None) -> Origin:
    """`origin`, or that of a tensor that is kept; its tensors carry no gradient."""
    form, tensors = origin or Origin(itself, (x,))
    return Origin(form, tuple(tensor.detach() for tensor in tensors))


def origin_of_last(origin: Origin, rows: int) -> Origin:
    """How the last rows of a tensor are formed again from what it is."""
    return Origin(partial(_last, origin.form, rows), origin.tensors)


def _last(form: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    return form(*tensors)[-rows:]
