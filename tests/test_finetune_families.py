"""Fine-tuning of single-modality autoencoders and of MAViL: the same command, with what each of them has."""

from __future__ import annotations

import json

import finetuning
import pytest
import torch
from tiny import one_thread, randomize  # noqa: F401
from tiny_mavil import MAVIL, TINY, TOWER, clips

from cavmae_fast import CAVMAE
from cavmae_fast.evaluation import Running, classify
from cavmae_fast.models import MAE, MAEFT, MAViL, MAViLFT, towers
from cavmae_fast.models.classifiers import family_of, make_classifier
from cavmae_fast.models.opening import open_model
from cavmae_fast.training.compiling import compile_model
from cavmae_fast.training.dry_run import DryRun
from cavmae_fast.training.finetune import FineTuneTask, finetune
from cavmae_fast.training.optimizers import layer_of, layers

SOURCES = {
    "a-mae": lambda: MAE("a", **TINY),
    "v-mae": lambda: MAE("v", **TINY),
    "mavil": lambda: MAViL(**MAVIL),
    "bottleneck": lambda: MAViL(**MAVIL | {"fusion": "bottleneck"}),
}
"Pretrained models by name."
CASES = [
    ("a-mae", None, MAEFT, "audioonly"),
    ("v-mae", None, MAEFT, "videoonly"),
    ("mavil", None, MAViLFT, "multimodal"),
    ("bottleneck", None, MAViLFT, "multimodal"),
    ("mavil", "audio", MAEFT, "audioonly"),
    ("mavil", "video", MAEFT, "videoonly"),
]
ALL_OPTIONS = {"ema": 0.5, "layer_decay": 0.75, "drop_path": 0.2, "accumulate": 2, "clip_grad": 1.0, "optimizer": "adamw"}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> finetuning.Job:
    """Clips, and a pretrained model of each kind beside the job's own."""
    job = finetuning.make_job(tmp_path_factory.mktemp("job"))
    for name, make in SOURCES.items():
        torch.manual_seed(1)
        make().save_pretrained(job.init.parent / name)
    return job


def of(job: finetuning.Job, name: str, **options) -> dict:
    """The options of a short run from a pretrained model."""
    return {"init": job.init.parent / name, "time_mask": 4, "epochs": 2, "average_epochs": (1, 2), **options}


@pytest.mark.parametrize(("name", "encoders", "kind", "mode"), CASES, ids=lambda value: str(value))
def test_every_family_is_fine_tuned_and_judged(job, tmp_path, name, encoders, kind, mode):
    options = of(job, name, model=encoders, **ALL_OPTIONS)
    summary = finetune(job.config(tmp_path / "run", **options))
    assert summary["mode"] == mode and set(summary["modes"]) == {mode} and summary["frames"] == 1 and summary["steps"] == 6
    begun = json.loads((tmp_path / "run" / "config.json").read_text())
    own = {"a-mae": "audio", "v-mae": "video"}.get(name, "av")
    assert (begun["mode"], begun["model"]) == (mode, encoders or own)
    tuned, start = open_model(tmp_path / "run" / "model"), make_classifier(open_model(options["init"]), 26, encoders).model
    assert type(tuned) is kind and tuned.modes == (mode,)
    before = start.state_dict()
    moved = {key for key, value in tuned.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, p in tuned.named_parameters() if p.requires_grad}
    found = classify(tuned, job.test, job.labels, modes=tuned.modes, running=Running(device="cpu", dtype="float32"))
    assert found.results[mode].figures() == pytest.approx(summary["modes"][mode]["1"], abs=1e-6)
    again = finetune(
        job.config(tmp_path / "again", **options | {"init": tmp_path / "run" / "model", "model": None, "steps": 1})
    )
    assert again["mode"] == mode  # its head fits, and goes on


def test_one_encoder_of_mavil_is_that_of_the_whole():
    mavil = randomize(MAViL(**MAVIL), seed=2)
    audio, imgs = clips(dtype=torch.float32)
    for encoders, x in (("audio", audio), ("video", imgs)):
        alone = make_classifier(mavil, 5, encoders).model
        tokens = mavil.features({"a": audio, "v": imgs})[alone.modality]
        torch.testing.assert_close(alone.forward_feat(x), tokens)


