"""What a recipe says: schedules, optimizers and their groups, and the options that change it."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from cavmae_fast.models import CAVMAE, CAVMAEFT
from cavmae_fast.training.adam import Adam, AdamW
from cavmae_fast.training.optimizers import OptimizerError, layer_of, layers, make_optimizer, parameter_groups
from cavmae_fast.training.recipes import PRETRAINING, Recipe
from cavmae_fast.training.run_config import RunConfig, recipe_in_force, resolve_run
from cavmae_fast.training.schedules import Constant, Cosine, StepDecay, WarmUp
from tests.tiny import ENCODER, TINY

RECIPE = PRETRAINING["cav-mae-base"]


def resolved(**options) -> RunConfig:
    return resolve_run(RunConfig(device="cpu", dtype="float32", **options), RECIPE)


# ----------------------------------------------------------------------------------------------------------- schedules


def test_cosine():
    """Against PyTorch's CosineAnnealingLR."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    published = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for step in range(20):
        assert Cosine(0.1).scale(0, step, 20) == pytest.approx(published.get_last_lr()[0])
        optimizer.step()
        published.step()
    assert Cosine(0.1).scale(0, 25, 20) == pytest.approx(0.1)


def test_warm_up_rises_to_the_whole_and_leaves_the_rest_to_the_schedule():
    rising = WarmUp(4, Cosine())
    assert [rising.scale(0, step, 14) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [rising.scale(0, step, 14) for step in range(4, 14)] == [Cosine().scale(0, step, 10) for step in range(10)]
    decay = WarmUp(4, StepDecay(1, 1, 3))
    assert [decay.scale(epoch, 100, 200) for epoch in range(4)] == [1, 0.5, 0.25, 0.125]
    assert WarmUp(0, Constant()).scale(0, 0, 1) == 1
    assert math.isfinite(WarmUp(9, Cosine()).scale(0, 3, 5))  # a run shorter than its warm-up


# ---------------------------------------------------------------------------------------------------------- optimizers


def test_one_group_in_the_models_order_unless_something_is_asked_for():
    model = CAVMAE(**TINY)
    (group,) = parameter_groups(RECIPE, model)
    assert group["scale"] == 1
    assert all(a is b for a, b in zip(group["params"], (p for p in model.parameters() if p.requires_grad), strict=True))


def test_the_head_learns_faster():
    model = CAVMAEFT(5, **ENCODER)
    groups = parameter_groups(replace(RECIPE, head_lr_factor=50.0), model)
    assert {group["scale"]: len(group["params"]) for group in groups}[50.0] == 4
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].startswith("mlp_head.") == (g["scale"] == 50) for g in groups for p in g["params"])


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("patch_embed_a.proj.weight", 0),
        ("pos_embed_v", 0),
        ("modality_a", 0),
        ("blocks_a.0.attn.qkv.weight", 1),
        ("blocks_v.1.norm1.bias", 2),
        ("blocks_u.0.norm1_a.weight", 3),
        ("norm_a.weight", 4),
        ("decoder_embed.weight", 4),
        ("decoder_blocks.0.attn.qkv.weight", 4),
        ("mask_token", 4),
        ("mlp_head.1.weight", 4),
    ],
)
def test_layers(name, layer):
    model = CAVMAE(**TINY)
    assert layers(model) == 3
    assert layer_of(name, model) == layer


def test_layer_decay_and_head_factor_multiply_and_follow_the_schedule():
    model = CAVMAEFT(5, **ENCODER)
    recipe = replace(RECIPE, head_lr_factor=10.0, layer_decay=0.5)
    groups = parameter_groups(recipe, model)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
    assert scales["mlp_head.1.weight"] == 10
    assert scales["norm.weight"] == 1
    assert scales["blocks_u.0.mlp.fc1.weight"] == 0.5
    assert scales["blocks_a.0.mlp.fc1.weight"] == 0.125
    assert scales["patch_embed_a.proj.weight"] == 0.0625
    assert len(scales) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_pytorchs_optimizers_are_fused(name, kind):
    optimizer = make_optimizer(replace(RECIPE, optimizer=name, betas=(0.8, 0.9)), nn.Linear(2, 2))
    assert type(optimizer) is kind and optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["weight_decay"] == RECIPE.weight_decay


@pytest.mark.parametrize(("name", "kind"), [("fast-adam", Adam), ("fast-adamw", AdamW)])
def test_our_own_optimizers(name, kind):
    optimizer = make_optimizer(replace(RECIPE, optimizer=name, betas=(0.8, 0.9)), nn.Linear(2, 2))
    assert type(optimizer) is kind and optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["weight_decay"] == RECIPE.weight_decay


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="'sgd'; it must be one of adam, adamw, fast-adam, fast-adamw, fused-adam"):
        make_optimizer(replace(RECIPE, optimizer="sgd"), nn.Linear(2, 2))


def test_apex_that_is_absent_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(OptimizerError, match=r"--optimizer is fused-adam, but NVIDIA's apex is not installed; build it"):
        make_optimizer(replace(RECIPE, optimizer="fused-adam"), nn.Linear(2, 2))


