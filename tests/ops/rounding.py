"""Makes Triton's interpreter round to 8 and 16 bits as a GPU does: its own conversions are wrong in many numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DTYPES = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
}
BYTES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object) -> np.ndarray:
    bits = torch.from_numpy(np.ascontiguousarray(values).reshape(-1).view(np.uint8).copy()).view(DTYPES[source])
    converted = bits.to(DTYPES[target])
    return converted.view(torch.uint8).numpy().view(BYTES[converted.itemsize]).reshape(values.shape)


@contextlib.contextmanager
def exact_rounding() -> Iterator[None]:
    """Within, kernels that compute in float32 can be interpreted on tensors in fp8 and bfloat16; so can products of fp8."""
    with mock.patch.object(interpreter, "_convert_float", _convert):
        yield
