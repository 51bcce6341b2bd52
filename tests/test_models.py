"""The fast models against the reference in float64, and the facts that users of the published models rely on."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny import ENCODER, OUTPUTS, TINY, gradients, inputs, one_thread, pair, randomize, relative  # noqa: F401
from torch import nn
from torch.nn.parallel import scatter_gather

import cavmae_fast
from cavmae_fast import models
from cavmae_fast.clip import ClipSpec
from cavmae_fast.data import draws, loader
from cavmae_fast.data.features import IMAGE_MEAN, IMAGE_STD, image_features
from cavmae_fast.models import CAVMAE, CAVMAEFT, PRESETS, CAVMAEFTAudio, create_model
from cavmae_fast.models.packed import State, block
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.reference import cavmae as reference
from cavmae_fast.reference.blocks import block as plain_block
from cavmae_fast.reference.cavmae_parameters import MODES
from cavmae_fast.reference.layers import Block, ModalityBlock
from cavmae_fast.reference.masking import random_masking
from cavmae_fast.training import adam

CONFIGS = {
    "default": {},
    "norm_pix": {"norm_pix_loss": True},
    "bidirectional": {"bidirect_contrast": True},
    "all-shared": {"modality_specific_depth": 0},
    "two-shared": {"depth": 4},
    "three-shared": {"depth": 4, "modality_specific_depth": 1},
    "none-shared": {"depth": 2},
    "wide-images": {"img_size": (32, 64)},
    "tall-images": {"img_size": (64, 32), "norm_pix_loss": True},
    "short-audio": {"audio_length": 16},
    "long-audio": {"audio_length": 160},
    "patch-8": {"patch_size": 8, "img_size": 16, "audio_length": 16, "norm_pix_loss": True},
    "trainable-positions": {"tr_pos": True},
    "one-channel": {"in_chans": 1, "norm_pix_loss": True},
    "one-decoder-block": {"decoder_depth": 1},
    "three-decoder-blocks": {"decoder_depth": 3},
    "narrow-mlp": {"mlp_ratio": 1.5},
    "norm-eps": {"norm_layer": lambda width: nn.LayerNorm(width, eps=1e-2)},
    "torch": {"attention": "torch"},
    "sdpa": {"attention": "sdpa"},
    "torch-two-shared": {"attention": "torch", "depth": 4},
    "sdpa-norm_pix": {"attention": "sdpa", "norm_pix_loss": True, "img_size": (32, 48)},
}


def run(model: nn.Module, config: dict, seed: int = 3, batch: int = 3, **forward) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(zip(OUTPUTS, model(*inputs(config, batch), **forward), strict=True))


def assert_same_step(fast: nn.Module, plain: nn.Module, config: dict, tolerance: float = 1e-9, **forward) -> None:
    """All eight outputs and every gradient of a pretraining step."""
    got, want = run(fast, config, **forward), run(plain, config, **forward)
    for key in OUTPUTS:
        assert got[key].shape == want[key].shape, key
        difference, scale = (got[key] - want[key]).detach().abs().max(), want[key].detach().abs().max()
        assert difference <= tolerance * max(1.0, float(scale)), key
    got["loss"].backward()
    want["loss"].backward()
    wanted = gradients(plain)
    assert gradients(fast).keys() == wanted.keys()
    # Some gradients are exactly 0 (the key's bias); they are compared on the scale of the largest.
    largest = max(float(g.norm()) for g in wanted.values())
    for key, gradient in gradients(fast).items():
        assert (gradient - wanted[key]).norm() <= tolerance * max(float(wanted[key].norm()), 1e-3 * largest), key


# ------------------------------------------------------------------------------------------------- pretraining step


@pytest.mark.parametrize("name", CONFIGS)
def test_step_equals_reference(name):
    config = TINY | CONFIGS[name]
    fast, plain = pair(CAVMAE, reference.CAVMAE, **config)
    assert_same_step(fast, plain, config, contrast_loss_weight=0.5)


@pytest.mark.parametrize("mask_mode", ["time", "freq", "tf"])
@pytest.mark.parametrize("ratios", [(0.75, 0.75), (0.5, 0.25), (0.9, 0.3), (0.1, 0.9)])
def test_mask_modes_and_ratios(mask_mode, ratios):
    config = TINY | {"img_size": 64, "audio_length": 80}
    fast, plain = pair(CAVMAE, reference.CAVMAE, **config)
    assert_same_step(
        fast, plain, config, mask_ratio_a=ratios[0], mask_ratio_v=ratios[1], mask_mode=mask_mode, mae_loss_weight=2.0
    )


def test_batch_of_one():
    fast, plain = pair(CAVMAE, reference.CAVMAE, **TINY)
    assert_same_step(fast, plain, TINY, batch=1)


def test_arguments_by_position():
    fast, _ = pair(CAVMAE, reference.CAVMAE, **TINY)
    torch.manual_seed(0)
    by_position = fast(*inputs(), 0.5, 0.25, 3.0, 0.1, "freq")
    torch.manual_seed(0)
    by_name = fast(
        *inputs(), mask_ratio_a=0.5, mask_ratio_v=0.25, mae_loss_weight=3.0, contrast_loss_weight=0.1, mask_mode="freq"
    )
    assert all(torch.equal(a, b) for a, b in zip(by_position, by_name))
    assert by_position[5].sum(1).tolist() == [16] * 3 and by_position[6].sum(1).tolist() == [1] * 3


def test_outputs_are_weighted_as_published():
    fast, _ = pair(CAVMAE, reference.CAVMAE, **TINY)
    one = run(fast, TINY, mae_loss_weight=1.0, contrast_loss_weight=1.0)
    out = run(fast, TINY, mae_loss_weight=3.0, contrast_loss_weight=0.2)
    torch.testing.assert_close(out["loss_mae_a"], one["loss_mae_a"])
    torch.testing.assert_close(out["loss_mae"], 3 * (one["loss_mae_a"] + one["loss_mae_v"]))
    torch.testing.assert_close(out["loss_c"], 0.2 * one["loss_c"])
    torch.testing.assert_close(out["loss"], out["loss_mae"] + out["loss_c"])


def test_non_contiguous_inputs():
    config = TINY | {"norm_pix_loss": True}
    fast, _ = pair(CAVMAE, reference.CAVMAE, **config)
    audio, imgs = inputs()
    strided = audio.transpose(1, 2).contiguous().transpose(1, 2)
    last = imgs.to(memory_format=torch.channels_last)
    every_other = imgs.repeat_interleave(2, dim=3)[..., ::2]
    torch.manual_seed(0)
    want = fast(audio, imgs)
    for a, v in ((strided, last), (audio.repeat(2, 1, 1)[:3], every_other)):
        torch.manual_seed(0)
        for x, y in zip(fast(a, v), want):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    one = imgs[:1].expand(3, -1, -1, -1)
    torch.manual_seed(0)
    got = fast(audio, one)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(got, fast(audio, one.contiguous())[0], rtol=1e-12, atol=0)


def test_inputs_are_left_as_they_were():
    fast, _ = pair(CAVMAE, reference.CAVMAE, **TINY | {"norm_pix_loss": True})
    audio, imgs = inputs()
    before = audio.clone(), imgs.clone()
    fast(audio, imgs)[0].backward()
    fast.forward_inpaint(audio, imgs)
    assert torch.equal(audio, before[0]) and torch.equal(imgs, before[1])


def test_repeated_runs_are_bitwise_equal():
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for _ in range(2):
            fast, _ = pair(CAVMAE, reference.CAVMAE, dtype=torch.float32, **TINY)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                torch.manual_seed(0)
                out = fast(*inputs(dtype=torch.float32))
            out[0].backward()
            results.append([*out, *gradients(fast).values()])
        assert all(torch.equal(a, b) for a, b in zip(*results))


# --------------------------------------------------------------------------------------- work that is not to be done


def calls_of(model, monkeypatch):
    """Counts the calls of the decoder, and the lengths of the streams in every block."""
    seen = {"decode": 0, "streams": []}
    decode = model.decode_removed

    def counted(*args):
        seen["decode"] += 1
        return decode(*args)

    def noted(state, *args, **options):
        seen["streams"].append(state.layout.lengths)
        return block(state, *args, **options)

    monkeypatch.setattr(model, "decode_removed", counted)
    for module in ("encoder", "cavmae"):
        monkeypatch.setattr(f"cavmae_fast.models.{module}.block", noted)
    return seen


def test_without_reconstruction_nothing_is_decoded(monkeypatch):
    fast, plain = pair(CAVMAE, reference.CAVMAE, **TINY)
    assert_same_step(fast, plain, TINY, mae_loss_weight=0.0)
    decoder = ("decoder_", "mask_token")
    assert not any(name.startswith(decoder) or (".norm1." in name and "blocks_u" in name) for name in gradients(fast))
    assert fast.norm.weight.grad is None and fast.norm_a.weight.grad is not None
    seen = calls_of(fast, monkeypatch)
    out = run(fast, TINY, mae_loss_weight=0)
    assert seen["decode"] == 0 and seen["streams"] == [(8, 1), (8, 1), (8, 1)]
    assert out["loss_mae"] == out["loss_mae_a"] == out["loss_mae_v"] == 0 and out["loss"] == out["loss_c"] > 0


def test_without_contrast_the_single_streams_are_not_computed(monkeypatch):
    fast, plain = pair(CAVMAE, reference.CAVMAE, **TINY)
    assert_same_step(fast, plain, TINY, contrast_loss_weight=0.0)
    assert fast.norm_a.weight.grad is None and fast.blocks_u[0].norm1_v.weight.grad is None
    assert fast.norm.weight.grad is not None
    seen = calls_of(fast, monkeypatch)
    out = run(fast, TINY, contrast_loss_weight=0)
    distinct = (3 * 9 + 36,)  # the first decoder block's: those that are kept, and one for each position
    assert seen["streams"] == [(8, 1), (8, 1), (9,), distinct]  # the last decoder block is `block_for_tokens`
    assert out["loss_c"] == 0 and out["c_acc"] == 0 and out["loss"] == out["loss_mae"] > 0


def test_with_both_losses_the_shared_block_runs_once(monkeypatch):
    fast, _ = pair(CAVMAE, reference.CAVMAE, **TINY)
    seen = calls_of(fast, monkeypatch)
    run(fast, TINY)
    assert seen["streams"] == [(8, 1), (8, 1), (8, 1, 9), (3 * 9 + 36,)] and seen["decode"] == 1


def test_both_weights_zero():
    fast, plain = pair(CAVMAE, reference.CAVMAE, **TINY)
    for model in (fast, plain):
        out = run(model, TINY, mae_loss_weight=0, contrast_loss_weight=0)
        assert out["loss"] == 0 and not out["loss"].requires_grad
        assert out["mask_a"].sum() == 24 * 3 and out["mask_v"].sum() == 3 * 3


def test_contrast_alone_takes_unmasked_inputs():
    """Ratio 0 leaves nothing to reconstruct, but everything to contrast."""
    fast, plain = pair(CAVMAE, reference.CAVMAE, **TINY)
    assert_same_step(fast, plain, TINY, mask_ratio_a=0, mask_ratio_v=0.0, mae_loss_weight=0)
    assert run(fast, TINY, mask_ratio_a=0, mask_ratio_v=0, mae_loss_weight=0)["mask_a"].sum() == 0


# ------------------------------------------------------------------------------------------------------------ masks


def published_masks(batch: int, length_a: int, length_v: int, ratio_a: float, ratio_v: float):
    """The published algorithm, written from the specification: noise for audio first, smallest values are kept."""
    results = []
    for length, ratio in ((length_a, ratio_a), (length_v, ratio_v)):
        noise = torch.rand(batch, length)
        mask = torch.ones(batch, length)
        for b in range(batch):
            order = sorted(range(length), key=lambda i, b=b: float(noise[b, i]))
            mask[b, order[: int(length * (1 - ratio))]] = 0
        results.append(mask)
    return results


@pytest.mark.parametrize("seed, ratio_a, ratio_v", [(0, 0.75, 0.75), (1, 0.5, 0.9), (2, 0.33, 0.1)])
@pytest.mark.parametrize("implementation", [models, reference])
def test_same_seed_same_masks_as_published(implementation, seed, ratio_a, ratio_v):
    model = implementation.CAVMAE(**TINY | {"img_size": 64})
    audio, imgs = inputs({"img_size": 64}, 4, torch.float32)
    torch.manual_seed(seed)
    want = published_masks(4, 32, 16, ratio_a, ratio_v)
    torch.manual_seed(seed)
    out = model(audio, imgs, ratio_a, ratio_v)
    assert torch.equal(out[5], want[0]) and torch.equal(out[6], want[1])
    assert out[5].dtype == out[6].dtype == torch.float32
    torch.manual_seed(seed)
    inpainted = model.forward_inpaint(audio, imgs, ratio_a, ratio_v)
    assert torch.equal(inpainted[2], want[0]) and torch.equal(inpainted[3], want[1])


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("grid", [(8, 64), (8, 40), (16, 5)])
@pytest.mark.parametrize("mode", ["unstructured", "time", "freq", "tf"])
def test_structured_masks(mode, grid, ratio):
    rows, columns = grid
    torch.manual_seed(0)
    masking = random_masking(64, grid, ratio, torch.device("cpu"), mode)
    length, kept = rows * columns, int(rows * columns * (1 - ratio))
    mask = masking.mask.view(64, rows, columns).bool()
    assert mask.flatten(1).sum(1).tolist() == [length - kept] * 64
    # ids agree with the mask, and are a permutation
    assert not masking.mask.gather(1, masking.ids_keep).any() and masking.mask.gather(1, masking.ids_removed).all()
    shuffled = torch.cat([masking.ids_keep, masking.ids_removed], dim=1)
    assert torch.equal(shuffled.gather(1, masking.ids_restore), torch.arange(length).expand(64, -1))

    factor = 0.7 if mode == "tf" else 1
    whole_columns = int(columns * ratio * factor) if mode in ("time", "tf") else 0
    whole_rows = int(rows * ratio * factor) if mode in ("freq", "tf") else 0
    chosen = whole_columns * rows + whole_rows * columns - whole_columns * whole_rows
    if chosen <= length - kept:  # else even the chosen ones are not all removed
        assert (mask.all(dim=1).sum(1) >= whole_columns).all() and (mask.all(dim=2).sum(1) >= whole_rows).all()
    else:
        assert mode == "tf"
    if mode != "unstructured" and whole_columns + whole_rows:
        assert len({tuple(m.tolist()) for m in mask.flatten(1).int()}) > 16  # drawn for each sample


def test_structure_is_along_the_right_axis():
    """At ratio 0.5 'time' removes exactly half of the columns of time and 'freq' half of the mel rows."""
    model = CAVMAE(**TINY)
    audio, imgs = inputs(dtype=torch.float32)
    for mode, axis, count in (("time", 1, 2), ("freq", 2, 4)):
        mask = model(audio, imgs, mask_ratio_a=0.5, mask_mode=mode)[5].view(3, 8, 4)  # [B, mel, time]
        assert mask.amin(axis).sum(1).tolist() == [count] * 3 and mask.amax(axis).sum(1).tolist() == [count] * 3


def test_every_place_is_masked_equally_often():
    torch.manual_seed(0)
    for mode, tolerance in (("unstructured", 0.03), ("time", 0.04), ("freq", 0.04)):
        share = random_masking(4096, (8, 4), 0.5, torch.device("cpu"), mode).mask.mean(0)
        assert (share - 0.5).abs().max() < tolerance, mode


# --------------------------------------------------------------------------------------- inpainting, features, patches


@pytest.mark.parametrize("name", ["default", "norm_pix", "two-shared", "wide-images", "patch-8", "one-channel", "sdpa"])
def test_inpainting_equals_reference(name):
    config = TINY | CONFIGS[name]
    fast, plain = pair(CAVMAE, reference.CAVMAE, **config)
    results = []
    for model in (fast, plain):
        torch.manual_seed(5)
        results.append(model.forward_inpaint(*inputs(config), 0.5, 0.5, "time"))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-9
    pred_a, pred_v, mask_a, mask_v, loss_a, loss_v = results[0]
    p, size = config.get("patch_size", 16), config["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    assert pred_a.shape == (3, 128 // p * config["audio_length"] // p, p * p)
    assert pred_v.shape == (3, height // p * width // p, p * p * config.get("in_chans", 3))
    assert mask_a.shape == pred_a.shape[:2] and mask_v.shape == pred_v.shape[:2]
    torch.manual_seed(5)
    out = fast(*inputs(config), 0.5, 0.5, mask_mode="time")
    torch.testing.assert_close(out[2], loss_a, rtol=1e-10, atol=0)
    torch.testing.assert_close(out[3], loss_v, rtol=1e-10, atol=0)


def test_inpainting_can_be_trained():
    fast, plain = pair(CAVMAE, reference.CAVMAE, **TINY)
    for model in (fast, plain):
        torch.manual_seed(5)
        pred_a, pred_v, *_, loss_a, loss_v = model.forward_inpaint(*inputs())
        (loss_a + 2 * loss_v + pred_a.square().mean() + pred_v.sin().mean()).backward()
    want = gradients(plain)
    assert gradients(fast).keys() == want.keys()
    for key, gradient in gradients(fast).items():
        assert (gradient - want[key]).norm() <= 1e-9 * max(float(want[key].norm()), 1e-3), key


def test_the_loss_is_that_of_the_inpainted_picture():
    """Independent of the operators: unpatchify the predictions, compare pixels under the mask."""
    fast, _ = pair(CAVMAE, reference.CAVMAE, **TINY)
    audio, imgs = inputs()
    pred_a, pred_v, mask_a, mask_v, loss_a, loss_v = fast.forward_inpaint(audio, imgs)
    for pred, mask, image, (c, h, w), loss in (
        (pred_v, mask_v, imgs, (3, 2, 2), loss_v),
        (pred_a, mask_a, audio.transpose(1, 2)[:, None], (1, 8, 4), loss_a),
    ):
        removed = mask.view(3, 1, h, w).repeat_interleave(16, 2).repeat_interleave(16, 3).expand_as(image).bool()
        error = (fast.unpatchify(pred, c, h, w) - image).square()
        torch.testing.assert_close(error[removed].mean(), loss.double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("c, h, w, p", [(3, 2, 2, 16), (1, 8, 64, 16), (3, 2, 5, 8), (4, 1, 3, 2)])
def test_unpatchify_undoes_patchify(c, h, w, p):
    x = torch.randn(2, c, h * p, w * p)
    patches = CAVMAE.patchify(x, c, h, w, p)
    assert patches.shape == (2, h * w, p * p * c)
    assert torch.equal(CAVMAE.unpatchify(patches, c, h, w, p), x)
    # (row, column, channel) within a patch, rows of patches first
    assert torch.equal(patches[:, w - 1, 0 : p * c].reshape(2, p, c), x[:, :, 0, (w - 1) * p :].transpose(1, 2))


def test_patchify_of_an_instance_takes_the_published_arguments():
    model = CAVMAE(**TINY)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.unpatchify(model.patchify(x, 3, 2, 2, 16), 3, 2, 2, 16), x)
    assert torch.equal(model.patchify(imgs=x, c=3, h=2, w=2), model.patchify(x, 3, 2, 2))


@pytest.mark.parametrize("name", ["default", "two-shared", "all-shared", "none-shared", "wide-images", "sdpa"])
def test_features_equal_reference(name):
    config = TINY | CONFIGS[name]
    fast, plain = pair(CAVMAE, reference.CAVMAE, **config)
    got, want = fast.forward_feat(*inputs(config)), plain.forward_feat(*inputs(config))
    assert got[0].shape == (3, 32, 48) and got[1].shape == (3, fast.patch_embed_v.num_patches, 48)
    assert relative(got[0], want[0]) < 1e-12 and relative(got[1], want[1]) < 1e-12


def test_features_do_not_depend_on_the_other_modality():
    fast, _ = pair(CAVMAE, reference.CAVMAE, **TINY)
    audio, imgs = inputs()
    a, v = fast.forward_feat(audio, imgs)
    other_a, _ = fast.forward_feat(audio, imgs.flip(0))
    _, other_v = fast.forward_feat(audio.flip(0), imgs)
    assert torch.equal(a, other_a) and torch.equal(v, other_v)


def test_tokens_of_audio_are_frequency_major():
    """Changing one patch of the spectrogram changes, before any attention, the token at row-major (mel, time)."""
    model, _ = pair(CAVMAE, reference.CAVMAE, **TINY | {"depth": 0, "modality_specific_depth": 0})
    audio, imgs = inputs()
    changed = audio.clone()
    changed[:, 16:32, 80:96] += 1  # time 1, mel 5
    difference = (model.forward_feat(changed, imgs)[0] - model.forward_feat(audio, imgs)[0]).abs().sum(-1)
    assert difference.ne(0).nonzero()[:, 1].unique().tolist() == [5 * 4 + 1]


# ------------------------------------------------------------------------------------------------------- uint8 images


def normalize_exactly(pixels: torch.Tensor, mean: tuple = IMAGE_MEAN, std: tuple = IMAGE_STD) -> torch.Tensor:
    """In float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    return (pixels.double() / 255 - mean) / std


