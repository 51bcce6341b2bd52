"""Launcher calls whose kernels are compiled ahead of time: name -> a function that calls the launcher on CPU tensors.

The shapes are the real ones (they decide how arguments are specialised), with a batch of 1 where the batch does not
matter, and once with everything that can be 1 equal to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from cavmae_fast.ops import attention_kernels, linear_gelu, stream_layer_norm

CASES: dict[str, Callable[[], object]] = {}
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _layer_norm(dtype: torch.dtype, width: int, lengths: list[int], delta: bool) -> None:
    rows = sum(lengths)
    x = torch.empty(rows, width)
    low = torch.empty(rows, width, dtype=dtype)
    weights = [torch.empty(width) for _ in lengths]
    stats = torch.empty(rows)
    stream_layer_norm._forward_triton(x, low if delta else None, weights, weights, lengths, 1e-5, dtype)
    stream_layer_norm._backward_triton(low, x if delta else None, x, stats, stats, weights, lengths, dtype)


for _name, _dtype in LOW_PRECISION.items():
    CASES[f"stream_layer_norm-shared-{_name}"] = partial(_layer_norm, _dtype, 768, [128, 49, 177], True)
    CASES[f"stream_layer_norm-decoder-{_name}"] = partial(_layer_norm, _dtype, 512, [708], True)
    CASES[f"stream_layer_norm-ones-{_name}"] = partial(_layer_norm, _dtype, 768, [1], False)


def _dgelu_bias(dtype: torch.dtype, width: int, rows: list[int]) -> None:
    x = torch.empty(sum(rows), width, dtype=dtype)
    linear_gelu._dgelu_bias_triton(x, x, rows, dtype)


for _name, _dtype in LOW_PRECISION.items():
    CASES[f"dgelu_bias-encoder-{_name}"] = partial(_dgelu_bias, _dtype, 3072, [128, 49])
    CASES[f"dgelu_bias-decoder-{_name}"] = partial(_dgelu_bias, _dtype, 2048, [708])
    CASES[f"dgelu_bias-ones-{_name}"] = partial(_dgelu_bias, _dtype, 1, [1])


def _attention(dtype: torch.dtype, width: int, heads: int, lengths: list[int], q_lengths: list[int] | None = None) -> None:
    queries = q_lengths or lengths
    q = torch.empty(sum(queries), (1 if q_lengths else 3) * heads * width, dtype=dtype)
    kv = torch.empty(sum(lengths), 2 * heads * width, dtype=dtype) if q_lengths else None
    out, lse = attention_kernels.attention_forward_triton(q, kv, 1, queries, lengths, heads)
    attention_kernels.attention_backward_triton(out, q, kv, out, lse, 1, queries, lengths, heads)


for _name, _dtype in LOW_PRECISION.items():
    CASES[f"attention-shared-{_name}"] = partial(_attention, _dtype, 64, 12, [128, 49, 177])
    CASES[f"attention-decoder-{_name}"] = partial(_attention, _dtype, 32, 16, [708])
    CASES[f"attention-queries-{_name}"] = partial(_attention, _dtype, 32, 16, [708], [531])
CASES["attention-long-bf16"] = partial(_attention, torch.bfloat16, 64, 12, [708])
CASES["attention-wide-bf16"] = partial(_attention, torch.bfloat16, 128, 8, [177])
CASES["attention-wide-long-bf16"] = partial(_attention, torch.bfloat16, 128, 8, [708])
CASES["attention-ones-fp16"] = partial(_attention, torch.float16, 16, 1, [1])
CASES["attention-odd-fp16"] = partial(_attention, torch.float16, 24, 3, [300])
CASES["attention-fp32"] = partial(_attention, torch.float32, 64, 12, [708])
