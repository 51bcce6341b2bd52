"""The transformer block of CAV-MAE: a pre-norm ViT block with one LayerNorm for each token stream that may pass it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from cavmae_fast.reference import operators

NormLayer = Callable[[int], nn.LayerNorm]


class PatchEmbed(nn.Module):
    """Projection of non-overlapping patches: images `[B, C, H, W]` -> tokens `[B, L, D]`, row after row."""

    def __init__(self, grid: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.img_size = (grid[0] * patch_size, grid[1] * patch_size)
        self.patch_size = (patch_size, patch_size)
        self.num_patches = grid[0] * grid[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a joint qkv projection with bias."""

    def __init__(self, dim: int, num_heads: int, implementation: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = operators.attention(q, k, v, self.implementation)
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`; `modality` 'a' or 'v' chooses that stream's own norms.

    Attention and MLP weights are the same for all streams. Every block carries all six norms, as published checkpoints
    do, whether or not a stream other than the plain one ever passes it.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer, attention: str) -> None:
        super().__init__()
        self.norm1, self.norm1_a, self.norm1_v = norm_layer(dim), norm_layer(dim), norm_layer(dim)
        self.attn = Attention(dim, num_heads, attention)
        self.norm2, self.norm2_a, self.norm2_v = norm_layer(dim), norm_layer(dim), norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def norms(self, modality: str | None) -> tuple[nn.LayerNorm, nn.LayerNorm]:
        """The two norms that the stream `modality` (None, 'a' or 'v') passes."""
        suffix = f"_{modality}" if modality else ""
        return getattr(self, "norm1" + suffix), getattr(self, "norm2" + suffix)

    def freeze_unused_norms(self) -> None:
        """Freezes the `_a` and `_v` norms of a block that only the plain stream passes: they never get a gradient."""
        for name in ("norm1_a", "norm1_v", "norm2_a", "norm2_v"):
            getattr(self, name).requires_grad_(False)

    def forward(self, x: Tensor, modality: str | None = None) -> Tensor:
        norm1, norm2 = self.norms(modality)
        x = x + self.attn(norm1(x))
        return x + self.mlp(norm2(x))
