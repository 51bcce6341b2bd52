"""The reference and the fast models against outputs and gradients of the published implementation."""

from __future__ import annotations

import golden
import pytest
import torch
import torch.nn.functional as F

from cavmae_fast import models
from cavmae_fast.reference import cavmae as reference
from cavmae_fast.reference.cavmae_parameters import MODES

OUTPUTS = ("loss", "loss_mae", "loss_mae_a", "loss_mae_v", "loss_c", "mask_a", "mask_v", "c_acc")
PRETRAINING = ["cavmae_small_normpix", "cavmae_small_rawpix", "cavmae_base_normpix"]
IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(models, id="fast")]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


def assert_norm(gradient: torch.Tensor, norm: torch.Tensor, key: str) -> None:
    """The norms in the files are float32 sums, which alone are off by up to 2e-4 in the largest matrices: summed alike
    the same gradient gives the same norm."""
    assert abs(gradient.norm() - norm) <= 1e-4 * norm, key


def head(x: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """The part of `x` that the file holds: all of it, or its first tokens."""
    return x[:, : want.shape[1]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining(implementation, name):
    want, metadata = golden.load(name)
    model = golden.fill(implementation.CAVMAE(**metadata["config"]))
    audio, imgs = golden.inputs(metadata)
    torch.manual_seed(metadata["mask_seed"])
    outputs = dict(zip(OUTPUTS, model(audio, imgs, **metadata["forward"])))
    for key in OUTPUTS[:5]:
        assert relative(outputs[key], want[key]) < 2e-5, key
    for key in OUTPUTS[5:]:
        assert torch.equal(outputs[key], want[key]), key

    outputs["loss"].backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert sorted(gradients) == sorted(k.removeprefix("gradnorm.") for k in want if k.startswith("gradnorm."))
    for key, gradient in gradients.items():
        norm = want[f"gradnorm.{key}"]
        assert_norm(gradient, norm, key)
        part = want[f"grad.{key}"].flatten()
        assert (gradient.flatten()[: part.numel()] - part).norm() <= 1e-4 * norm, key


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PRETRAINING)
def test_inpainting_and_features(implementation, name):
    want, metadata = golden.load(name)
    model = golden.fill(implementation.CAVMAE(**metadata["config"]))
    audio, imgs = golden.inputs(metadata)
    torch.manual_seed(metadata["mask_seed"])
    pred_a, pred_v, mask_a, mask_v, loss_a, loss_v = model.forward_inpaint(audio, imgs)
    assert torch.equal(mask_a, want["mask_a"]) and torch.equal(mask_v, want["mask_v"])
    for got, key in ((pred_a, "inpaint.pred_a"), (pred_v, "inpaint.pred_v")):
        assert relative(head(got, want[key]), want[key]) < 2e-5, key
    assert relative(loss_a, want["inpaint.loss_a"]) < 2e-5 and relative(loss_v, want["inpaint.loss_v"]) < 2e-5
    feature_a, feature_v = model.forward_feat(audio, imgs)
    assert relative(feature_a.mean(1), want["feat.a_mean"]) < 2e-5
    assert relative(feature_v.mean(1), want["feat.v_mean"]) < 2e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fine_tuned(implementation):
    want, metadata = golden.load("cavmaeft_small")
    model = golden.fill(implementation.CAVMAEFT(**metadata["config"]))
    audio, imgs = golden.inputs(metadata)
    target = torch.linspace(0, 1, metadata["config"]["label_dim"]).expand(metadata["batch"], -1)
    for mode in MODES:
        model.zero_grad(set_to_none=True)
        logits = model(audio, imgs, mode)
        assert relative(logits, want[mode]) < 2e-5, mode
        F.binary_cross_entropy_with_logits(logits, target).backward()
        for key, parameter in model.named_parameters():
            norm = want.get(f"gradnorm.{mode}.{key}")
            assert (parameter.grad is None) == (norm is None), f"{mode} {key}"
            if norm is not None:
                assert_norm(parameter.grad, norm, f"{mode} {key}")
    with torch.no_grad():
        feature_a, feature_v = model.forward_feat(audio, imgs)
        assert relative(feature_a.mean(1), want["feat.a_mean"]) < 2e-5
        assert relative(feature_v.mean(1), want["feat.v_mean"]) < 2e-5
        assert relative(model.forward_feat(audio, imgs, mode="a").mean(1), want["feat.a_only_mean"]) < 2e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_number_of_keys(implementation):
    with torch.device("meta"):
        assert len(implementation.CAVMAE().state_dict()) == 647
        assert len(implementation.CAVMAEFT(527).state_dict()) == 478
        assert len(implementation.CAVMAEFTAudio(527).state_dict()) == 252
    model = implementation.CAVMAE()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 191.036
    frozen = [k for k, p in model.named_parameters() if not p.requires_grad and "pos_embed" not in k]
    assert len(frozen) == 240
