"""The backward pass of attention in the CUDA library: its kernel run on the host, a warp's instructions emulated."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

from cavmae_fast.ops import configuration, dispatch, native
from cavmae_fast.ops.attention import resolve_backend
from cavmae_fast.ops.attention_library import attention_backward_library, attention_limit
from cavmae_fast.ops.attention_torch import column_sums
from cavmae_fast.ops.parity import assert_parity, poisoned_allocations, repeats
from cavmae_fast.tuning.plan import Settings, units
from cavmae_fast.tuning.search import plain
from tests.ops.test_attention import draw, oracle

CSRC = Path(__file__).parents[1] / "csrc"
HOST = """
#include <vector>
#include "attention_backward.cuh"
using namespace cavmae;

template <int W> bool run(const AttentionStreams& streams, int longest, bool backwards) {
    const int floats = shared_bytes(W, longest) / 4;
    for (int block = 0; block < streams.streams * streams.batch * streams.heads; ++block) {
        std::vector<Four> memory(floats / 4 + 1, Four{NAN, NAN, NAN, NAN});  // nothing is there from before
        char* start = reinterpret_cast<char*>(memory.data());
        Block<W> warps(start, backwards);
        attention_backward<W>(warps, streams.head(block, W));
        for (int i = 0; i < 4; ++i)  // and nothing is written past it
            if (!std::isnan(reinterpret_cast<float*>(start)[floats + i])) return false;
    }
    return true;
}

extern "C" bool backward(void* dq, void* dk, void* dv, const void* q, const void* k, const void* v, const void* dout,
                         const void* out, const float* lse, int64_t q_stride, int64_t k_stride, const int64_t* q_lengths,
                         const int64_t* lengths, int streams, int64_t batch, int64_t heads, int64_t width, int backwards) {
    AttentionStreams all = streams_of(dq, dk, dv, q, k, v, dout, out, lse, q_stride, k_stride, q_lengths, lengths, streams,
                                      batch, heads, width);
    return (width == 32 ? run<32> : run<64>)(all, all.longest, backwards);
}

extern "C" int64_t longest(int64_t width) { return most_queries(int(width)); }
"""
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64
SIZES = [SIZE, SIZE, POINTER, POINTER, ctypes.c_int, SIZE, SIZE, SIZE, ctypes.c_int]
"Strides, lengths of queries and keys, streams, batch, heads, head width, dtype (on the host: which warp is the first)."
# batch, lengths, heads, head width, lengths of the queries (None: packed self-attention)
SHAPES = [
    (2, (1,), 2, 32, None),
    (1, (17,), 1, 32, None),
    (1, (64,), 3, 32, None),
    (1, (129, 200), 2, 32, None),
    (2, (200, 17), 1, 32, (33, 1)),
    (1, (1, 31, 130), 2, 32, (129, 64, 200)),
    (2, (1, 49), 2, 64, None),
    (1, (129, 200), 1, 64, None),
    (1, (64, 70), 2, 64, (97, 1)),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    folder = tmp_path_factory.mktemp("attention")
    source, output = folder / "host.cpp", folder / "host.so"
    source.write_text(HOST)
    options = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", f"-I{CSRC}"]
    subprocess.run([compiler, *options, f"-o{output}", source], check=True)
    library = ctypes.CDLL(str(output))
    library.backward.argtypes, library.backward.restype = [*[POINTER] * 9, *SIZES], ctypes.c_bool
    library.longest.argtypes, library.longest.restype = [SIZE], SIZE
    return library


@pytest.fixture
def on_the_host(host, monkeypatch):
    """Launches run the kernel on the host; `on_the_host.backwards`: the last warp first."""
    order = mock.Mock(backwards=False)

    def call(name, *args):
        *args, dtype, stream = args
        assert (name, dtype, stream) == ("cavmae_attention_backward", 2, 5)
        assert all(address % 16 == 0 for address in args[:9])
        assert host.backward(*args, order.backwards), "shared memory was written past its end"

    monkeypatch.setattr(native, "call", call)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=5))
    return order


class Attention(torch.autograd.Function):
    """PyTorch's forward pass, the library's backward pass."""

    @staticmethod
    def forward(ctx, arguments, q, kv=None):
        out, lse = torch.ops.cavmae_fast.attention(q, kv, *arguments, "torch")
        ctx.save_for_backward(q, kv, out, lse)
        ctx.arguments = arguments
        return out

    @staticmethod
    def backward(ctx, dout):
        q, kv, out, lse = ctx.saved_tensors
        arguments = (dout.contiguous(), q, kv, out, lse, *ctx.arguments, 0, None, "cuda")
        dq, dkv, _ = torch.ops.cavmae_fast.attention_backward(*arguments)
        return None, dq, None if kv is None else dkv


def arguments_of(shape) -> tuple:
    batch, lengths, heads, _, q_lengths = shape
    return batch, list(q_lengths or lengths), list(lengths), heads


def ours(shape):
    return lambda *inputs: Attention.apply(arguments_of(shape), *inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(on_the_host, shape):
    inputs = draw(shape, torch.bfloat16)
    assert_parity(ours(shape), oracle(shape), inputs)
    assert repeats(ours(shape), inputs)


@pytest.mark.parametrize(("width", "lengths", "q_lengths"), [(32, (708,), None), (32, (66,), 0), (64, (66,), 0)])
def test_long_streams(on_the_host, host, width, lengths, q_lengths):
    """The decoder's, which the kernel is for; and as many queries (0) as shared memory holds."""
    shape = (1, lengths, 1, width, q_lengths if q_lengths is None else (host.longest(width),))
    assert_parity(ours(shape), oracle(shape), draw(shape, torch.bfloat16))


