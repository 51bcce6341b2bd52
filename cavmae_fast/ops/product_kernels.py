"""Matrix products in Triton with what follows them in their last step, for packed streams: the MLP's two expensive passes.

    linear_gelu:      z = x W[s]^T + b[s],    y = gelu(z)                       [R, K] -> [R, N] twice
    hidden_gradient:  dz = (dout W[s]) * gelu'(z),    db[s] = sum of dz         [R, M], [R, N] -> [R, N]

One launch for all streams, each with weights of its own. As many programs as the GPU runs at once go through the tiles of
all streams, so that no stream ends with a wave of its own. On Hopper and later, tiles travel by TMA (tensor descriptors)
where its rules on alignment hold, else by pointers; the arithmetic is the same. Sums of columns are made tile by tile and
added up in a fixed order, so runs repeat.

These are candidates of the tuner, beside cuBLAS with a pass over memory behind it (`linear_gelu.py`).
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import Launch, launch
from cavmae_fast.ops.stream_tiles import pick, sum_of_streams, three

INTERPRETED_PROGRAMS = 3
"Programs where there is no GPU: few, so that each takes several tiles in the tests."
TMA_SINCE = 90
"Compute capability with tensor descriptors in hardware."

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def gelu_derivative(z):
    """Phi(z) + z phi(z) with one exponential for both. erfc(x) = exp(-x^2) t (a1 + t (a2 + ...)), t = 1 / (1 + p x),
    x = |z| / sqrt 2 is formula 7.1.26 of Abramowitz & Stegun: |error| <= 1.5e-7, about the spacing of fp32 at 1.

    Counted in the machine code for sm_90: the loop of `dgelu_bias_kernel` takes about 33 instructions per element this way
    and 50 with erf and exp. Estimated: about 40 can be hidden behind its memory traffic, so memory alone sets its speed."""
    gauss = tl.exp2(z * z * (-0.5 * 1.4426950408889634))
    t = 1.0 / (0.3275911 * 0.7071067811865476 * tl.abs(z) + 1.0)
    half_erfc = t * (0.5 * 1.061405429) - 0.5 * 1.453152027
    half_erfc = t * half_erfc + 0.5 * 1.421413741
    half_erfc = t * half_erfc - 0.5 * 0.284496736
    half_erfc = (t * half_erfc + 0.5 * 0.254829592) * t * gauss
    return z * 0.3989422804014327 * gauss + tl.where(z < 0, half_erfc, 1.0 - half_erfc)


@triton.jit
def _place(tile, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a stream's tile. GROUP rows of tiles go together, column by column, so that what programs
    read at a time stays in the L2."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    in_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = tile // in_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return (first + tile % in_group % size) * BLOCK_M, tile % in_group // size * BLOCK_N


@triton.jit
def _load(matrix, descriptor, row, column, rows, columns, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The tile of a row-major matrix `[rows, columns]` at (row, column), zeros outside of it."""
    if TMA:
        return descriptor.load([row, column])
    r, c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    return tl.load(matrix + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0.0)


