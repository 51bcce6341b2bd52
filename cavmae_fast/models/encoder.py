"""What the fast models share: the encoder's forward pass on packed streams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cavmae_fast.models.abilities import Embeds
from cavmae_fast.models.drop_path import DropPath
from cavmae_fast.models.packed import RECOMPUTE, State, block, normalize
from cavmae_fast.models.rounded import rounded
from cavmae_fast.ops.attention import BACKENDS
from cavmae_fast.ops.embed_kept_patches import embed_kept_patches
from cavmae_fast.ops.join_streams import join_streams
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.residual import Residual, with_gradient_in
from cavmae_fast.reference.encoder_parameters import EncoderParameters

RESIDUAL_GRADIENTS = ("full", "low")


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on for the parameter's device, else the parameter's own."""
    device = parameter.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype


def mean_tokens(tokens: Tensor, parameter: Tensor) -> Tensor:
    """The mean of each sample's tokens, `[B, L, D]` -> `[B, D]`, in float32 (float64 for a model whose `parameter` is)."""
    return tokens.mean(dim=1, dtype=torch.promote_types(parameter.dtype, torch.float32))


class PackedEncoder(Embeds, DropPath, EncoderParameters):
    """The encoder on packed streams: all modalities lie in one buffer and pass each block together."""

    attentions = ("auto", *BACKENDS)
    recomputations = RECOMPUTE
    residual_gradient = "full"
    """'full': the gradient of the residual stream is handed from block to block in the stream's float32; 'low': in the dtype
    of the products, which saves a LayerNorm's backward pass 6 of 16 bytes per element, and rounds the gradient in each."""

    @property
    def depth(self) -> int:
        """Blocks that a token passes."""
        return len(self.blocks_a) + len(self.blocks_u)

    def _paths_of(self, paths: Tensor | None, index: int, modalities: Sequence[str | None]) -> Tensor | None:
        """The part of `paths` for block `index` and the streams that are computed."""
        if paths is None:
            return None
        places = [len(self.modalities) if m is None else self.modalities.index(m) for m in modalities]
        return paths[index, :, places]

    def embed_kept(self, inputs: dict[str, Tensor], ids_keep: dict[str, Tensor] | None, dtype: torch.dtype) -> State:
        """Inputs by modality -> packed tokens of their kept patches (None: all), one stream per modality, in order."""
        batch = next(iter(inputs.values())).shape[0]
        tokens, lengths = [], []
        for m, x in inputs.items():
            embedding = getattr(self, f"patch_embed_{m}")
            ids = None if ids_keep is None else ids_keep[m]
            tokens.append(
                embed_kept_patches(
                    self.images(m, x),
                    ids,
                    rounded(embedding.proj.weight, dtype),
                    embedding.proj.bias,
                    getattr(self, f"pos_embed_{m}").squeeze(0),
                    getattr(self, f"modality_{m}").flatten(),
                    self.clip_spec.image_mean,
                    self.clip_spec.image_std,
                )
            )
            lengths.append(embedding.num_patches if ids is None else ids.shape[1])
        return State(self.residual(torch.cat(tokens), dtype), None, StreamLayout(batch, tuple(lengths)))

    def residual(self, x: Tensor, dtype: torch.dtype) -> Tensor | Residual:
        """The beginning x of a residual stream, with its gradient as `residual_gradient` says; `dtype`: of the products."""
        if self.residual_gradient not in RESIDUAL_GRADIENTS:
            allowed = ", ".join(RESIDUAL_GRADIENTS)
            raise ValueError(f"residual_gradient is {self.residual_gradient!r}; it must be one of {allowed}")
        if self.residual_gradient == "full":
            return x
        if self.recompute == "block":
            raise ValueError("residual_gradient is 'low', which recompute 'block' does not have; take another of the two")
        return with_gradient_in(x, dtype)

    def specific_blocks(self, state: State, modalities: list[str], dtype: torch.dtype, paths: Tensor | None = None) -> State:
        """The modality-specific blocks, all modalities at once."""
        stacks = [getattr(self, f"blocks_{m}") for m in modalities]
        for index, blocks in enumerate(zip(*stacks)):
            own = self._paths_of(paths, index, modalities)
            state = block(state, blocks, [None] * len(modalities), dtype, self.attention, own, self.recompute)
        return state

    def shared_blocks(
        self, state: State, modalities: list[str | None], dtype: torch.dtype, paths: Tensor | None = None
    ) -> Tensor:
        """The shared blocks and final norms, all streams at once; `modalities` says whose norms each stream passes."""
        for index, shared in enumerate(self.blocks_u, start=len(self.blocks_a)):
            own = self._paths_of(paths, index, modalities)
            state = block(state, [shared], modalities, dtype, self.attention, own, self.recompute)
        norms = [getattr(self, f"norm_{m}" if m else "norm") for m in modalities]
        return normalize(state, norms, dtype)[1]

    def encode(
        self,
        inputs: dict[str, Tensor],
        ids_keep: dict[str, Tensor] | None,
        single: bool,
        joint: bool,
        paths: Tensor | None = None,
    ) -> dict[str | None, Tensor]:
        """The whole encoder -> normed tokens `[B, L, D]` by stream: each modality alone (`single`) under its name, all
        modalities together (`joint`; for one modality, that one with the joint norms) under None. `paths`: of
        `draw_paths`."""
        dtype = compute_dtype(self.norm.weight)
        modalities = list(inputs)
        state = self.specific_blocks(self.embed_kept(inputs, ids_keep, dtype), modalities, dtype, paths)
        streams = [*(modalities if single else ()), *([None] if joint else ())]
        if joint:
            x, delta, layout, *_ = state.settled()
            x, layout = join_streams(x, delta, layout, single=single)
            state = State(self.residual(x, dtype), None, layout)
        tokens = self.shared_blocks(state, streams, dtype, paths)
        return dict(zip(streams, state.layout.streams(tokens)))

    @property
    def lengths(self) -> dict[str, int]:
        """Patches by modality."""
        return {m: getattr(self, f"patch_embed_{m}").num_patches for m in self.modalities}

    def features(self, inputs: dict[str, Tensor], paths: Tensor | None = None) -> dict[str, Tensor]:
        """Unmasked inputs by modality -> the normed tokens `[B, L, D]` of each, seen alone."""
        return self.encode(inputs, None, single=True, joint=False, paths=paths)

    def mean_tokens(self, tokens: Tensor) -> Tensor:
        """The mean of each sample's tokens, `[B, L, D]` -> `[B, D]`, in float32 (float64 for a model in float64)."""
        return mean_tokens(tokens, self.norm.weight)
