"""Multiply-adds of MAViL and of single-modality autoencoders, counted as in `models.flops`: a step of what is trained is
three forward passes, a teacher's pass is one."""

from __future__ import annotations

from torch import nn

from cavmae_fast.models.flops import block_macs
from cavmae_fast.reference.masking import kept_tokens
from cavmae_fast.reference.mavil_encoder import MAViLEncoderParameters
from cavmae_fast.reference.mavil_parameters import MAViLParameters
from cavmae_fast.reference.tower import Tower


def encoder_macs(tower: Tower, kept: int, projected: int | None = None) -> float:
    """One tower's encoder over `kept` patches and the class token, `projected` patches being projected (None: the kept)."""
    embedding = (kept if projected is None else projected) * tower.patch_embed.proj.weight.numel()
    return embedding + sum(block_macs(block, kept + 1) for block in tower.blocks)


def decoder_macs(tower: Tower, kept: int, heads: list[nn.Linear], plain: bool = False) -> float:
    """One tower's decoder and `heads`. `plain`: the last block and the heads run for all patches, and not for removed ones
    alone."""
    total, removed = tower.num_patches + 1, tower.num_patches - kept
    *first, last = tower.decoder_blocks
    macs = (kept + 1) * tower.decoder_embed.weight.numel() + sum(block_macs(block, total) for block in first)
    macs += block_macs(last, total if plain else removed, total)
    return macs + sum((tower.num_patches if plain else removed) * head.weight.numel() for head in heads)


def fusion_macs(model: MAViLEncoderParameters, tokens_a: int, tokens_v: int) -> float:
    """The fusion encoder over so many tokens of audio and of video, class tokens counted."""
    fusion = model.fusion
    if fusion.form == "joint":
        return sum(block_macs(block, tokens_a + tokens_v) for block in fusion.blocks)
    extra = fusion.bottleneck.shape[1]
    stacks = ((fusion.blocks_a, tokens_a + extra), (fusion.blocks_v, tokens_v + extra))
    return sum(block_macs(block, tokens) for blocks, tokens in stacks for block in blocks)


def mae_macs(model: Tower, mask_ratio: float = 0.8, *, plain: bool = False) -> dict[str, float]:
    """One sample's forward pass of an `MAE` in pretraining, by part of the model. `plain`: as in `mavil_macs`."""
    kept = kept_tokens(model.num_patches, mask_ratio, "mask_ratio")
    return {
        "encoder": encoder_macs(model, kept, model.num_patches if plain else None),
        "decoder": decoder_macs(model, kept, [model.decoder_pred], plain),
    }


def mavil_macs(
    model: MAViLParameters,
    mask_ratio_a: float = 0.8,
    mask_ratio_v: float = 0.8,
    *,
    raw: bool = True,
    inter: bool = True,
    intra: bool = True,
    regression: bool = False,
    plain: bool = False,
) -> dict[str, float]:
    """One sample's forward pass of a `MAViL` in pretraining, by part of the model.

    Args:
        model: its sizes are read.
        mask_ratio_a, mask_ratio_v: shares of the patches that are removed.
        raw, inter, intra, regression: whether these losses are in force. What none of them needs is not computed.
        plain: as the reference computes it, which projects all patches and predicts kept ones too.
    """
    ratios = (mask_ratio_a, mask_ratio_v)
    kept = [kept_tokens(tower.num_patches, ratio, "mask_ratio") for tower, ratio in zip(model.towers, ratios)]
    views = 2 if intra else 1 if raw or inter or regression else 0
    parts = dict.fromkeys(("encoders", "fusion", "decoders"), 0.0)
    for tower, some in zip(model.towers, kept):
        parts["encoders"] += views * encoder_macs(tower, some, tower.num_patches if plain else None)
    if raw or regression:
        parts["fusion"] = fusion_macs(model, *(some + 1 for some in kept))
        for tower, some, target_head in zip(model.towers, kept, (model.target_pred_a, model.target_pred_v)):
            parts["decoders"] += decoder_macs(tower, some, [tower.decoder_pred] * raw, plain)
            # The reference, too, regresses removed patches alone.
            parts["decoders"] += regression * (tower.num_patches - some) * target_head.weight.numel()
    return parts


def fused_macs(model: MAViLEncoderParameters) -> float:
    """One whole clip through encoders and fusion encoder: a teacher's pass, and, but for its head, the classifier's."""
    lengths = [tower.num_patches for tower in model.towers]
    encoders = sum(encoder_macs(tower, length) for tower, length in zip(model.towers, lengths))
    return encoders + fusion_macs(model, *(length + 1 for length in lengths))


def step_flops(model: MAViLParameters, stage: int = 1) -> float:
    """Operations of one sample in a training step at 80 % masking; in stage 2 with the teacher's pass."""
    if stage == 1:
        return 6 * sum(mavil_macs(model).values())
    return 6 * sum(mavil_macs(model, raw=False, regression=True).values()) + 2 * fused_macs(model)
