from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cavmae_fast.ops import attention_backends, configuration, dispatch
from cavmae_fast.ops.attention import BACKENDS, attention, available_backends, query_attention, resolve_backend
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.parity import assert_parity, convert, run
from cavmae_fast.reference import operators as reference

MODULE = sys.modules[resolve_backend.__module__]
# batch, lengths, heads, head width, lengths of the queries (None: packed self-attention)
SHAPES = [
    (2, (1,), 2, 16, None),
    (1, (97,), 2, 32, None),
    (1, (49, 128, 177), 2, 64, None),
    (1, (130,), 2, 16, None),
    (1, (70,), 1, 128, None),
    (2, (5, 33), 3, 24, None),
    (2, (71,), 2, 32, (53,)),
    (1, (40, 20), 2, 64, (1, 70)),
]
LONG_SHAPES = [(1, (708,), 1, 32, None), (1, (708,), 1, 32, (531,)), (1, (30, 320), 1, 64, None)]


def draw(shape, dtype: torch.dtype) -> list[torch.Tensor]:
    batch, lengths, heads, width, q_lengths = shape
    generator = torch.Generator().manual_seed(sum(lengths))

    def one(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype).requires_grad_()

    d = heads * width
    if q_lengths is None:
        return [one(batch * sum(lengths), 3 * d)]
    return [one(batch * sum(q_lengths), d), one(batch * sum(lengths), 2 * d)]


def ours(shape, backend: str = "auto"):
    batch, lengths, heads, _, q_lengths = shape
    layout = StreamLayout(batch, lengths)
    if q_lengths is None:
        return lambda qkv: attention(qkv, layout, heads, backend=backend)
    return lambda q, kv: query_attention(q, kv, StreamLayout(batch, q_lengths), layout, heads, backend=backend)


def oracle(shape):
    batch, lengths, heads, width, q_lengths = shape
    d = heads * width
    if q_lengths is None:
        return lambda qkv: reference.packed_attention(qkv[:, :d], qkv[:, d:], batch, lengths, lengths, heads)
    return lambda q, kv: reference.packed_attention(q, kv, batch, q_lengths, lengths, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_parity(mode, shape, dtype):
    with dispatch.override(mode):
        assert_parity(ours(shape), oracle(shape), draw(shape, dtype))


@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_kernels_at_long_shapes(shape):
    with dispatch.override("triton"):
        assert_parity(ours(shape), oracle(shape), draw(shape, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[6], *LONG_SHAPES], ids=str)
@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_pytorch_back_ends(backend, shape, dtype):
    # In float64 the baseline is the reference itself: what is left is another order of summation.
    floor = 16 * torch.finfo(dtype).eps if dtype == torch.float64 else None
    assert_parity(ours(shape, backend), oracle(shape), draw(shape, dtype), floor=floor)


class FromLogSums(torch.autograd.Function):
    """Attention `[L, W]` whose backward forms the scores anew and the probabilities from the kept log sums: the formula of
    attention.py, written out. Backward adds up the products of a score in another order than forward, as kernels do. So the
    roundings of a score and of its row's log sum do not cancel, which shows where scores are large."""

    @staticmethod
    def forward(ctx, q, k, v):
        scores = q @ k.T * q.shape[1] ** -0.5
        out = scores.softmax(-1) @ v
        ctx.save_for_backward(q, k, v, out, scores.logsumexp(-1, keepdim=True))
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        scale = q.shape[1] ** -0.5
        p = (q.flip(1) @ k.flip(1).T * scale - lse).exp()
        ds = p * (dout @ v.T - (dout * out).sum(-1, keepdim=True)) * scale
        return ds @ k, ds.T @ q, p.T @ dout


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_peaked_scores(mode):
    """Scores of some hundreds: probabilities of 0 and 1, log sums far from 0, and tails beyond exp2's range."""
    shape = (1, (49, 70), 1, 32, None)
    inputs = [x.detach().mul(12).requires_grad_() for x in draw(shape, torch.float32)]

    def explicit(qkv):
        return torch.cat([FromLogSums.apply(*part.chunk(3, dim=1)) for part in qkv.split((49, 70))])

    with dispatch.override(mode):
        assert_parity(ours(shape), oracle(shape), inputs, baseline=explicit)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_low_scores(mode):
    """Every score near -400: what masked keys would add, exp2(-lse), overflows."""
    shape = (1, (3,), 1, 16, None)
    x = torch.cat([torch.full((3, 16), 10.0), torch.full((3, 16), -10.0), torch.zeros(3, 16)], dim=1)
    inputs = [(x + torch.randn(3, 48, generator=torch.Generator().manual_seed(0))).requires_grad_()]
    with dispatch.override(mode):  # the floor: float32's spacing at the scores' own size
        assert_parity(ours(shape), oracle(shape), inputs, floor=400 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6]], ids=str)
