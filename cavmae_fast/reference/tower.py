"""The parameters of one modality's masked autoencoder: a vision transformer and, for pretraining, a decoder.

Names and shapes are those of published image and audio MAEs, so that their checkpoints load by name. `MAE` is one tower,
`MAViL` two. How they are computed: `reference.mae` in plain PyTorch, `models.towers` on packed streams.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cavmae_fast.clip import MEL_BINS, ClipSpec
from cavmae_fast.reference.encoder_parameters import check_divides, check_heads, check_input, check_norm_layer, chosen
from cavmae_fast.reference.layers import Block, NormLayer, PatchEmbed, TubeletEmbed
from cavmae_fast.reference.masking import Masking, kept_tokens, random_masking
from cavmae_fast.reference.positions import separable_positions, sincos_positions

AUDIO_MEAN, AUDIO_STD = -4.2677393, 2 * 4.5689974
"Of AudioSet's log-mel values, as published with Audio-MAE and MAViL: `(x - mean) / (2 std)`. Certain."
CHANNELS = {"a": 1, "v": 3}
INPUTS = {"a": "audio", "v": "imgs"}
"How arguments that hold a modality are called."


class DecoderSizes(NamedTuple):
    """Width, blocks and attention heads of a decoder."""

    width: int
    depth: int
    heads: int


class Tower(nn.Module):
    """One modality's encoder, and its decoder where its sizes are given. No forward pass.

    Attributes:
        modality: 'a', a log-mel spectrogram `[B, audio_length, 128]`, or 'v', pictures `[B, frames, 3, H, W]`, and
            `[B, 3, H, W]` where `frames` is 1.
        patch_size, tubelet_size: pixels along the edges of a patch, and frames (1 for sound and single pictures).
    """

    def __init__(
        self,
        modality: str,
        img_size: int | tuple[int, int],
        frames: int,
        tubelet_size: int,
        audio_length: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer: NormLayer,
        decoder: DecoderSizes | None,
    ) -> None:
        super().__init__()
        self.modality = chosen("modality", modality, ("a", "v"))
        check_heads("num_heads", num_heads, "embed_dim", embed_dim)
        check_norm_layer(norm_layer, embed_dim)
        if depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1")
        self.frames = frames if modality == "v" else 1
        self.tubelet_size = tubelet_size if self.frames > 1 else 1
        self.patch_size = patch_size
        self.picture = (audio_length, MEL_BINS) if modality == "a" else _size_of(img_size)
        for name, value in zip(PICTURE_NAMES[modality], self.picture):
            check_divides(patch_size, name, value)
        if self.tubelet_size < 1 or self.frames < 1 or self.frames % self.tubelet_size:
            raise ValueError(f"tubelet_size {tubelet_size} does not divide frames, which is {frames}")
        rows, columns = (size // patch_size for size in self.picture)
        if self.frames == 1:
            self.patch_embed = PatchEmbed((rows, columns), patch_size, CHANNELS[modality], embed_dim)
        else:
            grid = (frames // tubelet_size, rows, columns)
            self.patch_embed = TubeletEmbed(grid, tubelet_size, patch_size, CHANNELS[modality], embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = _positions(embed_dim, self.patch_embed.grid)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, norm_layer) for _ in range(depth))
        self.norm = norm_layer(embed_dim)
        if decoder is not None:
            self._add_decoder(*decoder, mlp_ratio, norm_layer)

    def _add_decoder(self, width: int, depth: int, heads: int, mlp_ratio: float, norm_layer: NormLayer) -> None:
        check_heads("decoder_num_heads", heads, "decoder_embed_dim", width)
        if depth < 1:
            raise ValueError(f"decoder_depth is {depth}; it must be at least 1")
        self.decoder_embed = nn.Linear(self.norm.normalized_shape[0], width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = _positions(width, self.patch_embed.grid)
        self.decoder_blocks = nn.ModuleList(Block(width, heads, mlp_ratio, norm_layer) for _ in range(depth))
        self.decoder_norm = norm_layer(width)
        self.decoder_pred = nn.Linear(width, self.patch_embed.proj.weight[0].numel())

    @property
    def modalities(self) -> str:
        """As models of several modalities say it: here its own alone."""
        return self.modality

    stacks: ClassVar[tuple[tuple[str, ...], ...]] = (("blocks",),)
    "As in `EncoderParameters`."

    @property
    def num_patches(self) -> int:
        return self.patch_embed.num_patches

    def images(self, x: Tensor) -> Tensor:
        """The tower's input as images `[B, C, H, W]` or clips `[B, C, F, H, W]`, a view; uint8 not yet normalized."""
        if self.modality == "a":
            return x.unsqueeze(1)
        return x if self.frames == 1 else x.transpose(1, 2)

    def check_input(self, name: str, x: Tensor) -> None:
        """TypeError or ValueError, naming the argument, unless x is an input of this tower."""
        if self.modality == "a":
            check_input(name, x, self.picture, pixels=False)
        else:
            frames = () if self.frames == 1 else (self.frames,)
            check_input(name, x, (*frames, CHANNELS["v"], *self.picture), pixels=True)

    def draw_mask(self, batch: int, ratio: float, device: torch.device, name: str) -> Masking:
        """Masks of `batch` samples, each patch by itself. ValueError, naming the argument `name`, for a ratio that keeps
        nothing."""
        columns = self.patch_embed.grid[-1]
        return random_masking(batch, (self.num_patches // columns, columns), ratio, device, name=name)

    def check_removed(self, ratio: float, name: str) -> None:
        """ValueError when nothing would be removed, so that there is nothing to reconstruct."""
        length = self.num_patches
        if kept_tokens(length, ratio, name) == length:
            raise ValueError(f"{name} is {ratio}, which removes none of {length} patches; it must remove at least one")


PICTURE_NAMES = {"a": ("audio_length", "the number of mel bins"), "v": ("img_size", "img_size")}
"What errors call the height and the width of a tower's picture."


def clip_of(img_size: int | tuple[int, int], frames: int, audio_length: int, frame_rate: float | None = None) -> ClipSpec:
    """What models of towers take of a clip: `frames` pictures at `frame_rate` (None: 2 per second, as published), and the
    sound from where they begin; of one picture or none, the sound from the clip's beginning."""
    rate = frame_rate or 2.0 if frames > 1 else None
    return ClipSpec(
        image_size=_size_of(img_size),
        frames=frames,
        frame_rate=rate,
        audio_length=audio_length,
        audio_mean=AUDIO_MEAN,
        audio_std=AUDIO_STD,
    )


def _size_of(img_size: int | tuple[int, int]) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])


def _positions(width: int, grid: tuple[int, ...]) -> nn.Parameter:
    """Frozen sine-cosine positions `[1, 1 + L, width]` of the class token, which has none (zeros), and of a grid."""
    table = sincos_positions(width, *grid) if len(grid) == 2 else separable_positions(width, *grid)
    return nn.Parameter(torch.cat([torch.zeros(1, width), table]).unsqueeze(0), requires_grad=False)