@triton.jit
def _store(matrix, descriptor, value, row, column, rows, columns, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip  # noqa: E501
    """Writes what lies inside of the matrix."""
    if TMA:
        descriptor.store([row, column], value)
    else:
        r, c = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tl.store(matrix + r.to(tl.int64)[:, None] * columns + c[None, :], value, mask=inside)


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def _gelu_and_store(
    total, bias, y, y_tiles, pre, pre_tiles, row, column, rows, N,
    KEEP_PRE: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The GELU is that of the value as it is stored, as in two passes."""
    columns = column + tl.arange(0, WIDTH)
    added = tl.load(bias + columns, mask=columns < N, other=0.0).to(y.dtype.element_ty)
    value = (total + added.to(tl.float32)[None, :]).to(y.dtype.element_ty)
    if KEEP_PRE:
        _store(pre, pre_tiles, value, row, column, rows, N, TMA, BLOCK_M, WIDTH)
    z = value.to(tl.float32)
    result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    _store(y, y_tiles, result.to(y.dtype.element_ty), row, column, rows, N, TMA, BLOCK_M, WIDTH)


@triton.jit
def linear_gelu_product_kernel(
    x,  # [R, K]
    weight0, weight1, weight2,  # [N, K]
    bias0, bias1, bias2,  # [N]
    y, pre,  # [R, N]
    rows0, rows1, rows2, N, K,
    STREAMS: tl.constexpr, KEEP_PRE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y = gelu(x W^T + b), and the value before it. HALVES: the last step takes a tile's columns in halves, for fewer
    registers. FLATTEN: the first tiles of the next product are fetched during the last step."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N
    programs = tl.num_programs(0)
    before = 0  # tiles of the streams before
    for stream in tl.static_range(STREAMS):
        rows = pick(stream, rows0, rows1, rows2)
        weight = pick(stream, weight0, weight1, weight2)
        bias = pick(stream, bias0, bias1, bias2)
        if TMA:
            x_tiles = tl.make_tensor_descriptor(x, [rows, K], [K, 1], [BLOCK_M, BLOCK_K])
            weight_tiles = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
            y_tiles = tl.make_tensor_descriptor(y, [rows, N], [N, 1], [BLOCK_M, WIDTH])
            pre_tiles = tl.make_tensor_descriptor(pre, [rows, N], [N, 1], [BLOCK_M, WIDTH])
        else:
            x_tiles, weight_tiles, y_tiles, pre_tiles = None, None, None, None
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        start = (tl.program_id(0) + programs - before % programs) % programs
        for tile in tl.range(start, tiles, programs, flatten=FLATTEN):
            row, column = _place(tile, rows, N, BLOCK_M, BLOCK_N, GROUP)
            total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                a = _load(x, x_tiles, row, k, rows, K, TMA, BLOCK_M, BLOCK_K)
                b = _load(weight, weight_tiles, column, k, N, K, TMA, BLOCK_N, BLOCK_K)
                total = tl.dot(a, b.T, total, input_precision="ieee")
            if HALVES:
                left, right = _halves(total, BLOCK_M, BLOCK_N)
                _gelu_and_store(left, bias, y, y_tiles, pre, pre_tiles, row, column, rows, N, KEEP_PRE, TMA, BLOCK_M, WIDTH)
                _gelu_and_store(
                    right, bias, y, y_tiles, pre, pre_tiles, row, column + WIDTH, rows, N, KEEP_PRE, TMA, BLOCK_M, WIDTH
                )
            else:
                _gelu_and_store(total, bias, y, y_tiles, pre, pre_tiles, row, column, rows, N, KEEP_PRE, TMA, BLOCK_M, WIDTH)
        x += tl.cast(rows, tl.int64) * K
        y += tl.cast(rows, tl.int64) * N
        pre += tl.cast(rows, tl.int64) * N
        before += tiles


@triton.jit
def _dgelu_and_store(
    total, pre, pre_tiles, dpre, dpre_tiles, sums, row, column, rows, N,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    z = _load(pre, pre_tiles, row, column, rows, N, TMA, BLOCK_M, WIDTH).to(tl.float32)
    total *= gelu_derivative(z)  # rows outside of the stream are sums of zeros
    _store(dpre, dpre_tiles, total.to(dpre.dtype.element_ty), row, column, rows, N, TMA, BLOCK_M, WIDTH)
    columns = column + tl.arange(0, WIDTH)
    tl.store(sums + columns, tl.sum(total, axis=0), mask=columns < N)


@triton.jit
def hidden_gradient_product_kernel(
    dout,  # [R, M]
    weight0, weight1, weight2,  # [M, N]
    pre, dpre,  # [R, N]
    partial,  # [rows of tiles, N] fp32
    rows0, rows1, rows2, N, M,
    STREAMS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """dpre = (dout W) gelu'(pre), and the column sums of each row of tiles. HALVES, FLATTEN: as above."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N
    programs = tl.num_programs(0)
    before = 0  # tiles of the streams before
    for stream in tl.static_range(STREAMS):
        rows = pick(stream, rows0, rows1, rows2)
        weight = pick(stream, weight0, weight1, weight2)
        if TMA:
            dout_tiles = tl.make_tensor_descriptor(dout, [rows, M], [M, 1], [BLOCK_M, BLOCK_K])
            weight_tiles = tl.make_tensor_descriptor(weight, [M, N], [N, 1], [BLOCK_K, BLOCK_N])
            pre_tiles = tl.make_tensor_descriptor(pre, [rows, N], [N, 1], [BLOCK_M, WIDTH])
            dpre_tiles = tl.make_tensor_descriptor(dpre, [rows, N], [N, 1], [BLOCK_M, WIDTH])
        else:
            dout_tiles, weight_tiles, pre_tiles, dpre_tiles = None, None, None, None
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        start = (tl.program_id(0) + programs - before % programs) % programs
        for tile in tl.range(start, tiles, programs, flatten=FLATTEN):
            row, column = _place(tile, rows, N, BLOCK_M, BLOCK_N, GROUP)
            total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for k in range(0, M, BLOCK_K):
                a = _load(dout, dout_tiles, row, k, rows, M, TMA, BLOCK_M, BLOCK_K)
                b = _load(weight, weight_tiles, k, column, M, N, TMA, BLOCK_K, BLOCK_N)
                total = tl.dot(a, b, total, input_precision="ieee")
            sums = partial + (row // BLOCK_M).to(tl.int64) * N
            if HALVES:
                left, right = _halves(total, BLOCK_M, BLOCK_N)
                _dgelu_and_store(left, pre, pre_tiles, dpre, dpre_tiles, sums, row, column, rows, N, TMA, BLOCK_M, WIDTH)
                _dgelu_and_store(
                    right, pre, pre_tiles, dpre, dpre_tiles, sums, row, column + WIDTH, rows, N, TMA, BLOCK_M, WIDTH
                )
            else:
                _dgelu_and_store(total, pre, pre_tiles, dpre, dpre_tiles, sums, row, column, rows, N, TMA, BLOCK_M, WIDTH)
        dout += tl.cast(rows, tl.int64) * M
        pre += tl.cast(rows, tl.int64) * N
        dpre += tl.cast(rows, tl.int64) * N
        partial += tl.cast(tl.cdiv(rows, BLOCK_M), tl.int64) * N
        before += tiles


# ------------------------------------------------------------------------------------------------------- launchers


def _travel(architecture: str, *matrices: Tensor) -> str:
    """How tiles of the row-major matrices travel: by 'tma', by 'pointers', or value by value, 'odd', unless all addresses
    and rows are multiples of 16 bytes."""
    if any(m.data_ptr() % 16 or m.shape[1] * m.itemsize % 16 for m in matrices):
        return "odd"
    capability = int(architecture.partition(" ")[0].removeprefix("sm_"))
    return "tma" if capability >= TMA_SINCE else "pointers"


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _programs(device: torch.device, rows: Sequence[int], width: int, options: Launch) -> int:
    """One for each multiprocessor, or for each tile."""
    tiles = sum(triton.cdiv(n, options["BLOCK_M"]) for n in rows) * triton.cdiv(width, options["BLOCK_N"])
    count = INTERPRETED_PROGRAMS if device.type == "cpu" else _processors(device.index or 0)
    return min(count, tiles)


def _launched(run: Callable[[], object], device: torch.device) -> None:
    """`run()`, which launches a kernel that makes tensor descriptors: Triton asks for memory for them, on the device."""
    context = contextvars.copy_context()
    context.run(triton.set_allocator, lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    context.run(run)


def linear_gelu_product(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int], keep_pre: bool, architecture: str
) -> tuple[Tensor, Tensor]:
    """(y `[R, N]`; the values before the GELU `[R, N]`, or empty unless they are kept)."""
    width, depth = weights[0].shape
    y = x.new_empty(x.shape[0], width)
    pre = torch.empty_like(y) if keep_pre else x.new_empty(0)
    weights = [weight.contiguous() for weight in weights]
    travel = _travel(architecture, x, y, *weights, *([pre] if keep_pre else []))
    options = launch("linear_gelu_product", architecture, x.dtype, travel)
    grid = (_programs(x.device, rows, width, options),)
    _launched(
        lambda: linear_gelu_product_kernel[grid](
            x, *three(weights), *three(biases), y, pre if keep_pre else y, *three(rows), width, depth,
            STREAMS=len(rows), KEEP_PRE=keep_pre, TMA=travel == "tma", **options,
        ),
        x.device,
    )  # fmt: skip
    return y, pre


def hidden_gradient_product(
    dout: Tensor, pre: Tensor, weights: Sequence[Tensor], rows: Sequence[int], bias_dtype: torch.dtype, architecture: str
) -> tuple[Tensor, Tensor]:
    """(dpre `[R, N]`, db `[streams, N]`)."""
    depth, width = weights[0].shape
    dpre = torch.empty_like(pre)
    weights = [weight.contiguous() for weight in weights]
    travel = _travel(architecture, dout, pre, dpre, *weights)
    options = launch("hidden_gradient_product", architecture, pre.dtype, travel)
    tile_rows = three([triton.cdiv(n, options["BLOCK_M"]) for n in rows])
    partial = torch.empty(sum(tile_rows), width, dtype=torch.float32, device=pre.device)
    grid = (_programs(pre.device, rows, width, options),)
    _launched(
        lambda: hidden_gradient_product_kernel[grid](
            dout,
            *three(weights),
            pre,
            dpre,
            partial,
            *three(rows),
            width,
            depth,
            STREAMS=len(rows),
            TMA=travel == "tma",
            **options,
        ),
        pre.device,
    )
    return dpre, sum_of_streams(partial, tile_rows, len(rows), architecture).to(bias_dtype)
