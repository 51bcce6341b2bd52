"""What pretraining makes of MAViL and of single-modality autoencoders: the fast and the reference model train alike, a batch
in parts has the whole batch's gradients, teachers stay as they are."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cavmae_fast.data.batches import Batch
from cavmae_fast.models import MAE, MAViL
from cavmae_fast.models.mavil import LossWeights
from cavmae_fast.models.mavil_flops import fused_macs, step_flops
from cavmae_fast.models.mavil_presets import STAGE_1, STAGE_2
from cavmae_fast.models.precision import Precision
from cavmae_fast.reference import mae as plain_mae
from cavmae_fast.reference import mavil as plain_mavil
from cavmae_fast.reference.masking import Masking
from cavmae_fast.training.compiling import compile_model
from cavmae_fast.training.fit import fit, take_step
from cavmae_fast.training.mae_task import MAETask
from cavmae_fast.training.mavil_task import MAViLTask
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedules import Constant, Cosine, WarmUp
from cavmae_fast.training.state import RunState
from cavmae_fast.training.teacher import Teacher, TeacherError
from tests.clips_at_hand import ClipsAtHand, batch_of
from tests.tiny import gradients, one_thread, pair, randomize, relative  # noqa: F401
from tests.tiny_mavil import MAVIL, TINY, clips

CPU = torch.device("cpu")
RECIPE = Recipe(
    2e-3,
    batch_size=4,
    epochs=5,
    schedule=WarmUp(0, Cosine(0.1), share=0.1),
    optimizer="adamw",
    betas=(0.9, 0.95),
    weight_decay=0.05,
)
ALL = LossWeights(raw=0.7, inter=0.5, intra=0.3, regression=1.1)


class TowerClips(ClipsAtHand):
    """Clips of several pictures, for models of towers."""

    def batch_at(self, epoch: int, position: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * epoch + position)
        audio, imgs = clips(batch=self.batch, dtype=self.dtype)
        noise = (0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (audio, imgs))
        return batch_of(*(x + more for x, more in zip((audio, imgs), noise)), epoch, position)


class PlainTeacher:
    """The reference model as a teacher."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def targets(self, batch: Batch):
        return self.model.targets(batch.audio, batch.image)


def state_of(task, model: nn.Module, dtype: torch.dtype = torch.float32, **changes) -> RunState:
    task.prepare(model)
    loader = TowerClips(dtype=dtype)
    return RunState.start(model.train(), replace(RECIPE, **changes), loader, Precision(CPU, torch.float32))


def losses_of(task, model: nn.Module, steps: int) -> list[dict]:
    torch.manual_seed(3)
    rows: list[dict] = []
    fit(task, state_of(task, model), steps, rows.append)
    return rows


def teachers() -> tuple[Teacher, PlainTeacher]:
    models = pair(MAViL, plain_mavil.MAViL, dtype=torch.float32, **MAVIL)
    for model in models:  # another one than the student
        randomize(model, seed=7)
    return Teacher(models[0], "the teacher"), PlainTeacher(models[1])


@pytest.mark.parametrize("stage", ["a-mae", "v-mae", "stage 1", "stage 2"])
def test_fifty_steps_of_the_fast_and_the_reference_model_agree(stage):
    """Same seed and data, the whole loop with its optimizer and schedule, in float32."""
    if stage.endswith("-mae"):
        m = stage[0]
        fast, plain = pair(MAE, plain_mae.MAE, m, dtype=torch.float32, **TINY)
        tasks = [MAETask(0.8, m)] * 2
    else:
        fast, plain = pair(MAViL, plain_mavil.MAViL, dtype=torch.float32, **MAVIL)
        weights = STAGE_1 if stage == "stage 1" else STAGE_2
        tasks = [MAViLTask(0.8, weights, teacher) for teacher in teachers()]
    rows, expected = (losses_of(task, model, 50) for task, model in zip(tasks, (fast, plain)))
    assert len(rows) == len(expected) == 50
    for name in tasks[0].recorded:
        for row, want in zip(rows, expected):
            assert row[name] == pytest.approx(want[name], rel=1e-3), (name, row["step"])
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    in_force = {name for name in tasks[0].recorded if rows[0][name] != 0}
    pixels = {"loss_raw", "loss_raw_a", "loss_raw_v"}
    contrasts = {"loss", "loss_inter", "loss_intra"}
    expected_names = {"stage 1": contrasts | pixels, "stage 2": contrasts | {"loss_regression"}}
    assert in_force == expected_names.get(stage, {"loss"})


# ----------------------------------------------------------------------------------------------------- a batch in parts


def masks_by_clip(model: MAViL, monkeypatch, batch: int) -> None:
    """Every clip has masks of its own in both views, whatever part it is computed in."""
    torch.manual_seed(5)
    whole, place = {}, [0]
    for views in (1, 2):
        drawn = MAViL.draw_masks(model, batch, views, CPU, 0.5, 0.5)
        whole[views] = [Masking(*(x.unflatten(0, (views, batch)) for x in masking)) for masking in drawn]

    def draw(count: int, views: int, *_) -> tuple[Masking, Masking]:
        first = place[0] % batch
        place[0] += count
        return tuple(Masking(*(x[:, first : first + count].flatten(0, 1) for x in masking)) for masking in whole[views])

    monkeypatch.setattr(model, "draw_masks", draw)


