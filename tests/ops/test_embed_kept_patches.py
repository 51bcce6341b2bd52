from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cavmae_fast.ops import dispatch
from cavmae_fast.ops.embed_kept_patches import embed_kept_patches
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.reference import operators as reference

CASES = {
    "one pixel": ((1, 1, 1, 1), 1, 1, 1),
    "one patch an image": ((2, 3, 4, 4), 4, None, 5),
    "odd": ((3, 2, 15, 21), 3, 11, 97),
    "odd rgb": ((3, 3, 15, 21), 3, 11, 97),
    "patch 14": ((2, 3, 28, 42), 14, 4, 33),
    "video": ((2, 3, 224, 224), 16, 49, 96),
    "all video": ((1, 3, 112, 112), 16, None, 768),
    "audio": ((2, 1, 128, 256), 16, 32, 96),
    "clip": ((2, 3, 6, 8, 12), 4, 7, 33),
    "all of a clip": ((2, 2, 4, 6, 9), 3, None, 24),
    "one deep clip": ((3, 3, 2, 12, 8), 4, 5, 24),
    "tubelets": ((1, 3, 4, 48, 32), 16, 5, 96),
}
"images or clips, patch size, kept, width; patches of clips are two frames deep"


def inputs(case, dtype, pos_dtype=torch.float32):
    (batch, channels, *frames, height, width), p, kept, dim = CASES[case]
    depth = [2] if frames else []
    generator = torch.Generator().manual_seed(dim)

    def draw(*size, dtype=torch.float32):
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_()

    images = draw(batch, channels, *frames, height, width, dtype=torch.float32).detach()
    length = (frames[0] // 2 if frames else 1) * (height // p) * (width // p)
    ids = None if kept is None else torch.rand(batch, length, generator=generator).argsort(1)[:, :kept]
    weight, pos = draw(dim, channels, *depth, p, p, dtype=dtype), draw(length, dim, dtype=pos_dtype)
    return [images, ids, weight, draw(dim), pos, draw(dim)]


def transposed(function):
    """As the audio comes: the same image, its columns far apart in memory."""
    return lambda images, *rest: function(images.transpose(2, 3).contiguous().transpose(2, 3), *rest)


def explicit(images, ids, weight, bias, pos, modality):
    """fp32 arithmetic; the pixels, the projection and its gradient are rounded to the weight's dtype."""
    convolution = F.conv2d if weight.dim() == 4 else F.conv3d
    projected = convolution(images.to(weight.dtype).float(), weight.float(), stride=weight.shape[2:]).to(weight.dtype)
    projected = projected.float().flatten(2).transpose(1, 2)
    tokens = projected + pos.float() + (bias.float() + modality.float())
    if ids is not None:
        tokens = reference.take_tokens(tokens, ids)
    return tokens.flatten(0, 1).to(pos.dtype)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "pos_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)],
)
def test_parity(mode, case, dtype, pos_dtype):
    operator = transposed(embed_kept_patches) if case == "audio" else embed_kept_patches
    with dispatch.override(mode):
        assert_parity(operator, reference.embed_kept_patches, inputs(case, dtype, pos_dtype), baseline=explicit)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("case", ["one patch an image", "odd rgb", "patch 14", "video", "all video", "clip"])
