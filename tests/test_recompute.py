"""What the backward pass forms again: the same gradients, bit for bit, from less that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cavmae_fast.models import CAVMAE, CAVMAEFT, CAVMAEFTAudio, create_model
from cavmae_fast.models.packed import RECOMPUTE
from cavmae_fast.reference.cavmae import CAVMAE as ReferenceCAVMAE
from tests.tiny import ENCODER, TINY, gradients, inputs, one_thread, randomize  # noqa: F401

MIB = 2**20
KEPT_AT_MOST = {"none": 164, "elementwise": 110, "mlp": 72, "block": 25}
"MiB per clip that the base model keeps for backward, in bfloat16."


def kept_bytes(loss: Callable[[], Tensor]) -> int:
    """Bytes that are kept for the backward pass of `loss()` in bfloat16, each storage once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # the tensor as well: its address must not be used again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_bytes_of_the_base_model(recompute):
    """The difference between one clip and two: without the weights, which are kept whatever the batch."""
    model = create_model("cav-mae-base", recompute=recompute)

    def kept(batch: int) -> int:
        audio, imgs = torch.randn(batch, 1024, 128), torch.randn(batch, 3, 224, 224)
        return kept_bytes(lambda: model(audio, imgs).loss)

    assert 0.9 * KEPT_AT_MOST[recompute] < (kept(2) - kept(1)) / MIB <= KEPT_AT_MOST[recompute]


@pytest.mark.parametrize(
    ("recompute", "per_width"),
    [
        ("none", 4 + 2 + 6 + 2 + 4 + 2 + 8 + 8),  # sum, its norm, qkv, attention; sum, its norm, before and after the GELU
        ("elementwise", 4 + 6 + 2 + 2 + 8),  # sum, qkv, attention; update, before the GELU
        ("mlp", 4 + 6 + 2 + 2),
        ("block", 4),
    ],
)
def test_bytes_of_a_block(recompute, per_width):
    """Exactly, of a row of a block: the difference between two models, and between one clip and two."""
    width, heads, rows = ENCODER["embed_dim"], ENCODER["num_heads"], 32

    def kept(depth: int, batch: int) -> int:
        config = ENCODER | {"depth": depth, "modality_specific_depth": depth}
        model = CAVMAEFTAudio(5, **config, recompute=recompute)
        return kept_bytes(lambda: model.forward_pred(torch.randn(batch, 64, 128)))

    statistics = 0 if recompute == "block" else 4 * heads + 2 * 2 * 4  # attention's, and mean and deviation for two norms
    per_row = (kept(4, 2) - kept(4, 1) - kept(2, 2) + kept(2, 1)) / (2 * rows)
    assert per_row == per_width * width + statistics


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_nothing_is_kept_without_gradients(recompute):
    model = CAVMAE(**TINY, recompute=recompute)
    with torch.no_grad():
        assert kept_bytes(lambda: model(*inputs(dtype=torch.float32)).loss) == 0


def step(model: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(*batch).loss
    loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients(model).items()}


@pytest.mark.parametrize("attention", ["torch", "sdpa"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_gradients_are_the_same_bits(recompute, autocast, attention):
    """In two steps one after the other, in one and the same model."""
    model = randomize(CAVMAE(**TINY, norm_pix_loss=True, attention=attention))
    batches = [inputs(dtype=torch.float32), tuple(2 * x for x in inputs(dtype=torch.float32))]
    wanted = [step(model, batch, autocast) for batch in batches]
    model.recompute = recompute
    for batch, (loss, grads) in zip(batches, wanted):
        got, got_grads = step(model, batch, autocast)
        assert torch.equal(got, loss)
        assert got_grads.keys() == grads.keys()
        different = [name for name in grads if not torch.equal(got_grads[name], grads[name])]
        assert not different


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_classifiers(recompute):
    a, v = inputs(dtype=torch.float32)
    for build, run in (
        (CAVMAEFT, lambda model: model(a, v, "missingaudioonly")),
        (CAVMAEFT, lambda model: model(a, v, "multimodal")),
        (CAVMAEFTAudio, lambda model: model.forward_pred(a)),
    ):
        model = randomize(build(5, **ENCODER))
        wanted = {}
        for model.recompute in ("none", recompute):
            model.zero_grad()
            run(model).square().mean().backward()
            got = {name: grad.clone() for name, grad in gradients(model).items()}
            wanted = wanted or got
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_it_compiles_whole(recompute):
    torch.compiler.reset()
    model = randomize(CAVMAEFT(5, **ENCODER | {"depth": 2, "modality_specific_depth": 1}, recompute=recompute))
    compiled = copy.deepcopy(model)
    batch = inputs(dtype=torch.float32)
    model(*batch, "multimodal").square().mean().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(*batch, "multimodal").square().mean().backward()
    got = gradients(compiled)
    assert all(torch.equal(got[name], grad) for name, grad in gradients(model).items())


def test_it_belongs_to_the_run_and_not_to_the_weights(tmp_path):
    model = CAVMAE(**TINY, recompute="mlp")
    folder = model.save_pretrained(tmp_path / "model")
    assert "recompute" not in (folder / "config.json").read_text()
    assert CAVMAE.from_pretrained(folder).recompute == "none"
    assert CAVMAE.from_pretrained(folder, recompute="block").recompute == "block"


def test_values_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="recompute is 'all'; it must be one of none, elementwise, mlp, block"):
        CAVMAE(**TINY, recompute="all")
    model = CAVMAE(**TINY)
    with pytest.raises(ValueError, match="recompute is 'gelu'"):
        model.recompute = "gelu"
    assert model.recompute == "none"
    with pytest.raises(ValueError, match=r"must be one of none$"):
        ReferenceCAVMAE(**TINY, recompute="mlp")
