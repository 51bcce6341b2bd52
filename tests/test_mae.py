"""Single-modality masked autoencoders, what they are initialized from, and the presets of MAViL's paper."""

from __future__ import annotations

import pytest
import torch
from tiny import gradients, one_thread, pair, randomize, relative  # noqa: F401
from tiny_mavil import DECODER, MAVIL, TINY, TOWER, clips
from torch import nn

from cavmae_fast.models import (
    MAE,
    MAEFT,
    CheckpointError,
    MAViL,
    MAViLFT,
    create_model,
    load_checkpoint,
    load_mae,
    load_tower,
)
from cavmae_fast.models.flops import step_flops as cavmae_step_flops
from cavmae_fast.models.mavil_flops import decoder_macs, fused_macs, fusion_macs, mae_macs, mavil_macs, step_flops
from cavmae_fast.models.mavil_presets import STAGE_1, STAGE_2, TOWER_PRESETS
from cavmae_fast.models.opening import open_model
from cavmae_fast.models.tower_weights import TOWERS_TO_FINE_TUNED
from cavmae_fast.reference import mae as reference
from cavmae_fast.reference.positions import sincos_positions

CONFIGS = {
    "sound": {"modality": "a"},
    "clips": {"modality": "v"},
    "pictures": {"modality": "v", "frames": 1, "img_size": 48},
    "raw-pixels": {"modality": "v", "norm_pix_loss": False},
    "one-decoder-block": {"modality": "a", "decoder_depth": 1},
    "wide-pictures": {"modality": "v", "frames": 1, "img_size": (32, 64)},
}


def input_of(config: dict, batch: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    if isinstance(config.get("img_size"), tuple):
        shape = (batch, 3, *config["img_size"])
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    audio, imgs = clips(config, batch, dtype)
    return audio if config["modality"] == "a" else imgs


@pytest.mark.parametrize("name", CONFIGS)
def test_step_equals_reference(name):
    config = TINY | CONFIGS[name]
    fast, plain = pair(MAE, reference.MAE, **config)
    outputs = []
    for model in (fast, plain):
        torch.manual_seed(3)
        outputs.append(model(input_of(config)))
        outputs[-1].loss.backward()
    got, want = outputs
    assert relative(got.loss, want.loss) < 1e-10 and torch.equal(got.mask, want.mask)
    wanted = gradients(plain)
    trained = {name for name, p in fast.named_parameters() if p.requires_grad}
    assert gradients(fast).keys() == wanted.keys() == trained
    largest = max(float(g.norm()) for g in wanted.values())
    for key, gradient in gradients(fast).items():
        assert (gradient - wanted[key]).norm() <= 1e-9 * max(float(wanted[key].norm()), 1e-3 * largest), key


@pytest.mark.parametrize("modality", ["a", "v"])
def test_other_passes_equal_the_reference(modality):
    config = TINY | {"modality": modality}
    fast, plain = pair(MAE, reference.MAE, **config)
    results = []
    for model in (fast, plain):
        torch.manual_seed(0)
        results.append([model.forward_feat(input_of(config)), *model.forward_inpaint(input_of(config))])
    assert all(relative(one, other) < 1e-10 for one, other in zip(*results, strict=True))
    fast, plain = pair(MAEFT, reference.MAEFT, 5, **TOWER | {"modality": modality})
    audio, imgs = clips()
    got, want = fast(audio, imgs, fast.modes[0]), plain(audio, imgs)
    assert got.shape == (3, 5) and relative(got, want) < 1e-10
    assert torch.equal(got, fast(audio) if modality == "a" else fast(v=imgs))
    with pytest.raises(ValueError, match="mode is 'multimodal'; for MAEFT it must be one of"):
        fast.train_with("multimodal")
    got.sum().backward()
    assert gradients(fast).keys() == {name for name, p in fast.named_parameters() if p.requires_grad}


def test_names_are_those_of_published_checkpoints():
    """Of image MAEs with their decoder, and of Audio-MAE's encoder."""
    leaves = ["norm1.weight", "attn.qkv.bias", "attn.proj.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc2.bias"]
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "mask_token"]
    names += ["decoder_embed.weight", "decoder_pos_embed", "decoder_norm.bias", "decoder_pred.weight"]
    names += [f"{stack}.1.{leaf}" for stack in ("blocks", "decoder_blocks") for leaf in leaves]
    for modality in ("a", "v"):
        assert set(names) <= MAE(modality, **TINY).state_dict().keys()


