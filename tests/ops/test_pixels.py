"""uint8 images are normalized with the statistics that the call names, where their pixels are read."""

from __future__ import annotations

import importlib

import pytest
import torch

from cavmae_fast.ops import dispatch, pixels
from cavmae_fast.ops.embed_kept_patches import embed_kept_patches
from cavmae_fast.ops.masked_patch_mse import masked_patch_mse
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.reference import operators as reference

OWN = ((0.1, 0.7, 0.4), (0.5, 0.05, 0.25))
"A mean and a standard deviation for each color, far from ImageNet's."


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images() -> torch.Tensor:
    return torch.randint(256, (2, 3, 8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def embedding() -> list:
    ids = torch.tensor([[5, 0, 3], [1, 2, 4]])
    return [images(), ids, *(draw(*s, seed=len(s)).requires_grad_() for s in ((7, 3, 4, 4), (7,), (6, 7), (7,)))]


def normalized(dtype=torch.float32):
    """OWN applied to the images by hand."""
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in OWN)
    return (images().to(dtype) / 255 - mean) / std


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_embedding(mode):
    def explicit(pixels_, *rest):
        return reference.embed_kept_patches(normalized(), *rest)

    def exact(pixels_, *rest):
        return reference.embed_kept_patches(normalized(torch.float64), *rest)

    with dispatch.override(mode):
        assert_parity(lambda *args: embed_kept_patches(*args, *OWN), exact, embedding(), baseline=explicit)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss(mode, norm_pix_loss):
    values = [draw(2, 3, 48).requires_grad_(), images(), torch.tensor([[5, 0, 3], [1, 2, 4]])]

    def explicit(pred, pixels_, ids):
        return reference.masked_patch_mse(pred, normalized(pred.dtype), ids, 4, norm_pix_loss)

    with dispatch.override(mode):
        assert_parity(lambda *args: masked_patch_mse(*args, 4, norm_pix_loss, *OWN), explicit, values)


def test_the_reference_takes_them_too():
    torch.testing.assert_close(reference.normalize_images(images(), torch.float64, *OWN), normalized(torch.float64))
    values = embedding()
    want = reference.embed_kept_patches(normalized(), *values[1:])
    torch.testing.assert_close(reference.embed_kept_patches(*values, *OWN), want)
    pred = draw(2, 3, 48)
    want = reference.masked_patch_mse(pred, normalized(), values[1], 4, True)
    torch.testing.assert_close(reference.masked_patch_mse(pred, images(), values[1], 4, True, *OWN), want)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_floating_point_images_are_taken_as_they_are(mode):
    values = embedding()
    values[0] = normalized()
    with dispatch.override(mode):
        assert torch.equal(embed_kept_patches(*values, *OWN), embed_kept_patches(*values))


def test_statistics_stay_on_the_device():
    """A copy for every batch would wait for it."""
    pixels._on_device.cache_clear()
    with dispatch.override("torch"):
        for _ in range(3):
            embed_kept_patches(*embedding(), *OWN)
            embed_kept_patches(*embedding())
    assert pixels._on_device.cache_info()[:2] == (4, 2)  # hits, misses


def test_kernels_are_not_compiled_for_the_statistics():
    """They are arguments of kernels and no constants, so one compiled kernel serves all models."""
    modules = [importlib.import_module(f"cavmae_fast.ops.{name}") for name in ("embed_kept_patches", "masked_patch_mse")]
    kernels = [modules[0].take_patches_kernel, *(v for n, v in vars(modules[1]).items() if n.endswith("_kernel"))]
    assert len(kernels) == 3
    for kernel in kernels:
        numbers = set(kernel.arg_names) - set(kernel.fn.__annotations__)  # only constants are annotated
        assert {f"{what}_{color}" for what in ("scale", "shift") for color in "rgb"} <= numbers


def test_compiles_whole():
    torch.compiler.reset()
    values = embedding()
    compiled = torch.compile(lambda *args: embed_kept_patches(*args, *OWN), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*values), embed_kept_patches(*values, *OWN))


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.5,), OWN[1], "image_mean has 1 numbers; it must have one each for red, green and blue"),
        (OWN[0], (1.0, 1.0), "image_std has 2 numbers"),
        (OWN[0], (1.0, 0.0, 1.0), r"image_std is \(1.0, 0.0, 1.0\); its numbers must be above 0"),
        (OWN[0], (1.0, float("nan"), 1.0), "its numbers must be above 0"),
    ],
)
def test_errors(mean, std, words):
    with pytest.raises(ValueError, match=words):
        embed_kept_patches(*embedding(), mean, std)
    with pytest.raises(ValueError, match=words):
        masked_patch_mse(draw(2, 1, 48), images(), torch.zeros(2, 1, dtype=torch.int64), 4, True, mean, std)
