"""The parameters of single-modality masked autoencoders (He et al., CVPR 2022; Huang et al., NeurIPS 2022) and of the
classifier that is made of one, without a forward."""

from __future__ import annotations

import functools
from typing import ClassVar

from torch import Tensor, nn

from cavmae_fast.clip import ClipSpec
from cavmae_fast.reference.encoder_parameters import Recomputing, chosen, constructor_arguments, fitting
from cavmae_fast.reference.layers import NormLayer, initialize_weights
from cavmae_fast.reference.tower import DecoderSizes, Tower, clip_of

LAYER_NORM = functools.partial(nn.LayerNorm, eps=1e-6)
"Of all models of towers, as published. Certain."
SMALL_EMBEDDINGS = ("cls_token", "mask_token", "bottleneck")
"Parameters that begin as small normal numbers."


class MAEParameters(Recomputing, Tower):
    """A masked autoencoder of one modality: 'a', sound, or 'v', pictures."""

    attentions: ClassVar[tuple[str, ...]]
    "Allowed values of the argument `attention`; the first is its default."

    def __init__(
        self,
        modality: str,
        img_size: int | tuple[int, int] = 224,
        frames: int = 8,
        tubelet_size: int = 2,
        audio_length: int = 1024,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_layer: NormLayer = LAYER_NORM,
        norm_pix_loss: bool = True,
        *,
        attention: str | None = None,
        clip: ClipSpec | None = None,
        recompute: str = "none",
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__(
            modality,
            img_size,
            frames,
            tubelet_size,
            audio_length,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            norm_layer,
            DecoderSizes(decoder_embed_dim, decoder_depth, decoder_num_heads),
        )
        self.recompute = recompute
        self.attention = chosen("attention", attention, self.attentions)
        self.clip_spec = fitting(clip, clip_of(img_size, frames, audio_length))
        self.norm_pix_loss = norm_pix_loss
        self.config = config | {"norm_eps": self.norm.eps}
        initialize_weights(self, *SMALL_EMBEDDINGS)


class MAEFTParameters(Recomputing, Tower):
    """A classifier of one modality: the encoder, and a head on its mean token for `label_dim` classes."""

    attentions: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        label_dim: int,
        modality: str,
        img_size: int | tuple[int, int] = 224,
        frames: int = 8,
        tubelet_size: int = 2,
        audio_length: int = 1024,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_layer: NormLayer = LAYER_NORM,
        *,
        attention: str | None = None,
        clip: ClipSpec | None = None,
        recompute: str = "none",
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__(
            modality,
            img_size,
            frames,
            tubelet_size,
            audio_length,
            patch_size,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            norm_layer,
            None,
        )
        self.recompute = recompute
        self.attention = chosen("attention", attention, self.attentions)
        self.clip_spec = fitting(clip, clip_of(img_size, frames, audio_length))
        self.mlp_head = head(label_dim, embed_dim, norm_layer)
        self.config = config | {"norm_eps": self.norm.eps}
        initialize_weights(self, *SMALL_EMBEDDINGS)

    @property
    def modes(self) -> tuple[str]:
        """The one input mode that the classifier has, by its modality."""
        return ("audioonly" if self.modality == "a" else "videoonly",)

    def train_with(self, mode: str) -> None:
        """ValueError unless `mode` is the classifier's; there is nothing to freeze."""
        check_mode(self, mode)

    def chosen_input(self, a: Tensor | None, v: Tensor | None, mode: str | None) -> Tensor:
        """The input of the classifier's modality. TypeError or ValueError for one that does not fit, or another mode."""
        check_mode(self, mode or self.modes[0])
        x = a if self.modality == "a" else v
        self.check_input(self.modality, x)
        return x


def check_mode(model: nn.Module, mode: str) -> None:
    """ValueError unless `mode` is one of the model's `modes`."""
    if mode not in model.modes:
        raise ValueError(f"mode is {mode!r}; for {type(model).__name__} it must be one of {', '.join(model.modes)}")


def head(label_dim: int, width: int, norm_layer: NormLayer) -> nn.Sequential:
    """LayerNorm and a linear layer for `label_dim` classes. ValueError when there are none."""
    if label_dim < 1:
        raise ValueError(f"label_dim is {label_dim}; it must be at least 1")
    return nn.Sequential(norm_layer(width), nn.Linear(width, label_dim))
