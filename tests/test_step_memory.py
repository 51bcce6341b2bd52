"""The memory of a step that is never computed, against what it is known to take."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from cavmae_fast import doctor
from cavmae_fast.doctor import DoctorConfig
from cavmae_fast.models import CAVMAE
from cavmae_fast.models.packed import RECOMPUTE
from cavmae_fast.training.step_memory import LiveBytes, step_memory
from tests.tiny import TINY, inputs


def test_live_bytes():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100)  # of the same storage
        z = x + 1
        assert (live.now, live.peak) == (8000, 8000)
        del z
        assert (live.now, live.peak) == (4000, 8000)
        del x
        assert live.now == 4000
        del y
        assert (live.now, live.peak) == (0, 8000)


def test_a_step_that_can_be_counted_by_hand():
    """Weights of 10 x 10: the forward pass leaves the input and the loss. The backward pass begins with a number and makes
    the gradient of the weights while all of that still lives."""
    model = nn.Linear(10, 10, bias=False)
    model.weight.data.fill_(3)
    memory = step_memory(model, torch.float32, lambda light: light(torch.empty(7, 10)).sum())
    assert memory.model == 3 * 400
    assert memory.kept == 280 + 4
    assert memory.peak == memory.model + memory.kept + 4 + 400
    assert model.weight.grad is None and model.weight.eq(3).all()


def test_the_step_is_not_computed_and_the_model_stays():
    model = CAVMAE(**TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real = CAVMAE(**TINY)
    with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
        audio, imgs = (torch.empty_like(x) for x in inputs(dtype=torch.float32))
        loss = real(audio, imgs).loss
        kept = live.now
    memory = step_memory(
        model, torch.bfloat16, lambda light: light(*(torch.empty_like(x) for x in inputs(dtype=torch.float32))).loss
    )
    assert memory.kept == pytest.approx(kept, rel=0.02)
    assert memory.peak > memory.model + memory.kept
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    del loss


def test_what_the_doctor_says_of_memory():
    """The more is formed again, the more clips a GPU takes; and a larger one takes more."""
    title, *lines = doctor.examine(DoctorConfig(model="small", batch=64)).splitlines()
    assert "64 clips" in title
    assert [line.split()[1] for line in lines] == list(RECOMPUTE)
    takes = [[int(count.replace(",", "")) for count in re.findall(r"take ([\d,]+) clips", line)] for line in lines]
    small = [few for few, _ in takes]
    assert small == sorted(set(small)) and len(small) == 4
    assert all(3 * few < many for few, many in takes)
    assert len(doctor.examine(DoctorConfig(model="small", batch=8, recompute="mlp", gpu=(1,))).splitlines()) == 2


def test_what_the_doctor_says_of_models_of_towers():
    """Of MAViL both stages; a batch that is too small for its peak to grow says no less of what a GPU takes."""
    text = doctor.examine(DoctorConfig(model="mavil-small", batch=4, recompute="none", gpu=(24,)))
    first, *_, second, _ = text.splitlines()
    assert "a step of 4 clips" in first and "stage 2, with its teacher: a step of 4 clips" in second
    counts = [int(count.replace(",", "")) for count in re.findall(r"take ([\d,]+) clips", text)]
    assert len(counts) == 2 and all(1000 < count < 10_000 for count in counts)
    (line,) = doctor.examine(DoctorConfig(model="a-mae-small", batch=64, recompute="block", gpu=(24,))).splitlines()[1:]
    assert "kept for backward" in line


@pytest.mark.parametrize(("change", "words"), [({"model": "huge"}, "--model is 'huge'"), ({"batch": 1}, "--batch is 1")])
def test_what_the_doctor_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        doctor.examine(DoctorConfig(**{"model": "small"} | change))
