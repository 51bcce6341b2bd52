"""What does not fit is refused before any work, by an error that names the argument and says what is allowed."""

from __future__ import annotations

import functools

import pytest
import torch
from test_models import published_masks
from tiny import ENCODER, TINY, inputs, one_thread  # noqa: F401
from torch import nn

from cavmae_fast import models
from cavmae_fast.clip import ClipSpec
from cavmae_fast.reference import cavmae as reference
from cavmae_fast.reference.cavmae_parameters import MODES

NAN = float("nan")
IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(models, id="fast")]
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def refused(message: str, call, *args, error=ValueError, **kwargs) -> None:
    """The call raises `error`, and every word of `message` (parts separated by ' | ') is in its text."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    for part in message.split(" | "):
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"


@functools.cache
def model(implementation, kind: str = "CAVMAE"):
    if kind == "CAVMAE":
        return implementation.CAVMAE(**TINY)
    return getattr(implementation, kind)(5, **ENCODER)


AUDIO, IMGS = inputs(dtype=torch.float32)

# ------------------------------------------------------------------------------------------------------ constructors

BAD = {
    "heads": ({"num_heads": 5}, "num_heads is 5 | embed_dim | 48"),
    "no-heads": ({"num_heads": 0}, "num_heads is 0 | embed_dim"),
    "decoder-heads": ({"decoder_num_heads": 7}, "decoder_num_heads is 7 | decoder_embed_dim | 32"),
    "width": ({"embed_dim": 50, "num_heads": 5}, "embed_dim is 50 | multiple of 4"),
    "decoder-width": ({"decoder_embed_dim": 34, "decoder_num_heads": 2}, "decoder_embed_dim is 34 | multiple of 4"),
    "image": ({"img_size": 33}, "patch_size 16 | img_size | 33"),
    "image-width": ({"img_size": (32, 40)}, "patch_size 16 | img_size | 40"),
    "no-image": ({"img_size": 0}, "patch_size | img_size | 0"),
    "audio": ({"audio_length": 100}, "patch_size 16 | audio_length | 100"),
    "patch": ({"patch_size": 24, "img_size": 48, "audio_length": 48}, "patch_size 24 | mel bins | 128"),
    "no-patch": ({"patch_size": 0}, "patch_size 0"),
    "depth": ({"modality_specific_depth": 4}, "modality_specific_depth is 4 | 0..depth | 3"),
    "negative-depth": ({"modality_specific_depth": -1}, "modality_specific_depth is -1 | 0..depth"),
    "decoder-depth": ({"decoder_depth": 0}, "decoder_depth is 0 | at least 1"),
    "attention": ({"attention": "fast"}, "attention is 'fast' | one of | sdpa"),
    "batch-norm": ({"norm_layer": nn.BatchNorm1d}, "norm_layer | BatchNorm1d | torch.nn.LayerNorm"),
    "rms-norm": ({"norm_layer": nn.RMSNorm}, "norm_layer | RMSNorm | torch.nn.LayerNorm"),
    "no-norm": ({"norm_layer": None}, "norm_layer is None | torch.nn.LayerNorm"),
    "norm-without-weight": (
        {"norm_layer": functools.partial(nn.LayerNorm, elementwise_affine=False)},
        "norm_layer | weight and bias",
    ),
    "norm-without-bias": ({"norm_layer": functools.partial(nn.LayerNorm, bias=False)}, "norm_layer | weight and bias"),
}


@both
@pytest.mark.parametrize("name", BAD)
def test_constructor(implementation, name):
    change, message = BAD[name]
    refused(message, implementation.CAVMAE, **TINY | change)
    if not any(key.startswith("decoder") for key in change):
        for kind in ("CAVMAEFT", "CAVMAEFTAudio"):
            refused(message, getattr(implementation, kind), 5, **ENCODER | change)


@both
@pytest.mark.parametrize("label_dim", [0, -3])
@pytest.mark.parametrize("kind", ["CAVMAEFT", "CAVMAEFTAudio"])
def test_label_dim(implementation, kind, label_dim):
    refused(f"label_dim is {label_dim} | at least 1", getattr(implementation, kind), label_dim, **ENCODER)


@both
def test_unknown_arguments(implementation):
    refused("unexpected keyword argument 'embed_dimm'", implementation.CAVMAE, error=TypeError, embed_dimm=3)
    refused("label_dim", implementation.CAVMAEFT, error=TypeError)


@both
@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": (32, 64)}, "clip.image_size is (32, 64) | must be (32, 32)"),
        ({"audio_length": 1024}, "clip.audio_length is 1024 | must be 64"),
        ({"frames": 8, "frame_rate": 4.0}, "clip.frames is 8 | must be 1"),
        ({"mel_bins": 80}, "clip.mel_bins is 80 | must be 128"),
    ],
)
def test_clip_that_disagrees_with_the_other_arguments(implementation, change, message):
    clip = ClipSpec(**{"image_size": (32, 32), "audio_length": 64, **change})
    refused(message, implementation.CAVMAE, **TINY, clip=clip)
    refused(message, implementation.CAVMAEFT, 5, **ENCODER, clip=clip)


# ------------------------------------------------------------------------------------------------------------ inputs

SHAPES = {
    "transposed": (AUDIO.transpose(1, 2), IMGS, "audio has shape [3, 128, 64] | [B, 64, 128]"),
    "longer": (torch.randn(3, 80, 128), IMGS, "audio has shape [3, 80, 128] | [B, 64, 128]"),
    "no-batch": (AUDIO[0], IMGS, "audio has shape [64, 128] | [B, 64, 128]"),
    "with-channel": (AUDIO[:, None], IMGS, "audio has shape [3, 1, 64, 128]"),
    "empty": (AUDIO[:0], IMGS[:0], "audio has shape [0, 64, 128]"),
    "scalar": (torch.tensor(1.0), IMGS, "audio has shape []"),
    "gray": (AUDIO, IMGS[:, :1], "has shape [3, 1, 32, 32] | [B, 3, 32, 32]"),
    "channels-last": (AUDIO, IMGS.permute(0, 2, 3, 1), "has shape [3, 32, 32, 3] | [B, 3, 32, 32]"),
    "large": (AUDIO, torch.randn(3, 3, 64, 64), "has shape [3, 3, 64, 64] | [B, 3, 32, 32]"),
    "frames": (AUDIO, IMGS[:, None], "has shape [3, 1, 3, 32, 32] | [B, 3, 32, 32]"),
    "batch": (AUDIO[:2], IMGS, "audio holds 2 samples | 3 | as many"),
}
DTYPES = {
    "integer-audio": (AUDIO.long(), IMGS, "audio is torch.int64 | floating-point"),
    "integer-images": (AUDIO, IMGS.to(torch.int8), "imgs is torch.int8 | floating-point tensor or uint8 RGB"),
    "byte-audio": (AUDIO.byte(), IMGS, "audio is torch.uint8 | floating-point"),
    "complex": (AUDIO.to(torch.complex64), IMGS, "audio is torch.complex64 | floating-point"),
    "array": (AUDIO.numpy(), IMGS, "audio is ndarray | floating-point tensor"),
    "list": (AUDIO, IMGS.tolist(), "imgs is list | floating-point tensor"),
    "no-audio": (None, IMGS, "audio is NoneType | floating-point tensor"),
    "no-images": (AUDIO, None, "imgs is NoneType | floating-point tensor"),
}


def short(message: str) -> str:
    """The message with the names that forward_feat and the classifier give their arguments."""
    return message.replace("audio ", "a ").replace("imgs ", "v ")


@both
@pytest.mark.parametrize("name", [*SHAPES, *DTYPES])
def test_inputs(implementation, name):
    audio, imgs, message = (SHAPES | DTYPES)[name]
    error = ValueError if name in SHAPES else TypeError
    pretraining, classifier = model(implementation), model(implementation, "CAVMAEFT")
    refused(message, pretraining, audio, imgs, error=error)
    refused(message, pretraining.forward_inpaint, audio, imgs, error=error)
    refused(short(message), pretraining.forward_feat, audio, imgs, error=error)
    refused(short(message), classifier.forward_feat, audio, imgs, error=error)
    if audio is not None and imgs is not None:
        refused(short(message), classifier, audio, imgs, "multimodal", error=error)
    if audio is not AUDIO and name != "batch":
        refused(short(message), model(implementation, "CAVMAEFTAudio"), audio, error=error)
        refused(short(message), model(implementation, "CAVMAEFTAudio").forward_pred, audio, error=error)
        if audio is not None:
            refused(short(message), classifier, audio, None, "missingaudioonly", error=error)


@both
def test_bytes_are_rgb(implementation):
    one_channel = implementation.CAVMAE(**TINY, in_chans=1)
    refused("imgs is torch.uint8 | floating-point", one_channel, AUDIO, IMGS[:, :1].byte(), error=TypeError)


@both
def test_the_message_says_which_argument(implementation):
    """A wrong image must not be reported under audio's name, nor `a` as `audio`."""
    for call, name in ((model(implementation), "imgs"), (model(implementation).forward_feat, "v")):
        with pytest.raises(ValueError, match=rf"^{name} has shape"):
            call(AUDIO, IMGS[:, :1])
    with pytest.raises(ValueError, match=r"^v has shape"):
        model(implementation, "CAVMAEFT")(None, IMGS[:, :1], "videoonly")


