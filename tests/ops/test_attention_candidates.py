"""Launches of attention that the tuner may choose: backward in one pass, exponentials without a unit; sums of columns."""

from __future__ import annotations

import math

import pytest
import torch

from cavmae_fast.ops import configuration, dispatch
from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.attention import attention
from cavmae_fast.ops.attention_one_pass import attention_one_pass_triton
from cavmae_fast.ops.attention_tiles import exp2
from cavmae_fast.ops.configuration import ConfigurationError
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.parity import assert_parity, error, repeats
from tests.ops.test_attention import SHAPES, draw, draw_with_biases, oracle, ours, with_biases

#: name -> changes of every launch of the backward pass; the blocks are small, so that heads have several of them
ONE_PASS = {
    "peeled": {"ONE_PASS": True, "OUTER": 32, "INNER": 16, "PER_SM": 3, "PEEL": True},
    "masked": {"ONE_PASS": True, "OUTER": 32, "INNER": 32, "PER_SM": 1, "PEEL": False},
    "resident": {"ONE_PASS": True, "OUTER": 128, "INNER": 32, "PER_SM": 1, "PEEL": False},
}
#: batch, lengths, heads, head width, lengths of the queries (None: packed self-attention)
ODD = [SHAPES[0], SHAPES[5], SHAPES[6], SHAPES[7], (1, (70,), 1, 128, None), (1, (9, 33, 64), 2, 64, None)]


def launched(kernel: str, change: dict) -> dict:
    """A configuration in which every launch of `kernel` that the interpreter takes is changed."""
    cases = configuration.read(configuration.shipped_file(configuration.INTERPRETED))["launches"][kernel]
    return {"implementations": {}, "launches": {kernel: {case: options | change for case, options in cases.items()}}}


@pytest.fixture
def one_pass(request):
    with configuration.trial(launched("attention_backward", ONE_PASS[request.param])), dispatch.override("triton"):
        yield


# ------------------------------------------------------------------------------------------------- one pass backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("one_pass", ONE_PASS, indirect=True)
def test_one_pass(one_pass, shape, dtype):
    inputs = draw(shape, dtype)
    assert_parity(ours(shape), oracle(shape), inputs)
    assert repeats(ours(shape), inputs)


@pytest.mark.parametrize("one_pass", ONE_PASS, indirect=True)
def test_low_scores_in_one_pass(one_pass):
    """Every score near -400: what masked keys would add, exp2(-lse), overflows."""
    shape = (1, (3,), 1, 16, None)
    x = torch.cat([torch.full((3, 16), 10.0), torch.full((3, 16), -10.0), torch.zeros(3, 16)], dim=1)
    inputs = [(x + torch.randn(3, 48, generator=torch.Generator().manual_seed(0))).requires_grad_()]
    assert_parity(ours(shape), oracle(shape), inputs, floor=400 * torch.finfo(torch.float32).eps)


def test_the_one_pass_kernel_runs(monkeypatch):
    """Its launches are not silently those of the two kinds of program."""
    seen = []
    monkeypatch.setattr(
        "cavmae_fast.ops.attention_backward.attention_one_pass_triton",
        lambda *arguments: seen.append(arguments) or attention_one_pass_triton(*arguments),
    )
    for change, count in (({}, 0), (ONE_PASS["masked"], 1)):
        with configuration.trial(launched("attention_backward", change)), dispatch.override("triton"):
            attention(torch.randn(5, 96, requires_grad=True), StreamLayout(1, (5,)), 1).sum().backward()
        assert len(seen) == count


def offered(dtype: torch.dtype, key: str) -> list[dict]:
    """Launches of the backward pass that the tuner tries on some architecture, by one pass, each once."""
    found = []
    for architecture in ("sm_80", "sm_90", "sm_100"):
        for options in configuration.alternatives("attention_backward", architecture, dtype, key):
            if options.get("ONE_PASS") and options not in found:
                found.append(options)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("long 32", (1, (300,), 1, 32, None)),
        ("long 32", (1, (260,), 1, 32, (31,))),
        ("short 64", (1, (128, 177), 1, 64, None)),
    ],
    ids=str,
)
def test_what_the_tuner_offers(key, shape):
    inputs, cases = draw(shape, torch.float16), offered(torch.float16, key)
    assert cases
    for options in cases:
        content = {"implementations": {}, "launches": {"attention_backward": {f"float16 {key}": options}}}
        with configuration.trial(content), dispatch.override("triton"):
            assert_parity(ours(shape), oracle(shape), inputs)


