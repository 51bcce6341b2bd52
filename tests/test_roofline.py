"""The count of what a step's launches must do, against what is known of the step."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import GPUS, SHARES, Launch, launches_of, seconds, step_launches, table
from cavmae_fast.models import CAVMAE, create_model
from cavmae_fast.models.flops import step_flops
from cavmae_fast.ops import configuration
from cavmae_fast.reference.cavmae import CAVMAE as Published
from tests.tiny import one_thread  # noqa: F401

SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 3, "modality_specific_depth": 2, "decoder_embed_dim": 64}
SMALL |= {"decoder_num_heads": 2, "decoder_depth": 2, "norm_pix_loss": True}


def needed(launch: Launch) -> float:
    """Operations without the two products that the attention kernel forms a second time and the one it forms again."""
    return launch.flops * (8 / 14 if launch.name == "attention_backward_kernel" else 1)


def saved(batch: int, width: int, length: int, kept: int) -> float:
    """Operations that a decoder's first qkv saves: those of masked tokens, but for one at each position."""
    return 6 * 3 * width**2 * (batch * (length - kept) - length)


def test_operations_are_those_of_the_model():
    """All but the losses' few: the contrastive loss's similarities and the first layers' unneeded gradients."""
    model = CAVMAE(**SMALL)
    counted = sum(map(needed, step_launches(model, 8))) + saved(8, SMALL["decoder_embed_dim"], 708, 177)
    projections = sum(
        p.numel() * n for p, n in ((model.patch_embed_a.proj.weight, 128), (model.patch_embed_v.proj.weight, 49))
    )
    assert counted == pytest.approx(8 * (step_flops(model) - 2 * projections), rel=0.005)


def test_the_one_pass_backward_computes_less():
    """Five products and one exponential of each score instead of seven and two, and no launch for delta."""
    cases = configuration.read(configuration.shipped_file(configuration.INTERPRETED))["launches"]["attention_backward"]
    one_pass = {case: launch | {"ONE_PASS": True, "PER_SM": 1} for case, launch in cases.items()}
    model, forms = CAVMAE(**SMALL), []
    for launches in ({}, {"attention_backward": one_pass}):
        with configuration.trial({"implementations": {}, "launches": launches}):
            forms.append([launch for launch in launches_of(model, 2) if launch.name.startswith("attention_")])
    names = [{launch.name for launch in form} for form in forms]
    assert names[1] == {"attention_forward_kernel", "attention_one_pass_kernel"}
    assert names[0] - names[1] == {"attention_backward_kernel", "attention_delta_kernel"}
    flops, exponentials = ([sum(launch[i] for launch in form) for form in forms] for i in (2, 3))
    assert flops[1] / flops[0] == pytest.approx(7 / 9) and exponentials[1] / exponentials[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["tiny-v-mae", "tiny-mavil", "tiny-mavil-stage-2"])
def test_operations_of_models_of_towers(name):
    """All of a step but the patch projection's gradient of the pixels, which nobody needs; a teacher's pass included."""
    system = roofline.MODELS[name].system
    model = system.create()
    counted = sum(map(needed, step_launches(model, 8, system)))
    student = getattr(model, "student", model)
    views = 1 if name == "tiny-v-mae" else 2
    pixels = sum(
        2 * views * int(0.2 * tower.num_patches) * tower.patch_embed.proj.weight.numel() for tower in student.towers
    )
    for tower in student.towers:
        width, count = tower.mask_token.shape[-1], tower.num_patches
        counted += saved(8, width, 1 + count, 1 + int(0.2 * count))
    assert counted == pytest.approx(8 * (system.step_flops(model) - pixels), rel=1e-6)


def test_the_model_is_left_as_it_was_and_operators_run_again():
    """Kernels are noted in place of being run only while the step is noted."""
    model = CAVMAE(**SMALL)
    names = {launch.name for launch in launches_of(model, 2)}
    assert {"attention_forward_kernel", "stream_layer_norm_backward_kernel", "dgelu_bias_kernel"} <= names
    assert all(p.grad is None for p in model.parameters())
    out = model(torch.randn(2, 1024, 128), torch.randn(2, 3, 224, 224))
    assert torch.isfinite(out.loss)


def test_launches_at_a_batch_follow_from_two():
    """In proportion to the clips, but for what is there once."""
    model = CAVMAE(**SMALL)
    sums = [sum(launch.bytes for launch in step_launches(model, batch)) for batch in (4, 8, 16)]
    assert sums[2] - sums[1] == pytest.approx(2 * (sums[1] - sums[0]))
    assert sums[0] == pytest.approx(sum(launch.bytes for launch in launches_of(model, 4)), rel=0.01)


def test_an_optimizer_that_keeps_weights_rounded_spares_the_conversions():
    """Both updates move 28 bytes per parameter. With PyTorch's the step moves 12 more, for the weights in bfloat16 that it
    makes, and for the gradients that it makes float32 of."""
    model, kept = CAVMAE(**SMALL), CAVMAE(**SMALL)
    roofline.keep_weights_rounded(kept)
    one, other = launches_of(model, 2), launches_of(kept, 2)
    again = launches_of(kept, 2)
    assert other == again  # from the first step on
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    assert [launches[-1].name for launches in (one, other)] == ["adamw", "adamw"]
    assert one[-1].bytes == other[-1].bytes == 28 * count
    converted = sum(p.numel() for p in kept.parameters() if p.grad_dtype == torch.bfloat16)
    assert converted > 0.95 * count
    spared = sum(launch.bytes for launch in one) - sum(launch.bytes for launch in other)
    assert spared == pytest.approx(12 * converted, rel=0.01)
    assert len(one) - len(other) > 2 * sum(p.dim() > 1 for p in trained)
    assert sum(x.flops for x in one) == sum(x.flops for x in other)


def test_a_launch_takes_what_bounds_it():
    gpu = roofline.Gpu(bytes=10.0, flops=100.0, exponentials=1.0)
    assert seconds(Launch("copy", 20.0), gpu) == 2
    assert seconds(Launch("product", 20.0, 1000.0), gpu) == 10
    assert seconds(Launch("softmax", 20.0, 1000.0, 30.0), gpu) == 30
    shares = {"bytes": 0.5, "flops": 1.0, "exponentials": 1.0}
    assert seconds(Launch("copy", 20.0), gpu, shares) == 4
    text = table([Launch("copy", 4.8e9), Launch("copy", 4.8e9)], GPUS["H200"], 256)
    assert "128,000 clips/s" in text and f"{1e3 * 2 / SHARES['bytes'] / 1000:.2f}" in text


@pytest.mark.slow
def test_bytes_of_a_step_of_the_base_model():
    ours, theirs = (
        sum(launch.bytes for launch in step_launches(model, 256))
        for model in (create_model("cav-mae-base"), Published(norm_pix_loss=True, attention="eager"))
    )
    assert ours <= 0.55 * theirs