@both
def test_inputs_a_mode_does_not_use_are_not_looked_at(implementation):
    classifier = model(implementation, "CAVMAEFT")
    for mode in ("audioonly", "missingaudioonly"):
        assert classifier(AUDIO, "nothing", mode).shape == (3, 5)
    for mode in ("videoonly", "missingvideoonly"):
        assert classifier(object(), IMGS, mode).shape == (3, 5)


# ------------------------------------------------------------------------------------------- ratios, modes, attributes


@both
@pytest.mark.parametrize("ratio", [1, 1.0, 1.5, -0.1, NAN, float("inf"), 1.01])
@pytest.mark.parametrize("name", ["mask_ratio_a", "mask_ratio_v"])
def test_ratios(implementation, name, ratio):
    for call in (model(implementation), model(implementation).forward_inpaint):
        refused(f"{name} is {ratio} | at least 0 and below 1", call, AUDIO, IMGS, **{name: ratio})


@both
@pytest.mark.parametrize("ratio", [0, 0.0, 1e-20])
@pytest.mark.parametrize("name, patches", [("mask_ratio_a", 32), ("mask_ratio_v", 4)])
def test_ratios_that_leave_nothing_to_reconstruct(implementation, name, patches, ratio):
    message = f"{name} is {ratio} | none of {patches} patches | at least one"
    for call in (model(implementation), model(implementation).forward_inpaint):
        refused(message, call, AUDIO, IMGS, **{name: ratio})