def test_strided_gradients_and_inputs(mode, shape):
    inputs = draw(shape, torch.float32)
    with dispatch.override(mode):
        out, function = ours(shape)(*inputs), ours(shape)
        expanded = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(1)).expand(out.shape)
        transposed = expanded.t().contiguous().t()
        strided = convert(inputs, lambda t: torch.stack([t, t], dim=-1)[..., 0])
        want = torch.autograd.grad(out, inputs, expanded.contiguous())
        for leaves, gradient in ((inputs, expanded), (inputs, transposed), (strided, expanded)):
            got = torch.autograd.grad(function(*leaves), leaves, gradient)
            assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6]], ids=str)
def test_repeats_bitwise(mode, shape):
    with dispatch.override(mode):
        (first,), gradients, cotangents = run(ours(shape), draw(shape, torch.float16))
        (again,), others, _ = run(ours(shape), draw(shape, torch.float16), cotangents)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others))


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
def test_nan_reaches_the_output(mode, part):
    qkv = torch.randn(2 * 70, 3 * 32)
    qkv[70 + 69, part * 32] = float("nan")  # the last token of the second sample
    with dispatch.override(mode):
        out = attention(qkv, StreamLayout(2, (70,)), 2)
    assert not out[:70].isnan().any()
    assert out[139, 0].isnan()


@pytest.mark.parametrize("backend", ["auto", "torch", "triton", "sdpa"])
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6]], ids=str)
def test_compiles_whole(backend, shape):
    def loss(*inputs):
        return ours(shape, backend)(*inputs).square().sum()

    torch.compiler.reset()
    inputs = draw(shape, torch.float32)
    want = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), want, strict=True))


def test_registered_operators():
    for shape in (SHAPES[5], SHAPES[6]):
        batch, lengths, heads, _, q_lengths = shape
        q, kv = [*(t.detach() for t in draw(shape, torch.float32)), None][:2]
        arguments = (batch, list(q_lengths or lengths), list(lengths), heads, "torch")
        out, lse = torch.ops.cavmae_fast.attention(q, kv, *arguments)
        torch.library.opcheck(torch.ops.cavmae_fast.attention.default, (q, kv, *arguments))
        backward, given = torch.ops.cavmae_fast.attention_backward.default, (torch.ones_like(out), q, kv, out, lse)
        for owing in ((0, None), (1, torch.float32), (len(lengths), torch.float16)):
            torch.library.opcheck(backward, (*given, *arguments[:-1], *owing, "torch"))


# ------------------------------------------------------------------------------------------------------ owed gradients


def with_biases(shape, apart: bool):
    """Attention behind layers that add biases, one or one for each stream: ours, which owes their gradients, and the same
    without that."""
    batch, lengths, heads, width, q_lengths = shape
    layout, queries, d = StreamLayout(batch, lengths), StreamLayout(batch, q_lengths or lengths), heads * width

    def added(x, biases, of):
        each = biases if apart else biases * len(of.lengths)
        return torch.cat([part + b for part, b in zip(x.split(of.rows_per_stream), each)])

    def owing(*inputs, backend="auto", **options):
        x, biases = inputs[: 1 + (q_lengths is not None)], inputs[1 + (q_lengths is not None) :]
        detached = [b.detach() for b in biases]
        options |= {"backend": backend, "owed": biases}
        if q_lengths is None:
            return attention(added(x[0], detached, layout), layout, heads, **options)
        q, kv = added(x[0], [b[:d] for b in detached], queries), added(x[1], [b[d:] for b in detached], layout)
        return query_attention(q, kv, queries, layout, heads, **options)

    def plain(*inputs):
        x, biases = inputs[: 1 + (q_lengths is not None)], inputs[1 + (q_lengths is not None) :]
        if q_lengths is None:
            return oracle(shape)(added(x[0], biases, layout))
        return oracle(shape)(added(x[0], [b[:d] for b in biases], queries), added(x[1], [b[d:] for b in biases], layout))

    return owing, plain