def test_going_on_is_exact(job, tmp_path, monkeypatch):
    options = of(job, "mavil", **ALL_OPTIONS)
    finetune(job.config(tmp_path / "whole", **options))
    losses, taken = FineTuneTask.losses, []

    def stop(*arguments):
        taken.append(1)
        if len(taken) == 9:  # in the second part of the fifth step
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(FineTuneTask, "losses", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(job.config(tmp_path / "cut", save_every=1, **options))
    monkeypatch.undo()
    finetune(job.config(tmp_path / "cut", save_every=1, **options))
    one, other = (open_model(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_what_a_model_lacks_is_refused_before_anything_is_trained(job, tmp_path):
    for name, options, words in (
        ("mavil", {"mode": "audioonly"}, "--mode is audioonly, .* becomes a MAViLFT, which takes --mode multimodal alone"),
        ("a-mae", {"mode": "videoonly"}, "--mode is videoonly, .* becomes a MAEFT, which takes --mode audioonly alone"),
        ("a-mae", {"model": "av"}, "--model is av, but of --init .*, a MAE, it must be one of audio"),
        ("mavil", {"new_head": True}, "--new-head is given, but --init .* it is a MAViL"),
        ("mavil", {"time_mask": 40}, "--time-mask is 40; for this model's spectrogram it must be in 0 to 32"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(job.config(tmp_path, **of(job, name, **options)))
        assert not (tmp_path / "config.json").exists()
    model = MAViLFT(26, **TOWER)
    for options, words in (
        ({"modes": ("audioonly",)}, "mode is 'audioonly'; for MAViLFT it must be one of multimodal"),
        ({"frames": 10}, "frames is 10, but a MAViLFT takes 4 pictures of a clip at once; it must be 1"),
    ):
        with pytest.raises(ValueError, match=words):
            classify(model, job.test, job.labels, **options)
    with pytest.raises(ValueError, match="the checkpoint is a MAViL, which has no classes"):
        classify(MAViL(**MAVIL), job.test, job.labels)
    with pytest.raises(ValueError, match="model is a Linear, which is of no family"):
        family_of(torch.nn.Linear(2, 2))


def test_a_dry_run_counts_what_is_computed(job, tmp_path):
    found = finetune(job.config(tmp_path / "out", dry_run=True, **of(job, "mavil")))
    assert isinstance(found, DryRun) and found.flops > 0 and found.shapes[1][1] == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mavil", "bottleneck", "a-mae"])
def test_drop_path_leaves_out_the_branches_that_were_drawn(name):
    model = make_classifier(randomize(SOURCES[name](), seed=3), 5).model.double()
    audio, imgs = clips()
    x = (audio,) if name == "a-mae" else (audio, imgs)
    ones = torch.ones(model.depth, 2, len(model.modalities) + 1, 3)
    whole = model.compute(*x, None)
    torch.testing.assert_close(model.compute(*x, ones), whole)
    # Without any update, the stream is what is embedded, and without those of one clip, the others are as they were.
    paths = ones.clone()
    paths[..., 1] = 0
    some = model.compute(*x, paths)
    torch.testing.assert_close(some[[0, 2]], whole[[0, 2]])
    if name != "bottleneck":  # where bottleneck tokens come in
        parts = [model] if name == "a-mae" else model.towers
        norm = model.norm if name == "a-mae" else model.fusion.norm
        embedded = [towers.embed(tower, one, None, model.clip_spec, torch.float64) for tower, one in zip(parts, x)]
        means = [norm(tokens[1:2, 1:]).mean(dim=1) for tokens in embedded]
        torch.testing.assert_close(some[1:2], model.mlp_head(torch.cat(means, dim=1)))
    model.drop_path = 0.5
    torch.manual_seed(0)
    first = model.train()(*x)
    assert not torch.equal(first, model(*x)) and torch.equal(model.eval()(*x), whole)
    torch.manual_seed(0)
    assert torch.equal(model.train()(*x), first)


@pytest.mark.parametrize("name", ["mavil", "v-mae"])
def test_a_compiled_classifier_computes_the_same(name):
    model = make_classifier(randomize(SOURCES[name](), seed=4), 5).model.double().train()
    model.drop_path = 0.3
    audio, imgs = clips()
    results = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        x = model(audio, imgs, model.modes[0])
        x.square().sum().backward()
        results.append((x.detach(), model.mlp_head[1].weight.grad.clone()))
        compile_model(model, backend="aot_eager")
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("make", "depth", "expected"),
    [
        (
            lambda: MAEFT(3, "a", **TOWER),
            2,
            {"patch_embed.proj.weight": 0, "cls_token": 0, "blocks.0.norm1.bias": 1, "norm.weight": 3, "mlp_head.1.bias": 3},
        ),
        (
            lambda: MAViLFT(3, **TOWER, fusion_depth=2),
            4,
            {
                "audio.patch_embed.proj.bias": 0,
                "video.cls_token": 0,
                "audio.blocks.1.attn.qkv.weight": 2,
                "video.blocks.0.attn.qkv.weight": 1,
                "fusion.blocks.0.mlp.fc1.bias": 3,
                "fusion.blocks.1.mlp.fc1.bias": 4,
                "fusion.norm.weight": 5,
            },
        ),
        (
            lambda: MAViL(**MAVIL, fusion="bottleneck"),
            4,
            {"fusion.blocks_v.1.norm2.bias": 4, "audio.decoder_blocks.0.norm1.bias": 5},
        ),
        (lambda: CAVMAE(**finetuning.tiny.TINY), 3, {"decoder_blocks.0.norm1.bias": 4, "blocks_u.0.norm1_v.bias": 3}),
    ],
)
def test_layers_by_the_stacks_of_the_model(make, depth, expected):
    model = make()
    assert layers(model) == depth and {name: layer_of(name, model) for name in expected} == expected
    assert set(expected) <= set(dict(model.named_parameters()))