@both
def test_ratios_that_keep_nothing(implementation):
    refused("mask_ratio_v is 0.9 | none of 4 patches | at least one", model(implementation), AUDIO, IMGS, 0.75, 0.9)
    refused("mask_ratio_a is 0.99 | none of 32 patches", model(implementation), AUDIO, IMGS, 0.99)
    refused("mask_ratio_v is 0.9 | none of 4 patches", model(implementation), AUDIO, IMGS, 0.75, 0.9, 0.0)


@both
@pytest.mark.parametrize("mode", ["Time", "", None, "random"])
def test_mask_mode(implementation, mode):
    for call in (model(implementation), model(implementation).forward_inpaint):
        refused(f"mask_mode is {mode!r} | unstructured, time, freq, tf", call, AUDIO, IMGS, mask_mode=mode)


@both
@pytest.mark.parametrize("arguments", [{"mask_ratio_v": 1.0}, {"mask_ratio_v": 0}, {"mask_mode": "x"}])
def test_a_refused_call_draws_nothing(implementation, arguments):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        model(implementation)(AUDIO, IMGS, **arguments)
    assert torch.equal(torch.get_rng_state(), before)


@both
@pytest.mark.parametrize("mode", ["av", "", None, "audio"])
def test_classifier_mode(implementation, mode):
    refused(f"mode is {mode!r} | {', '.join(MODES)}", model(implementation, "CAVMAEFT"), AUDIO, IMGS, mode)


