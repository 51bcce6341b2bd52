"""The gradient of the residual stream in the dtype of the products, and what passes over memory a step makes beside its
operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cavmae_fast.models import CAVMAE, CAVMAEFT
from tests.tiny import ENCODER, TINY, gradients, inputs, one_thread, randomize, relative  # noqa: F401

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


def step(model: nn.Module, dtype: torch.dtype = torch.bfloat16, **settings) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a model, with its attributes set."""
    for name, value in settings.items():
        setattr(model, name, value)
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(*inputs(dtype=torch.float32), *(["multimodal"] if isinstance(model, CAVMAEFT) else []))
    loss = output[0] if isinstance(output, tuple) else output.float().square().sum()
    loss.backward()
    return loss.detach(), {name: g.clone() for name, g in gradients(model).items()}


@pytest.mark.parametrize("make", [lambda: CAVMAE(**TINY), lambda: CAVMAEFT(5, **ENCODER)], ids=["pretraining", "classifier"])
def test_only_gradients_are_rounded(make):
    model = randomize(make())
    loss, full = step(model)
    same, low = step(model, residual_gradient="low")
    assert torch.equal(loss, same) and full.keys() == low.keys()
    assert all(relative(low[name], full[name]) < 0.05 for name in full if float(full[name].norm()) > 1e-6)
    assert any(not torch.equal(low[name], full[name]) for name in full)


@pytest.mark.parametrize("recompute", ["elementwise", "mlp"])
def test_recomputation_gives_the_same_bits(recompute):
    model = randomize(CAVMAE(**TINY))
    loss, kept = step(model, residual_gradient="low")
    same, again = step(model, residual_gradient="low", recompute=recompute)
    assert torch.equal(loss, same) and all(torch.equal(kept[name], again[name]) for name in kept)


def test_in_float32_there_is_nothing_to_round():
    model = randomize(CAVMAE(**TINY))
    _, full = step(model, torch.float32)
    _, low = step(model, torch.float32, residual_gradient="low")
    assert all(torch.equal(full[name], low[name]) for name in full)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual_gradient": "half"}, "residual_gradient is 'half'; it must be one of full, low"),
        ({"residual_gradient": "low", "recompute": "block"}, "residual_gradient is 'low', which recompute 'block'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        step(CAVMAE(**TINY), **settings)


class Passes(TorchDispatchMode):
    """Counts the calls that only copy, or add what could have been added elsewhere, of at least `least` elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.calls = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in ("cat", "clone", "slice_backward", "add") and result.numel() >= self.least:
            self.calls.append(name)
        return result


def test_streams_are_not_copied_between_the_parts_of_the_model():
    """Forward: both embeddings are put side by side, one update is added outside of a LayerNorm, and the heads take
    contiguous tokens. Backward: what was split is put together in one pass, never as a sum of padded slices; of the
    gradients that meet, those of the last block's keys and queries alone are added outside of a LayerNorm."""
    model = randomize(CAVMAE(**TINY))
    batch, width = 3, TINY["embed_dim"]
    (audio, imgs), kept = inputs(dtype=torch.float32), (32 + 4) // 4
    with Passes(batch * kept * width) as passes:
        torch.manual_seed(1)
        loss = model(audio, imgs)[0]
        forward = list(passes.calls)
        loss.backward()
    backward = passes.calls[len(forward) :]
    assert forward == ["cat", "add", "clone"]
    assert "slice_backward" not in backward and backward.count("add") == 1, backward
