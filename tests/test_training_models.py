"""What training asks of models: the reference and the fast one train alike, averages, drop path, compiling."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cavmae_fast.models import CAVMAE, CAVMAEFT, CAVMAEFTAudio
from cavmae_fast.models.drop_path import draw_paths, on_path
from cavmae_fast.models.precision import Precision
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.reference import cavmae as reference
from cavmae_fast.training.compiling import compile_model
from cavmae_fast.training.fit import fit, take_step
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedules import Constant, Cosine, WarmUp
from cavmae_fast.training.state import RunState
from tests.clips_at_hand import ClipsAtHand, batch_of
from tests.tiny import ENCODER, TINY, inputs, one_thread, pair, randomize, relative  # noqa: F401

CPU = torch.device("cpu")
RECIPE = Recipe(2e-3, batch_size=4, epochs=5, schedule=WarmUp(5, Cosine(0.1)))
TASK = PretrainTask(0.5, "unstructured", 1.0, 0.1)


def state_of(model: nn.Module, **changes) -> RunState:
    TASK.prepare(model)
    return RunState.start(model.train(), replace(RECIPE, **changes), ClipsAtHand(), Precision(CPU, torch.float32))


def losses_of(model: nn.Module, steps: int, **changes) -> list[dict]:
    torch.manual_seed(3)
    rows: list[dict] = []
    fit(TASK, state_of(model, **changes), steps, rows.append)
    return rows


def test_fifty_steps_of_the_fast_and_the_reference_model_agree():
    """Same seed and data, the whole loop with its optimizer, schedule and clipping, in float32."""
    fast, plain = pair(CAVMAE, reference.CAVMAE, dtype=torch.float32, norm_pix_loss=True, **TINY)
    rows, expected = (losses_of(model, 50, clip_grad=5.0) for model in (fast, plain))
    assert len(rows) == len(expected) == 50
    for name in ("loss", "loss_mae", "loss_mae_a", "loss_mae_v", "loss_c"):
        for row, want in zip(rows, expected):
            assert row[name] == pytest.approx(want[name], rel=1e-3), (name, row["step"])
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


# ------------------------------------------------------------------------------------------------------ moving average


def test_the_average_follows_the_weights():
    model = CAVMAE(**TINY)
    state = state_of(model, ema=0.75)
    name = "blocks_u.0.mlp.fc1.weight"
    want = model.get_parameter(name).detach().clone()
    for batch in ClipsAtHand(steps=3):
        state.set_learning_rate(0, 10)
        take_step(TASK, state, batch)
        want = 0.75 * want + 0.25 * model.get_parameter(name).detach()
    own = model.get_parameter(name).detach().clone()
    frozen = model.pos_embed_a.clone()
    with state.averaged():
        torch.testing.assert_close(model.get_parameter(name).detach(), want)
        assert not torch.equal(model.get_parameter(name), own) and torch.equal(model.pos_embed_a, frozen)
    assert torch.equal(model.get_parameter(name), own)
    state.average.give()
    torch.testing.assert_close(model.get_parameter(name).detach(), want)


def test_a_skipped_step_leaves_the_average():
    state = state_of(CAVMAE(**TINY), ema=0.5)
    audio, imgs = inputs(batch=4, dtype=torch.float32)
    take_step(TASK, state, batch_of(audio, imgs))
    before = copy.deepcopy(state.average.state_dict())
    assert not take_step(TASK, state, batch_of(audio * float("inf"), imgs))["finite"]
    after = state.average.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_average_goes_on_with_the_run():
    state = state_of(CAVMAE(**TINY), ema=0.5)
    fit(TASK, state, 3, lambda row: None)
    saved = copy.deepcopy(state.state_dict())
    other = state_of(CAVMAE(**TINY), ema=0.5)
    other.load_state_dict(saved)
    for one in (state, other):
        torch.manual_seed(8)
        fit(TASK, one, 6, lambda row: None)
    averages = [one.average.state_dict() for one in (state, other)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_without_a_decay_there_is_no_average():
    state = state_of(CAVMAE(**TINY))
    assert state.average is None and state.state_dict()["average"] is None
    with state.averaged():
        pass


# ----------------------------------------------------------------------------------------------------------- drop path


def test_rates_rise_with_depth_and_keep_the_expectation():
    torch.manual_seed(0)
    factors = draw_paths(0.4, depth=3, streams=2, batch=20_000, device=CPU)
    assert factors.shape == (3, 2, 2, 20_000)
    assert (factors[0] == 1).all()
    for block, rate in ((1, 0.2), (2, 0.4)):
        torch.testing.assert_close((factors[block] == 0).float().mean(), torch.tensor(rate), atol=0.01, rtol=0)
        torch.testing.assert_close(factors[block].mean(), torch.tensor(1.0), atol=0.02, rtol=0)
        assert set(factors[block].unique().tolist()) == {0.0, float(torch.tensor(1) / torch.tensor(1 - rate))}
    assert not torch.equal(factors[2, 0], factors[2, 1]) and not torch.equal(factors[2, :, 0], factors[2, :, 1])


def test_factors_reach_their_clips_on_packed_streams():
    layout = StreamLayout(2, (3, 1))
    factors = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    got = on_path(torch.ones(layout.rows, 5), factors, layout)
    assert got[:, 0].tolist() == [0, 0, 0, 2, 2, 2, 3, 0] and (got == got[:, :1]).all()
    delta = torch.ones(8, 5)
    assert on_path(delta, None, layout) is delta


def test_without_a_rate_nothing_is_drawn_and_nothing_changes():
    model, audio_imgs = CAVMAE(**TINY), inputs(dtype=torch.float32)
    plain = copy.deepcopy(model)
    plain.drop_path = 0.0
    results = []
    for one, training in ((model, True), (plain, True), (model, False), (model, False)):
        one.train(training)
        torch.manual_seed(0)
        results.append((one(*audio_imgs).loss, torch.rand(1)))
        model.drop_path = 0.5  # from here on; an evaluation leaves nothing out
    for loss, drawn in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(drawn, results[0][1])
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(*audio_imgs).loss, results[0][0])


def without_branches(model: nn.Module, name: str) -> nn.Module:
    """A copy in which the block's branches give 0."""
    changed = copy.deepcopy(model)
    block = changed.get_submodule(name)
    for layer in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return changed