@pytest.mark.parametrize("layout", ["rows", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_are_normalized(mode, case, layout, dtype):
    """uint8 RGB gives what its normalized image gives."""
    values = inputs(case, dtype)
    values[0] = (values[0] * 60 + 120).clamp(0, 255).byte()
    last = layout == "channels last"

    def operator(images, *rest):
        return embed_kept_patches(images.movedim(1, -1).contiguous().movedim(-1, 1) if last else images, *rest)

    with dispatch.override(mode):
        assert_parity(
            operator,
            reference.embed_kept_patches,
            values,
            baseline=lambda images, *rest: explicit(reference.normalize_images(images, torch.float32), *rest),
        )


def test_bytes_are_three_channels():
    images, *rest = inputs("odd", torch.float32)
    rest[1] = rest[1][:, :1]
    with pytest.raises(ValueError, match=r"images is torch.uint8 with 1 channels; uint8 is RGB, 3 channels"):
        embed_kept_patches(images[:, :1].byte(), *rest)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("case", ["odd", "one patch an image", "clip", "all of a clip"])
def test_images_gradient_and_frozen_weight(mode, case):
    values = inputs(case, torch.float32)
    values[0].requires_grad_()
    values[2].requires_grad_(False)
    values[4].requires_grad_(False)
    with dispatch.override(mode):
        assert_parity(embed_kept_patches, reference.embed_kept_patches, values, baseline=explicit)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("case", ["odd", "clip"])
def test_without_modality(mode, case):
    values = inputs(case, torch.float32)
    values[5] = None
    with dispatch.override(mode):
        assert_parity(embed_kept_patches, reference.embed_kept_patches, values)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_a_clip_of_one_frame_is_an_image(mode):
    images, ids, weight, *rest = inputs("odd rgb", torch.float32)
    with dispatch.override(mode):
        want = embed_kept_patches(images, ids, weight, *rest)
        assert torch.equal(embed_kept_patches(images.unsqueeze(2), ids, weight.unsqueeze(2), *rest), want)


def test_frames_before_channels():
    """As loaders give clips: the frames come first in memory."""
    images, *rest = inputs("clip", torch.float32)
    strided = images.transpose(1, 2).contiguous().transpose(1, 2)
    for mode in ("torch", "triton"):
        with dispatch.override(mode):
            assert torch.equal(embed_kept_patches(strided, *rest), embed_kept_patches(images, *rest))


def test_float64_parameters_keep_their_digits():
    """Kernels count in float32: with float64 parameters PyTorch does it, whatever the pixels are."""
    images, ids, *parameters = inputs("odd", torch.float32)
    parameters = [p.double() for p in parameters]
    with dispatch.override("triton"):
        got = embed_kept_patches(images, ids, *parameters)
    want = reference.embed_kept_patches(images.double(), ids, *parameters)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_repeats_bitwise(mode):
    values = inputs("odd", torch.float32)
    leaves = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    with dispatch.override(mode):
        first, second = (torch.autograd.grad(embed_kept_patches(*values).square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_errors():
    images, ids, weight, bias, pos, modality = inputs("odd", torch.float32)
    with pytest.raises(ValueError, match=r"patch size 3 does not divide images of 14 x 21 pixels"):
        embed_kept_patches(images[:, :, 1:], ids, weight, bias, pos, modality)
    with pytest.raises(ValueError, match=r"images has shape \[2, 15, 21\]; it must be \[B, C, H, W\]"):
        embed_kept_patches(images[0], ids, weight, bias, pos, modality)
    with pytest.raises(ValueError, match=r"weight has shape \[97, 2, 3, 3\] and images \[3, 2, 1, 15, 21\]; "):
        embed_kept_patches(images.unsqueeze(2), ids, weight, bias, pos, modality)
    with pytest.raises(ValueError, match=r"tubelet size 2 does not divide clips of 1 frames"):
        embed_kept_patches(images.unsqueeze(2), ids, weight.unsqueeze(2).repeat(1, 1, 2, 1, 1), bias, pos, modality)
    with pytest.raises(ValueError, match=r"images has 1 channels; weight takes 2"):
        embed_kept_patches(images[:, :1], ids, weight, bias, pos, modality)
    with pytest.raises(ValueError, match=r"weight has shape \[97, 2, 9\]; it must be \[D, C, p, p\]"):
        embed_kept_patches(images, ids, weight.flatten(2), bias, pos, modality)
    with pytest.raises(ValueError, match=r"ids_keep has shape \[2, 11\]; it must be \[3, tokens\]"):
        embed_kept_patches(images, ids[:2], weight, bias, pos, modality)
    with pytest.raises(TypeError, match=r"ids_keep is torch.int32; it must be torch.int64"):
        embed_kept_patches(images, ids.int(), weight, bias, pos, modality)
    with pytest.raises(ValueError, match=r"pos has shape \[34, 97\]; images and weight need \[35, 97\]"):
        embed_kept_patches(images, ids, weight, bias, pos[1:], modality)
    with pytest.raises(ValueError, match=r"modality has shape \[1, 97\]; images and weight need \[97\]"):
        embed_kept_patches(images, ids, weight, bias, pos, modality.unsqueeze(0))
    with pytest.raises(TypeError, match=r"images is torch.int64; it must be floating-point"):
        embed_kept_patches(images.long(), ids, weight, bias, pos, modality)
