from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import dispatch
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.ops.scatter_tokens import scatter_tokens
from cavmae_fast.reference import operators as reference

SHAPES = [(1, 1, 1, 1), (3, 97, 31, 97), (2, 12, 12, 1023), (17, 5, 2, 33)]
"B, L, K, D"


def inputs(shape, dtype, pos_dtype):
    batch, length, kept, width = shape
    generator = torch.Generator().manual_seed(width)

    def draw(*size, dtype=torch.float32):
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_()

    order = torch.rand(batch, length, generator=generator).argsort(1)
    places = torch.where(order < kept, order, -1 - order)
    return [draw(batch * kept, width, dtype=dtype), places, draw(width), draw(length, width, dtype=pos_dtype)]


def check(mode, shape, dtype, pos_dtype):
    def explicit(x, places, mask_token, pos):
        return reference.scatter_tokens(x.float(), places, mask_token, pos.float()).to(pos_dtype)

    with dispatch.override(mode):
        assert_parity(scatter_tokens, reference.scatter_tokens, inputs(shape, dtype, pos_dtype), baseline=explicit)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "pos_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)],
)
def test_parity(mode, shape, dtype, pos_dtype):
    check(mode, shape, dtype, pos_dtype)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_video_in_the_decoder(mode):
    check(mode, (2, 196, 49, 512), torch.float16, torch.float32)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("wanted", [(0,), (0, 2), (0, 3), (2,)])
def test_only_the_wanted_gradients(mode, wanted):
    values = inputs((2, 12, 5, 8), torch.float32, torch.float32)
    for index in (0, 2, 3):
        values[index].requires_grad_(index in wanted)
    with dispatch.override(mode):
        assert_parity(scatter_tokens, reference.scatter_tokens, values)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_nan_stays_where_it_is(mode):
    x, places, mask_token, pos = inputs((2, 12, 5, 8), torch.float32, torch.float32)
    with torch.no_grad():
        x[7] = float("nan")
    with dispatch.override(mode):
        got = scatter_tokens(x, places, mask_token, pos)
    want = reference.scatter_tokens(x, places, mask_token, pos)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)  # one addition, of the same two numbers
    assert got.isnan().any(dim=1).sum() == 1


def test_errors():
    x, places, mask_token, pos = inputs((2, 12, 5, 8), torch.float32, torch.float32)
    with pytest.raises(TypeError, match=r"places is torch.int32; it must be torch.int64"):
        scatter_tokens(x, places.int(), mask_token, pos)
    with pytest.raises(ValueError, match=r"x has shape \[9, 8\]; it must be \[2 \* tokens, width\]"):
        scatter_tokens(x[:-1], places, mask_token, pos)
    with pytest.raises(ValueError, match=r"x has 10 rows; places \[2, 4\] have room for 8"):
        scatter_tokens(x, places[:, :4], mask_token, pos[:4])
    with pytest.raises(ValueError, match=r"mask_token has shape \[1, 8\]; x and places need \[8\]"):
        scatter_tokens(x, places, mask_token.unsqueeze(0), pos)
    with pytest.raises(ValueError, match=r"pos has shape \[11, 8\]; x and places need \[12, 8\]"):
        scatter_tokens(x, places, mask_token, pos[1:])
    with pytest.raises(TypeError, match=r"pos is torch.int64; it must be floating-point"):
        scatter_tokens(x, places, mask_token, pos.long())