def rgb(imgs: torch.Tensor, mean: tuple = IMAGE_MEAN, std: tuple = IMAGE_STD) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images `[B, 3, H, W]`, channels last in memory as decoders give them, and the same normalized in float64."""
    pixels = (imgs * 60 + 120).clamp(0, 255).byte().contiguous(memory_format=torch.channels_last)
    return pixels, normalize_exactly(pixels, mean, std)


OTHER_COLORS = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.3, 0.2, 0.25)}


@pytest.mark.parametrize("colors", [{}, OTHER_COLORS], ids=["imagenet", "other"])
@pytest.mark.parametrize("name", ["default", "norm_pix", "two-shared", "wide-images", "patch-8"])
@pytest.mark.parametrize("method", ["forward", "forward_inpaint"])
def test_bytes_are_normalized_on_the_way_in(name, method, colors):
    """Fast and reference models on uint8, against the reference on images that were normalized first."""
    config = TINY | CONFIGS[name]
    if colors:
        size = config["img_size"]
        image_size = (size, size) if isinstance(size, int) else size
        config["clip"] = ClipSpec(image_size=image_size, audio_length=config["audio_length"], **colors)
    fast, plain = pair(CAVMAE, reference.CAVMAE, **config)
    audio, imgs = inputs(config)
    pixels, normalized = rgb(imgs, *colors.values())
    results = []
    for model, images in ((plain, normalized), (plain, pixels), (fast, pixels)):
        torch.manual_seed(0)
        out = getattr(model, method)(audio, images)
        model.zero_grad()
        (out[0] if method == "forward" else out[4] + out[5]).backward()
        results.append([*out, *(g.clone() for _, g in sorted(gradients(model).items()))])
    for got in results[1:]:
        for value, want in zip(got, results[0], strict=True):
            torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("colors", [{}, OTHER_COLORS], ids=["imagenet", "other"])
def test_bytes_in_features_and_classifier(colors):
    audio, imgs = inputs()
    pixels, normalized = rgb(imgs, *colors.values())
    clip = ClipSpec(image_size=(32, 32), audio_length=64, **colors)
    pretraining = pair(CAVMAE, reference.CAVMAE, **TINY, clip=clip)
    for fast, plain in (pretraining, pair(CAVMAEFT, reference.CAVMAEFT, 5, **ENCODER, clip=clip)):
        for got, want in zip(fast.forward_feat(audio, pixels), plain.forward_feat(audio, normalized), strict=True):
            assert relative(got, want) < 1e-9
        assert relative(plain.forward_feat(audio, pixels)[1], want) < 1e-12
    for mode in MODES:
        want = plain(audio, normalized, mode)
        assert relative(fast(audio, pixels, mode), want) < 1e-9 and relative(plain(audio, pixels, mode), want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_under_autocast_and_in_low_precision(dtype):
    """uint8 gives what `image_features` gives: the same float32 numbers, to rounding."""
    model = randomize(CAVMAE(**TINY))
    exact = copy.deepcopy(model).double()
    audio, imgs = inputs(dtype=torch.float32)
    pixels, _ = rgb(imgs)

    def loss(audio, images):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(audio, images)[0].detach()

    def exact_loss(audio, pixels):
        torch.manual_seed(0)
        return exact(audio, normalize_exactly(pixels))[0].detach()

    assert_parity(loss, exact_loss, [audio, pixels], baseline=lambda audio, pixels: loss(audio, image_features(pixels)))
    half = model.to(torch.bfloat16)
    assert half.forward_feat(audio, pixels)[1].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["default", "two-shared", "all-shared", "none-shared", "sdpa", "wide-images"])
def test_fine_tuned_equals_reference(name, mode):
    config = ENCODER | CONFIGS[name]
    fast, plain = pair(CAVMAEFT, reference.CAVMAEFT, 5, **config)
    audio, imgs = inputs(config)
    unused_a, unused_v = (None if "video" in mode else audio), (None if "audio" in mode else imgs)
    got, want = fast(audio, imgs, mode), plain(unused_a, unused_v, mode)
    assert got.shape == (3, 5) and relative(got, want) < 1e-9
    assert torch.equal(fast(unused_a, unused_v, mode), got)
    weights = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    wanted = gradients(plain)
    assert gradients(fast).keys() == wanted.keys()
    for key, gradient in gradients(fast).items():
        assert (gradient - wanted[key]).norm() <= 1e-9 * max(float(wanted[key].norm()), 1e-3), key


def test_missing_is_the_mean_of_both_norm_passes():
    fast, plain = pair(CAVMAEFT, reference.CAVMAEFT, 5, **ENCODER)
    audio, imgs = inputs()
    for m, x, mode in (("a", audio, "missingaudioonly"), ("v", imgs, "missingvideoonly")):
        tokens = plain.specific(m, plain.embed(m, x))
        mean = (plain.shared(tokens).mean(1) + plain.shared(tokens, m).mean(1)) / 2
        torch.testing.assert_close(fast(audio, imgs, mode), fast.mlp_head(mean), rtol=1e-10, atol=1e-12)


def test_fine_tuned_features():
    fast, plain = pair(CAVMAEFT, reference.CAVMAEFT, 5, **ENCODER)
    audio, imgs = inputs()
    for got, want in zip(fast.forward_feat(audio, imgs), plain.forward_feat(audio, imgs), strict=True):
        assert relative(got, want) < 1e-12
    alone = fast.forward_feat(audio, None, "a")
    assert isinstance(alone, torch.Tensor) and relative(alone, plain.forward_feat(audio, None, "a")) < 1e-12


@pytest.mark.parametrize("name", ["default", "two-shared", "sdpa"])
def test_audio_model_equals_reference(name):
    config = ENCODER | CONFIGS[name]
    fast, plain = pair(CAVMAEFTAudio, reference.CAVMAEFTAudio, 5, **config)
    audio, imgs = inputs()
    tokens = fast(audio)
    assert tokens.shape == (3, 32, 48) and relative(tokens, plain(audio)) < 1e-12
    assert torch.equal(fast.forward_feat(audio, imgs, "a"), tokens)
    logits = fast.forward_pred(audio)
    assert logits.shape == (3, 5) and relative(logits, plain.forward_pred(audio)) < 1e-12
    logits.sum().backward()
    assert not any(name.endswith("_v") or "_v." in name for name in gradients(fast))


def test_audio_model_is_the_audio_branch_of_the_classifier():
    both, alone = randomize(CAVMAEFT(5, **ENCODER)).double(), CAVMAEFTAudio(5, **ENCODER).double()
    alone.load_state_dict({k: v for k, v in both.state_dict().items() if k in alone.state_dict()})
    audio, _ = inputs()
    torch.testing.assert_close(alone.forward_pred(audio), both(audio, None, "audioonly"), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------- precision and dtypes


def test_bf16_autocast_is_as_near_to_float64_as_the_reference():
    """Relative to an explicit baseline: at most twice the error that the plain model makes under the same autocast."""
    config = TINY | {"norm_pix_loss": True}
    fast, plain = pair(CAVMAE, reference.CAVMAE, **config)
    want = run(plain, config, batch=8, contrast_loss_weight=0.1)
    want["loss"].backward()
    exact = gradients(plain)
    results = {}
    for name, model in (("fast", fast.float()), ("plain", copy.deepcopy(plain).float())):
        model.zero_grad(set_to_none=True)
        audio, imgs = inputs(config, 8, torch.float32)
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = dict(zip(OUTPUTS, model(audio, imgs, contrast_loss_weight=0.1)))
        out["loss"].backward()
        results[name] = out, gradients(model)
    (fast_out, fast_grads), (plain_out, plain_grads) = results["fast"], results["plain"]
    assert torch.equal(fast_out["mask_a"], want["mask_a"].float())
    for key in OUTPUTS[:5]:
        # In a single number errors may cancel, in one of the two by chance: so the floor is one rounding to bf16.
        floor = 2**-9 * abs(want[key].item())
        assert abs(fast_out[key] - want[key]) <= 2 * abs(plain_out[key] - want[key]) + floor, key
    scale = max(float(g.norm()) for g in exact.values())

    def total(grads):
        return sum(float((grads[k].double() - exact[k]).square().sum()) for k in exact) ** 0.5

    assert total(fast_grads) <= 2 * total(plain_grads)
    assert total(fast_grads) < 0.05 * scale  # and it is no comparison of two broken models
    for key in exact:
        error = float((fast_grads[key].double() - exact[key]).norm())
        baseline = float((plain_grads[key].double() - exact[key]).norm())
        assert error <= 2 * baseline + 2**-9 * max(float(exact[key].norm()), 1e-3 * scale), key


def test_dtypes_under_autocast():
    model = randomize(CAVMAE(**TINY))
    audio, imgs = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dict(zip(OUTPUTS, model(audio, imgs)))
        features = model.forward_feat(audio, imgs)
    assert all(value.dtype == torch.float32 for value in out.values())
    out["loss"].backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())
    assert {f.dtype for f in features} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("input_dtype", ["same", torch.float32])
def test_whole_model_in_another_dtype(dtype, input_dtype):
    model = randomize(CAVMAE(**TINY)).to(dtype)
    audio, imgs = inputs(dtype=dtype if input_dtype == "same" else input_dtype)
    torch.manual_seed(0)
    out = dict(zip(OUTPUTS, model(audio, imgs)))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(out[key].dtype == statistics for key in OUTPUTS[:5])
    out["loss"].backward()
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients(model).values())
    torch.manual_seed(0)
    exact = randomize(CAVMAE(**TINY))(*inputs(dtype=torch.float32))[0]
    assert abs(out["loss"] - exact) < 0.02 * exact
    assert model.forward_feat(audio, imgs)[0].dtype == dtype
    classifier = randomize(CAVMAEFT(5, **ENCODER)).to(dtype)
    assert all(classifier(audio, imgs, mode).dtype == dtype for mode in MODES)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation(guard):
    fast, _ = pair(CAVMAE, reference.CAVMAE, **TINY)
    want = run(fast, TINY)
    fast.eval()
    with guard():
        got = run(fast, TINY)
        features = fast.forward_feat(*inputs())
        classifier = CAVMAEFT(5, **ENCODER).double()
        assert not classifier(*inputs(), "multimodal").requires_grad
    assert all(torch.equal(got[key], want[key]) for key in OUTPUTS) and not got["loss"].requires_grad
    assert not features[0].requires_grad


def test_without_contrast_gradients_one_can_freeze_parts():
    """A frozen encoder (linear probing of the decoder) or frozen positions get no gradient, the rest the same one."""
    fast, plain = pair(CAVMAE, reference.CAVMAE, **TINY)
    for model in (fast, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("decoder_") and "pos_embed" not in name)
    assert_same_step(fast, plain, TINY)


# -------------------------------------------------------------------------------------------------- the drop-in surface

PUBLISHED = {
    CAVMAE: [
        ("img_size", 224),
        ("audio_length", 1024),
        ("patch_size", 16),
        ("in_chans", 3),
        ("embed_dim", 768),
        ("modality_specific_depth", 11),
        ("num_heads", 12),
        ("decoder_embed_dim", 512),
        ("decoder_depth", 8),
        ("decoder_num_heads", 16),
        ("mlp_ratio", 4.0),
        ("norm_layer", nn.LayerNorm),
        ("norm_pix_loss", False),
        ("tr_pos", False),
    ],
    CAVMAEFT: [
        ("label_dim", inspect.Parameter.empty),
        ("img_size", 224),
        ("audio_length", 1024),
        ("patch_size", 16),
        ("in_chans", 3),
        ("embed_dim", 768),
        ("modality_specific_depth", 11),
        ("num_heads", 12),
        ("mlp_ratio", 4.0),
        ("norm_layer", nn.LayerNorm),
        ("norm_pix_loss", False),
        ("tr_pos", True),
    ],
}
PUBLISHED[CAVMAEFTAudio] = PUBLISHED[CAVMAEFT]
METHODS = {
    (CAVMAE, "forward"): [
        ("audio", inspect.Parameter.empty),
        ("imgs", inspect.Parameter.empty),
        ("mask_ratio_a", 0.75),
        ("mask_ratio_v", 0.75),
        ("mae_loss_weight", 1.0),
        ("contrast_loss_weight", 0.01),
        ("mask_mode", "unstructured"),
    ],
    (CAVMAE, "forward_inpaint"): [
        ("audio", inspect.Parameter.empty),
        ("imgs", inspect.Parameter.empty),
        ("mask_ratio_a", 0.75),
        ("mask_ratio_v", 0.75),
        ("mask_mode", "unstructured"),
    ],
    (CAVMAE, "forward_feat"): [("a", inspect.Parameter.empty), ("v", inspect.Parameter.empty)],
    (CAVMAEFT, "forward"): [(name, inspect.Parameter.empty) for name in ("a", "v", "mode")],
    (CAVMAEFT, "forward_feat"): [("a", inspect.Parameter.empty), ("v", None), ("mode", "av")],
    (CAVMAEFTAudio, "forward"): [("a", inspect.Parameter.empty)],
}


def positional(function) -> list[tuple]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind in kinds and p.name != "self"]


@pytest.mark.parametrize("model", PUBLISHED)
def test_constructors_have_the_published_positional_parameters(model):
    assert positional(model) == PUBLISHED[model]


@pytest.mark.parametrize("model, method", METHODS)
def test_methods_have_the_published_positional_parameters(model, method):
    assert positional(getattr(model, method)) == METHODS[model, method]


def test_the_fast_and_the_reference_models_take_the_same_arguments():
    for fast, plain in ((CAVMAE, reference.CAVMAE), (CAVMAEFT, reference.CAVMAEFT)):
        assert inspect.signature(fast) == inspect.signature(plain)
        for method in ("forward", "forward_feat"):
            assert positional(getattr(fast, method)) == positional(getattr(plain, method))


def test_construction_is_silent(capfd, recwarn):
    models.CAVMAE(**TINY), models.CAVMAEFT(5, **ENCODER), models.CAVMAEFTAudio(5, **ENCODER)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_default_models_on_the_meta_device():
    with torch.device("meta"):
        model, tuned, audio = CAVMAE(), CAVMAEFT(527), CAVMAEFTAudio(527)
    assert (len(model.state_dict()), len(tuned.state_dict()), len(audio.state_dict())) == (647, 478, 252)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == model.state_dict().keys()  # no buffer
    assert round(sum(p.numel() for p in parameters.values()) / 1e6, 3) == 191.036
    assert all(p.is_meta for p in parameters.values())
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    positions = {name for name in frozen if "pos_embed" in name}
    assert positions == {f"{d}pos_embed_{m}" for d in ("", "decoder_") for m in "av"}
    assert len(frozen - positions) == 240
    assert all(".norm1_" in name or ".norm2_" in name for name in frozen - positions)
    assert not any(name.startswith("blocks_u.") for name in frozen)
    assert all(p.requires_grad for p in tuned.parameters() if p.dim() == 3)  # positions are trained by default
    with torch.device("meta"):
        assert all(p.requires_grad for n, p in CAVMAE(tr_pos=True).named_parameters() if "pos_embed" in n)


def test_initialization():
    torch.manual_seed(0)
    model = CAVMAE(**TINY)
    for name, p in model.named_parameters():
        if "pos_embed" in name:
            assert p.abs().max() <= 1 and p.std() > 0.3
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p)), name
        elif name.endswith("weight") and "patch_embed" not in name:
            bound = (6 / (p.shape[0] + p.shape[1])) ** 0.5
            assert 0.9 * bound < p.abs().max() <= bound, name
        elif name.endswith("proj.weight"):
            bound = (6 / (p.shape[0] + p[0].numel())) ** 0.5
            assert 0.9 * bound < p.abs().max() <= bound, name
        elif p.dim() == 3:
            assert 0.01 < p.std() < 0.03, name
        elif "patch_embed" not in name:
            assert not p.any(), name
    torch.manual_seed(0)
    again = reference.CAVMAE(**TINY)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_deepcopy_and_pickle():
    fast, _ = pair(CAVMAE, reference.CAVMAE, **TINY | {"norm_layer": lambda width: nn.LayerNorm(width, eps=1e-3)})
    want = run(fast, TINY)["loss"]
    want.backward()
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
        assert torch.equal(run(other, TINY)["loss"], want)
        other.norm.weight.data.zero_()
        assert fast.norm.weight.abs().sum() > 0
    classifier = randomize(CAVMAEFT(5, **ENCODER))
    x = inputs(dtype=torch.float32)
    assert torch.equal(copy.deepcopy(classifier)(*x, "multimodal"), classifier(*x, "multimodal"))


def test_default_attention_is_the_automatic_one():
    """Else the kernels that are proven on a GPU would not be used."""
    assert CAVMAE(**TINY).attention == "auto" and CAVMAEFT(5, **ENCODER).attention == "auto"
    named = {"auto", "torch", "triton", "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "flash_attn", "xformers"}
    assert named | {"kept"} == set(CAVMAE.attentions)


def test_public_names():
    for name in cavmae_fast.__all__:
        home = {"Augmentation": draws, "Loader": loader, "Adam": adam, "AdamW": adam}.get(name, models)
        assert getattr(cavmae_fast, name) is getattr(home, name)
    assert set(cavmae_fast.__all__) <= set(dir(cavmae_fast))
    with pytest.raises(AttributeError, match="no attribute 'CAVMEA'"):
        _ = cavmae_fast.CAVMEA


# ------------------------------------------------------------- one set of parameters, two forward passes

FIRST_PARTS = {
    "CAVMAE": "modality_a modality_v pos_embed_a pos_embed_v mask_token decoder_modality_a decoder_modality_v "
    "decoder_pos_embed_a decoder_pos_embed_v patch_embed_a patch_embed_v blocks_a blocks_v blocks_u norm_a norm_v norm "
    "decoder_embed decoder_blocks decoder_norm decoder_pred_a decoder_pred_v",
    "CAVMAEFT": "modality_a modality_v pos_embed_a pos_embed_v patch_embed_a patch_embed_v blocks_a blocks_v blocks_u "
    "norm_a norm_v norm mlp_head",
    "CAVMAEFTAudio": "modality_a pos_embed_a patch_embed_a blocks_a blocks_u norm_a norm mlp_head",
}
"The first parts of the parameters' names at the published depth, in order."
NAMES = {"CAVMAE": "9b7573e03b78c817", "CAVMAEFT": "a6a793c413ba343d", "CAVMAEFTAudio": "01d2d44626bb0814"}
"SHA-256 of names, shapes and what is trained, line by line, as the first version of this package had them."
INITIAL = {"CAVMAE": 89365.1087, "CAVMAEFT": 52901.9895, "CAVMAEFTAudio": 20086.4778}
"Weighted sums of the initial values from seed 0, likewise: any other order of the random numbers changes them by hundreds."


def build(implementation, kind: str, config: dict | None = None) -> nn.Module:
    """The published size where no `config` is given."""
    classes = () if kind == "CAVMAE" else (527 if config is None else 5,)
    return getattr(implementation, kind)(*classes, **config or {})


@pytest.mark.parametrize("implementation", [models, reference])
@pytest.mark.parametrize("kind", NAMES)
def test_names_shapes_and_order_of_the_parameters(implementation, kind):
    with torch.device("meta"):
        model = build(implementation, kind)
    assert list(dict.fromkeys(name.split(".")[0] for name in model.state_dict())) == FIRST_PARTS[kind].split()
    lines = [f"{name} {list(p.shape)} {p.requires_grad}" for name, p in model.named_parameters()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == NAMES[kind]


@pytest.mark.parametrize("implementation", [models, reference])
@pytest.mark.parametrize("kind", INITIAL)
def test_initial_values_of_a_seed(implementation, kind):
    """Not bit by bit: PyTorch's own random numbers differ in the last digit between kinds of CPU."""
    torch.manual_seed(0)
    model = build(implementation, kind, TINY if kind == "CAVMAE" else ENCODER)
    total = 0.0
    for i, parameter in enumerate(model.parameters(), 1):
        ramp = torch.linspace(0, 1, parameter.numel(), dtype=torch.float64)
        total += i * float(parameter.detach().double().flatten() @ ramp)
    assert abs(total - INITIAL[kind]) < 0.01


