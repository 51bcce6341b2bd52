"""The layers of a vision transformer, computed in plain PyTorch with the parameters in `reference.layers`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.reference import operators
from cavmae_fast.reference.layers import Attention, Block, Mlp, PatchEmbed


def embed_patches(parameters: PatchEmbed, images: Tensor) -> Tensor:
    """Images `[B, C, H, W]` -> a token for each patch `[B, L, D]`, row after row."""
    return parameters.proj(images).flatten(2).transpose(1, 2)


def self_attention(parameters: Attention, x: Tensor, implementation: str) -> Tensor:
    """Multi-head self-attention over tokens x `[B, L, D]`; `implementation` as in `operators.attention`."""
    batch, length, dim = x.shape
    qkv = parameters.qkv(x).reshape(batch, length, 3, parameters.num_heads, dim // parameters.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    x = operators.attention(q, k, v, implementation)
    return parameters.proj(x.transpose(1, 2).reshape(batch, length, dim))


def mlp(parameters: Mlp, x: Tensor) -> Tensor:
    """Linear, exact GELU, linear, for each token of x `[B, L, D]` by itself."""
    return parameters.fc2(F.gelu(parameters.fc1(x)))


def block(parameters: Block, x: Tensor, attention: str, stream: str | None = None) -> Tensor:
    """`x + attention(norm1(x))`, then `x + mlp(norm2(x))`, for tokens x `[B, L, D]` of the stream whose norms to use."""
    norm1, norm2 = parameters.norms(stream)
    x = x + self_attention(parameters.attn, norm1(x), attention)
    return x + mlp(parameters.mlp, norm2(x))
