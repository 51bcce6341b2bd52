"""The parameters of CAV-MAE's encoder: what they are, how they begin, and which arguments and inputs fit them."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

import torch
from torch import Tensor, nn

from cavmae_fast.clip import MEL_BINS, ClipSpec
from cavmae_fast.reference.freezing import Freezing
from cavmae_fast.reference.layers import ModalityBlock, NormLayer, PatchEmbed, initialize_weights
from cavmae_fast.reference.positions import sincos_positions


class Recomputing(nn.Module):
    """A model with the property `recompute`. It belongs to a run and not to the weights: no configuration notes it."""

    recomputations: ClassVar[tuple[str, ...]] = ("none",)
    "Allowed values of `recompute`."
    _recompute = "none"

    @property
    def recompute(self) -> str:
        """What the backward pass forms again instead of keeping it, one of `recomputations`. It may be set at any time."""
        return self._recompute

    @recompute.setter
    def recompute(self, value: str) -> None:
        self._recompute = chosen("recompute", value, self.recomputations)


class EncoderParameters(Recomputing, Freezing):
    """Patch embeddings, the modality-specific blocks, the shared blocks and the final norms, without a forward pass.

    The reference and the fast models both derive from this class and each add a forward pass of their own: so names,
    shapes, order and initial values cannot drift apart, and no method of one is reached on the other.
    """

    modalities: ClassVar[str] = "av"
    "'av', or 'a' for an audio-only model, which carries no parameter of the video stream."
    attentions: ClassVar[tuple[str, ...]]
    "Allowed values of the argument `attention`; the first is its default."
    clip_spec: ClipSpec
    "What the model takes of a clip: the data path makes its inputs by this."

    def __init__(
        self,
        img_size: int | tuple[int, int],
        audio_length: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        modality_specific_depth: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer: NormLayer,
        tr_pos: bool,
        depth: int,
        attention: str | None,
        clip: ClipSpec | None,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        for name, value in (("img_size", height), ("img_size", width), ("audio_length", audio_length)):
            check_divides(patch_size, name, value)
        check_divides(patch_size, "the number of mel bins", MEL_BINS)
        check_heads("num_heads", num_heads, "embed_dim", embed_dim)
        if not 0 <= modality_specific_depth <= depth:
            raise ValueError(f"modality_specific_depth is {modality_specific_depth}; it must lie in 0..depth ({depth})")
        self.recompute = recompute
        self.attention = chosen("attention", attention, self.attentions)
        check_norm_layer(norm_layer, embed_dim)
        self.clip_spec = fitting(clip, ClipSpec(image_size=(height, width), audio_length=audio_length))
        self.in_chans = in_chans
        grids = {
            "a": (MEL_BINS // patch_size, audio_length // patch_size),
            "v": (height // patch_size, width // patch_size),
        }

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(ModalityBlock(embed_dim, num_heads, mlp_ratio, norm_layer) for _ in range(count))

        for m in self.modalities:
            channels = 1 if m == "a" else in_chans
            self.add_module(f"patch_embed_{m}", PatchEmbed(grids[m], patch_size, channels, embed_dim))
        for m in self.modalities:
            self.register_parameter(f"modality_{m}", nn.Parameter(torch.zeros(1, 1, embed_dim)))
        for m in self.modalities:
            self.register_parameter(f"pos_embed_{m}", positions(embed_dim, grids[m], tr_pos))
        for m in self.modalities:
            self.add_module(f"blocks_{m}", blocks(modality_specific_depth))
        self.blocks_u = blocks(depth - modality_specific_depth)
        for m in self.modalities:
            self.add_module(f"norm_{m}", norm_layer(embed_dim))
        self.norm = norm_layer(embed_dim)

    def initialize_weights(self) -> None:
        """Xavier-uniform projections, small normal embeddings."""
        initialize_weights(self, "modality_", "decoder_modality_", "mask_token")

    def freeze_modality_norms(self, *stacks: nn.ModuleList) -> None:
        """Freezes the modality norms of all blocks in `stacks`: no stream passes them, and plain DDP would wait for them."""
        for stack in stacks:
            for block in stack:
                block.freeze_modality_norms()

    @property
    def patch_size(self) -> int:
        return self.patch_embed_a.patch_size[0]

    def check_inputs(self, **inputs: Tensor) -> None:
        """Raises TypeError or ValueError, naming the argument, unless audio (`audio` or `a`) is `[B, T, 128]` and images
        (`imgs` or `v`) are `[B, C, H, W]`, floating-point (images: or uint8 RGB), all of one B."""
        height, time = self.patch_embed_a.img_size
        for name, x in inputs.items():
            sound = name in ("audio", "a")
            shape = (time, height) if sound else (self.in_chans, *self.patch_embed_v.img_size)
            check_input(name, x, shape, pixels=not sound and self.in_chans == 3)
        check_counts(**inputs)

    @staticmethod
    def spectrogram(audio: Tensor) -> Tensor:
        """audio `[B, T, 128]` as a one-channel image `[B, 1, 128, T]` (a view): its patches come frequency by frequency."""
        return audio.unsqueeze(1).transpose(2, 3)

    def images(self, m: str, x: Tensor) -> Tensor:
        """The input of modality `m` as images `[B, C, H, W]`, uint8 not yet normalized."""
        return self.spectrogram(x) if m == "a" else x


def constructor_arguments(values: dict) -> dict:
    """The arguments of a constructor, from its `locals()`, that say what the model is: enough to build it again.

    All of them can be written as JSON. `clip` is among them only where it was given, as a dict.
    """
    left_out = ("self", "__class__", "norm_layer", "attention", "clip", "recompute")
    arguments = {name: value for name, value in values.items() if name not in left_out}
    return arguments if values["clip"] is None else arguments | {"clip": asdict(values["clip"])}


def check_input(name: str, x: Tensor, shape: tuple[int, ...], pixels: bool) -> None:
    """TypeError or ValueError, naming the argument, unless x is a floating-point `[B, *shape]`; `pixels`: or uint8 RGB."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or (pixels and x.dtype == torch.uint8)):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} is {kind}; it must be a floating-point tensor{' or uint8 RGB' if pixels else ''}")
    if tuple(x.shape[1:]) != shape or x.dim() != len(shape) + 1 or x.shape[0] < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}; this model takes [B, {', '.join(map(str, shape))}]")