# --------------------------------------------------------------------------------------------------- sums of columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", ONE_PASS)
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6]], ids=str)
def test_sums_of_columns(shape, form, dtype):
    """They are at most as wrong as the sums of the rounded gradients, beside float32's own rounding."""
    batch, lengths, heads, width, q_lengths = shape
    queries, d = list(q_lengths or lengths), heads * width
    generator = torch.Generator().manual_seed(3)
    q, kv = [*(x.detach() for x in draw(shape, dtype)), None][:2]
    dout = torch.randn(batch * sum(queries), d, generator=generator).to(dtype)
    options = {"num_warps": 4, "num_stages": 1, "ON_FMA": 0} | ONE_PASS[form]
    peel = options.pop("PEEL")
    del options["ONE_PASS"]

    def backward(dtype, implementation, sums):
        x = [None if t is None else t.to(dtype) for t in (q, kv)]
        out, lse = torch.ops.cavmae_fast.attention(*x, batch, queries, list(lengths), heads, implementation)
        arguments = (dout.to(dtype), *x, out, lse, batch, queries, list(lengths), heads)
        if sums is None:
            return torch.ops.cavmae_fast.attention_backward(*arguments, 0, None, implementation)[:2]
        return attention_one_pass_triton(*arguments, options, peel, sums)

    def of_samples(x, lengths):
        parts = [part.view(batch, length, -1) for part, length in zip(x.split([batch * n for n in lengths]), lengths)]
        return torch.cat([part.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)) for part in parts])

    def columns(dq, dkv):
        return of_samples(dq, queries) if kv is None else torch.cat([of_samples(dq, queries), of_samples(dkv, lengths)], 1)

    sums = torch.full((len(lengths) * batch, 3 * d), math.nan)
    gradients = backward(dtype, "triton", sums)
    want = columns(*backward(torch.float64, "torch", None))
    again = torch.full_like(sums, math.nan)
    backward(dtype, "triton", again)
    assert torch.equal(sums, again)
    assert error(sums, want) <= error(columns(*gradients), want) + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("form", ONE_PASS)
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6], SHAPES[7]], ids=str)
def test_owed_gradients_in_the_kernel(shape, form, apart, monkeypatch):
    """Through the public function: the kernel forms them where the launch says so, and then nothing sums behind it."""
    ours, plain = with_biases(shape, apart)
    inputs = draw_with_biases(shape, apart, torch.float32)
    content = launched("attention_backward", ONE_PASS[form] | {"SUMS": True})
    monkeypatch.setattr("cavmae_fast.ops.attention_backward.column_sums", lambda *args: pytest.fail("a pass behind it"))
    with configuration.trial(content), dispatch.override("triton"):
        assert_parity(ours, plain, inputs)
        assert repeats(ours, inputs)


# ------------------------------------------------------------------------------------------ exponentials without a unit


@triton.jit
def exp2_kernel(
    x,  # [ROWS, COLUMNS] fp32
    out,  # [ROWS, COLUMNS] fp32
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ON_FMA: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + place, exp2(tl.load(x + place), ON_FMA))


def powers(x: torch.Tensor, on_fma: int) -> torch.Tensor:
    out = torch.full_like(x, math.nan)
    exp2_kernel[(1,)](x, out, ROWS=x.shape[0], COLUMNS=x.shape[1], ON_FMA=on_fma)
    return out


@pytest.mark.parametrize("on_fma", [1, 3, 8])
def test_exponentials_without_a_unit(on_fma):
    x = torch.cat([torch.linspace(-126, 20, 1 << 13), torch.linspace(-1, 1, 1 << 13)])[torch.randperm(1 << 14)].view(-1, 128)
    got, want = powers(x, on_fma).double(), x.double().exp2()
    off = (got / want - 1).abs().amax(0)  # of each column
    approximate = (off > 1e-5).view(2, 8, 8)
    assert approximate[:, :on_fma].all() and not approximate[:, on_fma:].any()
    assert off.max() < 7.6e-5 < torch.finfo(torch.float16).eps / 12 < torch.finfo(torch.bfloat16).eps / 12
    edges = torch.tensor([-math.inf, -1000.0, math.nan, 0.0]).repeat(8, 32)
    low, lower, unknown, one = powers(edges, 8)[:, :4].unbind(1)
    assert low.max() < 1.2e-38 and lower.max() < 1.2e-38 and unknown.isnan().all() and (one - 1).abs().max() < 7.6e-5


@pytest.mark.parametrize("on_fma", [2, 8])
@pytest.mark.parametrize("backward", [{}, ONE_PASS["masked"]], ids=["two-kinds", "one-pass"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]], ids=str)
def test_attention_with_them(shape, backward, on_fma):
    """By the parity rule, as every implementation."""
    forward, backward = (
        launched(kernel, change | {"ON_FMA": on_fma})["launches"]
        for kernel, change in (("attention_forward", {}), ("attention_backward", backward))
    )
    only_16_bit = {k: {c: o for c, o in v.items() if "16-bit" in c} for k, v in (forward | backward).items()}
    with configuration.trial({"implementations": {}, "launches": only_16_bit}), dispatch.override("triton"):
        assert_parity(ours(shape), oracle(shape), draw(shape, torch.float16))


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward"])
def test_float32_refuses_them(kernel):
    x = torch.randn(5, 96, requires_grad=True)
    refused = pytest.raises(ConfigurationError, match=f"{kernel} has a launch with ON_FMA for torch.float32")
    with configuration.trial(launched(kernel, {"ON_FMA": 1})), dispatch.override("triton"), refused:
        attention(x, StreamLayout(1, (5,)), 1).sum().backward()
    for architecture in ("sm_80", "sm_90", "sm_100"):
        for width in (16, 32, 64, 128):
            for length in ("short", "long"):
                found = configuration.alternatives(kernel, architecture, torch.float32, f"{length} {width}")
                assert not any(options.get("ON_FMA") for options in found)


@pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
def test_nan_reaches_the_output_past_them(part):
    qkv = torch.randn(2 * 70, 3 * 32).half()
    qkv[70 + 69, part * 32] = float("nan")  # the last token of the second sample
    content = {
        k: {c: o for c, o in v.items() if "16-bit" in c}
        for k, v in launched("attention_forward", {"ON_FMA": 8})["launches"].items()
    }
    with configuration.trial({"implementations": {}, "launches": content}), dispatch.override("triton"):
        out = attention(qkv, StreamLayout(2, (70,)), 2)
    assert not out[:70].isnan().any()
    assert out[139, 0].isnan()
