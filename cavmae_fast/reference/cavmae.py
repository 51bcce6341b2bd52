"""CAV-MAE in plain PyTorch (Gong et al., ICLR 2023): pretraining, fine-tuned and audio-only models.

Parameter names and shapes are those of the published checkpoints. The fast models in `cavmae_fast.models` subclass these
and replace only how the forward pass is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cavmae_fast.reference import operators
from cavmae_fast.reference.blocks import Block, NormLayer, PatchEmbed
from cavmae_fast.reference.masking import Masking, kept_tokens, random_masking
from cavmae_fast.reference.positions import sincos_positions

MEL_BINS = 128
MODES = ("multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly")


class Encoder(nn.Module):
    """What the models share: patch embeddings, the modality-specific blocks, the shared blocks and the final norms.

    `modalities` is 'av', or 'a' for an audio-only model, which carries no parameter of the video stream.
    """

    attentions: tuple[str, ...] = ("eager", "sdpa")
    "Allowed values of the argument `attention`; the first is its default."

    def __init__(
        self, img_size: int | tuple[int, int], audio_length: int, patch_size: int, in_chans: int, embed_dim: int,
        modality_specific_depth: int, num_heads: int, mlp_ratio: float, norm_layer: NormLayer, tr_pos: bool, depth: int,
        attention: str | None, modalities: str = "av",
    ) -> None:  # fmt: skip
        super().__init__()
        attention = attention or self.attentions[0]
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        for name, value in (("img_size", height), ("img_size", width), ("audio_length", audio_length)):
            _check_divides(patch_size, name, value)
        _check_divides(patch_size, "the number of mel bins", MEL_BINS)
        check_heads("num_heads", num_heads, "embed_dim", embed_dim)
        if not 0 <= modality_specific_depth <= depth:
            raise ValueError(f"modality_specific_depth is {modality_specific_depth}; it must lie in 0..depth ({depth})")
        if attention not in self.attentions:
            raise ValueError(f"attention is {attention!r}; it must be one of {', '.join(self.attentions)}")
        norm = norm_layer(embed_dim) if callable(norm_layer) else None
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            raise ValueError(f"norm_layer is {norm_layer!r}; it must build torch.nn.LayerNorm modules with weight and bias")
        grids = {
            "a": (MEL_BINS // patch_size, audio_length // patch_size),
            "v": (height // patch_size, width // patch_size),
        }
        self.modalities = modalities
        self.attention = attention
        self.in_chans = in_chans

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, norm_layer, attention) for _ in range(count))

        for m in modalities:
            channels = 1 if m == "a" else in_chans
            self.add_module(f"patch_embed_{m}", PatchEmbed(grids[m], patch_size, channels, embed_dim))
        for m in modalities:
            self.register_parameter(f"modality_{m}", nn.Parameter(torch.zeros(1, 1, embed_dim)))
        for m in modalities:
            self.register_parameter(f"pos_embed_{m}", _positions(embed_dim, grids[m], tr_pos))
        for m in modalities:
            self.add_module(f"blocks_{m}", blocks(modality_specific_depth))
        self.blocks_u = blocks(depth - modality_specific_depth)
        for suffix in ("_" + m for m in modalities):
            self.add_module("norm" + suffix, norm_layer(embed_dim))
        self.norm = norm_layer(embed_dim)

    def initialize_weights(self) -> None:
        """Xavier-uniform projections (the patch projections as if they were linear), small normal embeddings."""
        for name, parameter in self.named_parameters():
            if name.startswith(("modality_", "decoder_modality_", "mask_token")):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def freeze_unused_norms(self, *stacks: nn.ModuleList) -> None:
        """Freezes the modality norms of all blocks in `stacks`: no stream passes them, and plain DDP would wait."""
        for stack in stacks:
            for block in stack:
                block.freeze_unused_norms()

    @property
    def patch_size(self) -> int:
        return self.patch_embed_a.patch_size[0]

    def check_inputs(self, **inputs: Tensor) -> None:
        """Raises TypeError or ValueError, naming the argument, unless audio (`audio` or `a`) is `[B, T, 128]` and images
        (`imgs` or `v`) are `[B, C, H, W]`, floating-point (images: or uint8 RGB), all of one B."""
        height, time = self.patch_embed_a.img_size
        for name, x in inputs.items():
            shape = (time, height) if name in ("audio", "a") else (self.in_chans, *self.patch_embed_v.img_size)
            pixels = name in ("imgs", "v") and self.in_chans == 3
            if not isinstance(x, Tensor) or not (x.is_floating_point() or (pixels and x.dtype == torch.uint8)):
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name} is {kind}; it must be a floating-point tensor{' or uint8 RGB' if pixels else ''}")
            if tuple(x.shape[1:]) != shape or x.dim() != len(shape) + 1 or x.shape[0] < 1:
                raise ValueError(f"{name} has shape {list(x.shape)}; this model takes [B, {', '.join(map(str, shape))}]")
        counts = [(name, x.shape[0]) for name, x in inputs.items()]
        if counts[0][1] != counts[-1][1]:
            (name, count), (other, other_count) = counts
            raise ValueError(f"{name} holds {count} samples and {other} {other_count}; they must be as many")

    @staticmethod
    def spectrogram(audio: Tensor) -> Tensor:
        """audio `[B, T, 128]` as a one-channel image `[B, 1, 128, T]` (a view): its patches come frequency by frequency."""
        return audio.unsqueeze(1).transpose(2, 3)

    def images(self, m: str, x: Tensor) -> Tensor:
        """The input of modality `m` as images `[B, C, H, W]`, uint8 not yet normalized."""
        return self.spectrogram(x) if m == "a" else x

    def embed(self, m: str, x: Tensor) -> Tensor:
        """Input of modality `m` -> its tokens `[B, L, D]` with position and modality."""
        images = operators.normalize_images(self.images(m, x), self.norm.weight.dtype)
        tokens = getattr(self, f"patch_embed_{m}")(images)
        return tokens + getattr(self, f"pos_embed_{m}") + getattr(self, f"modality_{m}")

    def specific(self, m: str, tokens: Tensor) -> Tensor:
        """The modality-specific blocks of `m`."""
        for block in getattr(self, f"blocks_{m}"):
            tokens = block(tokens)
        return tokens

    def shared(self, tokens: Tensor, m: str | None = None) -> Tensor:
        """The shared blocks and the final norm: with the joint norms, or with those of modality `m`."""
        for block in self.blocks_u:
            tokens = block(tokens, m)
        return getattr(self, f"norm_{m}" if m else "norm")(tokens)

    def features(self, m: str, x: Tensor) -> Tensor:
        """Unmasked input of modality `m` -> its normed tokens `[B, L, D]`, seen alone."""
        return self.shared(self.specific(m, self.embed(m, x)), m)


class CAVMAE(Encoder):
    """The pretraining model. Audio `[B, audio_length, 128]` log-mel, imgs `[B, in_chans, img_size, img_size]`.

    uint8 RGB is normalized with ImageNet's mean and standard deviation on the way into the patch projection.
    Arguments and defaults are the published ones; `depth` (encoder blocks in all, 12 there), `attention` and
    `bidirect_contrast` (the mean of both directions in the contrastive loss) are ours.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, audio_length: int = 1024, patch_size: int = 16, in_chans: int = 3,
        embed_dim: int = 768, modality_specific_depth: int = 11, num_heads: int = 12, decoder_embed_dim: int = 512,
        decoder_depth: int = 8, decoder_num_heads: int = 16, mlp_ratio: float = 4.0, norm_layer: NormLayer = nn.LayerNorm,
        norm_pix_loss: bool = False, tr_pos: bool = False, *, depth: int = 12, attention: str | None = None,
        bidirect_contrast: bool = False,
    ) -> None:  # fmt: skip
        config = _arguments(locals())
        super().__init__(
            img_size, audio_length, patch_size, in_chans, embed_dim, modality_specific_depth, num_heads, mlp_ratio,
            norm_layer, tr_pos, depth, attention,
        )  # fmt: skip
        check_heads("decoder_num_heads", decoder_num_heads, "decoder_embed_dim", decoder_embed_dim)
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth is {decoder_depth}; it must be at least 1")
        width = decoder_embed_dim
        self.decoder_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_modality_a = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_modality_v = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_a = _positions(width, self.patch_embed_a.grid, tr_pos)
        self.decoder_pos_embed_v = _positions(width, self.patch_embed_v.grid, tr_pos)
        self.decoder_blocks = nn.ModuleList(
            Block(width, decoder_num_heads, mlp_ratio, norm_layer, self.attention) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(width)
        self.decoder_pred_a = nn.Linear(width, patch_size**2)
        self.decoder_pred_v = nn.Linear(width, patch_size**2 * in_chans)
        self.norm_pix_loss = norm_pix_loss
        self.bidirect_contrast = bidirect_contrast
        self.config = config | {"norm_eps": self.norm.eps}
        self.initialize_weights()
        self.freeze_unused_norms(self.blocks_a, self.blocks_v, self.decoder_blocks)

    @staticmethod
    def patchify(imgs: Tensor, c: int, h: int, w: int, p: int = 16) -> Tensor:
        """imgs `[B, c, h*p, w*p]` -> patches `[B, h*w, p*p*c]`, each in (row, column, channel) order."""
        if tuple(imgs.shape[1:]) != (c, h * p, w * p):
            raise ValueError(f"imgs has shape {list(imgs.shape)}; c, h, w and p ask for [B, {c}, {h * p}, {w * p}]")
        return operators.patchify(imgs, p)

    @staticmethod
    def unpatchify(x: Tensor, c: int, h: int, w: int, p: int = 16) -> Tensor:
        """The inverse of `patchify`: x `[B, h*w, p*p*c]` -> `[B, c, h*p, w*p]`."""
        if tuple(x.shape[1:]) != (h * w, p * p * c):
            raise ValueError(f"x has shape {list(x.shape)}; c, h, w and p ask for [B, {h * w}, {p * p * c}]")
        return operators.unpatchify(x, c, h, w, p)

    def draw_masks(
        self, batch: int, device: torch.device, mask_ratio_a: float, mask_ratio_v: float, mask_mode: str
    ) -> tuple[Masking, Masking]:
        """The masks of audio and video. Audio's noise is drawn first; video is always masked without structure."""
        kept_tokens(self.patch_embed_v.num_patches, mask_ratio_v, "mask_ratio_v")  # raises before anything is drawn
        masking_a = random_masking(batch, self.patch_embed_a.grid, mask_ratio_a, device, mask_mode, "mask_ratio_a")
        masking_v = random_masking(batch, self.patch_embed_v.grid, mask_ratio_v, device, name="mask_ratio_v")
        return masking_a, masking_v

    def check_removed(self, mask_ratio_a: float, mask_ratio_v: float) -> None:
        """ValueError when nothing would be removed, so that there is nothing to reconstruct."""
        for m, ratio in (("a", mask_ratio_a), ("v", mask_ratio_v)):
            name, length = f"mask_ratio_{m}", getattr(self, f"patch_embed_{m}").num_patches
            if kept_tokens(length, ratio, name) == length:
                raise ValueError(f"{name} is {ratio}, which removes none of {length} patches; it must remove at least one")

    def encode_kept(self, audio: Tensor, imgs: Tensor, masking_a: Masking, masking_v: Masking) -> tuple[Tensor, Tensor]:
        """The kept tokens `[B, K, D]` of audio and video after their modality-specific blocks."""
        a = self.specific("a", operators.take_tokens(self.embed("a", audio), masking_a.ids_keep))
        v = self.specific("v", operators.take_tokens(self.embed("v", imgs), masking_v.ids_keep))
        return a, v

    def decode(self, joint: Tensor, masking_a: Masking, masking_v: Masking) -> tuple[Tensor, Tensor]:
        """Joint tokens `[B, K, D]` -> predictions for every patch, audio `[B, La, p*p]`, video `[B, Lv, p*p*C]`."""
        joint = self.decoder_embed(joint)
        batch, kept_a = joint.shape[0], masking_a.ids_keep.shape[1]
        streams = []
        for m, kept, masking in (("a", joint[:, :kept_a], masking_a), ("v", joint[:, kept_a:], masking_v)):
            removed = self.mask_token.expand(batch, masking.ids_removed.shape[1], -1).to(kept.dtype)
            tokens = operators.take_tokens(torch.cat([kept, removed], dim=1), masking.ids_restore)
            streams.append(tokens + getattr(self, f"decoder_pos_embed_{m}") + getattr(self, f"decoder_modality_{m}"))
        x = torch.cat(streams, dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)
        length_a = self.patch_embed_a.num_patches
        return self.decoder_pred_a(x[:, :length_a]), self.decoder_pred_v(x[:, length_a:])

    def reconstruction_loss(self, m: str, x: Tensor, pred: Tensor, masking: Masking) -> Tensor:
        """Mean squared error on the removed patches of modality `m`, from predictions for every patch."""
        pred = operators.take_tokens(pred, masking.ids_removed)
        return operators.masked_patch_mse(
            pred, self.images(m, x), masking.ids_removed, self.patch_size, self.norm_pix_loss
        )

    def forward(
        self, audio: Tensor, imgs: Tensor, mask_ratio_a: float = 0.75, mask_ratio_v: float = 0.75,
        mae_loss_weight: float = 1.0, contrast_loss_weight: float = 0.01, mask_mode: str = "unstructured",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """One pretraining pass.

        Returns `loss, loss_mae, loss_mae_a, loss_mae_v, loss_c, mask_a, mask_v, c_acc`: `loss = loss_mae + loss_c`, both
        already weighted; masks `[B, L]` float, 1 = removed; `c_acc` the share of videos whose audio ranks first.
        """
        self.check_inputs(audio=audio, imgs=imgs)
        if mae_loss_weight != 0:
            self.check_removed(mask_ratio_a, mask_ratio_v)
        masking_a, masking_v = self.draw_masks(audio.shape[0], audio.device, mask_ratio_a, mask_ratio_v, mask_mode)
        a, v = self.encode_kept(audio, imgs, masking_a, masking_v)
        loss_mae = loss_mae_a = loss_mae_v = loss_c = c_acc = torch.zeros((), device=audio.device)
        if mae_loss_weight != 0:
            pred_a, pred_v = self.decode(self.shared(torch.cat([a, v], dim=1)), masking_a, masking_v)
            loss_mae_a = self.reconstruction_loss("a", audio, pred_a, masking_a)
            loss_mae_v = self.reconstruction_loss("v", imgs, pred_v, masking_v)
            loss_mae = mae_loss_weight * (loss_mae_a + loss_mae_v)
        if contrast_loss_weight != 0:
            means = self.shared(a, "a").mean(dim=1), self.shared(v, "v").mean(dim=1)
            nce, c_acc = operators.contrastive_loss(*means, bidirectional=self.bidirect_contrast)
            loss_c = contrast_loss_weight * nce
        return loss_mae + loss_c, loss_mae, loss_mae_a, loss_mae_v, loss_c, masking_a.mask, masking_v.mask, c_acc

    def forward_inpaint(
        self, audio: Tensor, imgs: Tensor, mask_ratio_a: float = 0.75, mask_ratio_v: float = 0.75,
        mask_mode: str = "unstructured",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Predictions for every patch: `pred_a [B, La, p*p], pred_v [B, Lv, p*p*C], mask_a, mask_v, loss_a, loss_v`."""
        self.check_inputs(audio=audio, imgs=imgs)
        self.check_removed(mask_ratio_a, mask_ratio_v)
        masking_a, masking_v = self.draw_masks(audio.shape[0], audio.device, mask_ratio_a, mask_ratio_v, mask_mode)
        a, v = self.encode_kept(audio, imgs, masking_a, masking_v)
        pred_a, pred_v = self.decode(self.shared(torch.cat([a, v], dim=1)), masking_a, masking_v)
        loss_a = self.reconstruction_loss("a", audio, pred_a, masking_a)
        loss_v = self.reconstruction_loss("v", imgs, pred_v, masking_v)
        return pred_a, pred_v, masking_a.mask, masking_v.mask, loss_a, loss_v

    def forward_feat(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Unmasked inputs -> normed tokens of each stream seen alone, audio `[B, La, D]` and video `[B, Lv, D]`."""
        self.check_inputs(a=a, v=v)
        return self.features("a", a), self.features("v", v)


class CAVMAEFT(Encoder):
    """The classifier: encoder and a head on the mean token. Arguments and inputs as in `CAVMAE`, with `label_dim` classes.

    `norm_pix_loss` is accepted, as in the published signature, and has no effect.
    """

    def __init__(
        self, label_dim: int, img_size: int | tuple[int, int] = 224, audio_length: int = 1024, patch_size: int = 16,
        in_chans: int = 3, embed_dim: int = 768, modality_specific_depth: int = 11, num_heads: int = 12,
        mlp_ratio: float = 4.0, norm_layer: NormLayer = nn.LayerNorm, norm_pix_loss: bool = False, tr_pos: bool = True,
        *, depth: int = 12, attention: str | None = None,
    ) -> None:  # fmt: skip
        config = _arguments(locals())
        super().__init__(
            img_size, audio_length, patch_size, in_chans, embed_dim, modality_specific_depth, num_heads, mlp_ratio,
            norm_layer, tr_pos, depth, attention,
        )  # fmt: skip
        self.mlp_head = classifier_head(embed_dim, label_dim)
        self.config = config | {"norm_eps": self.norm.eps}
        self.initialize_weights()
        self.freeze_unused_norms(self.blocks_a, self.blocks_v)

    def forward(self, a: Tensor | None, v: Tensor | None, mode: str) -> Tensor:
        """Logits `[B, label_dim]`. `mode`: 'multimodal'; 'audioonly' or 'videoonly' (the modality's own norms);
        'missingaudioonly' or 'missingvideoonly' (only that modality is *there*: the mean of the joint-norm and the
        own-norm passes). The input that a mode does not use may be None."""
        check_mode(mode, a, v)
        if mode == "multimodal":
            self.check_inputs(a=a, v=v)
            a, v = self.specific("a", self.embed("a", a)), self.specific("v", self.embed("v", v))
            return self.mlp_head(self.shared(torch.cat([a, v], dim=1)).mean(dim=1))
        m, x = ("a", a) if "audio" in mode else ("v", v)
        self.check_inputs(**{m: x})
        tokens = self.specific(m, self.embed(m, x))
        mean = self.shared(tokens, m).mean(dim=1)
        if mode.startswith("missing"):
            mean = (self.shared(tokens).mean(dim=1) + mean) / 2
        return self.mlp_head(mean)

    def forward_feat(self, a: Tensor, v: Tensor | None = None, mode: str = "av") -> tuple[Tensor, Tensor] | Tensor:
        """Normed tokens of each stream seen alone: both for mode 'av', audio's for 'a'."""
        if mode not in ("av", "a"):
            raise ValueError(f"mode is {mode!r}; it must be 'av' or 'a'")
        self.check_inputs(**({"a": a, "v": v} if mode == "av" else {"a": a}))
        return (self.features("a", a), self.features("v", v)) if mode == "av" else self.features("a", a)


class CAVMAEFTAudio(Encoder):
    """The audio branch of a fine-tuned model alone. `forward(a)` gives tokens; `forward_pred` gives logits.

    `in_chans` and `norm_pix_loss` are accepted, as in the published signature, and have no effect.
    """

    def __init__(
        self, label_dim: int, img_size: int | tuple[int, int] = 224, audio_length: int = 1024, patch_size: int = 16,
        in_chans: int = 3, embed_dim: int = 768, modality_specific_depth: int = 11, num_heads: int = 12,
        mlp_ratio: float = 4.0, norm_layer: NormLayer = nn.LayerNorm, norm_pix_loss: bool = False, tr_pos: bool = True,
        *, depth: int = 12, attention: str | None = None,
    ) -> None:  # fmt: skip
        config = _arguments(locals())
        super().__init__(
            img_size, audio_length, patch_size, in_chans, embed_dim, modality_specific_depth, num_heads, mlp_ratio,
            norm_layer, tr_pos, depth, attention, modalities="a",
        )  # fmt: skip
        self.mlp_head = classifier_head(embed_dim, label_dim)
        self.config = config | {"norm_eps": self.norm.eps}
        self.initialize_weights()
        self.freeze_unused_norms(self.blocks_a)

    def forward(self, a: Tensor) -> Tensor:
        """Audio `[B, audio_length, 128]` -> normed tokens `[B, La, D]`."""
        self.check_inputs(a=a)
        return self.features("a", a)

    def forward_feat(self, a: Tensor, v: Tensor | None = None, mode: str = "a") -> Tensor:
        """As `forward`; `v` and `mode` are there so that code for `CAVMAEFT` runs, and are not used."""
        return self(a)

    def forward_pred(self, a: Tensor, v: Tensor | None = None, mode: str = "audioonly") -> Tensor:
        """Logits `[B, label_dim]`; `v` and `mode` are not used, as in `forward_feat`."""
        return self.mlp_head(self(a).mean(dim=1))


def _arguments(values: dict) -> dict:
    """The arguments of a constructor, from its `locals()`, that say what the model is: enough to build it again."""
    return {k: v for k, v in values.items() if k not in ("self", "__class__", "norm_layer", "attention")}


def classifier_head(embed_dim: int, label_dim: int) -> nn.Sequential:
    if label_dim < 1:
        raise ValueError(f"label_dim is {label_dim}; it must be at least 1")
    return nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, label_dim))


def check_mode(mode: str, a: Tensor | None, v: Tensor | None) -> None:
    """ValueError unless `mode` is known and the inputs it uses are there."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if (a is None and "video" not in mode) or (v is None and "audio" not in mode):
        raise ValueError(f"mode {mode!r} uses the input {'a' if a is None and 'video' not in mode else 'v'}, which is None")


def check_heads(name: str, heads: int, width_name: str, width: int) -> None:
    """ValueError unless `heads` divide `width` and 4 does, as sine-cosine positions need."""
    if width < 4 or width % 4:
        raise ValueError(f"{width_name} is {width}; it must be a multiple of 4")
    if heads < 1 or width % heads:
        raise ValueError(f"{name} is {heads}, which does not divide {width_name} ({width})")


def _check_divides(patch_size: int, name: str, value: int) -> None:
    if patch_size < 1 or value < patch_size or value % patch_size:
        raise ValueError(f"patch_size {patch_size} does not divide {name}, which is {value}")


def _positions(width: int, grid: tuple[int, int], trainable: bool) -> nn.Parameter:
    return nn.Parameter(sincos_positions(width, *grid).unsqueeze(0), requires_grad=trainable)
