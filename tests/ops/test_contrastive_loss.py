from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import dispatch
from cavmae_fast.ops.contrastive_loss import contrastive_loss
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.reference import operators as reference

SHAPES = [(2, 3), (97, 33), (33, 97)]


def inputs(count, width, dtype, related=0.1):
    generator = torch.Generator().manual_seed(count)
    audio = torch.randn(count, width, generator=generator)
    video = related * audio + torch.randn(count, width, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (audio, video)]


def check(mode, shape, dtype, bidirectional):
    def explicit(audio, video):
        """fp32 arithmetic on normalized rows that are rounded to the inputs' dtype."""
        units = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype).float() for x in (audio, video))
        return reference.contrastive_loss(*units, bidirectional=bidirectional)

    with dispatch.override(mode):
        assert_parity(
            lambda *args: contrastive_loss(*args, bidirectional=bidirectional),
            lambda *args: reference.contrastive_loss(*args, bidirectional=bidirectional),
            inputs(*shape, dtype),
            baseline=explicit,
        )


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_parity(mode, shape, dtype, bidirectional):
    check(mode, shape, dtype, bidirectional)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(40, 768), (17, 1023)], ids=str)
def test_wide_rows(mode, shape):
    check(mode, shape, torch.float16, True)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_single_pair_costs_nothing(mode, bidirectional):
    values = inputs(1, 64, torch.float32)
    with dispatch.override(mode):
        loss, accuracy = contrastive_loss(*values, bidirectional=bidirectional)
        gradients = torch.autograd.grad(loss, values)
    assert loss == 0 and accuracy == 1
    assert all(g.abs().max() == 0 for g in gradients)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_first_of_equal_similarities_counts(mode):
    audio, video = inputs(70, 16, torch.float32)
    with torch.no_grad():
        for x in (audio, video):
            x[40] = x[3]  # in different tiles
            x[6] = x[5]  # in the same tile
    with dispatch.override(mode):
        _, got = contrastive_loss(audio, audio)
    assert got == torch.tensor(68 / 70)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_rows_of_zeros(mode):
    values = inputs(40, 16, torch.float32)
    with torch.no_grad():
        values[0][7] = 0
    with dispatch.override(mode):
        assert_parity(contrastive_loss, reference.contrastive_loss, values)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_similarity_far_below_zero(mode, bidirectional):
    """A tile beyond the last row holds exp(0 - maximum), here infinite: it must not count."""
    audio = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    values = [audio.requires_grad_(), (-audio.detach().flip(0)).requires_grad_()]
    with dispatch.override(mode):
        assert_parity(contrastive_loss, reference.contrastive_loss, [*values, 0.01, bidirectional])


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_nan_reaches_the_loss(mode, bidirectional):
    values = inputs(40, 16, torch.float32)
    with torch.no_grad():
        values[0][7, 3] = float("nan")
    with dispatch.override(mode):
        assert contrastive_loss(*values, bidirectional=bidirectional)[0].isnan()


def test_errors():
    audio, video = inputs(5, 8, torch.float32)
    with pytest.raises(ValueError, match=r"video has shape \[4, 8\]; audio has \[5, 8\]"):
        contrastive_loss(audio, video[:4])
    with pytest.raises(ValueError, match=r"audio has shape \[40\]; it must be \[N, D\]"):
        contrastive_loss(audio.flatten(), video)
    with pytest.raises(TypeError, match=r"video is torch.float16; audio is torch.float32"):
        contrastive_loss(audio, video.half())
    with pytest.raises(TypeError, match=r"audio is torch.int64; it must be floating-point"):
        contrastive_loss(audio.long(), video)
    with pytest.raises(ValueError, match=r"temperature is 0; it must be positive"):
        contrastive_loss(audio, video, 0)
