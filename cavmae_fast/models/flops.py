"""Floating-point operations of a training step, counted from a model: those that must be done, and those published.

A product of `[m, k]` and `[k, n]` is `2 m k n` operations. The backward pass of a product is two products of its size,
so a step is three forward passes; recomputation, normalization, softmax, GELU and the optimizer are not counted. What the
first decoder block saves on masked tokens depends on the batch, and is counted as if every clip had its own.
"""

from __future__ import annotations

from torch import nn

from cavmae_fast.reference.cavmae_parameters import CAVMAEParameters
from cavmae_fast.reference.encoder_parameters import EncoderParameters
from cavmae_fast.reference.masking import kept_tokens


def block_macs(block: nn.Module, tokens: int, keys: int | None = None) -> float:
    """Multiply-adds of one block for `tokens` tokens of a sample that attend to `keys` (None: themselves).

    With fewer tokens than keys, the keys' own queries, projections and MLP are not computed.
    """
    keys = keys or tokens
    width = block.attn.proj.in_features
    linear = width * width * (2 * keys + 2 * tokens) + 2 * width * block.mlp.fc1.out_features * tokens
    return linear + 2 * width * tokens * keys


def forward_macs(
    model: CAVMAEParameters,
    mask_ratio_a: float = 0.75,
    mask_ratio_v: float = 0.75,
    published: bool = False,
    reconstruction: bool = True,
    contrast: bool = True,
) -> dict[str, float]:
    """Multiply-adds of one sample's forward pass in pretraining, by part of the model.

    Args:
        model: its sizes are read.
        mask_ratio_a, mask_ratio_v: shares of the patches that are removed.
        published: as the published code computes it, which projects all patches and predicts kept ones too. Otherwise
            only kept patches are projected, and the last decoder block and the heads run for removed tokens alone.
        reconstruction, contrast: whether these losses are in force. What neither needs is not computed.
    """
    all_a, all_v = model.patch_embed_a.num_patches, model.patch_embed_v.num_patches
    kept_a, kept_v = (kept_tokens(n, r, "mask_ratio") for n, r in ((all_a, mask_ratio_a), (all_v, mask_ratio_v)))
    kept, total = kept_a + kept_v, all_a + all_v
    parts = dict.fromkeys(("embedding", "encoders", "shared", "decoder", "heads"), 0.0)
    for m, patches, some in (("a", all_a, kept_a), ("v", all_v, kept_v)):
        weight = getattr(model, f"patch_embed_{m}").proj.weight
        parts["embedding"] += (patches if published else some) * weight.numel()
        parts["encoders"] += sum(block_macs(block, some) for block in getattr(model, f"blocks_{m}"))
    passes = [kept_a, kept_v] * contrast + [kept] * reconstruction
    parts["shared"] = sum(block_macs(block, tokens) for block in model.blocks_u for tokens in passes)
    if reconstruction:
        *first, last = model.decoder_blocks
        parts["decoder"] = kept * model.decoder_embed.weight.numel() + sum(block_macs(block, total) for block in first)
        parts["decoder"] += block_macs(last, total if published else total - kept, total)
        for m, patches, some in (("a", all_a, kept_a), ("v", all_v, kept_v)):
            head = getattr(model, f"decoder_pred_{m}").weight
            parts["heads"] += (patches if published else patches - some) * head.numel()
    return parts


def classifier_macs(model: EncoderParameters, mode: str) -> float:
    """Multiply-adds of one sample's forward pass of a fine-tuned model, `mode` as in `CAVMAEFT.forward`."""
    modalities = {"audioonly": "a", "missingaudioonly": "a", "videoonly": "v", "missingvideoonly": "v"}.get(mode, "av")
    tokens = {m: getattr(model, f"patch_embed_{m}").num_patches for m in modalities}
    macs = sum(count * getattr(model, f"patch_embed_{m}").proj.weight.numel() for m, count in tokens.items())
    macs += sum(block_macs(block, count) for m, count in tokens.items() for block in getattr(model, f"blocks_{m}"))
    passes = 2 if mode.startswith("missing") else 1
    return macs + passes * sum(block_macs(block, sum(tokens.values())) for block in model.blocks_u)


def step_flops(model: CAVMAEParameters, published: bool = False) -> float:
    """Operations of one sample in a training step at 75 % masking: 229.5e9 for ViT-B, 234.3e9 as published."""
    return 6 * sum(forward_macs(model, published=published).values())