def test_configuration():
    """What `save_pretrained` writes: the constructor's arguments, in their order."""
    config = CAVMAE(**TINY).config
    want = [name for name, _ in PUBLISHED[CAVMAE] if name != "norm_layer"] + ["depth", "bidirect_contrast", "norm_eps"]
    assert list(config) == want and config["embed_dim"] == 48 and config["norm_eps"] == 1e-5


@pytest.mark.parametrize("kind", NAMES)
def test_no_forward_of_the_reference_is_reachable_on_a_fast_model(kind):
    """Its plain attention would run, silently, on whoever calls it."""
    config = TINY if kind == "CAVMAE" else ENCODER
    fast, plain = build(models, kind, config), build(reference, kind, config)
    computes = {"cavmae_fast.reference.cavmae", "cavmae_fast.reference.blocks"}

    def methods(model: nn.Module) -> dict[str, str]:
        members = inspect.getmembers(type(model), callable)
        return {name: inspect.unwrap(member).__module__ for name, member in members if hasattr(member, "__module__")}

    reached = {name for name, module in methods(plain).items() if module in computes}
    assert {"embed", "specific", "shared", "features", "forward", "forward_feat"} <= reached  # the test sees them
    assert {name for name, module in methods(fast).items() if module in computes} == set()
    for name in reached & methods(fast).keys():
        assert methods(fast)[name].startswith("cavmae_fast.models."), name
    for module in fast.modules():
        own = type(module).__module__.startswith("cavmae_fast") and module is not fast
        none = (nn.Module.forward, Block.forward)  # that of a block runs what it is given
        assert not own or type(module).forward in none, type(module)


