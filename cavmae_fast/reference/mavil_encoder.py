"""The parameters that MAViL's pretraining model and its classifier share: two towers and the fusion encoder."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from cavmae_fast.clip import ClipSpec
from cavmae_fast.reference.encoder_parameters import Recomputing, check_counts, chosen, fitting
from cavmae_fast.reference.layers import Block, NormLayer
from cavmae_fast.reference.tower import DecoderSizes, Tower, clip_of

FUSIONS = ("joint", "bottleneck")


class Fusion(nn.Module):
    """The fusion encoder: plain ViT blocks over the tokens of both modalities, class tokens included; and the final norm.

    'joint': every block attends to all tokens at once. 'bottleneck' (Nagrani et al., NeurIPS 2021): each modality has
    blocks of its own and attends to itself and to a few bottleneck tokens, whose updates by the two modalities are averaged
    after every block.
    """

    def __init__(
        self, form: str, depth: int, tokens: int, width: int, heads: int, mlp_ratio: float, norm_layer: NormLayer
    ) -> None:
        super().__init__()
        self.form = chosen("fusion", form, FUSIONS)
        if depth < 1:
            raise ValueError(f"fusion_depth is {depth}; it must be at least 1")

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(Block(width, heads, mlp_ratio, norm_layer) for _ in range(depth))

        if form == "joint":
            self.blocks = blocks()
        else:
            if tokens < 1:
                raise ValueError(f"bottleneck_tokens is {tokens}; it must be at least 1")
            self.blocks_a, self.blocks_v = blocks(), blocks()
            self.bottleneck = nn.Parameter(torch.zeros(1, tokens, width))
        self.norm = norm_layer(width)


class MAViLEncoderParameters(Recomputing):
    """What both MAViL models have: a tower for each modality (`audio`, `video`) and the fusion encoder (`fusion`).

    `decoder` None: towers without decoders. The other arguments as in `MAViLParameters`.
    """

    modalities: ClassVar[str] = "av"
    attentions: ClassVar[tuple[str, ...]]
    "Allowed values of the argument `attention`; the first is its default."

    def __init__(
        self,
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
        fusion: str,
        fusion_depth: int,
        bottleneck_tokens: int,
        decoder: DecoderSizes | None,
        attention: str | None,
        clip: ClipSpec | None,
        recompute: str,
    ) -> None:
        super().__init__()
        sizes = (img_size, frames, tubelet_size, audio_length, patch_size, embed_dim, depth, num_heads, mlp_ratio)
        self.audio = Tower("a", *sizes, norm_layer, decoder)
        self.video = Tower("v", *sizes, norm_layer, decoder)
        self.fusion = Fusion(fusion, fusion_depth, bottleneck_tokens, embed_dim, num_heads, mlp_ratio, norm_layer)
        self.recompute = recompute
        self.attention = chosen("attention", attention, self.attentions)
        self.clip_spec = fitting(clip, clip_of(img_size, frames, audio_length))

    @property
    def towers(self) -> tuple[Tower, Tower]:
        return self.audio, self.video

    def check_inputs(self, **inputs: Tensor) -> None:
        """TypeError or ValueError, naming the argument, unless sound (`audio` or `a`) is `[B, audio_length, 128]` and
        pictures (`imgs` or `v`) are `[B, frames, 3, H, W]`, all of one B."""
        for name, x in inputs.items():
            (self.audio if name in ("audio", "a") else self.video).check_input(name, x)
        check_counts(**inputs)
