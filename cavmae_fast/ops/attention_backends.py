"""Attention behind the packed layout that differentiates itself: PyTorch's `scaled_dot_product_attention`, flash-attn and
xformers; and `kept`, for CPUs.

Each takes (q, kv, batch, q_lengths, lengths, heads) as the registered operator does.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend

from cavmae_fast.ops.attention_cpu import KeptProbabilities
from cavmae_fast.ops.attention_torch import operands

PACKAGES = {"flash_attn": "flash-attn", "xformers": "xformers"}
"Back end -> the package that pip knows it by."


@functools.cache
def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def sdpa(q, kv, batch, q_lengths, lengths, heads):
    outputs = []
    for parts in operands(q, kv, batch, q_lengths, lengths, heads):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in parts))
        outputs.append(out.transpose(1, 2).reshape(-1, heads * out.shape[-1]))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def kept(q, kv, batch, q_lengths, lengths, heads):
    """For CPUs: batched products, the probabilities kept for backward."""
    outputs = [
        KeptProbabilities.apply(*parts, parts[0].shape[-1] ** -0.5).flatten(2).flatten(0, 1)
        for parts in operands(q, kv, batch, q_lengths, lengths, heads)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def sdpa_with(kernel: SDPBackend, *arguments):
    """`sdpa` by one of its kernels, whichever PyTorch itself would take. Raises RuntimeError where it does not fit."""
    with torch_attention.sdpa_kernel(kernel):
        return sdpa(*arguments)


@functools.lru_cache(maxsize=64)
def _boundaries(batch: int, lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Row at which each sample begins, and the end: int32 `[samples + 1]`, flash-attn's `cu_seqlens`."""
    counts = torch.tensor([0, *(length for length in lengths for _ in range(batch))])
    return counts.cumsum(0).to(device, torch.int32)


def flash_attn(q, kv, batch, q_lengths, lengths, heads):
    import flash_attn as package

    keys, most = _boundaries(batch, tuple(lengths), q.device), max(lengths)
    if kv is None:
        packed = q.view(q.shape[0], 3, heads, -1)
        return package.flash_attn_varlen_qkvpacked_func(packed, keys, most).flatten(1)
    queries = _boundaries(batch, tuple(q_lengths), q.device)
    q, kv = q.view(q.shape[0], heads, -1), kv.view(kv.shape[0], 2, heads, -1)
    return package.flash_attn_varlen_kvpacked_func(q, kv, queries, keys, max(q_lengths), most).flatten(1)


@functools.lru_cache(maxsize=64)
def _block_mask(batch: int, q_lengths: tuple[int, ...], lengths: tuple[int, ...], device: torch.device):
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    counts = [[length for length in each for _ in range(batch)] for each in (q_lengths, lengths)]
    return BlockDiagonalMask.from_seqlens(*counts, device=device)


def xformers(q, kv, batch, q_lengths, lengths, heads):
    from xformers.ops import memory_efficient_attention

    mask = _block_mask(batch, tuple(q_lengths), tuple(lengths), q.device)
    parts = q.chunk(3, dim=1) if kv is None else (q, *kv.chunk(2, dim=1))
    out = memory_efficient_attention(*(t.unflatten(1, (heads, -1)).unsqueeze(0) for t in parts), attn_bias=mask)
    return out.squeeze(0).flatten(1)


SDPA_KERNELS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa,
    "kept": kept,
    **{name: partial(sdpa_with, kernel) for name, kernel in SDPA_KERNELS.items()},
    "flash_attn": flash_attn,
    "xformers": xformers,
}