@both
@pytest.mark.parametrize("mode", MODES)
def test_classifier_input_missing(implementation, mode):
    classifier = model(implementation, "CAVMAEFT")
    if "video" not in mode:
        refused(f"mode {mode!r} uses the input a, which is None", classifier, None, IMGS, mode)
    if "audio" not in mode:
        refused(f"mode {mode!r} uses the input v, which is None", classifier, AUDIO, None, mode)


@both
def test_feature_mode(implementation):
    classifier = model(implementation, "CAVMAEFT")
    refused("mode is 'v' | 'av' or 'a'", classifier.forward_feat, AUDIO, IMGS, "v")
    refused("v is NoneType", classifier.forward_feat, AUDIO, error=TypeError)


@pytest.mark.parametrize("value", ["everyone", None, 0])
def test_negatives(value):
    bad = models.CAVMAE(**TINY)
    bad.negatives = value
    refused(f"negatives is {value!r} | all, rank", bad, AUDIO, IMGS)
    refused(f"negatives is {value!r} | all, rank", bad, AUDIO, IMGS, contrast_loss_weight=0)


@both
def test_weights_of_losses_that_are_not_trained(implementation):
    """`create_model("cav")` and the default weights: a reconstruction loss would be reported that nothing learns."""
    contrastive, reconstructing = implementation.CAVMAE(**TINY), implementation.CAVMAE(**TINY)
    contrastive.train_losses(reconstruction=False, contrast=True)
    reconstructing.train_losses(reconstruction=True, contrast=False)
    refused("mae_loss_weight is 1.0 | must be 0 | train_losses | reconstruction=True", contrastive, AUDIO, IMGS)
    refused("contrast_loss_weight is 0.01 | must be 0 | train_losses | contrast=True", reconstructing, AUDIO, IMGS)
    contrastive.train_losses(reconstruction=True, contrast=True)
    assert contrastive(AUDIO, IMGS).loss.isfinite()
    none = {"reconstruction": False, "contrast": False}
    refused("reconstruction and contrast are both False | at least one", contrastive.train_losses, **none)
    assert contrastive(AUDIO, IMGS).loss.isfinite()  # a refused call changes nothing


def test_weights_of_a_preset():
    model = models.create_model("cav", **TINY)
    refused("mae_loss_weight is 1.0", model, AUDIO, IMGS)
    assert model(AUDIO, IMGS, mae_loss_weight=0).loss.isfinite()


def test_unavailable_attention():
    refused("flash_attn | cpu", models.CAVMAE(**TINY, attention="flash_attn"), AUDIO, IMGS, error=RuntimeError)


@both
def test_patchify(implementation):
    refused("imgs has shape [3, 3, 32, 32] | [B, 3, 48, 32]", implementation.CAVMAE.patchify, IMGS, 3, 3, 2)
    refused("x has shape [2, 4, 768] | [B, 6, 768]", implementation.CAVMAE.unpatchify, torch.randn(2, 4, 768), 3, 3, 2)


def test_a_gradient_that_is_not_computed_is_refused():
    """The fast loss gives no gradient to the pixels; silence would be a wrong gradient."""
    with pytest.raises(ValueError, match="requires a gradient"):
        models.CAVMAE(**TINY)(AUDIO.clone().requires_grad_(), IMGS)


