"""What the backward pass forms again: the same gradients, bit for bit, from less that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cavmae_fast.models import CAVMAE, CAVMAEFT, CAVMAEFTAudio, create_model
from cavmae_fast.models.mae import MAE, MAEFT
from cavmae_fast.models.mavil import MAViL, MAViLFT
from cavmae_fast.models.packed import RECOMPUTE, State, block
from cavmae_fast.ops.distinct_tokens import kept_at
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.reference.cavmae import CAVMAE as ReferenceCAVMAE
from cavmae_fast.reference.layers import Block
from cavmae_fast.reference.mavil import MAViL as ReferenceMAViL
from cavmae_fast.training.step_memory import pretraining_memory
from tests.tiny import ENCODER, TINY, gradients, inputs, one_thread, randomize  # noqa: F401
from tests.tiny_mavil import MAVIL, TOWER, clips
from tests.tiny_mavil import TINY as TINY_MAE

MIB = 2**20
KEPT_AT_MOST = {"none": 163, "elementwise": 103, "mlp": 68, "block": 22}
"MiB per clip that the base model keeps for backward, in bfloat16."
TOWERS_KEEP_AT_MOST = {
    "a-mae": {"none": 106, "elementwise": 67, "mlp": 44, "block": 14},
    "v-mae": {"none": 164, "elementwise": 104, "mlp": 69, "block": 23},
    "mavil": {"none": 368, "elementwise": 231, "mlp": 152, "block": 49},
    "mavil-stage-2": {"none": 370, "elementwise": 233, "mlp": 154, "block": 51},
}
"The same of models of towers; in stage 2 with the teacher's tokens, and without anything of its pass."


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


PER_WIDTH = [
    ("none", 4 + 2 + 6 + 2 + 4 + 2 + 8 + 8),  # sum, its norm, qkv, attention; sum, its norm, before and after the GELU
    ("elementwise", 4 + 6 + 2 + 2 + 8),  # sum, qkv, attention; update, before the GELU
    ("mlp", 4 + 6 + 2 + 2),
    ("block", 4),
]


@pytest.mark.parametrize(("recompute", "per_width"), PER_WIDTH)
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


@pytest.mark.parametrize(("recompute", "per_width"), PER_WIDTH)
def test_bytes_of_a_block_of_a_tower(recompute, per_width):
    """As above: 17 tokens, the class token being one of them."""
    width, heads, rows = TOWER["embed_dim"], TOWER["num_heads"], 17

    def kept(depth: int, batch: int) -> int:
        model = MAEFT(5, "a", **TOWER | {"depth": depth}, recompute=recompute)
        return kept_bytes(lambda: model.forward_feat(torch.randn(batch, 32, 128)))

    statistics = 0 if recompute == "block" else 4 * heads + 2 * 2 * 4
    per_row = (kept(4, 2) - kept(4, 1) - kept(2, 2) + kept(2, 1)) / (2 * rows)
    assert per_row == per_width * width + statistics


@pytest.mark.parametrize(
    ("recompute", "of_kept", "of_all"),
    [
        ("none", 4 + 2, 6 + 2 + 4 + 2 + 8 + 8),  # sum, its norm; qkv, attention; sum, its norm, before and after the GELU
        ("elementwise", 4, 6 + 2 + 4 + 8),
        ("mlp", 4, 6 + 2 + 4),
        ("block", 4, 0),
    ],
)
def test_bytes_of_the_first_block_of_a_decoder(recompute, of_kept, of_all):
    """Exactly: what comes before attention is kept of kept tokens alone; that of the others does not grow with the batch."""
    width, heads, count, length = 32, 4, 5, 20
    one = Block(width, heads, 4.0, nn.LayerNorm)

    def kept(batch: int) -> int:
        places = kept_at(torch.rand(batch, length).argsort(1)[:, :count], length)
        x = torch.randn(batch * count + length, width, requires_grad=True)
        state = State(x, None, StreamLayout(1, (len(x),)), kept=[places])
        return kept_bytes(lambda: block(state, [one], [None], torch.bfloat16, "torch", recompute=recompute))

    per_clip = count * of_kept * width + length * of_all * width
    if recompute != "block":
        per_clip += count * 2 * 4 + length * (2 * 4 + 4 * heads)  # mean and deviation for each norm, attention's statistics
        per_clip += 8 * (count + length)  # which tokens stand where
    assert kept(3) - kept(2) == per_clip


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", TOWERS_KEEP_AT_MOST)
def test_bytes_of_models_of_towers(name, recompute):
    """Counted on tensors without contents; the difference between two batches, so without weights."""
    few, many = (pretraining_memory(name, recompute, batch).kept for batch in (2, 4))
    allowed = TOWERS_KEEP_AT_MOST[name][recompute]
    assert 0.9 * allowed < (many - few) / 2 / MIB <= allowed


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_nothing_is_kept_without_gradients(recompute):
    model = CAVMAE(**TINY, recompute=recompute)
    with torch.no_grad():
        assert kept_bytes(lambda: model(*inputs(dtype=torch.float32)).loss) == 0
    teacher = MAViL(**MAVIL, recompute=recompute)
    assert kept_bytes(lambda: teacher.targets(*clips(dtype=torch.float32))) == 0


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


STAGE_2 = {"raw_loss_weight": 0.0, "regression_loss_weight": 1.0}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
@pytest.mark.parametrize("case", ["a-mae", "v-mae", "stage-1", "stage-2", "bottleneck", "one-decoder-block"])
def test_gradients_of_models_of_towers_are_the_same_bits(case, recompute, autocast):
    audio, imgs = clips(dtype=torch.float32)
    if case.endswith("mae"):
        model, batch = randomize(MAE(case[0], **TINY_MAE)), (audio if case[0] == "a" else imgs,)
        forward = model.forward
    else:
        changes = {"bottleneck": {"fusion": "bottleneck"}, "one-decoder-block": {"decoder_depth": 1}}.get(case, {})
        model, batch = randomize(MAViL(**MAVIL | changes)), (audio, imgs)
        if case == "stage-2":
            targets = randomize(MAViL(**MAVIL), seed=4).targets(audio, imgs)
            forward = lambda *batch: MAViL.forward(model, *batch, targets, **STAGE_2)  # noqa: E731
        else:
            forward = model.forward
    model.forward = forward
    wanted, grads = step(model, batch, autocast)
    model.recompute = recompute
    got, got_grads = step(model, batch, autocast)
    assert torch.equal(got, wanted) and got_grads.keys() == grads.keys()
    assert not [name for name in grads if not torch.equal(got_grads[name], grads[name])]


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_classifiers(recompute):
    a, v = inputs(dtype=torch.float32)
    sound, frames = clips(dtype=torch.float32)
    for build, run in (
        (lambda: CAVMAEFT(5, **ENCODER), lambda model: model(a, v, "missingaudioonly")),
        (lambda: CAVMAEFT(5, **ENCODER), lambda model: model(a, v, "multimodal")),
        (lambda: CAVMAEFTAudio(5, **ENCODER), lambda model: model.forward_pred(a)),
        (lambda: MAEFT(5, "v", **TOWER), lambda model: model(v=frames)),
        (lambda: MAViLFT(5, **TOWER), lambda model: model(sound, frames)),
    ):
        model = randomize(build())
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


@pytest.mark.parametrize("model", [CAVMAE(**TINY), MAViL(**MAVIL), MAE("a", **TINY_MAE)], ids=lambda m: type(m).__name__)
def test_it_belongs_to_the_run_and_not_to_the_weights(model, tmp_path):
    model.recompute = "mlp"
    folder = model.save_pretrained(tmp_path / "model")
    assert "recompute" not in (folder / "config.json").read_text()
    assert type(model).from_pretrained(folder).recompute == "none"
    assert type(model).from_pretrained(folder, recompute="block").recompute == "block"


def test_values_that_are_not_known_are_refused():
    for build in (lambda: CAVMAE(**TINY, recompute="all"), lambda: MAViL(**MAVIL, recompute="all")):
        with pytest.raises(ValueError, match="recompute is 'all'; it must be one of none, elementwise, mlp, block"):
            build()
    model = CAVMAE(**TINY)
    with pytest.raises(ValueError, match="recompute is 'gelu'"):
        model.recompute = "gelu"
    assert model.recompute == "none"
    for plain, config in ((ReferenceCAVMAE, TINY), (ReferenceMAViL, MAVIL)):
        with pytest.raises(ValueError, match=r"must be one of none$"):
            plain(**config, recompute="mlp")