def losses_and_gradients(task, model, batch, monkeypatch, **changes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of one step, caught before the optimizer."""
    state, caught = state_of(task, model, torch.float64, **changes), {}

    def update(self, loss: Tensor) -> dict[str, Tensor]:
        caught.update({name: g.clone() for name, g in gradients(model).items()}, loss=loss.detach())
        model.zero_grad(set_to_none=True)
        return {}

    monkeypatch.setattr(RunState, "update", update)
    return take_step(task, state, batch), caught


WEIGHTS = {
    "all": ALL,
    "inter alone": LossWeights(0.0, 1.0, 0.0, 0.0),
    "intra and regression": LossWeights(0.0, 0.0, 1.0, 1.0),
    "without contrast": LossWeights(1.0, 0.0, 0.0, 1.0),
}


@pytest.mark.parametrize("parts", [2, 7])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_of_parts_are_the_whole_batchs(weights, parts, monkeypatch):
    """Both contrasts included, whose negatives are the clips of the whole batch."""
    model = randomize(MAViL(**MAVIL)).double()
    teacher = Teacher(randomize(MAViL(**MAVIL), seed=7).double(), "the teacher")
    task = MAViLTask(0.5, WEIGHTS[weights], teacher)
    batch = batch_of(*clips(batch=7))
    masks_by_clip(model, monkeypatch, 7)
    want, expected = losses_and_gradients(task, model, batch, monkeypatch)
    got, found = losses_and_gradients(task, model, batch, monkeypatch, accumulate=parts)
    assert found.keys() == expected.keys()
    for name, value in want.items():
        # What is 0 because its loss has no weight is not reported by parts without it.
        assert relative(got.get(name, torch.zeros(())), value) < 1e-12, name
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-10, name


def test_both_passes_over_a_part_draw_the_same(monkeypatch):
    seen: list[Tensor] = []
    model = randomize(MAViL(**MAVIL)).double()
    pool = model.pool

    def watched(*args):
        embeddings = pool(*args)
        seen.append(torch.cat(embeddings).detach())
        return embeddings

    monkeypatch.setattr(model, "pool", watched)
    task = MAViLTask(0.8, STAGE_1)
    state = state_of(task, model, accumulate=2, learning_rate=1e-9)
    torch.manual_seed(0)
    take_step(task, state, batch_of(*clips(batch=6)))
    first, second = seen[:2], seen[2:]
    assert all(relative(one, other) < 1e-12 for one, other in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


# ------------------------------------------------------------------------------------------------------------- teachers


def test_a_teacher_stays_as_it_is():
    teacher, _ = teachers()
    before = copy.deepcopy(teacher.model.state_dict())
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    task = MAViLTask(0.8, STAGE_2, teacher)
    fit(task, state_of(task, student), 3, lambda row: None)
    assert not teacher.model.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    teacher.check_unchanged()
    assert not torch.equal(student.fusion.norm.weight, teacher.model.fusion.norm.weight)
    with torch.no_grad():
        teacher.model.video.cls_token[0, 0, 0] += 1e-6
    with pytest.raises(TeacherError, match="has changed while it taught"):
        teacher.check_unchanged()


def test_a_teacher_that_is_the_student_and_nothing_masked():
    """There is nothing to regress, and that is no error."""
    teacher, _ = teachers()
    student = copy.deepcopy(teacher.model)
    task = MAViLTask(0.0, STAGE_2, teacher)
    task.prepare(student)
    batch = batch_of(*clips(dtype=torch.float32))
    losses = task.losses(student.train(), batch)
    assert losses["loss_regression"] == 0 and losses["loss_inter"] > 0
    assert all(torch.equal(*both) for both in zip(student.fused(batch.audio, batch.image), teacher.targets(batch)))


def test_operations_of_a_step():
    model = MAViL(**MAVIL)
    teacher = Teacher(MAViL(**MAVIL), "the teacher")
    assert MAViLTask(0.8, STAGE_1).step_flops(model) == step_flops(model, 1)
    assert MAViLTask(0.8, STAGE_2, teacher).step_flops(model) == step_flops(model, 2)
    teacher_alone = step_flops(model, 2) - 2 * fused_macs(model)

    class Cached:
        macs = 0.0

    assert MAViLTask(0.8, STAGE_2, Cached()).step_flops(model) == pytest.approx(teacher_alone)


# ------------------------------------------------------------------------------------------------------- other promises


def test_evaluation_leaves_the_random_state():
    """Masks of a held-out loss come from a seed of their own: twice the same, and training draws what it would have."""
    model, task = MAE("a", **TINY), MAETask(0.8, "a")
    model.train()
    torch.manual_seed(9)
    batches = [batch_of(*clips(batch=count, dtype=torch.float32)) for count in (3, 1)]
    before = torch.get_rng_state()
    first, again = task.evaluate(model, batches), task.evaluate(model, batches)
    assert first == again and first["held_out_clips"] == 4 and first["held_out_loss"] > 0
    assert torch.equal(torch.get_rng_state(), before) and model.training


@pytest.mark.parametrize("kind", ["mae", "mavil"])
def test_compiled_as_it_is(kind):
    """`--compile` takes the heavy part alone; here with the back end that compiles nothing."""
    task = MAETask(0.8, "v") if kind == "mae" else MAViLTask(0.8, STAGE_1)
    model = MAE("v", **TINY) if kind == "mae" else MAViL(**MAVIL)
    task.prepare(model)
    batch = batch_of(*clips(dtype=torch.float32))
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        loss = task.losses(model, batch)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        compile_model(model, backend="eager")
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_warm_up_by_share():
    schedule = WarmUp(0, Constant(), share=0.1)
    assert [schedule.scale(0, step, 50) for step in (0, 1, 4, 5, 49)] == pytest.approx([0.2, 0.4, 1, 1, 1])
    assert schedule.scale(0, 0, 3) == 1.0  # no whole step