# --------------------------------------------------------------------------------------------------------------- NaN


@both
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_nan_anywhere_gives_a_nan_loss(implementation, norm_pix_loss, autocast):
    """Every pixel is in a kept patch, which all tokens see, or in a removed one, which the loss sees."""
    pretraining = implementation.CAVMAE(**TINY | {"norm_pix_loss": norm_pix_loss})
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for spoilt in (0, 1):
            x = [AUDIO.clone(), IMGS.clone()]
            x[spoilt].view(-1)[torch.randint(x[spoilt].numel(), (1,), generator=generator)] = NAN
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss, loss_mae, loss_a, loss_v, *_ = pretraining(*x)
            assert loss.isnan() and loss_mae.isnan() and (loss_a, loss_v)[spoilt].isnan()


@both
def test_infinity_is_not_hidden(implementation):
    for spoilt in (0, 1):
        x = [AUDIO.clone(), IMGS.clone()]
        x[spoilt].fill_(float("inf"))
        assert not model(implementation)(*x)[0].isfinite()


@both
def test_nan_in_one_modality_reaches_the_contrastive_loss(implementation):
    for audio, imgs in ((AUDIO * NAN, IMGS), (AUDIO, IMGS * NAN)):
        out = model(implementation)(audio, imgs, mae_loss_weight=0)
        assert out[0].isnan() and out[4].isnan()


@both
def test_contrast_does_not_see_what_was_removed(implementation):
    """NaN in a removed patch leaves the contrastive loss alone as it is: that patch is no part of it."""
    torch.manual_seed(0)
    mask = published_masks(3, 32, 4, 0.75, 0.75)[0]
    place = int(mask[0].nonzero()[0])  # of 8 mel rows x 4 columns of time
    spoilt = AUDIO.clone()
    spoilt[0, place % 4 * 16, place // 4 * 16] = NAN
    results = []
    for audio in (AUDIO, spoilt):
        torch.manual_seed(0)
        results.append(model(implementation)(audio, IMGS, mae_loss_weight=0)[0])
    assert torch.equal(*results) and results[0].isfinite()


@both
@pytest.mark.parametrize("mode", MODES)
def test_nan_reaches_the_logits(implementation, mode):
    assert model(implementation, "CAVMAEFT")(AUDIO * NAN, IMGS * NAN, mode).isnan().all()


@both
def test_nan_weights_reach_the_loss(implementation):
    """As a diverged training would have them, wherever the NaN is."""
    for name, parameter in model(implementation).named_parameters():
        if not parameter.requires_grad:
            continue
        broken = implementation.CAVMAE(**TINY)
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[0] = NAN
        assert broken(AUDIO, IMGS)[0].isnan(), name


def sdpa_hides_nan(part: str) -> bool:
    """Whether PyTorch's own kernel gives 0 for NaN scores: that depends on the CPU's instructions."""
    operands = {name: torch.ones(3, 3, 8, 16) for name in "qkv"}
    operands[part][:, 0, :, 0] = NAN
    return not bool(torch.nn.functional.scaled_dot_product_attention(*operands.values()).isnan().any())


@pytest.mark.parametrize("attention", ["torch", "sdpa"])
@pytest.mark.parametrize("part", ["q", "k"])
def test_nan_scores_are_not_hidden(attention, part):
    """NaN in the projection of the queries or the keys alone, as after a bad step of the optimizer. Our operator shows it
    on every CPU; the back end that is PyTorch's alone shows it where PyTorch does."""
    broken = models.CAVMAE(**TINY, attention=attention)
    with torch.no_grad():
        broken.blocks_a[0].attn.qkv.weight[0 if part == "q" else 48] = NAN
    hidden = attention == "sdpa" and sdpa_hides_nan(part)
    assert bool(broken(AUDIO, IMGS)[0].isnan()) == (not hidden)
