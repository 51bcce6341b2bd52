"""The reference and the fast models against outputs and gradients of the published implementation.

The golden values are float32 numbers of one machine; float32 numbers of another machine differ from them by rounding. So the
judge is the reference in float64, whose results are the same everywhere. The golden values must be near it, by fixed bounds.
The fast models in float32 may be as far from it as twice what the golden values and the reference in float32 are. A single
number's error is a matter of luck, hence the largest and the middle error of many are compared, not each with its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import ModuleType

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast import models
from cavmae_fast.reference import cavmae as reference
from cavmae_fast.reference.cavmae_parameters import MODES

OUTPUTS = ("loss", "loss_mae", "loss_mae_a", "loss_mae_v", "loss_c", "mask_a", "mask_v", "c_acc")
INPAINTING = tuple(f"inpaint.{name}" for name in ("pred_a", "pred_v", "mask_a", "mask_v", "loss_a", "loss_v"))
EQUAL = ("mask_a", "mask_v", "c_acc")
"Outputs that are equal to the golden values, not near them."
PRETRAINING = ["cavmae_small_normpix", "cavmae_small_rawpix", "cavmae_base_normpix"]

# How far the golden values may be from float64, relative to their norm. This depends on no machine.
NEAR_OUTPUT, NEAR_GRADIENT = 2e-5, 1e-4
# The norms of gradients in the files are sums in float32, which alone are off by this much in the largest matrices.
NEAR_NORM = 3e-4
# float32's spacing at the largest number on the way to a loss: a similarity of up to 1 over the temperature 0.05.
FLOOR = torch.finfo(torch.float32).eps / 0.05

Values = dict[str, Tensor]
"Outputs or gradients, by the golden file's names."


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


def errors(got: Values, exact: Values) -> list[float]:
    assert got.keys() == exact.keys()
    return [relative(got[key], exact[key]) for key in exact]


def assert_as_exact(got: Sequence[float], baseline: Sequence[float], floor: float = 0.0) -> None:
    """The largest and the middle of the errors are at most twice those of the baseline."""
    for measure in (max, statistics.median):
        measured, allowed = measure(got), 2 * measure(baseline) + floor
        assert measured <= allowed, f"{measure.__name__} of the relative errors {measured:.2e}, allowed {allowed:.2e}"


def run(implementation: ModuleType, metadata: dict, dtype: torch.dtype) -> tuple[Values, Values]:
    """(outputs, gradients) of one pretraining step; among the outputs what `forward_inpaint` and `forward_feat` return."""
    model = golden.fill(implementation.CAVMAE(**metadata["config"])).to(dtype)
    audio, imgs = (x.to(dtype) for x in golden.inputs(metadata))
    torch.manual_seed(metadata["mask_seed"])
    outputs = dict(zip(OUTPUTS, model(audio, imgs, **metadata["forward"])))
    outputs["loss"].backward()
    with torch.no_grad():
        torch.manual_seed(metadata["mask_seed"])
        outputs |= zip(INPAINTING, model.forward_inpaint(audio, imgs), strict=True)
        feature_a, feature_v = model.forward_feat(audio, imgs)
        outputs |= {"feat.a_mean": feature_a.mean(1), "feat.v_mean": feature_v.mean(1)}
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in outputs.items()}, gradients


def held(x: Tensor, want: Tensor) -> Tensor:
    """The part of an output that the file holds: all of it, or its first tokens."""
    return x[:, : want.shape[1]] if x.ndim else x


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining(name):
    want, metadata = golden.load(name)
    exact, exact_gradients = run(reference, metadata, torch.float64)
    near, gradients = run(reference, metadata, torch.float32)
    baseline = errors(gradients, exact_gradients)
    del gradients  # 0.8 GB at the published size
    got, gradients = run(models, metadata, torch.float32)
    for key in EQUAL:
        for outputs in (exact, near, got):
            inpainted = outputs.pop(f"inpaint.{key}", want[key])
            assert torch.equal(outputs.pop(key).float(), want[key]) and torch.equal(inpainted.float(), want[key]), key

    own = [relative(want[key], held(value, want[key])) for key, value in exact.items()]
    assert max(own) < NEAR_OUTPUT
    assert_as_exact(errors(got, exact), own + errors(near, exact), FLOOR)

    assert sorted(exact_gradients) == sorted(k.removeprefix("gradnorm.") for k in want if k.startswith("gradnorm."))
    for key, gradient in exact_gradients.items():
        norm, part = gradient.norm(), want[f"grad.{key}"].flatten()  # of the largest matrices the file holds a part
        assert relative(want[f"gradnorm.{key}"], norm) < NEAR_NORM, key
        assert (gradient.flatten()[: part.numel()] - part).norm() < NEAR_GRADIENT * norm, key
    assert_as_exact(errors(gradients, exact_gradients), baseline)


def classify(model: torch.nn.Module, metadata: dict, mode: str, dtype: torch.dtype) -> tuple[Values, Values]:
    """(logits, gradients) of the classifier."""
    model.zero_grad(set_to_none=True)
    audio, imgs = (x.to(dtype) for x in golden.inputs(metadata))
    target = torch.linspace(0, 1, metadata["config"]["label_dim"]).to(dtype).expand(metadata["batch"], -1)
    logits = model(audio, imgs, mode)
    F.binary_cross_entropy_with_logits(logits, target).backward()
    return {mode: logits.detach()}, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def features(model: torch.nn.Module, metadata: dict, dtype: torch.dtype) -> Values:
    audio, imgs = (x.to(dtype) for x in golden.inputs(metadata))
    feature_a, feature_v = model.forward_feat(audio, imgs)
    alone = model.forward_feat(audio, imgs, mode="a")
    return {"feat.a_mean": feature_a.mean(1), "feat.v_mean": feature_v.mean(1), "feat.a_only_mean": alone.mean(1)}


def test_fine_tuned():
    want, metadata = golden.load("cavmaeft_small")
    kinds = [(reference, torch.float64), (reference, torch.float32), (models, torch.float32)]
    built = [(golden.fill(kind.CAVMAEFT(**metadata["config"])).to(dtype), dtype) for kind, dtype in kinds]
    exact, near, got = (features(model, metadata, dtype) for model, dtype in built)
    for mode in MODES:
        results = [classify(model, metadata, mode, dtype) for model, dtype in built]
        for outputs, (logits, _) in zip((exact, near, got), results):
            outputs |= logits
        exact_gradients, near_gradients, gradients = (found for _, found in results)
        named = sorted(k.removeprefix(f"gradnorm.{mode}.") for k in want if k.startswith(f"gradnorm.{mode}."))
        assert sorted(exact_gradients) == named
        for key, gradient in exact_gradients.items():
            assert relative(want[f"gradnorm.{mode}.{key}"], gradient.norm()) < NEAR_NORM, f"{mode} {key}"
        assert_as_exact(errors(gradients, exact_gradients), errors(near_gradients, exact_gradients))
    own = errors({key: want[key] for key in exact}, exact)
    assert max(own) < NEAR_OUTPUT
    assert_as_exact(errors(got, exact), own + errors(near, exact), FLOOR)


@pytest.mark.parametrize("implementation", [pytest.param(reference, id="reference"), pytest.param(models, id="fast")])
def test_number_of_keys(implementation):
    with torch.device("meta"):
        assert len(implementation.CAVMAE().state_dict()) == 647
        assert len(implementation.CAVMAEFT(527).state_dict()) == 478
        assert len(implementation.CAVMAEFTAudio(527).state_dict()) == 252
    model = implementation.CAVMAE()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 191.036
    frozen = [k for k, p in model.named_parameters() if not p.requires_grad and "pos_embed" not in k]
    assert len(frozen) == 240