def test_a_plain_block_has_two_norms():
    plain, with_modalities = Block(48, 3, 4.0, nn.LayerNorm), ModalityBlock(48, 3, 4.0, nn.LayerNorm)
    assert [*dict(plain.named_children())] == ["norm1", "attn", "norm2", "mlp"]
    want = ["norm1", "norm1_a", "norm1_v", "attn", "norm2", "norm2_a", "norm2_v", "mlp"]
    assert [*dict(with_modalities.named_children())] == want


def test_a_plain_block_on_packed_streams_equals_the_reference():
    one = randomize(Block(48, 3, 4.0, nn.LayerNorm)).double()
    x = torch.randn(3, 7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = block(State(x.flatten(0, 1), None, StreamLayout(3, (7,))), [one], [None], torch.float64, "auto").value()
    torch.testing.assert_close(got.view(3, 7, 48), plain_block(one, x, "eager"), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------- what is returned


@pytest.mark.parametrize("implementation", [models, reference])
def test_outputs_have_names_and_unpack_as_published(implementation):
    model, classifier = implementation.CAVMAE(**TINY), implementation.CAVMAEFT(5, **ENCODER)
    x = inputs(dtype=torch.float32)
    out = model(*x)
    assert type(out) is models.PretrainOutput and out._fields == OUTPUTS
    loss, loss_mae, *_, c_acc = out
    assert loss is out.loss and loss_mae is out.loss_mae and c_acc is out.c_acc and out[5] is out.mask_a
    inpainted = model.forward_inpaint(*x)
    assert type(inpainted) is models.InpaintOutput
    assert inpainted._fields == ("pred_a", "pred_v", "mask_a", "mask_v", "loss_a", "loss_v")
    for features in (model.forward_feat(*x), classifier.forward_feat(*x)):
        assert type(features) is models.FeatureOutput and features._fields == ("audio", "video")
        assert features.audio.shape == (3, 32, 48) and features.video.shape == (3, 4, 48)


def test_outputs_are_gathered_by_data_parallel(monkeypatch):
    """DataParallel's gathering; the copy between devices alone is stood in for."""
    monkeypatch.setattr(scatter_gather.Gather, "apply", lambda device, dim, *parts: torch.stack(parts))
    model = CAVMAE(**TINY)
    parts = [model(*inputs(dtype=torch.float32)) for _ in range(2)]
    gathered = scatter_gather.gather(parts, "cpu")
    assert type(gathered) is models.PretrainOutput
    assert torch.equal(gathered.loss, torch.stack([part.loss for part in parts])) and gathered.mask_a.shape == (2, 3, 32)


# --------------------------------------------------------------------------------------- losses in force and what is trained

IN_FORCE = [(True, True), (True, False), (False, True)]


def assert_trained_is_reached(model: nn.Module, reconstruction: bool, contrast: bool, *x: torch.Tensor) -> None:
    """Every trainable parameter gets a gradient, and no other: what plain DistributedDataParallel needs."""
    model.zero_grad(set_to_none=True)
    out = model(*x, mae_loss_weight=0.5 * reconstruction, contrast_loss_weight=0.1 * contrast)
    out.loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []


@pytest.mark.parametrize("implementation", [models, reference])
@pytest.mark.parametrize("losses", IN_FORCE)
@pytest.mark.parametrize(
    "name", ["default", "two-shared", "none-shared", "all-shared", "trainable-positions", "one-decoder-block"]
)
def test_the_losses_in_force_decide_what_is_trained(implementation, name, losses):
    model = implementation.CAVMAE(**TINY | CONFIGS[name])
    x = inputs(dtype=torch.float32)
    assert_trained_is_reached(model, True, True, *x)
    model.train_losses(reconstruction=losses[0], contrast=losses[1])
    assert_trained_is_reached(model, *losses, *x)


@pytest.mark.parametrize("losses", IN_FORCE)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_with_every_choice_of_losses(name, losses):
    """The weights of a run, and not those of its preset, decide: `cav` with a reconstruction loss trains its decoder, and
    `cav-mae-base` without the contrastive one leaves no norm waiting for a gradient."""
    depths = {"modality_specific_depth": min(2, PRESETS[name].model.get("modality_specific_depth", 2))}
    model = create_model(name, **TINY | depths)
    preset = PRESETS[name]
    x = inputs(dtype=torch.float32)
    assert_trained_is_reached(model, preset.mae_loss_weight != 0, preset.contrast_loss_weight != 0, *x)
    model.train_losses(reconstruction=losses[0], contrast=losses[1])
    assert_trained_is_reached(model, *losses, *x)


def test_train_losses_leaves_alone_what_others_froze():
    model = CAVMAE(**TINY)
    model.decoder_embed.requires_grad_(False)
    model.norm_a.weight.requires_grad_(False)
    model.blocks_a.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for losses in [*IN_FORCE, *reversed(IN_FORCE)]:
        model.train_losses(reconstruction=losses[0], contrast=losses[1])
        now = {name: p.requires_grad for name, p in model.named_parameters()}
        assert not any(now[name] and not before[name] for name in now)
    assert now == before


def test_train_losses_drops_the_gradients_of_what_it_freezes():
    """Else the next step of the optimizer would still take them."""
    model = CAVMAE(**TINY)
    model(*inputs(dtype=torch.float32)).loss.backward()
    model.train_losses(reconstruction=False, contrast=True)
    assert model.mask_token.grad is None and model.norm.weight.grad is None and model.norm_a.weight.grad is not None


def test_what_train_losses_froze_is_known_to_a_copy():
    model = create_model("cav", **TINY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_trained_is_reached(other, False, True, *inputs(dtype=torch.float32))
        other.train_losses(reconstruction=True, contrast=True)
        assert_trained_is_reached(other, True, True, *inputs(dtype=torch.float32))
    assert not model.mask_token.requires_grad


def test_a_loss_out_of_force_may_be_evaluated():
    model = create_model("av-mae", **TINY)
    x = inputs(dtype=torch.float32)
    with torch.no_grad():
        assert model(*x).loss_c > 0
    assert model.eval()(*x).loss_c > 0


# --------------------------------------------------------------------------------------------- what is taken of a clip


@pytest.mark.parametrize("implementation", [models, reference])
@pytest.mark.parametrize("kind", NAMES)
def test_the_model_owns_its_clip_spec(implementation, kind):
    config = (TINY if kind == "CAVMAE" else ENCODER) | {"img_size": (32, 64)}
    frames = 0 if kind == "CAVMAEFTAudio" else 1  # it takes sound alone
    assert build(implementation, kind, config).clip_spec == ClipSpec(image_size=(32, 64), audio_length=64, frames=frames)
    assert build(implementation, kind, config | {"img_size": 32}).clip_spec.image_size == (32, 32)
    options = {"audio_mean": -4.0, "audio_std": 4.0, "sample_rate": 32000, "frames": frames}
    own = ClipSpec(image_size=(32, 64), audio_length=64, **options)
    model = build(implementation, kind, config | {"clip": own})
    assert model.clip_spec == own and model.config["clip"]["audio_mean"] == -4.0


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_compiled_step_equals_eager(attention, monkeypatch):
    torch._dynamo.reset()
    config = TINY | {"norm_pix_loss": True, "attention": attention}
    fast, _ = pair(CAVMAE, reference.CAVMAE, **config)
    audio, imgs = inputs(config)
    torch.manual_seed(0)
    masks = fast.draw_masks(3, audio.device, 0.75, 0.75, "unstructured")
    monkeypatch.setattr(fast, "draw_masks", lambda *_: masks)
    want = fast(audio, imgs)
    want[0].backward()
    expected = gradients(fast)
    fast.zero_grad(set_to_none=True)
    got = torch.compile(fast, fullgraph=True, backend="aot_eager")(audio, imgs)
    assert type(got) is models.PretrainOutput
    got.loss.backward()
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert gradients(fast).keys() == expected.keys()
    for key, gradient in gradients(fast).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-10, atol=1e-12)


def test_compiled_masks_are_valid():
    """The noise drawn inside a compiled graph gives masks of the right kind, new ones at every call."""
    torch._dynamo.reset()
    fast = CAVMAE(**TINY)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    first, second = (compiled(*inputs(dtype=torch.float32)) for _ in range(2))
    assert first[5].sum(1).tolist() == second[5].sum(1).tolist() == [24] * 3
    assert not torch.equal(first[5], second[5]) and first[0].isfinite()


@pytest.mark.parametrize("mode", ["multimodal", "missingaudioonly"])
def test_compiled_classifier_equals_eager(mode):
    torch._dynamo.reset()
    fast, _ = pair(CAVMAEFT, reference.CAVMAEFT, 5, **ENCODER)
    audio, imgs = inputs()
    target = torch.rand(3, 5, dtype=torch.float64)
    results = []
    for model in (fast, torch.compile(fast, fullgraph=True, backend="aot_eager")):
        fast.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(model(audio, imgs, mode), target).backward()
        results.append(gradients(fast))
    assert results[0].keys() == results[1].keys()
    for key, gradient in results[0].items():
        torch.testing.assert_close(results[1][key], gradient, rtol=1e-10, atol=1e-12)


def test_constructing_draws_nothing_it_does_not_need():
    """Two models built from one seed are equal, whatever the attention back end."""
    states = []
    for attention in ("torch", "sdpa"):
        torch.manual_seed(4)
        with contextlib.redirect_stdout(io.StringIO()):
            states.append(CAVMAE(**TINY, attention=attention).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
