"""Models whose blocks multiply 8-bit numbers."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

from cavmae_fast.models import CAVMAE, MAE
from cavmae_fast.models.packed import RECOMPUTE
from cavmae_fast.models.precision import Precision, fp8_products, in_fp8
from cavmae_fast.ops import fp8
from cavmae_fast.training.pretrain import PretrainConfig, resolve
from tests.tiny import TINY, gradients, inputs, one_thread, randomize, relative  # noqa: F401

CPU = torch.device("cpu")
FP8, BF16, FULL = (Precision.named(CPU, name) for name in ("fp8", "bfloat16", "float32"))


def step(model: nn.Module, precision: Precision) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients; the backward pass runs outside of `precision.autocast()`, as in training."""
    model.zero_grad()
    torch.manual_seed(3)
    with precision.autocast():
        loss = model(*inputs(dtype=torch.float32), contrast_loss_weight=0.1).loss
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_errors_of_a_model():
    """Every product adds some percent (tests/ops/test_fp8_products.py), and a block has four in a row."""
    model = randomize(CAVMAE(**TINY))
    results = {precision: step(model, precision) for precision in (FULL, BF16, FP8)}
    loss, wanted = results[FULL]
    errors = {
        precision: sorted(relative(got[name], wanted[name]) for name in wanted if wanted[name].norm() > 0)
        for precision, (_, got) in results.items()
    }
    middle = {precision: values[len(values) // 2] for precision, values in errors.items()}
    assert middle[BF16] < 0.03 and 0.02 < middle[FP8] < 0.2, middle
    assert errors[FP8][-1] < 0.6, errors[FP8][-1]
    assert relative(results[FP8][0], loss) < 0.02
    assert torch.equal(step(model, FP8)[0], results[FP8][0])


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputation_gives_the_same_bits(recompute):
    """Also where a whole block is computed again in the backward pass, which runs outside of the context."""
    model = randomize(CAVMAE(**TINY))
    wanted = step(model, FP8)
    model.recompute = recompute
    assert same(step(model, FP8), wanted)
    assert not same(step(model, BF16), wanted)


def test_the_context_ends():
    assert not in_fp8()
    with pytest.raises(KeyError), fp8_products():
        assert in_fp8()
        raise KeyError
    assert not in_fp8()
    with BF16.autocast():
        assert not in_fp8() and torch.is_autocast_enabled("cpu")
    with FP8.autocast():
        assert in_fp8() and torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_blocks_alone(monkeypatch):
    """Embeddings, heads and losses take no part: as many layers as the blocks have."""
    counted = []
    check = fp8.check_fp8
    for name in ("stream_linear", "stream_mlp"):
        file = importlib.import_module(f"cavmae_fast.ops.{name}")  # not the function of that name
        monkeypatch.setattr(file, "check_fp8", lambda *args: counted.append(args) or check(*args))
    model = CAVMAE(**TINY)
    step(model, FP8)
    specific, shared, decoder = len(model.blocks_a), len(model.blocks_u), len(model.decoder_blocks)
    assert len(counted) == 3 * (specific + shared + decoder) + 1  # qkv, proj and MLP; the last one has its queries apart


def test_towers_follow_it():
    model = MAE("a", audio_length=64, embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=2,
                decoder_num_heads=4)  # fmt: skip
    losses = []
    for precision in (BF16, FP8, FP8):
        torch.manual_seed(3)
        with precision.autocast():
            losses.append(model(torch.randn(2, 64, 128)).loss.detach())
    assert torch.equal(losses[1], losses[2]) and not torch.equal(losses[0], losses[1])


def test_nothing_of_it_is_in_a_checkpoint():
    model = CAVMAE(**TINY)
    before = copy.deepcopy(model.state_dict())
    step(model, FP8)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_wrong_uses_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"fp8 goes with dtype torch\.bfloat16; it is torch\.float32"):
        Precision(CPU, torch.float32, fp8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    with pytest.raises(fp8.Fp8Error, match=r"NVIDIA A10 has 8\.6"):
        Precision.named(torch.device("cuda"), "fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(fp8.Fp8Error, match=r"NVIDIA A10 has 8\.6"):
        resolve(PretrainConfig(device="cuda", dtype="fp8"))


def test_odd_models_are_refused():
    model = CAVMAE(**TINY | {"embed_dim": 36})
    with pytest.raises(fp8.Fp8Error, match="widths that are multiples of 16; a layer has 108"), FP8.autocast():
        model(*inputs(dtype=torch.float32))


def test_gradients_are_handed_on(monkeypatch):
    """By the LayerNorm behind an update, wherever one of the same streams follows in a block."""
    taken = []
    take = fp8.Handed.take

    def watched(self, gradient):
        taken.append(take(self, gradient))
        return taken[-1]

    monkeypatch.setattr(fp8.Handed, "take", watched)
    model = randomize(CAVMAE(**TINY))
    with_them = step(model, FP8)
    stacks = [len(model.blocks_a), len(model.blocks_u), len(model.decoder_blocks)]
    found = sum(held is not None for held in taken)
    # Two updates a block. Behind the last one of a stack is no block; the last block's first norm has its values read.
    assert len(taken) == 2 * sum(stacks) and found >= len(taken) - len(stacks) - 1
    monkeypatch.setattr(fp8.Handed, "take", lambda self, gradient: None)
    assert same(step(model, FP8), with_them)
