"""Every system behind one interface: the step that it names is the step that its model is trained by."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import one_thread, relative  # noqa: F401
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, whose benchmarks are not installed

from benchmarks import budget
from cavmae_fast.models import PRESETS, create_model
from cavmae_fast.models.abilities import Embeds
from cavmae_fast.models.mavil_presets import TOWER_PRESETS
from cavmae_fast.models.systems import SYSTEMS, StudentAndTeacher, inputs
from cavmae_fast.tuning.plan import MODELS, TINY

SMALL = {name: system.resized(TINY) for name, system in SYSTEMS.items() if "small" not in name}


def said_of_the_budget() -> list[str]:
    """The lines of the table in docs/performance.md."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "performance.md").read_text()
    return text.partition("## Budget of a step")[2].partition("\n| ")[2].partition("\n\n")[0].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("system", budget.NAMES)
def test_the_budget_that_is_said_is_counted(system):
    assert f"| {' | '.join(budget.row(system))} |" in said_of_the_budget()


@pytest.mark.parametrize("system", budget.NAMES)
def test_operations_that_are_said_are_counted(system):
    """As above, without the memory, which takes longer to count."""
    with torch.device("meta"):
        model = SYSTEMS[system].create()
    row = [budget.NAMES[system]] + [f"{SYSTEMS[system].step_flops(model, plain=p) / 1e9:.0f}" for p in (False, True)]
    assert any(line.startswith(f"| {' | '.join(row)} |") for line in said_of_the_budget())


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_preset_is_there_and_every_second_stage():
    assert set(SYSTEMS) >= {*PRESETS, *TOWER_PRESETS}
    assert {name for name in SYSTEMS if name.endswith("-stage-2")} == {
        f"{name}-stage-2" for name in TOWER_PRESETS if "mavil" in name
    }


@pytest.mark.parametrize("name", SMALL)
def test_the_fast_model_and_the_reference_take_the_same_step(name):
    """From the same weights, masks and clips: the same loss, in float64, and a gradient wherever something is trained."""
    sizes = {} if name in TOWER_PRESETS or "stage-2" in name else {"modality_specific_depth": min(1, _specific(name))}
    system = SMALL[name].resized(sizes)
    torch.manual_seed(0)
    plain = system.create(plain=True).double()
    fast = system.create().double()
    fast.load_state_dict(plain.state_dict())
    assert any(isinstance(module, Embeds) for module in fast.modules())
    assert not any(isinstance(module, Embeds) for module in plain.modules())
    assert trained(fast) == trained(plain)
    audio, imgs = inputs(fast, 2)
    losses = []
    for model in (fast, plain):
        torch.manual_seed(1)
        losses.append(system.step_loss(model, audio.double(), imgs))
    assert relative(losses[0], losses[1]) < 1e-10
    losses[0].backward()
    assert {n for n, p in fast.named_parameters() if p.grad is not None} == trained(fast)


def _specific(name: str) -> int:
    return PRESETS[name].model.get("modality_specific_depth", 11)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_its_preset(name):
    with torch.device("meta"):
        made = SYSTEMS[name].create()
        if isinstance(made, StudentAndTeacher):
            assert not trained(made.teacher)
            wanted = TOWER_PRESETS[name.removesuffix("-stage-2")].create(stage=2)
            made = made.student
        else:
            wanted = create_model(name)
    assert made.config == wanted.config and trained(made) == trained(wanted)


@pytest.mark.parametrize("name", ["tiny", "tiny-v-mae", "tiny-mavil", "tiny-mavil-stage-2"])
def test_operations_as_the_reference_computes_them(name):
    """What PyTorch's counter sees in a forward pass of the reference, but for the similarities of the contrasts; of a step,
    what is trained counts three times and a teacher's pass once."""
    system = MODELS[name].system
    model = system.create(plain=True)
    batch, (audio, imgs) = 2, inputs(model, 2)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        system.step_loss(model, audio, imgs)
    teacher = 0
    if isinstance(model, StudentAndTeacher):
        with FlopCounterMode(display=False) as alone:
            model.teacher.targets(audio, imgs)
        teacher = alone.get_total_flops()
    width = 64
    contrasts = {"tiny": 1, "tiny-v-mae": 0}.get(name, 3)
    forward = counter.get_total_flops() - teacher - contrasts * 2 * batch * batch * width
    assert batch * system.step_flops(model, plain=True) == pytest.approx(3 * forward + teacher, rel=1e-6)