def draw_with_biases(shape, apart: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    _, lengths, heads, width, _ = shape
    generator = torch.Generator().manual_seed(5)
    count = len(lengths) if apart else 1
    biases = [torch.randn(3 * heads * width, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    return [*draw(shape, dtype), *biases]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6], SHAPES[7]], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton", "sdpa", "kept"])
def test_owed_gradients(backend, shape, apart, dtype):
    ours, plain = with_biases(shape, apart)
    assert_parity(partial(ours, backend=backend), plain, draw_with_biases(shape, apart, dtype))


def test_biases_that_are_not_trained_are_not_summed():
    ours, _ = with_biases(SHAPES[5], True)
    inputs = draw_with_biases(SHAPES[5], True, torch.float32)
    for bias in inputs[1:]:
        bias.requires_grad_(False)
    ours(*inputs).sum().backward()
    assert inputs[0].grad is not None and all(bias.grad is None for bias in inputs[1:])


def test_owed_biases_that_do_not_fit():
    layout = StreamLayout(2, (3, 4))
    qkv = torch.randn(14, 3 * 32)
    with pytest.raises(ValueError, match=r"owed has shapes \[\[32\]\]; it takes \[96\], once or for each of 2 streams"):
        attention(qkv, layout, 2, owed=[torch.zeros(32)])
    with pytest.raises(ValueError, match=r"owed has shapes .*; it takes \[96\]"):
        attention(qkv, layout, 2, owed=[torch.zeros(96)] * 3)


def test_saved_lse_is_in_base_2():
    shape = (1, (40,), 1, 16, None)
    (qkv,) = draw(shape, torch.float32)

    def exact(qkv):
        q, k, _ = qkv.chunk(3, dim=1)
        return (q @ k.T / 4).exp().sum(1).log2()

    for backend in ("torch", "triton"):

        def saved(qkv, backend=backend):
            return torch.ops.cavmae_fast.attention(qkv, None, 1, [40], [40], 1, backend)[1][0]

        assert_parity(saved, exact, [qkv.detach()])


def test_back_end_choice(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(configuration, "target_of", lambda device: "sm_90" if device.type == "cuda" else "cpu")
    assert resolve_backend("auto", cpu, torch.float32) == "torch"
    with dispatch.override("triton"):
        assert resolve_backend("auto", cpu, torch.float32) == "triton"
        assert resolve_backend("auto", cpu, torch.float64) == "torch"
        assert resolve_backend("auto", cpu, torch.float32, head_width=160) == "torch"
        assert resolve_backend("auto", cuda, torch.bfloat16) == "triton"
    assert resolve_backend("auto", cuda, torch.bfloat16) == "sdpa"
    chosen = {"bfloat16": "triton", "bfloat16 short 32": "sdpa_cudnn", "bfloat16 long 32": "flash_attn"}
    with configuration.trial({"implementations": {"attention": chosen}, "launches": {}}):
        assert resolve_backend("auto", cuda, torch.bfloat16) == "triton"
        assert resolve_backend("auto", cuda, torch.float16) == "sdpa"
        assert resolve_backend("auto", cuda, torch.float64) == "sdpa"
        assert resolve_backend("auto", cuda, torch.bfloat16, head_width=160) == "sdpa"
        assert resolve_backend("auto", cuda, torch.bfloat16, 64, 708) == "triton"
        assert resolve_backend("auto", cuda, torch.bfloat16, 32, 128) == "sdpa_cudnn"
        assert resolve_backend("auto", cuda, torch.bfloat16, 32, 708) == "sdpa"  # the package is not installed
    chosen = {"float32 short 64": "products", "float32": "flash"}
    with configuration.trial({"implementations": {"attention": chosen}, "launches": {}}):
        assert resolve_backend("auto", cpu, torch.float32, 64, 128) == "products"
        assert resolve_backend("auto", cpu, torch.float32, 64, 708) == "torch"  # in float32 `flash` is what it is anyway
    assert list(available_backends(cuda)) == list(BACKENDS)
    assert available_backends("cpu")["sdpa"] == "available"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["flash", "products", "products in 2 MiB", "kept"])
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5], SHAPES[7], LONG_SHAPES[1]], ids=str)
def test_forms_on_the_cpu(shape, form, dtype):
    entries = {"implementations": {"attention": {"float32": form, "bfloat16": form}}, "launches": {}}
    with configuration.trial(entries), dispatch.override("auto"):
        assert_parity(ours(shape), oracle(shape), draw(shape, dtype))


