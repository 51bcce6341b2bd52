"""Section `parity`: every operator's kernels, and the models on them, against float64 on the device itself.

An error may be twice that of an explicit low-precision implementation, plus rounding: the rule and the sample calls are
those of `tests/ops`. An operator that passes in bf16, fp16 and fp32 is right on this architecture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import DTYPES, ROOT, BenchmarkError, error_text, first_line
from report import Report
from throughput import MODELS, exact_float32, release
from torch import Tensor, nn

from cavmae_fast import models
from cavmae_fast.ops import registry
from cavmae_fast.reference import cavmae as reference

sys.path.insert(0, str(ROOT / "tests" / "ops"))
from samples import Sample, samples

from cavmae_fast.ops import parity as harness

FP16_LOSS_SCALE = 1024.0


def compare(sample: Sample, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Error and allowed error of every output and gradient, and whether a second run gives the same bits."""
    inputs = sample.inputs(dtype, device)
    exact = harness.convert(inputs, lambda t: t.double() if t.is_floating_point() else t)
    want, want_gradients, cotangents = harness.run(sample.reference, exact)
    base = harness.run(sample.baseline(dtype), harness.convert(inputs, torch.clone), cotangents)
    with registry.override("triton"), harness.poisoned_allocations():
        got, again = (harness.run(sample.function, harness.convert(inputs, harness.guarded), cotangents) for _ in "12")
    names = [f"output {i}" for i in range(len(want))] + [f"gradient {i}" for i in range(len(want_gradients))]
    results = []
    for name, value, exact_value, base_value in zip(
        names, [*got[0], *got[1]], [*want, *want_gradients], [*base[0], *base[1]], strict=True
    ):
        eps = torch.finfo(value.dtype).eps
        error, allowed = harness.error(value, exact_value), 2 * harness.error(base_value, exact_value) + 2 * eps
        results.append({"what": name, "error": error, "allowed": allowed, "right": error <= allowed})
    repeats = all(torch.equal(a, b) for a, b in zip([*got[0], *got[1]], [*again[0], *again[1]], strict=True))
    return {"results": results, "repeats": repeats, "right": repeats and all(r["right"] for r in results)}


def operators(report: Report) -> dict[str, bool]:
    """One row a sample and dtype -> operator: right in every one of them."""
    right = dict.fromkeys((name for name, has_kernels in registry.operators.items() if has_kernels), True)
    seen = set()
    chosen = samples("small") if report.tiny else samples("real") + samples("small")
    for sample in chosen:
        if sample.operator not in right:
            continue
        seen.add(sample.operator)
        for name, dtype in DTYPES.items():
            row: dict[str, Any] = {"operator": sample.operator, "case": sample.case, "dtype": name}
            if name == "bf16" and registry.interpreting():
                report.add("operators", row | {"right": None, "reason": "Triton's interpreter has no bf16"})
                continue
            try:
                row |= compare(sample, dtype, report.device)
            except Exception as error:  # one operator's crash must not hide what the others do
                row |= {"right": False, "reason": first_line(error), "error": error_text(error)}
            report.add("operators", row)
            right[sample.operator] &= row["right"]
    return {name: passed and name in seen for name, passed in right.items()}


# ---------------------------------------------------------------------------------------------------------- models


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


def compare_models(report: Report, kind: str) -> None:
    """Loss and gradients of the fast model `kind` on its kernels against the reference in float64; one row a dtype."""
    device, config = report.device, dict(MODELS["tiny" if report.tiny else "base"])
    loss_of = _pretraining_loss
    if kind == "CAVMAEFT":
        loss_of = _classification_loss
        config = {k: v for k, v in config.items() if not k.startswith("decoder")} | {"label_dim": 10}
    torch.manual_seed(0)
    plain = getattr(reference, kind)(**config, attention="sdpa").to(device)
    (rows, frames), (height, width) = plain.patch_embed_a.img_size, plain.patch_embed_v.img_size
    inputs = tuple(torch.randn(4, *shape).to(device) for shape in ((frames, rows), (3, height, width)))
    fast = getattr(models, kind)(**config).to(device)
    fast.load_state_dict(plain.state_dict())
    base = {n: _evaluate(plain, loss_of, inputs, d) for n, d in DTYPES.items()}
    want = _evaluate(plain.double(), loss_of, tuple(x.double() for x in inputs), torch.float64)
    for name, dtype in DTYPES.items():
        row: dict[str, Any] = {"model": kind, "dtype": name}
        if name == "bf16" and registry.interpreting():
            report.add("models", row | {"right": None, "reason": "Triton's interpreter has no bf16"})
            continue
        with registry.override("triton"):
            got = _evaluate(fast, loss_of, inputs, dtype)
        for what, value, exact, near in zip(("loss", "gradient"), got, want, base[name]):
            error, floor = harness.error(value, exact), 2 * torch.finfo(dtype).eps
            row[what] = {"error": error, "allowed": 2 * harness.error(near, exact) + floor}
        row["right"] = all(row[what]["error"] <= row[what]["allowed"] for what in ("loss", "gradient"))
        report.add("models", row)


def run(report: Report) -> None:
    """The section. Raises BenchmarkError, naming them, when an operator or a model is wrong."""
    report.data["architecture"] = registry.architecture(report.device.index or 0) if report.on_gpu else None
    with exact_float32():
        report.data["right"] = right = operators(report)
        report.save()
        release(report.device)
        for kind in ("CAVMAE", "CAVMAEFT"):
            compare_models(report, kind)
            release(report.device)
    wrong = [name for name, passed in right.items() if not passed]
    wrong += [f"{row['model']} in {row['dtype']}" for row in report.data["models"] if row["right"] is False]
    if wrong:
        raise BenchmarkError(f"wrong on this device: {', '.join(wrong)}")