def check_counts(**inputs: Tensor) -> None:
    """ValueError unless all inputs (one or two) hold as many samples."""
    counts = [(name, x.shape[0]) for name, x in inputs.items()]
    if counts[0][1] != counts[-1][1]:
        (name, count), (other, other_count) = counts
        raise ValueError(f"{name} holds {count} samples and {other} {other_count}; they must be as many")


def check_norm_layer(norm_layer: NormLayer, width: int) -> None:
    """ValueError unless it builds LayerNorms with weight and bias."""
    norm = norm_layer(width) if callable(norm_layer) else None
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise ValueError(f"norm_layer is {norm_layer!r}; it must build torch.nn.LayerNorm modules with weight and bias")


def chosen(name: str, value: str | None, allowed: tuple[str, ...]) -> str:
    """`value`, or the first of `allowed` for None. ValueError, naming the argument, for another."""
    if value is not None and value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value or allowed[0]


def positions(width: int, grid: tuple[int, int], trainable: bool) -> nn.Parameter:
    """Sine-cosine positions `[1, L, width]` of a grid of patches."""
    return nn.Parameter(sincos_positions(width, *grid).unsqueeze(0), requires_grad=trainable)


def check_heads(name: str, heads: int, width_name: str, width: int) -> None:
    """ValueError unless `heads` divide `width` and 4 does, as sine-cosine positions need."""
    if width < 4 or width % 4:
        raise ValueError(f"{width_name} is {width}; it must be a multiple of 4")
    if heads < 1 or width % heads:
        raise ValueError(f"{name} is {heads}, which does not divide {width_name} ({width})")


def check_divides(patch_size: int, name: str, value: int) -> None:
    """ValueError, naming what `value` is, unless `patch_size` divides it."""
    if patch_size < 1 or value < patch_size or value % patch_size:
        raise ValueError(f"patch_size {patch_size} does not divide {name}, which is {value}")


def fitting(clip: ClipSpec | None, own: ClipSpec) -> ClipSpec:
    """`clip`, or `own` where it is None. ValueError where `clip` differs from `own` in what the other arguments decide."""
    if clip is None:
        return own
    for name in ("image_size", "audio_length", "frames", "mel_bins"):
        value, allowed = getattr(clip, name), getattr(own, name)
        value = tuple(value) if name == "image_size" else value
        if value != allowed:
            raise ValueError(f"clip.{name} is {value}; for the other arguments of this model it must be {allowed}")
    return clip
