"""The process that proves one operator in one dtype, or one model: `python -m benchmarks.suite.proof`.

It appends a JSON line to `--rows` after every case, so that what was found before a crash is not lost. Its exit code is 0
when it went through all cases, right or wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import DTYPES, error_text, find_device, first_line
from benchmarks.throughput import MODELS, exact_float32, release
from cavmae_fast import models
from cavmae_fast.ops import catalogue, dispatch, parity
from cavmae_fast.ops.catalogue import Case
from cavmae_fast.reference import cavmae as reference

MODEL_KINDS = ("CAVMAE", "CAVMAEFT")
FP16_LOSS_SCALE = 1024.0
LEAST_BATCH = 8
"Where the float64 reference does not fit, the batch is halved, down to this."
Write = Callable[[dict[str, Any]], None]


# -------------------------------------------------------------------------------------------------------- one operator


def prove_operator(operator: str, dtype: str, batch: int, tiny: bool, device: torch.device, write: Write) -> None:
    """One row a case, the models' own shapes first. Ends after an exception: a device may be unusable then, and the
    operator is not right in this dtype anyway."""
    with dispatch.override("triton"):
        choice = dispatch.choose(operator, device, DTYPES[dtype])
    if choice.implementation != "triton":  # or PyTorch's kernels would be proven in the place of ours
        write({"operator": operator, "dtype": dtype, "case": None, "right": None, "reason": choice.reason})
        return
    for make, samples in cases_of(operator, DTYPES[dtype], batch, tiny):
        row = {"operator": operator, "dtype": dtype} | compare_case(make, samples, DTYPES[dtype], device)
        write(row)
        release(device)
        if "error" in row:
            return


def cases_of(
    operator: str, dtype: torch.dtype, batch: int, tiny: bool
) -> Iterator[tuple[Callable[[int], Case], int | None]]:
    """The operator's cases: functions of the batch, and the batch to begin with (None: theirs is fixed)."""
    sets: list[tuple[Callable[[int], list[Case]], int | None]] = [(lambda _: catalogue.small(), None)]
    if not tiny:
        sets = [(catalogue.pretraining, batch), (catalogue.variants, batch), *sets]
    for cases, samples in sets:
        for index, case in enumerate(cases(samples or 1)):
            if case.operator == operator and dtype in case.dtypes:
                yield lambda n, cases=cases, index=index: cases(n)[index], samples


def compare_case(make: Callable[[int], Case], batch: int | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Errors and allowed errors of one case, at the largest batch that fits: `batch`, or a half of it, a quarter, ..."""
    case = make(batch or 1)
    row: dict[str, Any] = {"case": case.name, "batch": batch}
    try:
        with dispatch.override("triton"):
            inputs = case.inputs(dtype, device)
            results = parity.compare(case.ours, case.reference, inputs, baseline=case.baseline)
            repeats = parity.repeats(case.ours, inputs)
    except torch.OutOfMemoryError as error:
        reason = first_line(error)
    except Exception as error:
        return row | {"right": False, "reason": first_line(error), "error": error_text(error)}
    else:
        found = [{"what": r.what, "error": r.error, "allowed": r.allowed, "right": r.right} for r in results]
        right = repeats and all(r.right for r in results)
        return row | {"results": found, "repeats": repeats, "right": right} | _reason(results, repeats)
    if batch is None or batch // 2 < LEAST_BATCH:
        return row | {"right": False, "reason": reason, "error": reason}
    release(device)
    return compare_case(make, batch // 2, dtype, device)


def _reason(results: list[parity.Result], repeats: bool) -> dict[str, str]:
    """What is wrong, for the record's reader; empty when all is right."""
    wrong = [f"{r.what} is off by {r.error:.1e}, {r.allowed:.1e} is allowed" for r in results if not r.right]
    if not repeats:
        wrong.append("a second run gives other bits")
    return {"reason": "; ".join(wrong)} if wrong else {}


# ------------------------------------------------------------------------------------------------------------- a model


def _pretraining_loss(model: nn.Module, audio: Tensor, imgs: Tensor) -> Tensor:
    torch.manual_seed(3)
    return model(audio, imgs)[0]


def _classification_loss(model: nn.Module, audio: Tensor, imgs: Tensor) -> Tensor:
    logits = model(audio, imgs, "multimodal")
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % logits.shape[1])


def _evaluate(
    model: nn.Module, loss_of: Callable, inputs: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss and all gradients in a row, in float64. `dtype` is autocast's where it is a 16-bit one."""
    device, parameters = inputs[0].device.type, [p for p in model.parameters() if p.requires_grad]
    scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
    with torch.autocast(device, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
        loss = loss_of(model, *inputs)
    gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True, materialize_grads=True)
    return loss.detach().double(), torch.cat([g.flatten().double() for g in gradients]) / scale


def prove_model(kind: str, tiny: bool, device: torch.device, write: Write) -> None:
    """Loss and gradients of the fast model `kind` on its kernels against the reference in float64; one row a dtype."""
    config, loss_of = dict(MODELS["tiny" if tiny else "base"]), _pretraining_loss
    if kind == "CAVMAEFT":
        loss_of = _classification_loss
        config = {k: v for k, v in config.items() if not k.startswith("decoder")} | {"label_dim": 10}
    torch.manual_seed(0)
    plain = getattr(reference, kind)(**config, attention="sdpa").to(device)
    (rows, frames), (height, width) = plain.patch_embed_a.img_size, plain.patch_embed_v.img_size
    inputs = tuple(torch.randn(4, *shape).to(device) for shape in ((frames, rows), (3, height, width)))
    fast = getattr(models, kind)(**config).to(device)
    fast.load_state_dict(plain.state_dict())
    base = {name: _evaluate(plain, loss_of, inputs, dtype) for name, dtype in DTYPES.items()}
    want = _evaluate(plain.double(), loss_of, tuple(x.double() for x in inputs), torch.float64)
    for name, dtype in DTYPES.items():
        row: dict[str, Any] = {"model": kind, "dtype": name}
        if name == "bf16" and dispatch.interpreting():
            write(row | {"right": None, "reason": "Triton's interpreter has no bf16"})
            continue
        with dispatch.override("triton"):
            got = _evaluate(fast, loss_of, inputs, dtype)
        for what, value, exact, near in zip(("loss", "gradient"), got, want, base[name]):
            error, floor = parity.error(value, exact), 2 * torch.finfo(dtype).eps
            row[what] = {"error": error, "allowed": 2 * parity.error(near, exact) + floor}
        row["right"] = all(row[what]["error"] <= row[what]["allowed"] for what in ("loss", "gradient"))
        write(row)


# --------------------------------------------------------------------------------------------------------- the process


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operator", help="an operator; with --dtype")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--model", choices=MODEL_KINDS, help="a model, instead of an operator")
    parser.add_argument("--device", required=True)
    parser.add_argument("--batch", type=int, default=LEAST_BATCH)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=Path, required=True, help="file to which a JSON line is appended for each case")
    args = parser.parse_args(arguments)
    device = find_device(parser, args.device)

    def write(row: dict[str, Any]) -> None:
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    with exact_float32():
        if args.model is not None:
            prove_model(args.model, args.tiny, device, write)
        else:
            prove_operator(args.operator, args.dtype, args.batch, args.tiny, device, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
