"""MAViL on packed streams against the reference in float64, and what its two stages rest on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import gradients, one_thread, pair, randomize, relative  # noqa: F401
from tiny_mavil import MAVIL, TOWER, clips
from torch import nn

from cavmae_fast.models.mavil import MAViL, MAViLFT
from cavmae_fast.models.weights import CheckpointError
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.reference import mavil as reference
from cavmae_fast.reference.outputs import FeatureOutput, MAViLOutput
from cavmae_fast.reference.positions import separable_positions, sincos_positions

OFF = {f"{loss}_loss_weight": 0.0 for loss in ("raw", "inter", "intra", "regression")}
LOSSES = {
    "all": {"raw_loss_weight": 0.7, "inter_loss_weight": 0.5, "intra_loss_weight": 0.3, "regression_loss_weight": 0.9},
    "stage-1": {},
    "raw": OFF | {"raw_loss_weight": 2.0},
    "inter": OFF | {"inter_loss_weight": 0.5},
    "intra": OFF | {"intra_loss_weight": 0.5},
    "regression": OFF | {"regression_loss_weight": 0.5},
    "stage-2": {"raw_loss_weight": 0.0, "regression_loss_weight": 1.0},
}
CONFIGS = {
    "default": {},
    "raw-pixels": {"norm_pix_loss": False},
    "bottleneck": {"fusion": "bottleneck", "bottleneck_tokens": 3},
    "one-fusion-block": {"fusion_depth": 1},
    "one-decoder-block": {"decoder_depth": 1},
    "one-frame": {"frames": 1, "img_size": 48},
    "frame-by-frame": {"tubelet_size": 1},
    "one-tubelet": {"frames": 2, "img_size": 48},
    "patch-8": {"patch_size": 8, "img_size": 16, "audio_length": 16},
    "class-token-pooled": {"pool_class_token": True},
    "normalized-targets": {"normalize_targets": True},
    "temperatures": {"inter_temperature": 0.3, "intra_temperature": 0.2},
    "narrow-mlp": {"mlp_ratio": 1.5},
    "norm-eps": {"norm_layer": lambda width: nn.LayerNorm(width, eps=1e-2)},
    "torch": {"attention": "torch"},
}


def random_targets(model, batch=3):
    generator = torch.Generator().manual_seed(5)
    shapes = [(batch, tower.num_patches, tower.norm.normalized_shape[0]) for tower in model.towers]
    return FeatureOutput(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def run(model, config, seed=3, batch=3, **forward) -> MAViLOutput:
    torch.manual_seed(seed)
    return model(*clips(config, batch), random_targets(model, batch), **forward)


def assert_same_step(fast, plain, config, **forward):
    got, want = run(fast, config, **forward), run(plain, config, **forward)
    for name, one, other in zip(MAViLOutput._fields, got, want):
        assert one.shape == other.shape and relative(one, other) < 1e-10, name
    got.loss.backward()
    want.loss.backward()
    wanted = gradients(plain)
    assert gradients(fast).keys() == wanted.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for name, gradient in gradients(fast).items():
        assert (gradient - wanted[name]).norm() <= 1e-9 * max(float(wanted[name].norm()), 1e-3 * largest), name


@pytest.mark.parametrize("losses", LOSSES)
def test_losses_equal_the_reference(losses):
    fast, plain = pair(MAViL, reference.MAViL, **MAVIL)
    assert_same_step(fast, plain, MAVIL, **LOSSES[losses])


@pytest.mark.parametrize("name", CONFIGS)
def test_step_equals_reference(name):
    config = MAVIL | CONFIGS[name]
    fast, plain = pair(MAViL, reference.MAViL, **config)
    assert_same_step(fast, plain, config, **LOSSES["all"])


@pytest.mark.parametrize("ratios", [(0.5, 0.6), (0.8, 0.3)])
def test_mask_ratios(ratios):
    fast, plain = pair(MAViL, reference.MAViL, **MAVIL)
    assert_same_step(fast, plain, MAVIL, mask_ratio_a=ratios[0], mask_ratio_v=ratios[1], **LOSSES["all"])


def test_bytes_equal_the_reference():
    fast, plain = pair(MAViL, reference.MAViL, **MAVIL)
    audio, _ = clips()
    imgs = torch.randint(256, (3, 4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    outputs = []
    for model in (fast, plain):
        torch.manual_seed(0)
        outputs.append(model(audio, imgs).loss)
    # The reference normalizes pixels in float64, the model, whose projection is in float64 too, likewise.
    assert relative(*outputs) < 1e-10


def test_half_the_precision_half_the_story():
    """Under autocast all outputs are finite, the losses in float32 and near those of float32."""
    fast, _ = pair(MAViL, reference.MAViL, dtype=torch.float32, **MAVIL)
    audio, imgs = clips(dtype=torch.float32)
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(fast(audio, imgs, fast.targets(audio, imgs), **LOSSES["all"]))
    exact, low = outputs
    assert low.loss.dtype == torch.float32
    assert relative(low.loss, exact.loss) < 0.05
    low.loss.backward()
    assert all(g.isfinite().all() for g in gradients(fast).values())


@pytest.mark.parametrize("fusion", ["joint", "bottleneck"])
def test_other_passes_equal_the_reference(fusion):
    config = MAVIL | {"fusion": fusion}
    fast, plain = pair(MAViL, reference.MAViL, **config)
    for method in ("targets", "forward_feat", "forward_inpaint"):
        results = []
        for model in (fast, plain):
            torch.manual_seed(0)
            results.append(getattr(model, method)(*clips()))
        for one, other in zip(*results, strict=True):
            assert relative(one, other) < 1e-10, method


def test_features_of_one_modality():
    """As evaluation asks for them: by name, and only those that are given."""
    model, _ = pair(MAViL, reference.MAViL, **MAVIL)
    audio, imgs = clips()
    both = model.forward_feat(audio, imgs)
    model.check_inputs(v=imgs)
    assert model.modalities == "av" and model.features({"v": imgs}).keys() == {"v"}
    assert relative(model.features({"v": imgs})["v"], both.video) < 1e-12
    assert relative(model.features({"a": audio})["a"], both.audio) < 1e-12


@pytest.mark.parametrize("fusion", ["joint", "bottleneck"])
def test_classifier_equals_the_reference(fusion):
    fast, plain = pair(MAViLFT, reference.MAViLFT, 7, **TOWER, fusion=fusion)
    fast.train_with("multimodal")
    with pytest.raises(ValueError, match="mode is 'audioonly'; for MAViLFT it must be one of multimodal"):
        fast(*clips(), "audioonly")
    got, want = fast(*clips(), "multimodal"), plain(*clips())
    assert got.shape == (3, 7) and relative(got, want) < 1e-10
    got.square().sum().backward()
    want.square().sum().backward()
    trained = {name for name, p in fast.named_parameters() if p.requires_grad}
    assert gradients(fast).keys() == gradients(plain).keys() == trained
    assert all(relative(g, gradients(plain)[name]) < 1e-6 for name, g in gradients(fast).items() if "qkv.bias" not in name)


# --------------------------------------------------------------------------------------------------------- the stages


def test_fast_and_reference_train_alike():
    """50 steps from one seed in float32: losses within 1e-3."""
    losses = []
    for kind in (MAViL, reference.MAViL):
        torch.manual_seed(0)
        model = kind(**MAVIL)
        model.train_losses(raw=True, inter=True, intra=True, regression=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        rows = []
        for step in range(50):
            audio, imgs = (x + 0.01 * step for x in clips(dtype=torch.float32))
            loss = model(audio, imgs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows.append(float(loss.detach()))
        losses.append(rows)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_teacher_that_is_the_student_and_nothing_removed():
    """The student's fused tokens are the teacher's, and there is nothing to regress."""
    fast, _ = pair(MAViL, reference.MAViL, **MAVIL)
    targets = fast.targets(*clips())
    student = fast.fused(*clips())
    assert student.audio.requires_grad and all(torch.equal(one, other) for one, other in zip(student, targets))
    output = fast(*clips(), targets, 0.0, 0.0, **LOSSES["stage-2"])
    assert output.loss_regression == 0 and output.loss_inter > 0
    plain = reference.MAViL(**MAVIL).double()
    assert plain(*clips(), plain.targets(*clips()), 0.0, 0.0, **LOSSES["stage-2"]).loss_regression == 0


def test_a_teacher_gets_no_gradient_and_does_not_change():
    teacher, _ = pair(MAViL, reference.MAViL, **MAVIL)
    student = randomize(MAViL(**MAVIL).double(), seed=1)
    student.train_losses(raw=False, inter=True, intra=True, regression=True)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        targets = teacher.targets(*clips())
        assert not any(tokens.requires_grad for tokens in targets)
        torch.manual_seed(0)
        output = student(*clips(), targets, **LOSSES["stage-2"])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss_regression.detach()))
    assert losses[-1] < losses[0]
    assert not gradients(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("losses", [name for name in LOSSES if name != "all"])
@pytest.mark.parametrize("fusion", ["joint", "bottleneck"])
def test_what_is_trained_gets_a_gradient(losses, fusion):
    """So plain DDP, which waits for every gradient, works with any losses."""
    model = MAViL(**MAVIL | {"fusion": fusion}).double()
    defaults = {"raw_loss_weight": 1.0, "inter_loss_weight": 0.1, "intra_loss_weight": 0.01, "regression_loss_weight": 0.0}
    weights = defaults | LOSSES[losses]
    model.train_losses(**{name.removesuffix("_loss_weight"): weight != 0 for name, weight in weights.items()})
    run(model, MAVIL, **weights).loss.backward()
    assert gradients(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    model.train_losses(raw=True, inter=True, intra=True, regression=True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all("pos_embed" in name for name in frozen)


def test_losses_out_of_force():
    model = MAViL(**MAVIL)
    with pytest.raises(
        ValueError, match="raw, inter, intra and regression are all False; at least one loss must be trained"
    ):
        model.train_losses(raw=False, inter=False, intra=False, regression=False)
    model.train_losses(raw=True, inter=True, intra=True, regression=False)
    with pytest.raises(ValueError, match=r"regression_loss_weight is 1.0, but this model's train_losses\(\) froze"):
        model(*clips(dtype=torch.float32), random_targets(model), regression_loss_weight=1.0)
    model.eval()(*clips(dtype=torch.float32), random_targets(model), regression_loss_weight=1.0)


# ------------------------------------------------------------------------------------------------------- exact savings


def test_one_pass_for_both_views_and_both_modalities(monkeypatch):
    """What the blocks see: two streams, of both views, of kept patches and a class token."""
    from cavmae_fast.models import mavil, packed, towers

    seen, ends = [], []

    def block(state, *rest, **options):
        seen.append(state.layout)
        return packed.block(state, *rest, **options)

    def block_for_tokens(state, one, ids, *rest, **options):
        ends.append((state.layout.lengths, ids.shape[1]))
        return packed.block_for_tokens(state, one, ids, *rest, **options)

    monkeypatch.setattr(towers, "block", block)
    monkeypatch.setattr(mavil, "block", block)
    monkeypatch.setattr(towers, "block_for_tokens", block_for_tokens)
    model = MAViL(**MAVIL)
    audio, imgs = clips(dtype=torch.float32)
    model(audio, imgs)
    kept_a, kept_v = 1 + 3, 1 + 1  # of 16 and 8 patches
    encoders, fused = StreamLayout(6, (kept_a, kept_v)), StreamLayout(3, (kept_a + kept_v,))
    assert seen == [encoders] * 2 + [fused] * 2 + [StreamLayout(1, (3 * kept_a + 17, 3 * kept_v + 9))]
    assert ends == [((17,), 13), ((9,), 7)]
    seen.clear()
    model.targets(audio, imgs)
    assert seen == [StreamLayout(3, (17, 9))] * 2 + [StreamLayout(3, (26,))] * 2
    seen.clear()
    model(audio, imgs, raw_loss_weight=0.0, intra_loss_weight=0.0)
    assert seen == [StreamLayout(3, (kept_a, kept_v))] * 2


def test_the_published_sizes():
    with torch.device("meta"):
        model = MAViL()
    assert [tower.num_patches for tower in model.towers] == [512, 784]
    assert model.audio.patch_embed.grid == (64, 8) and model.video.patch_embed.grid == (4, 14, 14)
    masks = model.draw_masks(2, 2, torch.device("cpu"), 0.8, 0.8)
    assert [tuple(masking.ids_keep.shape) for masking in masks] == [(4, 102), (4, 156)]
    spec = model.clip_spec
    assert (spec.frames, spec.frame_rate, spec.crop_seconds, spec.audio_length) == (8, 2.0, 4.0, 1024)
    assert (spec.audio_mean, spec.audio_std) == (-4.2677393, 2 * 4.5689974)


def test_positions_are_separable():
    table = separable_positions(768, 4, 14, 14).view(4, 196, 768)
    assert torch.equal(table[2, :, 192:], sincos_positions(576, 14, 14))
    assert torch.equal(table[:, 3, :192], table[:, 150, :192])
    assert torch.equal(table[1, 0, :96], (10000.0 ** (-torch.arange(96, dtype=torch.float64) / 96)).sin().float())
    with pytest.raises(ValueError, match="embedding width is 24; separable positions need a multiple of 16"):
        separable_positions(24, 2, 2, 2)


def test_views_differ():
    model = MAViL(**MAVIL)
    a, v = model.draw_masks(3, 2, torch.device("cpu"), 0.8, 0.8)
    for masking in (a, v):
        one, other = masking.mask.chunk(2)
        assert not torch.equal(one, other)
    assert run(model.double(), MAVIL).mask_a.shape == (3, 16)


# --------------------------------------------------------------------------------------------- files, kernels and errors


def test_saved_and_opened(tmp_path):
    from cavmae_fast.models.opening import open_model

    model = randomize(MAViL(**MAVIL | {"fusion": "bottleneck"}))
    model.save_pretrained(tmp_path / "model")
    again = open_model(tmp_path / "model")
    assert type(again) is MAViL and again.config == model.config and again.fusion.norm.eps == 1e-6
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(CheckpointError, match=r"describes a MAViL; this is MAViLFT.from_pretrained"):
        MAViLFT.from_pretrained(tmp_path / "model")


def test_errors():
    model = MAViL(**MAVIL)
    audio, imgs = clips(dtype=torch.float32)
    targets = random_targets(model)
    regress = {"raw_loss_weight": 0.0, "regression_loss_weight": 1.0}
    cases = [
        (lambda: model(audio, imgs[:, :2]), r"imgs has shape \[3, 2, 3, 32, 32\]; this model takes \[B, 4, 3, 32, 32\]"),
        (lambda: model(audio[:2], imgs), "audio holds 2 samples and imgs 3; they must be as many"),
        (lambda: model(audio, imgs, mask_ratio_a=0.0), "mask_ratio_a is 0.0, which removes none of 16 patches"),
        (lambda: model(audio, imgs, mask_ratio_v=0.99), "mask_ratio_v is 0.99, which keeps none of 8 patches"),
        (lambda: model(audio, imgs, **regress), "targets is None; regression_loss_weight is not 0"),
        (lambda: model(audio, imgs, targets, 0.0, 0.8, **regress), "mask_ratio_a is 0.0, which removes none"),
        (
            lambda: model(audio, imgs, FeatureOutput(targets.audio, targets.video[..., :16]), **regress),
            r"targets.video has shape \[3, 8, 16\]; this model regresses \[3, 8, 48\]: the teacher must have its width",
        ),
        (
            lambda: model(audio, imgs, FeatureOutput(*(t.requires_grad_() for t in targets)), **regress),
            "targets.audio requires a gradient; a teacher gets none",
        ),
        (lambda: MAViL(**MAVIL | {"fusion": "late"}), "fusion is 'late'; it must be one of joint, bottleneck"),
        (lambda: MAViL(**MAVIL | {"fusion_depth": 0}), "fusion_depth is 0; it must be at least 1"),
        (lambda: MAViL(**MAVIL | {"inter_temperature": 0.0}), "inter_temperature is 0.0; it must be above 0"),
        (lambda: MAViL(**MAVIL | {"tubelet_size": 3}), "tubelet_size 3 does not divide frames, which is 4"),
        (lambda: MAViL(**MAVIL | {"audio_length": 40}), "patch_size 16 does not divide audio_length, which is 40"),
        (lambda: MAViL(**MAVIL | {"attention": "eager"}), "attention is 'eager'; it must be one of auto"),
        (lambda: MAViLFT(0, **TOWER), "label_dim is 0; it must be at least 1"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match=r"imgs is torch.int64; it must be a floating-point tensor or uint8 RGB"):
        model(audio, imgs.long())
    model.negatives = "none"
    with pytest.raises(ValueError, match="negatives is 'none'; it must be one of all, rank"):
        model(audio, imgs)


def test_kernels_give_the_reference():
    """In Triton's interpreter, which must be asked for before the first kernel is defined."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CAVMAE_OPS": "triton"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here)])
    program = (
        "import torch\n"
        "from tiny import pair, gradients, relative\n"
        "from tiny_mavil import MAVIL, clips\n"
        "from cavmae_fast.models.mavil import MAViL\n"
        "from cavmae_fast.reference import mavil\n"
        "torch.set_num_threads(1)\n"
        "fast, plain = pair(MAViL, mavil.MAViL, dtype=torch.float32, **MAVIL)\n"
        "audio, _ = clips(batch=2, dtype=torch.float32)\n"
        "imgs = torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8)\n"
        "rows = []\n"
        "for model in (fast, plain):\n"
        "    torch.manual_seed(0)\n"
        "    output = model(audio, imgs, model.targets(audio, imgs), regression_loss_weight=1.0)\n"
        "    output.loss.backward()\n"
        "    rows.append((output, gradients(model)))\n"
        "(got, ours), (want, theirs) = rows\n"
        "largest = max(float(g.norm()) for g in theirs.values())\n"
        "assert ours.keys() == theirs.keys()\n"
        "print(max(relative(a, b) for a, b in zip(got, want)),\n"
        "      max(float((g - theirs[n]).norm()) / max(float(theirs[n].norm()), 1e-3 * largest) for n, g in ours.items()))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    losses, steps = (float(word) for word in run.stdout.split())
    # float32 through some twenty layers: 1e-5 and less per layer, as for the other kernels against float32 references.
    assert losses < 1e-5 and steps < 1e-3


def test_compiles_whole():
    """Without a graph break, and to the same numbers."""
    torch.compiler.reset()
    model, _ = pair(MAViL, reference.MAViL, **MAVIL)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for one in (compiled, model):
        torch.manual_seed(0)
        outputs.append(one(*clips(), random_targets(model), **LOSSES["all"]))
    assert all(relative(one, other) < 1e-10 for one, other in zip(*outputs, strict=True))


def test_pictures_of_the_loader(tmp_path):
    """Eight pictures of a four-second crop as uint8, and the sound from where it begins."""
    from cavmae_fast.data.loader import Loader
    from cavmae_fast.data.media.synthetic import generate_clips

    config = TOWER | {"frames": 8, "decoder_embed_dim": 32, "decoder_num_heads": 4, "decoder_depth": 1, "fusion_depth": 1}
    model = MAViL(**config)
    train, _ = generate_clips(tmp_path, num_train=2, num_test=1, seconds=4.5, size=48)
    batch = next(iter(Loader(train, batch_size=2, clip=model.clip_spec, training=True, workers=0)))
    assert batch.image.shape == (2, 8, 3, 32, 32) and batch.image.dtype == torch.uint8
    output = model(batch.audio, batch.image)
    output.loss.backward()
    assert output.loss.isfinite()