def test_a_dropped_block_is_passed_by(monkeypatch):
    """All of one stream's clips leave out both branches of one block: as if the branches gave 0, for that stream alone."""
    model = randomize(CAVMAE(**TINY)).to(torch.float64).train()
    inputs_ = inputs()
    for place, stream, name, loss in ((0, 0, "blocks_a.0", None), (2, 2, "blocks_u.0", "loss_mae")):
        paths = torch.ones(3, 2, 3, 3, dtype=torch.float64)
        paths[place, :, stream] = 0
        monkeypatch.setattr(model, "draw_paths", lambda *_, paths=paths: paths)
        torch.manual_seed(0)
        got = model(*inputs_)
        monkeypatch.undo()
        torch.manual_seed(0)
        want = without_branches(model, name)(*inputs_)
        torch.manual_seed(0)
        whole = model(*inputs_)
        if loss is None:
            assert relative(got.loss, want.loss) < 1e-12 < relative(got.loss, whole.loss)
        else:  # the streams seen alone pass the shared block as ever
            assert relative(got.loss_mae, want.loss_mae) < 1e-12 < relative(got.loss_mae, whole.loss_mae)
            assert torch.equal(got.loss_c, whole.loss_c)


@pytest.mark.parametrize("kind", ["CAVMAEFT", "CAVMAEFTAudio"])
def test_classifiers_drop_paths_too(kind):
    audio, imgs = inputs(dtype=torch.float32)
    model = randomize({"CAVMAEFT": CAVMAEFT, "CAVMAEFTAudio": CAVMAEFTAudio}[kind](5, **ENCODER)).train()

    def logits() -> Tensor:
        torch.manual_seed(0)
        return model(audio, imgs, "multimodal") if kind == "CAVMAEFT" else model.forward_pred(audio)

    before = logits()
    model.drop_path = 0.9
    assert not torch.equal(logits(), before)
    model.eval()
    torch.testing.assert_close(logits(), before)


def test_drop_path_by_recipe():
    model = CAVMAE(**TINY)
    state_of(model, drop_path=0.25)
    assert model.drop_path == 0.25 and CAVMAE.drop_path == 0.0
    with pytest.raises(ValueError, match=r"--drop-path is 0\.25, but Linear has no drop path"):
        RunState.start(nn.Linear(2, 2), replace(RECIPE, drop_path=0.25), ClipsAtHand(), Precision(CPU, torch.float32))
    model.drop_path = 1.5
    with pytest.raises(ValueError, match=r"drop_path is 1\.5; it must be at least 0 and below 1"):
        model(*inputs(dtype=torch.float32))


# ----------------------------------------------------------------------------------------------------------- compiling


@pytest.fixture
def compiled_cavmae() -> CAVMAE:
    torch._dynamo.reset()
    model = randomize(CAVMAE(**TINY))
    compile_model(model, backend="aot_eager")
    return model


def test_a_compiled_run_has_the_same_losses(compiled_cavmae):
    """Masks are drawn outside the compiled part, so they are the same ones; parameters keep their names."""
    eager = randomize(CAVMAE(**TINY))
    assert compiled_cavmae.state_dict().keys() == eager.state_dict().keys()
    want, got = (losses_of(model, 4) for model in (eager, compiled_cavmae))
    for row, expected in zip(got, want):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["c_acc"] == expected["c_acc"]


def test_a_compiled_model_keeps_its_sentences(compiled_cavmae):
    compiled_cavmae.train_losses(reconstruction=True, contrast=False)
    compiled_cavmae.train()
    with pytest.raises(ValueError, match=r"contrast_loss_weight is 0.01, but this model's train_losses\(\) froze"):
        compiled_cavmae(*inputs(dtype=torch.float32))
    with pytest.raises(ValueError, match="audio has shape"):
        compiled_cavmae(torch.zeros(1, 5, 128), torch.zeros(1, 3, 32, 32))


def test_compiled_classifier(compiled_cavmae):
    model = randomize(CAVMAEFT(5, **ENCODER)).eval()
    audio, imgs = inputs(dtype=torch.float32)
    want = model(audio, imgs, "multimodal")
    compile_model(model, backend="aot_eager")
    torch.testing.assert_close(model(audio, imgs, "multimodal"), want)
    with pytest.raises(ValueError, match="mode is 'none'"):
        model(audio, imgs, "none")


def test_a_model_that_cannot_be_compiled():
    with pytest.raises(ValueError, match="--compile: Linear has no method compute"):
        compile_model(nn.Linear(2, 2))


def test_schedules_by_steps_are_followed():
    rows = losses_of(CAVMAE(**TINY), 8)
    assert [row["learning_rate"] for row in rows[:5]] == pytest.approx([2e-3 * step / 5 for step in range(1, 6)])
    assert rows[7]["learning_rate"] == 2e-3 * Cosine(0.1).scale(0, 2, 3)
    assert {row["learning_rate"] for row in losses_of(CAVMAE(**TINY), 3, schedule=Constant())} == {2e-3}
