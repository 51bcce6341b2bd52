from __future__ import annotations

import pytest
import torch

from cavmae_fast.ops import dispatch
from cavmae_fast.ops.gather_tokens import gather_tokens
from cavmae_fast.ops.parity import assert_parity
from cavmae_fast.reference import operators as reference

SHAPES = [(1, 1, 1, 1), (3, 97, 31, 97), (2, 12, 12, 1023), (2, 708, 531, 512), (5, 196, 49, 768)]
"B, L, M, D"


def inputs(shape, dtype, device="cpu"):
    batch, length, taken, width = shape
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(batch * length, width, generator=generator).to(device, dtype).requires_grad_()
    ids = torch.rand(batch, length, generator=generator).argsort(1)[:, :taken].to(device)
    return [x, ids]


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_copies_are_exact(mode, shape, dtype):
    with dispatch.override(mode):
        assert_parity(gather_tokens, reference.gather_tokens, inputs(shape, dtype), floor=0.0)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_strided_inputs_and_gradients(mode):
    x, ids = inputs((2, 9, 4, 6), torch.float32)
    strided = x.detach().t().contiguous().t().requires_grad_()
    with dispatch.override(mode):
        out = gather_tokens(strided, ids)
        torch.testing.assert_close(out, reference.gather_tokens(x, ids), rtol=0, atol=0)
        out.sum().backward()  # an expanded gradient
    reference.gather_tokens(x, ids).sum().backward()
    torch.testing.assert_close(strided.grad, x.grad, rtol=0, atol=0)


def test_errors():
    x, ids = inputs((2, 9, 4, 6), torch.float32)
    with pytest.raises(TypeError, match=r"ids is torch.int32; it must be torch.int64"):
        gather_tokens(x, ids.int())
    with pytest.raises(ValueError, match=r"ids has shape \[8\]; it must be \[samples, tokens\]"):
        gather_tokens(x, ids.flatten())
    with pytest.raises(ValueError, match=r"ids has shape \[2, 0\]"):
        gather_tokens(x, ids[:, :0])
    with pytest.raises(ValueError, match=r"x has shape \[17, 6\]; it must be \[2 \* tokens, width\]"):
        gather_tokens(x[:-1], ids)
    with pytest.raises(TypeError, match=r"x is torch.int64; it must be floating-point"):
        gather_tokens(x.long(), ids)
