"""The backward pass of `attention` in the CUDA library, for Hopper.

The algorithm is that of `attention_one_pass.py`. All that belongs to a head's queries stays in shared memory, the unfinished
dq as well, so nothing is read or written twice; that bounds the length of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.ops import _triton, native
from cavmae_fast.ops.attention_tiles import columns
from cavmae_fast.ops.attention_torch import column_sums
from cavmae_fast.ops.native import aligned, current_stream, device_limit

WIDTHS = (32, 64)
"Widths of heads that the kernel is compiled for."


def attention_limit(dtype: torch.dtype, shape: Sequence[int]) -> str | None:
    """Why the library does not take a call; `shape` is (head width, longest stream), or without the latter."""
    width, *longest = shape
    if dtype != torch.bfloat16 or width not in WIDTHS:
        return f"the CUDA library's kernel takes bfloat16 and heads of width 32 or 64, not {dtype} and {width}"
    if not _triton.AVAILABLE:
        return "its forward pass is Triton's, which is not installed"
    most = native.library().cavmae_attention_longest(width)
    if longest and longest[0] > most:
        return f"the CUDA library's kernel takes {most} tokens of width {width} at most, not {longest[0]}"
    return device_limit((9,))


def attention_backward_library(
    dout: Tensor,
    q: Tensor,
    kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    batch: int,
    q_lengths: Sequence[int],
    lengths: Sequence[int],
    heads: int,
    owed: int,
    owed_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator `attention_backward`: (dq, dkv, the bias gradients that are owed)."""
    dout, q, out, lse = aligned(dout, q, out, lse)
    kv = None if kv is None else aligned(kv)[0]
    dq, dkv = torch.empty_like(q), None if kv is None else torch.empty_like(kv)
    inputs, gradients = columns(q, kv), columns(dq, dkv)
    addresses = [tensor.data_ptr() for tensor in (*gradients, *inputs, dout, out, lse)]
    strides = (inputs[0].stride(0), inputs[1].stride(0))
    streams = (native.sizes(q_lengths), native.sizes(lengths), len(lengths), batch)
    sizes = (heads, inputs[0].shape[1] // heads, native.DTYPES[q.dtype], current_stream(q.device))
    native.call("cavmae_attention_backward", *addresses, *strides, *streams, *sizes)
    dbias = column_sums(dq, dkv, batch, q_lengths, lengths, owed, owed_dtype)
    return dq, q.new_empty(0) if dkv is None else dkv, dbias