def test_apex_is_asked_for_the_same_update(monkeypatch):
    """A stand-in with the signature of apex's class; L2 regularization and not AdamW, which is its default."""
    asked = {}

    def fused_adam(params, lr, betas, weight_decay, adam_w_mode=True, capturable=False):
        asked.update(params=params, lr=lr, betas=betas, weight_decay=weight_decay, adam_w_mode=adam_w_mode)
        return SimpleNamespace()

    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = fused_adam
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    make_optimizer(replace(RECIPE, optimizer="fused-adam"), nn.Linear(2, 2))
    assert asked["adam_w_mode"] is False and asked["lr"] == RECIPE.learning_rate and len(asked["params"][0]["params"]) == 2


# ------------------------------------------------------------------------------------------------------------- options


def test_without_options_the_recipe_is_in_force():
    config = resolved()
    assert recipe_in_force(config, RECIPE) == RECIPE
    assert (config.optimizer, config.schedule, config.decay_start, config.end_factor) == ("adam", "step", 10, None)
    assert None not in (config.betas, config.weight_decay, config.clip_grad, config.ema, config.accumulate)


def test_every_option_reaches_the_recipe():
    changes = {
        "optimizer": "adamw",
        "betas": (0.9, 0.95),
        "weight_decay": 0.05,
        "head_lr_factor": 5.0,
        "layer_decay": 0.75,
        "clip_grad": 1.0,
        "ema": 0.999,
        "drop_path": 0.1,
        "accumulate": 4,
    }
    recipe = recipe_in_force(resolved(**changes), RECIPE)
    assert recipe == replace(RECIPE, **changes)


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"decay_factor": 0.1}, StepDecay(10, 5, 25, 0.1)),
        ({"decay_start": 2, "decay_every": 1, "epochs": 8}, StepDecay(2, 1, 8, 0.5)),
        ({"schedule": "cosine"}, Cosine(0.0)),
        ({"schedule": "cosine", "end_factor": 0.1, "warmup_steps": 7}, WarmUp(7, Cosine(0.1))),
        ({"schedule": "constant"}, Constant()),
        ({"warmup_steps": 7}, WarmUp(7, StepDecay(10, 5, 25, 0.5))),
        ({"warmup_steps": 0}, StepDecay(10, 5, 25, 0.5)),
    ],
)
def test_schedules_by_options(options, schedule):
    assert recipe_in_force(resolved(**options), RECIPE).schedule == schedule


def test_a_recipe_with_another_schedule_can_be_changed_too():
    recipe = Recipe(1e-3, 8, 5, WarmUp(10, Cosine(0.2)))
    config = resolve_run(RunConfig(device="cpu", dtype="float32"), recipe)
    assert (config.schedule, config.end_factor, config.warmup_steps) == ("cosine", 0.2, 10)
    assert recipe_in_force(config, recipe) == recipe
    config = resolve_run(
        RunConfig(device="cpu", dtype="float32", schedule="step", decay_start=2, decay_every=1, warmup_steps=0), recipe
    )
    assert recipe_in_force(config, recipe).schedule == StepDecay(2, 1, 5, 0.5)
    with pytest.raises(ValueError, match="--schedule step needs --decay-start, because the recipe has none"):
        resolve_run(RunConfig(device="cpu", dtype="float32", schedule="step"), recipe)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"betas": (0.9, 1.0)}, r"--betas is \(0.9, 1.0\); it must be two numbers, each at least 0 and below 1"),
        ({"weight_decay": -1.0}, "--weight-decay is -1.0; it must be 0 or more"),
        ({"warmup_steps": -1}, "--warmup-steps is -1; it must be 0 or more"),
        ({"decay_every": 0}, "--decay-every is 0; it must be above 0"),
        ({"decay_factor": 0.0}, "--decay-factor is 0.0; it must be above 0"),
        ({"head_lr_factor": 0.0}, "--head-lr-factor is 0.0; it must be above 0"),
        ({"layer_decay": 1.5}, "--layer-decay is 1.5; it must be above 0 and at most 1"),
        ({"layer_decay": float("nan")}, "--layer-decay is nan; it must be"),
        ({"clip_grad": -0.5}, "--clip-grad is -0.5; it must be 0 or more"),
        ({"ema": 1.0}, "--ema is 1.0; it must be at least 0 and below 1"),
        ({"drop_path": 1.0}, "--drop-path is 1.0; it must be at least 0 and below 1"),
        ({"accumulate": 0}, "--accumulate is 0; it must be above 0"),
        ({"accumulate": 9, "batch_size": 8}, "--accumulate is 9; it must be at most the batch size, which is 8"),
        ({"max_skipped": 0}, "--max-skipped is 0; it must be above 0"),
        ({"end_factor": 0.1}, "--end-factor is for --schedule cosine; the schedule is step"),
        ({"schedule": "cosine", "decay_start": 1}, "--decay-start is for --schedule step; the schedule is cosine"),
        ({"schedule": "cosine", "end_factor": 2.0}, "--end-factor is 2.0; it must be in 0 to 1"),
    ],
)
def test_values_that_are_not_allowed(options, words):
    with pytest.raises(ValueError, match=words):
        resolved(**options)
