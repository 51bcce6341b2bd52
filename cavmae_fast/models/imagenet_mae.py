"""Initialization of a CAV-MAE model from an image masked autoencoder (He et al., CVPR 2022), as in the paper."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from cavmae_fast.models.weights import CheckpointError, LoadReport, state_of

MODALITIES = ("a", "v")


def load_imagenet_mae(model: nn.Module, source: str | os.PathLike | Mapping[str, Tensor]) -> LoadReport:
    """Initializes a CAV-MAE model from an image MAE checkpoint (ViT with or without decoder and class token).

    The RGB projection goes to video and, summed over channels, to audio; the first blocks to both modality-specific stacks
    and the rest to the shared blocks, whose norms and the final norm are copied to the `_a` and `_v` ones; the decoder,
    where checkpoint and model have one, to the decoder, the first 256 (patch area) outputs of its head serving audio.
    Position embeddings without class token are taken for video. Returns which of the model's names kept their own values
    and which of the checkpoint's were not used. Raises CheckpointError when a shape does not fit or no block is found.
    """
    stack = "blocks_u." if len(model.blocks_u) else "blocks_a."
    return load_places(model, source, stack, functools.partial(places_of, model))


def load_places(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Tensor],
    stack: str,
    places: Callable[[str, Tensor], Iterable[tuple[str, Tensor]]],
) -> LoadReport:
    """Initializes `model` from the checkpoint of another: `places` says for each of its tensors where it goes, name by name,
    and what of it goes there; names that the model does not have are passed over.

    Returns which of the model's names kept their own values and which of the checkpoint's were not used. Raises
    CheckpointError when a shape does not fit, or when nothing was found for `stack`, the model's first blocks. Nothing is
    loaded when there is an error.
    """
    state, origin = state_of(source)
    own = model.state_dict()
    new: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, value in state.items():
        for name, part in places(key, value):
            if name not in own:
                continue
            if own[name].shape != part.shape:
                raise CheckpointError(
                    f"{origin}: {key} gives {name} the shape {list(part.shape)}, the model's has {list(own[name].shape)}"
                )
            new[name] = part
            used.add(key)
    if not any(name.startswith(stack) for name in new):
        raise CheckpointError(f"{origin} is no image MAE checkpoint of this depth: it has no block for {stack}0")
    model.load_state_dict(new, strict=False)
    return LoadReport(sorted(own.keys() - new.keys()), sorted(state.keys() - used - {"cls_token"}))


def places_of(model: nn.Module, key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Where the tensor `key` of an image MAE goes in `model`, name by name, and what of it goes there.

    Names may be given that the model does not have: an audio-only model has no `_v`, a classifier no decoder.
    """
    first, _, rest = key.partition(".")
    if first == "blocks":
        yield from _block_places(len(model.blocks_a), rest, value)
    elif first == "norm":
        for name in ("norm", "norm_a", "norm_v"):
            yield f"{name}.{rest}", value
    elif key == "patch_embed.proj.weight":
        yield "patch_embed_v.proj.weight", value
        yield "patch_embed_a.proj.weight", value.sum(dim=1, keepdim=True)
    elif key == "patch_embed.proj.bias":
        for m in MODALITIES:
            yield f"patch_embed_{m}.proj.bias", value
    elif key in ("pos_embed", "decoder_pos_embed"):
        yield f"{key}_v", _without_class_token(value, getattr(model, f"{key}_v", None))
    elif first == "decoder_pred" and hasattr(model, "decoder_pred_a"):
        yield f"decoder_pred_v.{rest}", value
        yield f"decoder_pred_a.{rest}", value[: model.decoder_pred_a.out_features]
    elif first in ("decoder_blocks", "decoder_embed", "decoder_norm", "mask_token"):
        yield key, value


def _block_places(specific: int, rest: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The places of `blocks.<rest>`: the first `specific` blocks are each modality's own, those above them shared."""
    number, _, leaf = rest.partition(".")
    if not number.isdecimal():
        return
    if int(number) < specific:
        for m in MODALITIES:
            yield f"blocks_{m}.{number}.{leaf}", value
        return
    block = f"blocks_u.{int(number) - specific}"
    yield f"{block}.{leaf}", value
    norm, _, kind = leaf.partition(".")
    if norm in ("norm1", "norm2"):
        for m in MODALITIES:
            yield f"{block}.{norm}_{m}.{kind}", value


def _without_class_token(positions: Tensor, own: Tensor | None) -> Tensor:
    """Positions `[1, L, D]` without the class token's, which is the first of `[1, 1 + L, D]`; `own` are the model's."""
    has_class_token = own is not None and positions.shape[1] == own.shape[1] + 1
    return positions[:, 1:] if has_class_token else positions
