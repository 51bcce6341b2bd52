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
from cavmae_fast.ops.gelu import gelu, gelu_derivative
from cavmae_fast.ops.stream_tiles import pick, sum_of_streams, three

INTERPRETED_PROGRAMS = 3
"Programs where there is no GPU: few, so that each takes several tiles in the tests."
TMA_SINCE = 90
"Compute capability with tensor descriptors in hardware."

# --------------------------------------------------------------------------------------------------------- kernels


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
def _finish(
    total,  # [BLOCK_M, WIDTH] fp32
    bias, weight_scale, x_scale, out, out_tiles, pre, pre_tiles, sums, row, column, rows, N,
    LAST: tl.constexpr, KEEP_PRE: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What is done with a tile of the product before it is written; `LAST` says what (`stream_product_kernel`)."""
    dtype: tl.constexpr = out.dtype.element_ty
    columns = column + tl.arange(0, WIDTH)
    inside = columns < N
    if x_scale is not None:
        r = row + tl.arange(0, BLOCK_M)
        of_rows = tl.load(x_scale + r, mask=r < rows, other=0.0)
        total = total * of_rows[:, None] * tl.load(weight_scale + columns, mask=inside, other=0.0)[None, :]
    if LAST == "dgelu":
        z = _load(pre, pre_tiles, row, column, rows, N, TMA, BLOCK_M, WIDTH).to(tl.float32)
        total *= gelu_derivative(z)  # rows outside of the stream are sums of zeros
        _store(out, out_tiles, total.to(dtype), row, column, rows, N, TMA, BLOCK_M, WIDTH)
        tl.store(sums + columns, tl.sum(total, axis=0), mask=inside)
    else:
        if bias is not None:
            total += tl.load(bias + columns, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
        value = total.to(dtype)
        if LAST == "gelu":
            if KEEP_PRE:
                _store(pre, pre_tiles, value, row, column, rows, N, TMA, BLOCK_M, WIDTH)
            value = gelu(value.to(tl.float32)).to(dtype)  # of the value as it is stored, as in two passes
        _store(out, out_tiles, value, row, column, rows, N, TMA, BLOCK_M, WIDTH)


@triton.jit
def stream_product_kernel(
    x,  # [R, K]
    weight0, weight1, weight2,  # [N, K], or with ROWS_OF_K [K, N]
    bias0, bias1, bias2,  # [N], or None
    x_scale,  # [R] fp32, or None
    scale0, scale1, scale2,  # [N] fp32, or None
    out,  # [R, N]
    pre,  # [R, N], or None
    partial,  # [rows of tiles, N] fp32, or None
    rows0, rows1, rows2, N, K,
    STREAMS: tl.constexpr, LAST: tl.constexpr, KEEP_PRE: tl.constexpr, ROWS_OF_K: tl.constexpr, TMA: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """The product x W^T of each stream's rows, of 8-bit numbers times the scales of its rows and columns, and then by LAST:

    - "bias": out is the product and the bias, where there is one;
    - "gelu": and its GELU; pre is what it is of, written with KEEP_PRE;
    - "dgelu": out is the product times the GELU's derivative at pre, and `partial` the column sums of each row of tiles.

    HALVES: the last step takes a tile's columns in halves, for fewer registers. FLATTEN: the first tiles of the next product
    are fetched during the last step. PROMOTE: sums of 8-bit numbers go to float32 every BLOCK_K products, where the units
    add up with less."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N
    programs = tl.num_programs(0)
    before = 0  # tiles of the streams before
    for stream in tl.static_range(STREAMS):
        rows = pick(stream, rows0, rows1, rows2)
        weight = pick(stream, weight0, weight1, weight2)
        bias = pick(stream, bias0, bias1, bias2)
        weight_scale = pick(stream, scale0, scale1, scale2)
        x_tiles, weight_tiles, out_tiles, pre_tiles = None, None, None, None
        if TMA:
            x_tiles = tl.make_tensor_descriptor(x, [rows, K], [K, 1], [BLOCK_M, BLOCK_K])
            if ROWS_OF_K:
                weight_tiles = tl.make_tensor_descriptor(weight, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
            else:
                weight_tiles = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
            out_tiles = tl.make_tensor_descriptor(out, [rows, N], [N, 1], [BLOCK_M, WIDTH])
            if pre is not None:
                pre_tiles = tl.make_tensor_descriptor(pre, [rows, N], [N, 1], [BLOCK_M, WIDTH])
        tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        start = (tl.program_id(0) + programs - before % programs) % programs
        for tile in tl.range(start, tiles, programs, flatten=FLATTEN):
            row, column = _place(tile, rows, N, BLOCK_M, BLOCK_N, GROUP)
            total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                a = _load(x, x_tiles, row, k, rows, K, TMA, BLOCK_M, BLOCK_K)
                if ROWS_OF_K:
                    b = _load(weight, weight_tiles, k, column, K, N, TMA, BLOCK_K, BLOCK_N)
                else:
                    b = _load(weight, weight_tiles, column, k, N, K, TMA, BLOCK_N, BLOCK_K).T
                if PROMOTE:
                    total = tl.dot(a, b, total, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
                else:
                    total = tl.dot(a, b, total, input_precision="ieee")
            sums = partial
            if partial is not None:
                sums += (row // BLOCK_M).to(tl.int64) * N
            if HALVES:
                left, right = _halves(total, BLOCK_M, BLOCK_N)
                _finish(
                    left, bias, weight_scale, x_scale, out, out_tiles, pre, pre_tiles, sums, row, column, rows, N,
                    LAST, KEEP_PRE, TMA, BLOCK_M, WIDTH,
                )  # fmt: skip
                _finish(
                    right, bias, weight_scale, x_scale, out, out_tiles, pre, pre_tiles, sums, row, column + WIDTH, rows, N,
                    LAST, KEEP_PRE, TMA, BLOCK_M, WIDTH,
                )  # fmt: skip
            else:
                _finish(
                    total, bias, weight_scale, x_scale, out, out_tiles, pre, pre_tiles, sums, row, column, rows, N,
                    LAST, KEEP_PRE, TMA, BLOCK_M, WIDTH,
                )  # fmt: skip
        x += tl.cast(rows, tl.int64) * K
        out += tl.cast(rows, tl.int64) * N
        if pre is not None:
            pre += tl.cast(rows, tl.int64) * N
        if partial is not None:
            partial += tl.cast(tl.cdiv(rows, BLOCK_M), tl.int64) * N
        if x_scale is not None:
            x_scale += rows
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


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    rows: Sequence[int],
    architecture: str,
    out: Tensor,
    *,
    last: str,
    biases: Sequence[Tensor] = (),
    pre: Tensor | None = None,
    keep_pre: bool = False,
    rows_of_k: bool = False,
    scales: tuple[Tensor, Sequence[Tensor]] | None = None,
) -> Tensor | None:
    """Runs `stream_product_kernel`, with `last` as its last step. `scales`: those of x and of the weights, where they are of
    8-bit numbers. For "dgelu" -> the sums of out's columns, `[streams, N]` fp32."""
    width, depth = out.shape[1], x.shape[1]
    travel = _travel(architecture, x, out, *weights, *([] if pre is None else [pre]))
    options = launch("stream_product", architecture, x.dtype, f"{last} {travel}")
    sums, tile_rows = None, three([triton.cdiv(n, options["BLOCK_M"]) for n in rows])
    if last == "dgelu":
        sums = torch.empty(sum(tile_rows), width, dtype=torch.float32, device=out.device)
    x_scale, of_weights = scales or (None, [None])
    grid = (_programs(x.device, rows, width, options),)
    _launched(
        lambda: stream_product_kernel[grid](
            x, *three(weights), *three(biases or [None]), x_scale, *three(of_weights), out, pre, sums, *three(rows), width,
            depth, STREAMS=len(rows), LAST=last, KEEP_PRE=keep_pre, ROWS_OF_K=rows_of_k, TMA=travel == "tma",
            PROMOTE=x.dtype == torch.float8_e5m2, **options,
        ),
        x.device,
    )  # fmt: skip
    return None if sums is None else sum_of_streams(sums, tile_rows, len(rows), architecture)


def linear_gelu_product(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Sequence[int], keep_pre: bool, architecture: str
) -> tuple[Tensor, Tensor]:
    """(y `[R, N]`; the values before the GELU `[R, N]`, or empty unless they are kept)."""
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    pre = torch.empty_like(y) if keep_pre else None
    weights = [weight.contiguous() for weight in weights]
    options = {"last": "gelu", "biases": biases, "pre": pre, "keep_pre": keep_pre}
    _launch(x, weights, rows, architecture, y, **options)
    return y, pre if keep_pre else x.new_empty(0)


def hidden_gradient_product(
    dout: Tensor, pre: Tensor, weights: Sequence[Tensor], rows: Sequence[int], bias_dtype: torch.dtype, architecture: str
) -> tuple[Tensor, Tensor]:
    """(dpre `[R, N]`, db `[streams, N]`)."""
    dpre, weights = torch.empty_like(pre), [weight.contiguous() for weight in weights]
    options = {"last": "dgelu", "pre": pre, "rows_of_k": True}
    return dpre, _launch(dout, weights, rows, architecture, dpre, **options).to(bias_dtype)


def fp8_product_triton(
    x: Tensor,
    scale: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[int],
    dtype: torch.dtype,
    architecture: str,
) -> Tensor:
    """`x W^T + b` of 8-bit x `[R, K]` and weights `[N, K]` with scales `[R, 1]` and `[N, 1]` -> `[R, N]` in `dtype`."""
    out = torch.empty(x.shape[0], weights[0].shape[0], dtype=dtype, device=x.device)
    options = {"last": "bias", "biases": biases, "scales": (scale, scales)}
    _launch(x, weights, rows, architecture, out, **options)
    return out


def fp8_hidden_gradient_product(
    dout: Tensor,
    scale: Tensor,
    pre: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    rows: Sequence[int],
    bias_dtype: torch.dtype,
    architecture: str,
) -> tuple[Tensor, Tensor]:
    """`hidden_gradient_product` of 8-bit dout `[R, M]` and transposed weights `[N, M]`, with their scales."""
    dpre = torch.empty_like(pre)
    options = {"last": "dgelu", "pre": pre, "scales": (scale, scales)}
    db = _launch(dout, weights, rows, architecture, dpre, **options)
    return dpre, db.to(bias_dtype)
