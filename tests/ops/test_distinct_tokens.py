"""Tokens that are the same in all samples, once: made, and every sample's made of them."""

from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import dispatch
from cavmae_fast.ops.distinct_tokens import Kept, distinct_tokens, kept_at
from cavmae_fast.ops.parity import assert_parity, repeats
from cavmae_fast.ops.residual import Residual, with_gradient_in
from cavmae_fast.ops.scatter_tokens import scatter_distinct
from cavmae_fast.reference import operators as reference

SHAPES = [(1, 1, 1, 1), (3, 97, 31, 97), (2, 12, 12, 1023), (17, 5, 2, 33)]
"B, L, K, D"
BOTH = pytest.mark.parametrize("mode", ["torch", "triton"])


def ids_of(batch: int, length: int, kept: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :kept].contiguous()


def draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def made(x, ids, mask_token, pos):
    return distinct_tokens(x, kept_at(ids, len(pos)), mask_token, pos)


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("dtype", "pos_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16, torch.float16)],
)
def test_what_differs(mode, shape, trained, dtype, pos_dtype):
    batch, length, kept, width = shape
    pos = draw(length, width, dtype=pos_dtype, seed=3).requires_grad_(trained)
    inputs = [draw(batch * kept, width, dtype=dtype), ids_of(batch, length, kept), draw(width, seed=2), pos]

    def explicit(x, ids, mask_token, pos):
        return reference.distinct_tokens(x.float(), ids, mask_token, pos.float()).to(pos_dtype)

    with dispatch.override(mode):
        assert_parity(made, reference.distinct_tokens, inputs, baseline=explicit)
        assert repeats(made, inputs)


def every(lengths, kept):
    """Ours and the reference, of streams packed in one buffer."""

    def ours(x, *indices):
        ids, places = indices[: len(kept)], indices[len(kept) :]
        return scatter_distinct(x, [Kept(*stream) for stream in zip(ids, places)])

    def plain(x, *indices):
        places = indices[len(kept) :]
        parts = x.split([p.shape[0] * k + n for p, k, n in zip(places, kept, lengths)])
        return torch.cat([reference.scatter_distinct(*stream) for stream in zip(parts, places)])

    return ours, plain


def streams(batch, lengths, kept, width, dtype):
    indices = [kept_at(ids_of(batch, n, k, seed), n) for seed, (n, k) in enumerate(zip(lengths, kept))]
    x = draw(batch * sum(kept) + sum(lengths), width, dtype=dtype)
    return [x, *(one.ids for one in indices), *(one.places for one in indices)]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [*((b, [n], [k], d) for b, n, k, d in SHAPES), (3, [17, 9], [4, 2], 48), (2, [5, 1, 3], [2, 1, 3], 16)],
    ids=str,
)
def test_every_sample(mode, shape, dtype):
    batch, lengths, kept, width = shape
    ours, plain = every(lengths, kept)
    inputs = streams(batch, lengths, kept, width, dtype)
    with dispatch.override(mode):
        assert torch.equal(ours(*inputs), plain(*inputs))  # copies
        assert_parity(ours, plain, inputs)
        assert repeats(ours, inputs)


@BOTH
def test_what_is_kept_reaches_no_sum_and_nan_stays_where_it_is(mode):
    """Each token's gradient goes to one row; a masked one's to that of its position."""
    (x, ids, places), (ours, _) = streams(4, [12], [5], 8, torch.float32), every([12], [5])
    gradient = torch.randn(4 * 12, 8)
    standing = (places >= 0).flatten()
    gradient[standing] = torch.nan
    with dispatch.override(mode):
        ours(x, ids, places).backward(gradient)
    assert x.grad[:20].isnan().all() and not x.grad[20:].isnan().any()
    total = torch.where(standing[:, None], 0, gradient).view(4, 12, 8).sum(0)
    torch.testing.assert_close(x.grad[20:], total)


@BOTH
def test_sums_are_formed_in_float32(mode):
    """2304 times 1 in float16, where 2048 + 1 is 2048."""
    batch = 2304
    kept = kept_at(torch.zeros(batch, 1, dtype=torch.int64), 2)  # all samples keep the first of two tokens
    x = draw(batch + 2, 4, dtype=torch.float16)
    with dispatch.override(mode):
        scatter_distinct(x, [kept]).backward(torch.ones(2 * batch, 4, dtype=torch.float16))
    assert (x.grad[-1] == batch).all() and (x.grad[-2] == 0).all() and (x.grad[:-2] == 1).all()


def test_a_stream_whose_gradient_is_narrower():
    x, ids, places = streams(3, [12], [5], 8, torch.float32)
    plain, carried = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    gradient = torch.randn(3 * 12, 8).bfloat16()
    scatter_distinct(plain.bfloat16(), [Kept(ids, places)]).backward(gradient)
    out = scatter_distinct(with_gradient_in(carried, torch.bfloat16), [Kept(ids, places)])
    assert isinstance(out, Residual) and torch.equal(out.value, scatter_distinct(x, [Kept(ids, places)]))
    assert not out.value.requires_grad and out.carrier.dtype == torch.bfloat16
    out.carrier.backward(gradient)
    assert torch.equal(carried.grad, plain.grad)


def test_errors():
    x, ids, places = streams(2, [12], [5], 8, torch.float32)
    kept = Kept(ids, places)
    with pytest.raises(ValueError, match=r"x has shape \[21, 8\]; the tokens that differ are \[22, width\]"):
        scatter_distinct(x[:-1], [kept])
    with pytest.raises(TypeError, match=r"ids is torch.int32; it must be torch.int64"):
        kept_at(ids.int(), 12)
    mask_token, pos = torch.randn(8), torch.randn(12, 8)
    with pytest.raises(ValueError, match=r"x has 8 rows; kept has 10 tokens"):
        distinct_tokens(x[:8], kept, mask_token, pos)
    with pytest.raises(ValueError, match=r"mask_token has shape \[1, 8\]; x and places need \[8\]"):
        distinct_tokens(x[:10], kept, mask_token.unsqueeze(0), pos)
    with pytest.raises(ValueError, match=r"pos has shape \[11, 8\]; x and places need \[12, 8\]"):
        distinct_tokens(x[:10], kept, mask_token, pos[1:])
    with pytest.raises(TypeError, match=r"pos is torch.int64; it must be floating-point"):
        distinct_tokens(x[:10], kept, mask_token, pos.long())