def image_mae(**changes) -> dict[str, torch.Tensor]:
    """The weights of an image MAE whose pictures have 2 x 2 patches."""
    return randomize(MAE("v", **TINY | {"frames": 1} | changes), seed=4).state_dict()


def test_image_mae_into_a_clip():
    image = randomize(MAE("v", **TINY | {"frames": 1}), seed=4)
    state = image.state_dict() | {"head.weight": torch.zeros(1)}
    model = MAE("v", **TINY)
    report = load_mae(model, state)
    assert report.missing == [] and report.unexpected == ["head.weight"]
    own = {name: value.clone() for name, value in model.state_dict().items()}
    for depth in range(2):
        assert torch.equal(own["patch_embed.proj.weight"][:, :, depth], state["patch_embed.proj.weight"])
        assert torch.equal(own["pos_embed"][:, 1 + 4 * depth : 5 + 4 * depth], state["pos_embed"][:, 1:])
        assert torch.equal(own["decoder_pred.bias"][768 * depth : 768 * (depth + 1)], state["decoder_pred.bias"])
    assert torch.equal(own["blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])
    load_mae(model, state, keep_sum=True)
    halved = model.state_dict()["patch_embed.proj.weight"]
    assert torch.equal(halved, own["patch_embed.proj.weight"] / 2)
    # A still clip of one frame and its copy gives the tokens that the image gives.
    still = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    same = nn.functional.conv3d(still.unsqueeze(2).repeat(1, 1, 2, 1, 1), halved.double(), stride=(2, 16, 16)).squeeze(2)
    want = nn.functional.conv2d(still, state["patch_embed.proj.weight"].double(), stride=16)
    torch.testing.assert_close(same, want, rtol=0, atol=1e-10)


def test_image_mae_into_mavil():
    state = image_mae()
    model = MAViL(**MAVIL | {"fusion_depth": 3})
    own_positions = model.audio.pos_embed.clone()
    report = load_mae(model, state)
    assert report.unexpected == []
    assert {name.partition(".")[2] or name for name in report.missing} == {
        "pos_embed",
        "decoder_pos_embed",
        "weight",
        "bias",
    }
    assert {name for name in report.missing if not name.startswith("target_pred_")} == {
        "audio.pos_embed",
        "audio.decoder_pos_embed",
    }
    assert torch.equal(model.audio.pos_embed, own_positions)
    kernel = state["patch_embed.proj.weight"]
    assert torch.equal(model.audio.patch_embed.proj.weight, kernel.sum(dim=1, keepdim=True))
    for number in range(3):
        assert torch.equal(model.fusion.blocks[number].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(model.fusion.norm.weight, state["norm.weight"])
    # A pixel of sound is the mean of the three colors that the image's head predicts there.
    assert torch.equal(model.audio.decoder_pred.bias[5], state["decoder_pred.bias"][15:18].mean())
    bottleneck = MAViL(**MAVIL | {"fusion": "bottleneck"})
    load_mae(bottleneck, state)
    for stack in (bottleneck.fusion.blocks_a, bottleneck.fusion.blocks_v):
        assert torch.equal(stack[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])


def test_audio_mae_into_sound():
    """Its decoder is another: it is left, whole, and named."""
    state = randomize(MAE("a", **TINY), seed=2).state_dict()
    state["decoder_blocks.0.attn.relative_position_bias_table"] = torch.zeros(3)
    model = MAEFT(3, "a", **TOWER)
    report = load_mae(model, state)
    assert [name for name in report.missing if not name.startswith("mlp_head")] == []
    assert all(name.startswith(("decoder_", "mask_token")) for name in report.unexpected)
    assert torch.equal(model.pos_embed, state["pos_embed"])
    pretraining = MAE("a", **TINY)
    before = pretraining.decoder_embed.weight.clone()
    load_mae(pretraining, state)
    assert torch.equal(pretraining.decoder_embed.weight, before)
    assert torch.equal(pretraining.blocks[0].mlp.fc2.weight, state["blocks.0.mlp.fc2.weight"])


def test_checkpoints_that_do_not_fit():
    with pytest.raises(
        CheckpointError, match=r"pos_embed gives pos_embed the shape \[1, 19, 48\], the model's has \[1, 9, 48\]"
    ):
        load_mae(MAE("v", **TINY), image_mae(img_size=48))
    with pytest.raises(CheckpointError, match=r"cls_token gives audio.cls_token the shape \[1, 1, 96\]"):
        load_mae(MAViL(**MAVIL), image_mae(embed_dim=96, num_heads=6))
    with pytest.raises(CheckpointError, match=r"it has no block for blocks\.0"):
        load_mae(MAE("v", **TINY), {"head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"is no MAViL checkpoint: no name in it begins with audio\."):
        load_tower(MAEFT(3, "a", **TOWER), image_mae())


def test_from_pretraining_to_fine_tuning(tmp_path):
    mavil = randomize(MAViL(**MAVIL))
    path = mavil.save_pretrained(tmp_path / "mavil")
    both = MAViLFT(3, **TOWER)
    report = load_checkpoint(both, path, **TOWERS_TO_FINE_TUNED)
    assert all(name.startswith("mlp_head.") for name in report.missing)
    assert torch.equal(both.fusion.blocks[1].attn.proj.weight, mavil.fusion.blocks[1].attn.proj.weight)
    for modality, tower in (("a", mavil.audio), ("v", mavil.video)):
        one = MAEFT(3, modality, **TOWER)
        load_tower(one, path)
        assert torch.equal(one.blocks[1].attn.proj.weight, tower.blocks[1].attn.proj.weight)
        alone = MAE(modality, **TINY)
        assert load_tower(alone, path) == ([], [])
        assert torch.equal(alone.decoder_pred.weight, tower.decoder_pred.weight)
        alone.save_pretrained(tmp_path / modality)
        again = open_model(tmp_path / modality)
        assert type(again) is MAE and again.modality == modality
        load_checkpoint(one, tmp_path / modality, **TOWERS_TO_FINE_TUNED)
    one.save_pretrained(tmp_path / "classifier")
    assert type(open_model(tmp_path / "classifier")) is MAEFT


def test_positions():
    sound, clip = MAE("a", **TINY), MAE("v", **TINY)
    assert torch.equal(sound.pos_embed[0, 1:], sincos_positions(48, 2, 8)) and not sound.pos_embed[0, 0].any()
    assert not sound.pos_embed.requires_grad and clip.pos_embed.shape == (1, 1 + 8, 48)


@pytest.mark.parametrize("name", TOWER_PRESETS)
def test_presets(name):
    small = {k: v for k, v in TINY.items() if k not in ("tubelet_size",)}
    model = create_model(name, **small)
    assert model.frames == 4 if name.startswith("v-") else True
    if isinstance(model, MAE):
        return
    for stage, weights in ((1, TOWER_PRESETS[name].weights(1)), (2, TOWER_PRESETS[name].weights(2))):
        model = TOWER_PRESETS[name].create(stage, **small)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert ("target_pred_a.weight" in trained) == (stage == 2) == (weights.regression != 0)
        assert ("audio.decoder_pred.weight" in trained) == (stage == 1)
        assert ("audio.norm.weight" in trained) == (weights.inter != 0)
    with pytest.raises(ValueError, match="stage is 3; it must be 1 or 2"):
        TOWER_PRESETS[name].create(3)


def test_preset_of_another_name():
    with pytest.raises(ValueError, match=r"model is 'maviil'; it must be one of small, .*mavil"):
        create_model("maviil")
    assert MAViL.forward.__defaults__[-4:] == (STAGE_1.raw, STAGE_1.inter, STAGE_1.intra, STAGE_1.regression)
    assert STAGE_2.regression == 1.0 and STAGE_2.raw == 0.0


def test_errors():
    model = MAE("v", **TINY)
    _, imgs = clips(dtype=torch.float32)
    for call, words in (
        (lambda: MAE("x", **TINY), "modality is 'x'; it must be one of a, v"),
        (lambda: model(imgs[:, 0]), r"x has shape \[3, 3, 32, 32\]; this model takes \[B, 4, 3, 32, 32\]"),
        (lambda: model(imgs, 0.0), "mask_ratio is 0.0, which removes none of 8 patches"),
        (lambda: MAE("a", **TINY | {"depth": 0}), "depth is 0; it must be at least 1"),
        (lambda: MAE("a", **TINY | {"decoder_depth": 0}), "decoder_depth is 0; it must be at least 1"),
        (lambda: MAE("a", **TINY | {"embed_dim": 50}), "embed_dim is 50; it must be a multiple of 4"),
        (lambda: MAE("v", **TINY | {"embed_dim": 40, "num_heads": 4}), "embedding width is 40; separable positions need"),
        (lambda: MAE("a", **TINY | {"norm_layer": nn.Identity}), "norm_layer is .*; it must build torch.nn.LayerNorm"),
        (lambda: MAEFT(0, "a", **TOWER), "label_dim is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert DECODER.keys() <= model.config.keys()


# ----------------------------------------------------------------------------------------------------------- operations


def counted(function) -> float:
    """Multiply-adds of products that PyTorch itself counts."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as mode:
        function()
    return mode.get_total_flops() / 2


def test_operations_are_those_that_pytorch_counts():
    """Of the models without our operators' own names: PyTorch's back ends are counted by PyTorch."""
    audio, imgs = clips(dtype=torch.float32, batch=1)
    model = reference_mavil()
    got = counted(lambda: model(audio, imgs, regression_loss_weight=0.0, inter_loss_weight=0.0))
    want = sum(mavil_macs(model, inter=False, plain=True).values())
    assert got == pytest.approx(want, rel=1e-3)  # the contrast's own product of one clip is the rest
    assert counted(lambda: model.targets(audio, imgs)) == pytest.approx(fused_macs(model), rel=1e-9)
    sound = reference.MAE("a", **TINY)
    macs = mae_macs(sound)
    kept = 3
    encoder = macs["encoder"] + (16 - kept) * sound.patch_embed.proj.weight.numel()
    want = encoder + decoder_macs(sound, kept, [sound.decoder_pred], plain=True)
    assert counted(lambda: sound(audio)) == pytest.approx(want, rel=1e-9)


def reference_mavil():
    from cavmae_fast.reference.mavil import MAViL as Plain

    return Plain(**MAVIL)


def test_operations_of_the_published_sizes():
    with torch.device("meta"):
        model, bottleneck = MAViL(), MAViL(fusion="bottleneck")
        cavmae = create_model("cav-mae-base")
    least, plain = sum(mavil_macs(model).values()), sum(mavil_macs(model, plain=True).values())
    assert 60e9 < least < plain < 1.15 * least
    assert step_flops(model) == 6 * least
    teacher = 2 * fused_macs(model)
    assert step_flops(model, stage=2) > step_flops(model) > cavmae_step_flops(cavmae)
    assert 0.2e12 < teacher < 0.7e12
    assert fusion_macs(bottleneck, 513, 785) < fusion_macs(model, 513, 785)


def test_the_classification_of_batches_takes_them(tmp_path):
    """Evaluation calls every classifier in the same way."""
    from cavmae_fast.data.loader import Loader
    from cavmae_fast.data.media.synthetic import generate_clips
    from cavmae_fast.evaluation.predicting import logits

    size = TOWER | {"frames": 8}
    train, _ = generate_clips(tmp_path, num_train=2, num_test=1, seconds=4.5, size=48)
    for model in (MAEFT(3, "a", **size), MAEFT(3, "v", **size), MAViLFT(3, **size)):
        batch = next(iter(Loader(train, batch_size=2, clip=model.clip_spec, workers=0)))
        assert logits(model, batch, model.modes[0]).shape == (2, 3)
