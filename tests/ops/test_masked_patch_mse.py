from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import dispatch
from cavmae_fast.ops.masked_patch_mse import masked_patch_mse as operator_of_ours
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.reference import operators as reference

CASES = {
    "one patch": ((1, 1, 4, 4), 4, 1),
    "odd": ((3, 2, 15, 21), 3, 11),
    "odd rgb": ((3, 3, 15, 21), 3, 11),
    "patch 14": ((2, 3, 28, 42), 14, 5),
    "video": ((2, 3, 224, 224), 16, 147),
    "audio": ((1, 1, 128, 1024), 16, 384),
    "clip": ((2, 3, 6, 8, 12), 4, 7),
    "one deep clip": ((3, 2, 2, 12, 9), 3, 5),
    "tubelets": ((1, 3, 4, 48, 32), 16, 5),
}
"images or clips, patch size, removed; patches of clips are two frames deep"


def tubelet_size(images):
    return 2 if images.dim() == 5 else 1


def masked_patch_mse(pred, images, ids, p, norm_pix_loss):
    return operator_of_ours(pred, images, ids, p, norm_pix_loss, tubelet_size=tubelet_size(images))


def plain(pred, images, ids, p, norm_pix_loss):
    return reference.masked_patch_mse(pred, images, ids, p, norm_pix_loss, tubelet_size=tubelet_size(images))


def inputs(case, dtype, shift=0.0):
    (batch, channels, *frames, height, width), p, removed = CASES[case]
    generator = torch.Generator().manual_seed(height)
    images = torch.randn(batch, channels, *frames, height, width, generator=generator) + shift
    length = (frames[0] // 2 if frames else 1) * (height // p) * (width // p)
    ids = torch.rand(batch, length, generator=generator).argsort(1)[:, :removed]
    pred = (
        torch.randn(batch, removed, p * p * channels * tubelet_size(images), generator=generator).to(dtype).requires_grad_()
    )
    return [pred, images, ids]


def check(mode, case, dtype, norm_pix_loss, shift=0.0):
    p = CASES[case][1]

    def operator(pred, images, ids):
        if case == "audio":  # as it comes: the same image, its columns far apart in memory
            images = images.transpose(2, 3).contiguous().transpose(2, 3)
        return masked_patch_mse(pred, images, ids, p, norm_pix_loss)

    def explicit(pred, images, ids):
        return plain(pred.float(), images, ids, p, norm_pix_loss)

    with dispatch.override(mode):
        assert_parity(
            operator,
            lambda *args: plain(*args, p, norm_pix_loss),
            inputs(case, dtype, shift),
            baseline=explicit,
        )


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_parity(mode, case, dtype, norm_pix_loss):
    check(mode, case, dtype, norm_pix_loss)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("case", ["odd rgb", "patch 14", "video", "clip", "tubelets"])
@pytest.mark.parametrize("layout", ["rows", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_bytes_are_normalized(mode, case, layout, dtype, norm_pix_loss):
    """uint8 RGB gives what its normalized image gives."""
    pred, images, ids = inputs(case, dtype)
    p = CASES[case][1]

    def operator(pred, images, ids):
        last = layout == "channels last"
        return masked_patch_mse(
            pred, images.movedim(1, -1).contiguous().movedim(-1, 1) if last else images, ids, p, norm_pix_loss
        )

    with dispatch.override(mode):
        assert_parity(
            operator,
            lambda *args: plain(*args, p, norm_pix_loss),
            [pred, (images * 60 + 120).clamp(0, 255).byte(), ids],
            baseline=lambda pred, images, ids: plain(
                pred.float(), reference.normalize_images(images, torch.float32), ids, p, norm_pix_loss
            ),
        )


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_variance_of_pixels_far_from_zero(mode):
    check(mode, "video", torch.float32, True, shift=1000.0)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_flat_patches_have_finite_targets(mode):
    pred, images, ids = inputs("odd", torch.float32)
    flat = torch.full_like(images, 3.0)
    with dispatch.override(mode):
        assert_parity(lambda pred: masked_patch_mse(pred, flat, ids, 3, True), lambda pred: pred.square().mean(), [pred])


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("index", [0, 1])
def test_nan_reaches_the_loss(mode, index):
    values = inputs("odd", torch.float32)
    with torch.no_grad():
        values[index].flatten()[:] = float("nan")
    with dispatch.override(mode):
        assert masked_patch_mse(*values, 3, True).isnan()


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_repeats_bitwise(mode):
    values = inputs("video", torch.float32)
    with dispatch.override(mode):
        assert torch.equal(*(masked_patch_mse(*values, 16, True) for _ in range(2)))


def test_float64_stays_float64():
    pred, images, ids = inputs("odd", torch.float64)
    assert masked_patch_mse(pred, images, ids, 3, True).dtype == torch.float64


def test_errors():
    pred, images, ids = inputs("odd", torch.float32)
    with pytest.raises(ValueError, match=r"patch size 4 does not divide images of 15 x 21 pixels"):
        masked_patch_mse(pred, images, ids, 4, True)
    with pytest.raises(ValueError, match=r"tubelet size 2 does not divide clips of 1 frames"):
        operator_of_ours(pred, images, ids, 3, True, tubelet_size=2)
    with pytest.raises(ValueError, match=r"pred has shape \[3, 10, 18\]; images, ids_removed and patch_size need"):
        masked_patch_mse(pred[:, 1:], images, ids, 3, True)
    with pytest.raises(ValueError, match=r"ids_removed has shape \[3, 0\]"):
        masked_patch_mse(pred[:, :0], images, ids[:, :0], 3, True)
    with pytest.raises(TypeError, match=r"ids_removed is torch.int32; it must be torch.int64"):
        masked_patch_mse(pred, images, ids.int(), 3, True)
    with pytest.raises(TypeError, match=r"pred is torch.int64; it must be floating-point"):
        masked_patch_mse(pred.long(), images, ids, 3, True)
    with pytest.raises(ValueError, match=r"images requires a gradient"):
        masked_patch_mse(pred, images.requires_grad_(), ids, 3, True)
