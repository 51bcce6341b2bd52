"""Adam and AdamW of this package: PyTorch's updates and checkpoints, and weights that are kept rounded."""

from __future__ import annotations

import copy
import gc
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

import cavmae_fast
from cavmae_fast.models import CAVMAE
from cavmae_fast.models.precision import Precision
from cavmae_fast.models.rounded import copies_of, keep_rounded, refresh, rounded
from cavmae_fast.ops import dispatch
from cavmae_fast.training.adam import Adam, AdamW
from cavmae_fast.training.fit import fit
from cavmae_fast.training.optimizers import make_optimizer
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.recipes import Recipe
from cavmae_fast.training.schedules import Constant
from cavmae_fast.training.state import RunState
from tests.clips_at_hand import ClipsAtHand
from tests.tiny import TINY, inputs, one_thread  # noqa: F401

PAIRS = [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)]
CPU = torch.device("cpu")


def trained(optimizer_of, steps: int = 4, model: nn.Module | None = None):
    """A small network after `steps` steps, and its optimizer."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    optimizer = optimizer_of(model.parameters())
    x = torch.randn(6, 5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_public_names():
    assert cavmae_fast.AdamW is AdamW and cavmae_fast.Adam is Adam


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}, {"maximize": True}], ids=str
)
def test_the_updates_are_pytorchs(ours, theirs, options):
    one, _ = trained(lambda p: ours(p, lr=0.01, **options))
    other, _ = trained(lambda p: theirs(p, lr=0.01, fused=True, **options))
    assert equal(one, other)
    with dispatch.override("triton"):
        again, _ = trained(lambda p: ours(p, lr=0.01, **options))
    for a, b in zip(again.parameters(), other.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_checkpoints_go_both_ways(mode, ours, theirs, form):
    with dispatch.override(mode):
        for first, second in ((ours, theirs), (theirs, ours)):
            options = [{} if kind is ours else form for kind in (first, second)]
            model, optimizer = trained(lambda p, kind=first, given=options[0]: kind(p, lr=0.01, **given))
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            going_on, twin = second(model.parameters(), lr=0.5, **options[1]), copy.deepcopy(model)
            going_on.load_state_dict(torch.load(file, weights_only=True))
            assert going_on.param_groups[0]["lr"] == 0.01
            same = first(twin.parameters(), lr=0.5, **options[0])
            same.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for one, its in ((model, going_on), (twin, same)):
                for p in one.parameters():
                    p.grad = p.detach() * 0.5
                its.step()
            for a, b in zip(model.parameters(), twin.parameters()):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
            keys = [set(one.state_dict()["state"][0]) for one in (going_on, same)]
            assert keys == [{"step", "exp_avg", "exp_avg_sq"}] * 2


def test_groups_have_their_own_options():
    def groups(kind, **options):
        def make(parameters):
            first, *others = parameters
            return kind([{"params": [first], "lr": 0.1, "weight_decay": 0.5}, {"params": others}], lr=0.001, **options)

        return make

    assert equal(trained(groups(AdamW))[0], trained(groups(torch.optim.AdamW, fused=True))[0])


def test_parameters_without_gradients_stay():
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    model.weight.grad = torch.ones_like(model.weight)
    before = model.bias.clone()
    optimizer.step()
    assert torch.equal(model.bias, before) and model.bias not in optimizer.state


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_memory_formats(mode):
    """Parameters and gradients may be laid out in any dense way, each in its own."""
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 5, 5)
    for one, kind, options in ((model, AdamW, {"rounded": torch.float16}), (twin, torch.optim.AdamW, {"foreach": False})):
        optimizer = kind(one.parameters(), lr=0.1, **options)
        rounded(one.weight, torch.float16)
        one(x).square().mean().backward()
        one.weight.grad = one.weight.grad.contiguous()
        with dispatch.override(mode):
            optimizer.step()
    assert torch.allclose(model.weight, twin.weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(rounded(model.weight, torch.float16), model.weight.half())


def test_a_parameter_with_gaps_is_refused():
    weight = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    weight.grad = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"a parameter of shape \[4, 3\] has strides \(6, 2\)"):
        AdamW([weight]).step()


def test_a_closure_and_a_schedule():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    schedule.step()
    assert optimizer.step(closure).item() < first and optimizer.param_groups[0]["lr"] == 0.005


def test_grad_scaler_skips_and_unscales():
    model = nn.Linear(3, 2)
    optimizer, plain = AdamW(model.parameters(), lr=0.1), copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.full((1, 3), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert equal(model, plain) and scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    scaler.step(optimizer)
    other = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    plain(torch.ones(1, 3)).sum().backward()
    other.step()
    assert equal(model, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounded": torch.int8}, "rounded is torch.int8; it must be"),
        ({"rounded": torch.float16, "low_gradients": True}, "low_gradients is for rounded=torch.bfloat16"),
        ({"low_gradients": True}, "low_gradients is for rounded=torch.bfloat16"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW(nn.Linear(2, 2).parameters(), **options)


def test_amsgrad_is_refused():
    model = nn.Linear(2, 2)
    state = torch.optim.AdamW(model.parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="state_dict is of an optimizer with amsgrad=True"):
        AdamW(model.parameters()).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------ rounded weights


def test_the_copy_follows_the_weight():
    weight = nn.Parameter(torch.randn(4, 3))
    keep_rounded([weight], torch.bfloat16)
    assert copies_of([weight]) == [None], "nobody has asked for it yet"
    first = rounded(weight, torch.bfloat16)
    assert torch.equal(first, weight.bfloat16()) and first.requires_grad
    assert rounded(weight, torch.bfloat16).data_ptr() == first.data_ptr()
    assert rounded(weight, torch.float16).dtype == torch.float16 and rounded(weight, torch.float32) is weight
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(rounded(weight, torch.bfloat16), weight.bfloat16())
    weight.data.mul_(2)  # what PyTorch does not count
    refresh([weight])
    assert torch.equal(rounded(weight, torch.bfloat16), weight.bfloat16())
    weight.data = torch.zeros(4, 3)
    assert not rounded(weight, torch.bfloat16).any()


def test_copies_belong_to_no_checkpoint_and_to_no_other_model():
    model = nn.Linear(4, 3)
    keep_rounded(model.parameters(), torch.bfloat16)
    rounded(model.weight, torch.bfloat16)
    other = copy.deepcopy(model)
    assert copies_of([*other.parameters()]) == [None, None]
    file = io.BytesIO()
    torch.save(model.weight, file)
    assert len(file.getvalue()) < 4000
    tensor = copies_of([model.weight])[0]
    del model, other
    gc.collect()
    assert len(gc.get_referrers(tensor)) <= 2


@pytest.mark.parametrize("low", [False, True])
def test_gradients_reach_the_weight(low):
    weight = nn.Parameter(torch.randn(4, 3))
    keep_rounded([weight], torch.bfloat16, low)
    x = torch.randn(5, 3).bfloat16()
    (x @ rounded(weight, torch.bfloat16).T).sum().backward()
    assert weight.grad.dtype == (torch.bfloat16 if low else torch.float32)
    want = torch.ones(5, 4).bfloat16().T @ x
    assert torch.equal(weight.grad.to(torch.bfloat16), want)


def run(optimizer: str, dtype: torch.dtype, **changes) -> RunState:
    torch.manual_seed(0)
    recipe = Recipe(0.002, batch_size=4, epochs=2, schedule=Constant(), optimizer=optimizer, weight_decay=0.1, **changes)
    state = RunState.start(CAVMAE(**TINY), recipe, ClipsAtHand(steps=6), Precision(CPU, dtype))
    state.rows = []
    fit(PretrainTask(0.5, "unstructured", 1.0, 0.1), state, 6, state.rows.append)
    return state


@pytest.mark.parametrize(
    "changes", [{}, {"clip_grad": 0.1}, {"accumulate": 2}, {"ema": 0.9}], ids=["plain", "clipped", "in parts", "averaged"]
)
@pytest.mark.parametrize(("fast", "plain"), [("fast-adam", "adam"), ("fast-adamw", "adamw")])
def test_training_is_the_same_bits(fast, plain, changes):
    """Weights that are kept rounded, and gradients that stay in bfloat16, change nothing but where they are converted. (The
    norm of all gradients is summed in another order, so clipped ones differ in their last bits.)"""
    one, other = (run(name, torch.bfloat16, **changes) for name in (fast, plain))
    asked = [c for c in copies_of([*one.model.parameters()]) if c is not None]
    assert len(asked) > 20 and not any(c is not None for c in copies_of([*other.model.parameters()]))
    if "clip_grad" in changes:
        for a, b in zip(one.rows, other.rows):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        return
    assert [row["loss"] for row in one.rows] == [row["loss"] for row in other.rows]
    assert equal(one.model, other.model)
    for a, b in zip(one.rows, other.rows):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_training_in_other_dtypes(dtype):
    one, other = (run(name, dtype) for name in ("fast-adam", "adam"))
    assert [row["loss"] for row in one.rows] == [row["loss"] for row in other.rows] and equal(one.model, other.model)


def test_which_gradients_stay_low():
    model = CAVMAE(**TINY)
    recipe = Recipe(0.002, batch_size=4, epochs=2, schedule=Constant(), optimizer="fast-adamw")

    def low(**changes) -> bool:
        optimizer = make_optimizer(replace(recipe, **changes), model, torch.bfloat16)
        audio, imgs = inputs(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            model(audio, imgs)[0].backward()
        found = {p.grad.dtype for p in model.parameters() if p.grad is not None}
        for p in model.parameters():
            p.grad, p.grad_dtype = None, torch.float32
        optimizer.step()
        return torch.bfloat16 in found

    assert low() and not low(accumulate=2)


def test_a_run_goes_on_with_the_same_bits():
    whole = run("fast-adamw", torch.bfloat16)
    torch.manual_seed(0)
    halves = []
    for steps in (3, 6):
        state = RunState.start(CAVMAE(**TINY), whole.recipe, ClipsAtHand(steps=6), Precision(CPU, torch.bfloat16))
        if halves:
            state.load_state_dict(halves[0])
        fit(PretrainTask(0.5, "unstructured", 1.0, 0.1), state, steps, lambda row: None)
        halves.append(copy.deepcopy(state.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(halves[1]["model"].values(), whole.model.state_dict().values()))
