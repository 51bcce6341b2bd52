"""The parameters of a vision transformer's layers: their names, shapes and order, and nothing about how they are computed.

None of these modules has a forward pass of its own, because the reference and the fast models share the parameters and not
the computation: `reference.blocks` computes with them in plain PyTorch, `models.packed` on packed streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

NormLayer = Callable[[int], nn.LayerNorm]


class PatchEmbed(nn.Module):
    """The linear projection of non-overlapping square patches; `grid` counts them: rows, columns."""

    def __init__(self, grid: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.img_size = (grid[0] * patch_size, grid[1] * patch_size)
        self.patch_size = (patch_size, patch_size)
        self.num_patches = grid[0] * grid[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)


class TubeletEmbed(nn.Module):
    """The linear projection of tubelets: `tubelet_size` frames of square patches; `grid` counts them: along frames, rows,
    columns."""

    def __init__(
        self, grid: tuple[int, int, int], tubelet_size: int, patch_size: int, in_chans: int, embed_dim: int
    ) -> None:
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.grid = grid
        self.num_patches = grid[0] * grid[1] * grid[2]
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=size, stride=size)


class Attention(nn.Module):
    """Multi-head self-attention: the joint projection of queries, keys and values, and that of the result."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """Two linear layers, with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)


class Block(nn.Module):
    """A pre-norm ViT block: `norm1`, `attn`, `norm2`, `mlp`."""

    streams: ClassVar[tuple[str | None, ...]] = (None,)
    "The token streams that have two norms of their own; None is the plain stream."

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self._add_norms("norm1", dim, norm_layer)
        self.attn = Attention(dim, num_heads)
        self._add_norms("norm2", dim, norm_layer)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def _add_norms(self, name: str, dim: int, norm_layer: NormLayer) -> None:
        for stream in self.streams:
            self.add_module(_of_stream(name, stream), norm_layer(dim))

    def forward(self, compute: Callable[..., Any], *args: Any) -> Any:
        """`compute(*args)`, a function that uses this block's parameters.

        A block computes nothing itself, but what uses it calls it, because that is how PyTorch's tools learn when its
        parameters are needed: FSDP gathers the shards before and drops them after, in both passes.
        """
        return compute(*args)

    def norms(self, stream: str | None = None) -> tuple[nn.LayerNorm, nn.LayerNorm]:
        """The two norms that the token stream `stream` passes, one of `streams`."""
        return getattr(self, _of_stream("norm1", stream)), getattr(self, _of_stream("norm2", stream))


class ModalityBlock(Block):
    """The block of CAV-MAE: audio ('a') and video ('v') seen alone pass norms of their own, such as `norm1_a`.

    Attention and MLP weights are the same for all streams. Published checkpoints carry all six norms in every block,
    whether or not a stream other than the plain one ever passes it.
    """

    streams = (None, "a", "v")

    def freeze_modality_norms(self) -> None:
        """Freezes the norms of audio and video, for a block that only the plain stream passes: they never get a gradient."""
        for stream in ("a", "v"):
            for norm in self.norms(stream):
                norm.requires_grad_(False)


def initialize_weights(model: nn.Module, *embeddings: str) -> None:
    """Xavier-uniform projections (the patch projections as if they were linear); small normal values for the parameters
    whose own name (what follows the last dot) begins with one of `embeddings`."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith(embeddings):
            nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, PatchEmbed | TubeletEmbed):
            nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def _of_stream(name: str, stream: str | None) -> str:
    return name if stream is None else f"{name}_{stream}"
