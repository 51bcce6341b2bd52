"""Each private interface of torch, where it is there and where it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cavmae_fast import compat

PACKAGE = Path(compat.__file__).parent
PRIVATE = re.compile(r"torch\.(?:ops\.\w+\.)?(?:\w+\.)?_[a-zA-Z]\w*|aten\._\w+")
"Names of torch, of its modules and of its operators that begin with an underscore."
PRESENT_AND_ABSENT = pytest.mark.parametrize("absent", [False, True], ids=["present", "absent"])


def private(text: str) -> list[str]:
    return [name for name in PRIVATE.findall(text) if not name.endswith("__")]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_uses_private_interfaces(path):
    if path != Path(compat.__file__):
        assert private(path.read_text()) == []


def test_this_test_finds_them():
    found = private(
        "torch._C._x; torch.cpu._is_a(); torch.ops.mkldnn._b(); torch.ops.aten._c.out(); torch._softmax; aten._d;"
        " torch.__version__; torch.ops.cavmae_fast.attention; torch.float32; self._torch"
    )
    want = "torch._C._x torch.cpu._is_a torch.ops.mkldnn._b torch.ops.aten._c torch._softmax aten._d"
    assert found == want.split()


class Without:
    """A module without some of its names."""

    def __init__(self, module, *names: str) -> None:
        self._module, self._names = module, names

    def __getattr__(self, name: str):
        if name in self._names:
            raise AttributeError(name)
        return getattr(self._module, name)


@PRESENT_AND_ABSENT
def test_without_autocast(monkeypatch, absent):
    if absent:
        monkeypatch.setattr(torch, "_C", Without(torch._C, "_ExcludeDispatchKeyGuard"))
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with compat.without_autocast():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_constant_for_compile():
    """torch.compile takes the result as it finds it, and does not look inside."""
    calls = []

    @compat.constant_for_compile
    def answer(name: str) -> int:
        calls.append(Path(__file__).read_text()[:3])  # nothing that torch.compile could trace
        return len(name)

    torch.compiler.reset()
    compiled = torch.compile(lambda x: x * answer("four"), fullgraph=True, backend="eager")
    assert compiled(torch.ones(())).item() == 4.0
    assert compiled(torch.ones(())).item() == 4.0
    assert len(calls) <= 2 and all(calls)


@PRESENT_AND_ABSENT
def test_fused_linear(monkeypatch, absent):
    compat.has_fused_linear.cache_clear()
    if absent:
        monkeypatch.setattr(torch.ops, "mkldnn", Without(torch.ops.mkldnn, "_linear_pointwise"))
        assert compat.has_fused_linear(torch.bfloat16) is False
        compat.has_fused_linear.cache_clear()  # of what was found with that stand-in
        return
    if not compat.has_fused_linear(torch.bfloat16):
        pytest.skip("this CPU, or this build of PyTorch, multiplies no bf16 with oneDNN")
    x, weight, bias = (torch.randn(shape).to(torch.bfloat16) for shape in ((5, 32), (16, 32), (16,)))
    want = torch.addmm(bias.double(), x.double(), weight.t().double())
    torch.testing.assert_close(compat.fused_linear(x, weight, bias).double(), want, rtol=2**-8, atol=2**-8)


def reference_attention(q, k, v, scale):
    scores = q @ k.mT * scale
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@PRESENT_AND_ABSENT
def test_attention(monkeypatch, absent):
    """In float64, where all that differs is the order of sums; strided as the operator hands its tensors over."""
    if absent:
        names = [f"_scaled_dot_product_flash_attention_for_cpu{suffix}" for suffix in ("", "_backward")]
        monkeypatch.setattr(torch.ops, "aten", Without(torch.ops.aten, *names))
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, length, 3, 16, dtype=torch.float64, generator=generator).transpose(1, 2) for length in (5, 7, 7, 5)
    )
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    want, want_lse = reference_attention(*leaves, 0.3)
    out, lse = compat.flash_attention_cpu(q, k, v, 0.3)
    torch.testing.assert_close((out, lse), (want.detach(), want_lse.detach()))
    assert out.transpose(1, 2).is_contiguous()  # its rows are those of the packed output, without a copy
    grads = compat.flash_attention_cpu_backward(dout, q, k, v, out, lse, 0.3)
    torch.testing.assert_close(grads, torch.autograd.grad(want, leaves, dout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_dtypes_without_the_kernel(monkeypatch, dtype):
    monkeypatch.setattr(torch.ops, "aten", Without(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"))
    q, k, v = torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, lse = compat.flash_attention_cpu(q, k, v, 0.25)
    want, want_lse = reference_attention(q.double(), k.double(), v.double(), 0.25)
    assert out.dtype == dtype and lse.dtype == torch.float32
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


@PRESENT_AND_ABSENT
def test_softmax_backward(monkeypatch, absent):
    if absent:
        monkeypatch.setattr(torch.ops, "aten", Without(torch.ops.aten, "_softmax_backward_data"))
    x, gradient = torch.randn(2, 3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    p = x.softmax(-1)
    (want,) = torch.autograd.grad(p, x, gradient)
    got = compat.softmax_backward_(gradient, p.detach())
    assert got.data_ptr() == gradient.data_ptr()
    torch.testing.assert_close(got, want)


@PRESENT_AND_ABSENT
def test_foreach(monkeypatch, absent):
    if absent:
        monkeypatch.setattr(torch, "_foreach_add_", None)
        monkeypatch.setattr(torch, "_foreach_copy_", None)
    tensors, others = [torch.zeros(2), torch.zeros(3)], [torch.full((2,), 2.0), torch.full((3,), 3.0)]
    compat.foreach("add_", tensors, 1)
    assert [t.tolist() for t in tensors] == [[1.0] * 2, [1.0] * 3]
    compat.foreach("copy_", tensors, others)
    assert [t.tolist() for t in tensors] == [[2.0] * 2, [3.0] * 3]