def gradients(shape, inputs, dout):
    q, kv = [*(x.detach() for x in inputs), None][:2]
    out, lse = torch.ops.cavmae_fast.attention(q, kv, *arguments_of(shape), "torch")
    with poisoned_allocations():
        return attention_backward_library(dout, q, kv, out, lse, *arguments_of(shape), 1, torch.float32)


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4], SHAPES[8]], ids=str)
def test_the_order_of_warps_makes_no_difference(on_the_host, shape):
    """Where one wrote what another reads without a barrier between, it would. Sums of columns are those of the results."""
    inputs = draw(shape, torch.bfloat16)
    batch, lengths, heads, width, q_lengths = shape
    dout = torch.randn(batch * sum(q_lengths or lengths), heads * width).bfloat16()
    first = gradients(shape, inputs, dout)
    on_the_host.backwards = True
    second = gradients(shape, inputs, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    dkv = None if q_lengths is None else first[1]
    assert torch.equal(first[2], column_sums(first[0], dkv, *arguments_of(shape)[:3], 1, torch.float32))


def test_low_scores(on_the_host):
    """Every score near -400: what masked keys would add, exp2(-lse), overflows."""
    shape = (1, (3,), 1, 32, None)
    x = torch.cat([torch.full((3, 32), 8.0), torch.full((3, 32), -8.0), torch.zeros(3, 32)], dim=1)
    noise = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    inputs = [(x + noise).bfloat16().requires_grad_()]
    dq = gradients(shape, inputs, torch.ones(3, 32).bfloat16())[0]
    assert dq.isfinite().all()


@pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
def test_nan_reaches_the_gradient(on_the_host, part):
    shape = (2, (70,), 2, 32, None)
    qkv = draw(shape, torch.bfloat16)[0].detach()
    qkv[70 + 69, part * 64] = math.nan  # the last token of the second sample, in the first head
    dq = gradients(shape, [qkv], torch.randn(140, 64).bfloat16())[0].view(2, 70, 3, 2, 32)
    assert dq[0].isfinite().all() and dq[1, :, :, 1].isfinite().all()
    assert dq[1, 69, :, 0].isnan().any()


# ---------------------------------------------------------------------------------------------------- which calls


def test_what_the_library_takes(host, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: mock.Mock(cavmae_attention_longest=host.longest))
    assert host.longest(32) >= 708 and host.longest(64) >= 320
    assert attention_limit(torch.bfloat16, (32, 708)) is None and attention_limit(torch.bfloat16, (64,)) is None
    assert "takes bfloat16 and heads of width 32 or 64" in attention_limit(torch.float16, (32, 708))
    assert "takes bfloat16 and heads of width 32 or 64" in attention_limit(torch.bfloat16, (48, 708))
    longest = host.longest(32)
    assert attention_limit(torch.bfloat16, (32, longest)) is None
    assert f"takes {longest} tokens of width 32 at most" in attention_limit(torch.bfloat16, (32, longest + 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "not for compute capability 8.0" in attention_limit(torch.bfloat16, (32, 708))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert attention_limit(torch.bfloat16, (32, 708)) is None
    monkeypatch.setattr("cavmae_fast.ops._triton.AVAILABLE", False)
    assert "forward pass is Triton's" in attention_limit(torch.bfloat16, (32, 708))


def test_it_is_chosen_where_it_was_tuned(host, monkeypatch):
    """By the length of the call: what shared memory does not hold runs elsewhere."""
    monkeypatch.setattr(native, "library", lambda: mock.Mock(cavmae_attention_longest=host.longest))
    monkeypatch.setattr(configuration, "target_of", lambda device: "sm_90")
    tuned = {"implementations": {"attention": {"bfloat16 long 32": "cuda"}}, "launches": {}}
    gpu = torch.device("cuda")
    with configuration.trial(tuned), dispatch.override("auto"):
        assert resolve_backend("auto", gpu, torch.bfloat16, 32, 708) == "cuda"
        assert resolve_backend("auto", gpu, torch.bfloat16, 32, 785) == "sdpa"
        assert resolve_backend("auto", torch.device("cpu"), torch.bfloat16, 32, 708) == "torch"


@pytest.mark.parametrize(
    ("model", "tried"),
    [("base", {"short 64": True, "long 32": True}), ("mavil", {"short 64": True, "long 32": False, "long 64": True})],
)
def test_the_tuner_tries_it(host, monkeypatch, model, tried):
    """In every unit of attention whose streams it takes: those of MAViL's decoders are longer, 785 tokens."""
    monkeypatch.setattr(native, "library", lambda: mock.Mock(cavmae_attention_longest=host.longest))
    monkeypatch.setattr(configuration, "target_of", lambda device: "sm_90")
    found = units(Settings(model, 2, "bfloat16", "cuda", ("attention",)))
    names = {unit.key: [candidate.name for candidate in plain(unit, torch.device("cuda"))] for unit in found}
    assert {key: names[key].count("CUDA library") for key in names} == tried


def test_its_forward_pass_is_tritons():
    qkv = torch.randn(2 * 33, 3 * 32).half()
    arguments = (qkv, None, 2, [33], [33], 1)
    got, want = (torch.ops.cavmae_fast.attention(*arguments, name) for name in ("cuda", "triton"))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


# ------------------------------------------------------------------------------------------------------ for a device


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The library with this kernel alone, which needs no headers of CUTLASS."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH: the kernel cannot be compiled here")
    output = tmp_path_factory.mktemp("built") / "attention.so"
    sources = [CSRC / name for name in ("attention_backward_sm90.cu", "attention_backward.cu", "cavmae.cu")]
    options = ["-O3", "-std=c++17", "-ftz=true", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"]
    options += ["-shared", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    subprocess.run([nvcc, *options, f"-o={output}", *sources], check=True)
    return output


def read(library: Path, *options: str) -> str:
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, *options, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_compiled(built):
    """Without spills, within the registers that a block of 256 threads has, on the matrix units, and with no calls."""
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", read(built, "-res-usage"))
    assert len(usage) == 2
    assert all(int(registers) <= 255 and int(stack) == int(local) == 0 for registers, stack, local in usage)
    kernels = read(built, "-sass").split("Function : ")[1:]
    assert len(kernels) == 2
    for code in kernels:
        assert all(word in code for word in ("HMMA", "LDSM", "STSM", "MUFU.EX2"))
        assert not re.search(r"\b(CALL|LDL|STL|ATOM|RED)\.", code)


def test_bad_arguments_return_codes(built, host):
    """Refused before anything is launched: none of the addresses is ever read, and no device is needed."""
    library = ctypes.CDLL(str(built))
    library.cavmae_attention_longest.argtypes, library.cavmae_attention_longest.restype = [SIZE], SIZE
    library.cavmae_attention_backward.argtypes = [*[POINTER] * 9, *SIZES, POINTER]
    most = {width: library.cavmae_attention_longest(width) for width in (16, 32, 48, 64)}
    assert most == {16: 0, 32: host.longest(32), 48: 0, 64: host.longest(64)}
    usual = {"q_stride": 96, "k_stride": 96, "q_lengths": (8, 708), "lengths": (8, 9000), "streams": 2, "batch": 3}
    usual |= {"heads": 1, "width": 32, "dtype": 2}

    def code(position=None, address=None, **changes):
        addresses = [4096] * 9
        if position is not None:
            addresses[position] = address
        values = [native.sizes(v) if isinstance(v, tuple) else v for v in (usual | changes).values()]
        return library.cavmae_attention_backward(*addresses, *values, None)

    assert [code(i) for i in range(9)] == [-1] * 9
    assert code(q_lengths=None) == code(lengths=None) == -1
    assert [code(i, 4104) for i in range(9)] == [-4] * 9
    for lengths in ((0, 8), (8, -1), (8, 2**40)):
        assert code(q_lengths=lengths) == code(lengths=lengths) == -2
    assert code(q_lengths=(8, most[32] + 1)) == -2
    for name, values in {
        "streams": (0, 4, -1),
        "batch": (0, 2**40),
        "heads": (0, 4, 2**40),  # 4 do not fit into a row
        "width": (0, 16, 128),
        "q_stride": (31, 100, 2**40),
        "k_stride": (31, 100, 2**40),
    }.items():
        assert [code(**{name: value}) for value in values] == [-2] * len(values), name
    assert [code(dtype=dtype) for dtype in (0, 1, 9)] == [-3] * 3
    if not torch.cuda.is_available():
        assert code() > 0 and code(q_lengths=(8, most[32])) > 0  # the arguments are fine, the device is missing