def test_wide_heads_fall_to_pytorch():
    shape = (1, (9,), 1, 160, None)
    with dispatch.override("triton"):
        assert_parity(ours(shape), oracle(shape), draw(shape, torch.float32))
        with pytest.raises(ValueError, match="width 160; it takes at most 128"):
            ours(shape, "triton")(*draw(shape, torch.float32))


@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6], SHAPES[7]], ids=str)
def test_what_flash_attn_is_given(monkeypatch, shape):
    """A stand-in with flash-attn's signatures and layout, for machines that cannot run it."""

    def kvpacked(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
        cuts = zip(q.split(cu_seqlens_q.diff().tolist()), kv.split(cu_seqlens_k.diff().tolist()))
        parts = [reference.attention(a.transpose(0, 1), *b.permute(1, 2, 0, 3)).transpose(0, 1) for a, b in cuts]
        return torch.cat(parts)

    def qkvpacked(qkv, cu_seqlens, max_seqlen):
        return kvpacked(qkv[:, 0], qkv[:, 1:], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

    fake = SimpleNamespace(flash_attn_varlen_qkvpacked_func=qkvpacked, flash_attn_varlen_kvpacked_func=kvpacked)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(MODULE, "_state", lambda name, device: "available")
    inputs = draw(shape, torch.float16)
    assert_parity(ours(shape, "flash_attn"), oracle(shape), inputs)


def test_errors(monkeypatch):
    layout = StreamLayout(2, (5, 7))
    qkv = torch.zeros(24, 96)
    with pytest.raises(ValueError, match=r"qkv has shape \[23, 96\]"):
        attention(qkv[:23], layout, 2)
    with pytest.raises(ValueError, match="num_heads is 5"):
        attention(qkv, layout, 5)
    with pytest.raises(ValueError, match="num_heads is 0"):
        attention(qkv, layout, 0)
    with pytest.raises(TypeError, match="int32"):
        attention(qkv.int(), layout, 2)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        attention(qkv, layout, 2, backend="fast")
    q, kv = torch.zeros(6, 32), torch.zeros(24, 64)
    with pytest.raises(ValueError, match="batch and number of streams"):
        query_attention(q, kv, StreamLayout(2, (3,)), layout, 2)
    with pytest.raises(ValueError, match=r"kv has shape \[24, 60\]"):
        query_attention(q, kv[:, :60], StreamLayout(2, (1, 2)), layout, 2)
    with pytest.raises(ValueError, match=r"torch.float16.* needs"):
        query_attention(q, kv.half(), StreamLayout(2, (1, 2)), layout, 2)
    with pytest.raises(ValueError, match="float64; it takes"):
        attention(qkv.double(), layout, 2, backend="triton")

    found = {"flash_attn": False, "xformers": True}
    monkeypatch.setattr(attention_backends, "installed", found.get)
    with pytest.raises(RuntimeError, match="pip install flash-attn"):
        attention(qkv, layout, 2, backend="flash_attn")
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        attention(qkv, layout, 2, backend="xformers")
    with pytest.raises(ValueError, match="got float32; it takes float16, bfloat16"):
        found["flash_attn"] = True
        resolve_backend("flash_attn", torch.device("cuda"), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        attention(qkv, layout, 2, backend="triton")
