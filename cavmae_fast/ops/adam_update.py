"""Adam's update of many parameters at once: float32 weights and moments, gradients in float32 or 16 bits, and the weights
rounded to 16 bits beside them.

    g = grad / grad_scale                    (+ weight_decay * p, where the decay is not decoupled: Adam with L2)
    p = p (1 - lr * weight_decay)            (where it is decoupled: AdamW)
    m = m + (1 - beta1) (g - m),    v = beta2 v + (1 - beta2) g^2
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps),    rounded = p

Nothing changes where `found_inf` is not 0. Everything that changes from step to step (the step t, the learning rate, scales)
may lie on the device, so a CUDA graph can hold the update.

The kernel is one launch for all tensors of a dtype. It finds them by a table of addresses in device memory, and a list of
chunks says which stretch of which tensor a program takes. An update in bf16 with rounded weights moves 28 bytes per
parameter; PyTorch's fused kernel moves as many and leaves gradients (6 bytes) and weights (6 bytes) to be converted apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from cavmae_fast.compat import foreach
from cavmae_fast.ops._triton import tl, triton
from cavmae_fast.ops.configuration import launch
from cavmae_fast.ops.dispatch import register

ALIGNMENT = 16
"Tensors whose addresses and sizes are multiples of it are read 16 bytes at a time."
KEPT_TABLES = 8
"Tables of addresses that are kept for steps whose tensors lie where those of an earlier one did."
SPARE_TABLES = 64
"Of each size at most as many pieces of pinned memory are kept for the tables of steps that are captured."

# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _one_minus_power(log_base, exponent):
    """1 - base^exponent, for a base near 1 too, where a difference would cancel: the series is exact to 1e-8 there."""
    x = log_base * exponent
    near = tl.maximum(x, -0.5)
    series = 1 + near / 5 * (1 + near / 6 * (1 + near / 7 * (1 + near / 8)))
    series = -near * (1 + near / 2 * (1 + near / 3 * (1 + near / 4 * series)))
    return tl.where(x > -0.5, series, 1 - tl.exp(x))


@triton.jit
def adam_update_kernel(
    table,  # [tensors, 7] int64: addresses of weight, gradient, both moments, step, rounded weight; elements
    chunks,  # [programs, 2] int32: tensor, number of the chunk in it
    rate,  # the learning rate, or [] of it
    found_inf, grad_scale,  # [] or None
    beta1, beta2, log_beta1, log_beta2, eps, weight_decay,
    GRADIENT: tl.constexpr, ROUNDED: tl.constexpr, RATE_ON_DEVICE: tl.constexpr, DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr, HAS_FOUND_INF: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program updates a chunk of CHUNK elements, BLOCK at a time. The steps are counted already."""
    program = tl.program_id(0)
    row = table + tl.load(chunks + 2 * program).to(tl.int64) * 7
    weights = tl.load(row).to(tl.pointer_type(tl.float32))
    gradients = tl.load(row + 1).to(tl.pointer_type(GRADIENT))
    first_moments = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    second_moments = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)))
    if ROUNDED is not None:
        copies = tl.load(row + 5).to(tl.pointer_type(ROUNDED))
    if ALIGNED:
        weights, gradients = tl.multiple_of(weights, 16), tl.multiple_of(gradients, 16)
        first_moments, second_moments = tl.multiple_of(first_moments, 16), tl.multiple_of(second_moments, 16)
        if ROUNDED is not None:
            copies = tl.multiple_of(copies, 16)
    begin, count = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK, tl.load(row + 6)
    if HAS_FOUND_INF:
        count = tl.where(tl.load(found_inf) == 0, count, 0)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    if RATE_ON_DEVICE:
        rate = tl.load(rate).to(tl.float32)
    step_size = rate / _one_minus_power(log_beta1, step)
    inverse_root = 1 / tl.sqrt(_one_minus_power(log_beta2, step))
    for start in range(0, CHUNK, BLOCK):
        place = begin + start + tl.arange(0, BLOCK)
        inside = place < count
        p = tl.load(weights + place, mask=inside, other=0.0)
        g = tl.load(gradients + place, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(first_moments + place, mask=inside, other=0.0)
        v = tl.load(second_moments + place, mask=inside, other=0.0)
        if HAS_GRAD_SCALE:
            g = g / tl.load(grad_scale)
            tl.store(gradients + place, g.to(GRADIENT), mask=inside)
        if MAXIMIZE:
            g = -g
        if DECOUPLED:
            p -= rate * weight_decay * p
        else:
            g += weight_decay * p
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p -= step_size * m / (tl.sqrt(v) * inverse_root + eps)
        tl.store(weights + place, p, mask=inside)
        tl.store(first_moments + place, m, mask=inside)
        tl.store(second_moments + place, v, mask=inside)
        if ROUNDED is not None:
            tl.store(copies + place, p.to(ROUNDED), mask=inside)


# ------------------------------------------------------------------------------------------------------- launchers


@functools.cache  # for good: a CUDA graph may read it at any time
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """The chunks of tensors of these sizes, `[programs, 2]` int32: tensor, number of the chunk in it."""
    counts = torch.tensor([triton.cdiv(size, chunk) for size in sizes])
    tensors = torch.arange(len(sizes)).repeat_interleave(counts)
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([tensors, torch.arange(len(tensors)) - before], dim=1).to(torch.int32).to(device)


class _Tables:
    """Tables of addresses on their device. Most steps find the table of an earlier one, because PyTorch's allocator gives
    gradients the memory that they had."""

    def __init__(self) -> None:
        self._known: dict[tuple, Tensor] = {}
        self._captured: list[tuple[Tensor | None, Tensor]] = []
        self._spare: dict[torch.device, list[Tensor]] = {}

    def get(self, rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
        """`rows` as `[len(rows), 7]` int64 on the device."""
        key, host = (device, *rows), torch.tensor(rows, dtype=torch.int64)
        if device.type != "cuda":
            return host
        table = self._known.get(key)
        if torch.cuda.is_current_stream_capturing():
            return self._in_graph(host, table, device)
        if table is None:
            while len(self._known) >= KEPT_TABLES:
                del self._known[next(iter(self._known))]
            table = self._known[key] = host.to(device, non_blocking=True)  # pageable memory is staged: nobody waits
        spare = self._spare.setdefault(device, [])
        if sum(memory.numel() >= host.numel() for memory in spare) < SPARE_TABLES:
            spare.append(torch.empty(host.numel(), dtype=torch.int64, pin_memory=True))
        return table

    def _in_graph(self, host: Tensor, table: Tensor | None, device: torch.device) -> Tensor:
        """A table that is kept for good. One that is not there yet is copied by the graph itself, from pinned memory that
        was made by an earlier step, as much for each of its tables: it must not be allocated now."""
        source = None
        if table is None:
            spare = self._spare.get(device, [])
            places = [place for place, memory in enumerate(spare) if memory.numel() >= host.numel()]
            if not places:
                raise RuntimeError("an update of Adam was captured in a CUDA graph before one ran; run a step before it")
            memory = spare.pop(min(places, key=lambda place: spare[place].numel()))
            source = memory[: host.numel()].view(host.shape).copy_(host)
            table = source.to(device, non_blocking=True)
        self._captured.append((source, table))
        return table


_tables = _Tables()


def _update_triton(
    grads, params, exp_avgs, exp_avg_sqs, steps, rounded, rate, lr, beta1, beta2, eps, weight_decay, decoupled, maximize,
    grad_scale, found_inf, architecture,
):  # fmt: skip
    foreach("add_", steps, 1)
    groups: dict[bool, list[tuple[int, ...]]] = {}
    columns = [params, grads, exp_avgs, exp_avg_sqs, steps, rounded or params]
    for tensors in zip(*columns, strict=True):
        *addresses, step, copy = (tensor.data_ptr() for tensor in tensors)
        size = tensors[0].numel()
        aligned = all(number % ALIGNMENT == 0 for number in (*addresses, copy, size))
        groups.setdefault(aligned, []).append((*addresses, step, copy, size))
    options = launch("adam_update", architecture, grads[0].dtype)
    for aligned, rows in groups.items():
        chunks = _chunks(tuple(row[-1] for row in rows), options["CHUNK"], params[0].device)
        adam_update_kernel[(len(chunks),)](
            _tables.get(rows, params[0].device), chunks, lr if rate is None else rate, found_inf, grad_scale, beta1, beta2,
            _log(beta1), _log(beta2), eps, weight_decay, GRADIENT=_type(grads), ROUNDED=_type(rounded),
            RATE_ON_DEVICE=rate is not None, DECOUPLED=decoupled, MAXIMIZE=maximize, HAS_FOUND_INF=found_inf is not None,
            HAS_GRAD_SCALE=grad_scale is not None, ALIGNED=aligned, **options,
        )  # fmt: skip
    if found_inf is not None:
        foreach("sub_", steps, [found_inf] * len(steps))


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _type(tensors: Sequence[Tensor]) -> tl.dtype | None:
    """Triton's name of the tensors' dtype; None for no tensors."""
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return getattr(tl, names[tensors[0].dtype]) if tensors else None


def _update_torch(
    grads, params, exp_avgs, exp_avg_sqs, steps, rounded, rate, lr, beta1, beta2, eps, weight_decay, decoupled, maximize,
    grad_scale, found_inf,
):  # fmt: skip
    """PyTorch's fused kernel, between conversions. On a CPU tensor by tensor, so that what is converted is in the cache."""
    converted = grads[0].dtype != params[0].dtype
    at_once = 1 if params[0].device.type == "cpu" and (converted or rounded) else len(params)
    parts = [slice(first, first + at_once) for first in range(0, len(params), at_once)]
    room = params[0].new_empty(max(sum(p.numel() for p in params[part]) for part in parts) if converted else 0)
    for part in parts:
        wide = grads[part]
        if converted:
            pieces = room.split([p.numel() for p in params[part]] + [len(room) - sum(p.numel() for p in params[part])])
            wide = [piece.as_strided(p.shape, p.stride()) for piece, p in zip(pieces, params[part])]
            foreach("copy_", wide, grads[part])
        adam(
            params[part], wide, exp_avgs[part], exp_avg_sqs[part], [], steps[part], fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=lr if rate is None else rate, weight_decay=weight_decay, eps=eps, maximize=maximize,
            grad_scale=grad_scale, found_inf=found_inf, decoupled_weight_decay=decoupled,
        )  # fmt: skip
        if converted and grad_scale is not None:
            foreach("copy_", grads[part], wide)  # they are left divided
        if rounded:
            foreach("copy_", rounded[part], params[part])


# -------------------------------------------------------------------------------------------------- torch operator


adam_update = register(
    "adam_update",
    "(Tensor(a!)[] grads, Tensor(b!)[] params, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps,"
    " Tensor(f!)[] rounded, Tensor? rate, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " bool decoupled, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    torch=_update_torch,
    triton=_update_triton,
    fake=lambda *args: None,
)
"""One step of Adam, in place, on tensors of one device: gradients of one dtype, weights, both moments and steps in float32
(steps `[]` each, of the step before), and `rounded`: tensors of one 16-bit dtype that the weights are rounded to, or none.
What belongs to a parameter lies dense in memory, with the same strides.

The learning rate is `rate`, `[]` on the device, or else `lr`. `decoupled`: AdamW's weight decay, else L2. `grad_scale`: what
gradients are divided by, which they are left as. `found_inf`: where it is not 0, nothing is changed.
"""
