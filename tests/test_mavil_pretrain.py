"""`cavmae-fast pretrain` of MAViL and of single-modality autoencoders: both stages, their options, and what they refuse."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import one_thread, randomize  # noqa: F401

from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.opening import open_clips
from cavmae_fast.models import CAVMAE, MAE, CheckpointError, MAViL
from cavmae_fast.models.mavil_presets import TOWER_PRESETS
from cavmae_fast.models.opening import open_model, weights_hash
from cavmae_fast.training import pretrain as job
from cavmae_fast.training import target_cache
from cavmae_fast.training.closing import pretrained
from cavmae_fast.training.pretrain import pretrain
from cavmae_fast.training.pretrain_config import PretrainConfig, resolve
from cavmae_fast.training.recipes import TOWER_PRETRAINING
from cavmae_fast.training.run_config import recipe_in_force
from cavmae_fast.training.schedules import Cosine, WarmUp
from cavmae_fast.training.target_cache import TargetCache, TargetCacheError, part_name
from cavmae_fast.training.teacher import TeacherError
from tests.tiny import ENCODER
from tests.tiny_mavil import MAVIL, TINY, tiny_presets


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, preset in tiny_presets().items():
        monkeypatch.setitem(TOWER_PRESETS, name, preset)
    monkeypatch.setattr(job, "loss_curve", lambda rows, panels, path: path.touch())


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    generate_clips(folder, num_train=12, num_test=4, seconds=2.5, size=48)
    return folder


@pytest.fixture
def config(clips, tmp_path) -> PretrainConfig:
    return PretrainConfig(
        data=(clips / "train",),
        out=tmp_path / "run",
        model="mavil-small",
        steps=2,
        batch_size=4,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return randomize(MAViL(**MAVIL), seed=3).save_pretrained(tmp_path_factory.mktemp("teacher") / "model")


def rows(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "learning_rate" in row]


def losses(out: Path) -> list[tuple]:
    return [(row["loss"], row["loss_regression"], row["loss_inter"]) for row in rows(out)]


# ------------------------------------------------------------------------------------------------------------- families


def test_stage_1(clips, config):
    config = replace(config, eval_data=(clips / "test",), ema=0.5, accumulate=2)
    summary = pretrain(config)
    model = open_model(config.out / "model")
    assert type(model) is MAViL and model.config["fusion_depth"] == MAVIL["fusion_depth"]
    assert summary["held_out_clips"] == 4 and "A->V R@1" in summary
    assert summary["loss"] == pytest.approx(summary["loss_raw"] + summary["loss_inter"] + summary["loss_intra"])
    assert len(rows(config.out)) == 2 and all(row["loss_regression"] == 0 for row in rows(config.out))
    text = pretrained(config, summary)
    assert "inter " in text and "regression" not in text and "--teacher" in text
    assert (config.out / "reconstruction.png").read_bytes().startswith(b"\x89PNG") and "reconstruction.png" in text
    assert f"next:  cavmae-fast retrieve {config.out / 'model'}" in text


@pytest.mark.parametrize("name", ["a-mae-small", "v-mae-small"])
def test_one_modality(clips, config, name):
    config = replace(config, model=name, eval_data=(clips / "test",))
    summary = pretrain(config)
    assert type(open_model(config.out / "model")) is MAE
    assert summary["held_out_clips"] == 4 and 0 < summary["held_out_loss"] < 3
    assert (config.out / "reconstruction.png").read_bytes().startswith(b"\x89PNG")
    text = pretrained(config, summary)
    assert "loss on 4 held-out clips" in text and f"next:  cavmae-fast inpaint {config.out / 'model'}" in text


@pytest.mark.parametrize("changes", [{"model": "a-mae-small"}, {"model": "v-mae-small"}, {"rounds": 1}], ids=str)
def test_the_demo(config, changes, monkeypatch):
    """Without --data; a chain has one set of clips."""
    few = functools.partial(generate_clips, num_train=8, num_test=2, size=48)
    monkeypatch.setattr("cavmae_fast.training.run.generate_clips", few)
    config = replace(config, data=(), steps=1, **changes)
    summary = pretrain(config)
    assert summary["held_out_clips"] == 2
    assert [path.parent for path in config.out.rglob("manifest.jsonl")] == [config.out / "clips"]
    text = pretrained(config, summary)
    assert f"next:  cavmae-fast finetune --init {config.out / 'model'}" in text
    assert ("a round of stage 2" in text) is False
    open_model(config.out / "model")


def test_options_reach_the_model_and_the_task(config):
    config = replace(config, fusion="bottleneck", bottleneck_tokens=3, norm_pix_loss="on", inter_temperature=0.2)
    config = replace(config, pool_class_token="on", intra_loss_weight=0.0, mask_ratio=0.5, steps=1)
    pretrain(config)
    model = open_model(config.out / "model")
    names = ("fusion", "bottleneck_tokens", "norm_pix_loss", "inter_temperature", "pool_class_token", "normalize_targets")
    assert [model.config[name] for name in names] == ["bottleneck", 3, True, 0.2, True, False]
    assert rows(config.out)[0]["loss_intra"] == 0
    noted = json.loads((config.out / "config.json").read_text())
    assert noted["noise"] == "off" and noted["optimizer"] == "adamw" and noted["warmup_share"] == pytest.approx(0.1)


def test_noise_and_crops_are_drawn_as_the_options_say(config):
    """Without noise, sound and pictures begin together; crops differ from epoch to epoch."""
    changed = [replace(config, noise="on", out=config.out / "noisy"), replace(config, out=config.out / "plain")]
    for one in changed:
        pretrain(one)
    assert losses(changed[0].out) != losses(changed[1].out)


@pytest.mark.parametrize("name", TOWER_PRESETS)
def test_options_that_are_filled_in_say_the_same_again(name):
    """As with `--config` and an earlier run's config.json; an option beside it counts more."""
    first = resolve(PretrainConfig(model=name, device="cpu", dtype="float32"))
    assert resolve(first) == first
    recipe = TOWER_PRETRAINING[name]
    assert recipe_in_force(first, recipe) == recipe
    warmed = resolve(replace(first, warmup_share=0.0, warmup_steps=7))
    assert recipe_in_force(warmed, recipe).schedule == WarmUp(7, Cosine(0.0))


def test_every_preset_has_a_recipe():
    """Certain of the audio model: AdamW, 2e-4 for 256 clips, 512 of them, 33 epochs, 3 of warm-up."""
    assert TOWER_PRETRAINING.keys() == TOWER_PRESETS.keys()
    recipe = TOWER_PRETRAINING["mavil"]
    assert (recipe.optimizer, recipe.betas, recipe.batch_size, recipe.epochs) == ("adamw", (0.9, 0.95), 512, 33)
    assert recipe.learning_rate == pytest.approx(2e-4 * 512 / 256)
    assert recipe.schedule.scale(0, 299, 3300) == 1.0 and recipe.schedule.scale(0, 149, 3300) == pytest.approx(0.5)


# -------------------------------------------------------------------------------------------------------------- stage 2


def test_a_teacher_is_known_by_its_weights(config, teacher, tmp_path):
    """The folder of a model, of a run, and a state dict: the same run. It goes on with the same teacher elsewhere."""
    shutil.copytree(teacher, tmp_path / "earlier" / "model")
    torch.save(open_model(teacher).state_dict(), tmp_path / "weights.pth")
    outs = []
    for place in (teacher, tmp_path / "earlier", tmp_path / "weights.pth"):
        outs.append(tmp_path / f"student{len(outs)}")
        pretrain(replace(config, teacher=place, out=outs[-1], save_every=1))
        noted = json.loads((outs[-1] / "config.json").read_text())
        assert noted["teacher_hash"] == weights_hash(open_model(teacher))
    assert losses(outs[0]) == losses(outs[1]) == losses(outs[2])
    assert not (outs[0] / "reconstruction.png").exists()  # its pixel decoder is not trained
    assert all(regression > 0 for _, regression, _ in losses(outs[0]))
    (outs[1] / "summary.json").unlink()
    (outs[1] / "checkpoints" / "step-00000002.pt").unlink()
    pretrain(replace(config, teacher=teacher, out=outs[1], save_every=1))
    assert losses(outs[1]) == losses(outs[0])


def test_another_teacher_on_the_way_is_refused(config, teacher, tmp_path):
    other = randomize(MAViL(**MAVIL), seed=4).save_pretrained(tmp_path / "other")
    pretrain(replace(config, teacher=teacher))
    (config.out / "summary.json").unlink()
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"was begun with other options \(teacher_hash \w+ then, \w+ now\)"):
        pretrain(replace(config, teacher=other))
    with pytest.raises(ValueError, match="teacher_hash"):
        pretrain(config)
    pinned = json.loads((config.out / "config.json").read_text())["teacher_hash"]
    with pytest.raises(TeacherError, match=f"--teacher-hash says that it must be {pinned}"):
        pretrain(replace(config, teacher=other, teacher_hash=pinned, out=tmp_path / "new"))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: MAViL(**MAVIL | {"embed_dim": 96}),
            r"has audio tokens \[16, 96\] \(patches, width\), its student \[16, 48\]",
        ),
        (lambda: MAViL(**MAVIL | {"frames": 8}), "takes clips with frames 8, its student with 4; they must agree"),
        (lambda: MAViL(**MAVIL | {"patch_size": 8}), "tokens .* they must agree"),
        (lambda: MAE("a", **TINY), "holds a MAE; it must be a MAViL"),
        (lambda: CAVMAE(**ENCODER), "holds a CAVMAE; it must be a MAViL"),
    ],
)
def test_a_teacher_that_does_not_fit(config, tmp_path, make, words):
    """One sentence, before anything is trained or removed."""
    place = make().save_pretrained(tmp_path / "teacher")
    with pytest.raises(TeacherError, match=words):
        pretrain(replace(config, teacher=place))
    assert not (config.out / "config.json").exists()


def test_a_teacher_that_cannot_be_read(config, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "no.pth")
    for place in (tmp_path / "nowhere", tmp_path / "no.pth"):
        with pytest.raises(CheckpointError, match=str(place)):
            pretrain(replace(config, teacher=place))


def test_a_dry_run_counts_the_teacher(config, teacher):
    alone, taught = (pretrain(replace(config, teacher=t, dry_run=True)) for t in (None, teacher))
    size = sum(p.numel() * 4 for p in open_model(teacher).parameters())
    assert taught.memory.model - alone.memory.model == pytest.approx(size, rel=0.3)  # heads differ, too
    assert taught.flops > alone.flops and "GFLOP" in taught.render()
    assert not config.out.exists()


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of four clips: three of them."""
    monkeypatch.setattr(target_cache, "PART_CLIPS", 4)
    monkeypatch.setattr(target_cache, "STEP_CLIPS", 2)
    monkeypatch.setattr("cavmae_fast.training.pretrain_setup.STEP_CLIPS", 2)


def test_cached_targets_are_the_teachers(clips, config, teacher, tmp_path, small_parts, monkeypatch):
    config = replace(config, teacher=teacher, cache_targets=tmp_path / "cache")
    pretrain(config)
    names = sorted(path.name for path in config.cache_targets.iterdir())
    assert names == [*(part_name(number) for number in range(3)), "targets.json"]
    model = open_model(teacher)
    cache = TargetCache(config.cache_targets, torch.device("cpu"))
    loader = Loader(clips / "train", 5, model.clip_spec, workers=0)
    for batch in loader:  # other steps than those that the cache was made in
        for got, want in zip(cache.targets(batch), model.targets(batch.audio, batch.image), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    order = np.array([3, 0])
    turned = replace(batch, clips=order, ids=["three", "zero"])
    assert torch.equal(
        cache.targets(turned).audio,
        torch.cat([cache.targets(replace(batch, clips=order[i : i + 1], ids=["x"])).audio for i in (0, 1)]),
    )

    # A second run takes what is there, and no teacher computes.
    monkeypatch.setattr(MAViL, "targets", lambda *_: pytest.fail("the teacher was asked"))
    again = replace(config, out=tmp_path / "again")
    pretrain(again)
    assert losses(again.out) == losses(config.out)


def test_a_cache_that_was_cut_short_is_made_whole(config, teacher, tmp_path, small_parts, monkeypatch):
    config = replace(config, teacher=teacher, cache_targets=tmp_path / "cache")
    put = target_cache._put

    def dies(path, tensors):
        if path.name == part_name(1):
            raise KeyboardInterrupt
        put(path, tensors)

    monkeypatch.setattr(target_cache, "_put", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert sorted(path.name for path in config.cache_targets.iterdir()) == [part_name(0), "targets.json"]
    monkeypatch.setattr(target_cache, "_put", put)
    pretrain(config)
    undisturbed = replace(config, out=tmp_path / "other", cache_targets=tmp_path / "whole")
    pretrain(undisturbed)
    assert losses(config.out) == losses(undisturbed.out)
    for number in range(3):
        ours, theirs = (folder / part_name(number) for folder in (config.cache_targets, undisturbed.cache_targets))
        assert ours.read_bytes() == theirs.read_bytes()


def test_another_cache_is_refused(clips, config, teacher, tmp_path):
    cache = tmp_path / "cache"
    config = replace(config, teacher=teacher, cache_targets=cache)
    pretrain(config)
    before = {path: path.read_bytes() for path in cache.iterdir()}
    other = randomize(MAViL(**MAVIL), seed=4).save_pretrained(tmp_path / "other")
    for changes, words in (
        ({"teacher": other}, "teacher .* there, .* now"),
        ({"data": (clips / "test",)}, "clips 12 there, 4 now"),
        ({"dtype": "bfloat16"}, "computed_in float32 there, bfloat16 now"),
        ({"cache_targets": clips}, "holds files, but no targets.json"),
    ):
        with pytest.raises(TargetCacheError, match=words):
            pretrain(replace(config, out=tmp_path / "new", **changes))
        assert not (tmp_path / "new" / "config.json").exists()
    assert {path: path.read_bytes() for path in cache.iterdir()} == before
    (cache / part_name(0)).write_bytes(b"damaged")
    with pytest.raises(TargetCacheError, match=f"{part_name(0)} cannot be read .* remove it"):
        pretrain(replace(config, out=tmp_path / "new"))


def test_clips_that_cannot_be_used_have_no_targets(clips, config, teacher, tmp_path, small_parts):
    """Neither the cache nor training can use them; one that training can use after all is named."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in sorted((clips / "train").iterdir())[:6]:
        shutil.copy(path, folder)
    for number in range(4):  # the last part has none at all
        (folder / f"z{number}.mp4").write_text("no film")
    config = replace(config, data=(folder,), teacher=teacher, cache_targets=tmp_path / "cache")
    summary = pretrain(config)
    assert summary["rejected_clips"] >= 1
    cache = TargetCache(config.cache_targets, torch.device("cpu"))
    batch = Loader(open_clips([folder]), 2, open_model(teacher).clip_spec, workers=0).batch_at(0, 0)
    missing = replace(batch, clips=np.array([0, 9]), ids=["one", "nine"])
    with pytest.raises(TargetCacheError, match=f"holds no targets of clip 'nine'.*{part_name(2)}"):
        cache.targets(missing)


# ------------------------------------------------------------------------------------------------------- initialization


def image_mae(tmp_path: Path) -> Path:
    """A checkpoint with the names of image MAEs, of this size."""
    single = {**TINY, "frames": 1}
    state = randomize(MAE("v", **single), seed=5).state_dict()
    torch.save({"model": state}, tmp_path / "image.pth")
    return tmp_path / "image.pth"


def test_from_an_image_mae(config, tmp_path, capsys):
    """By name: what was taken, what was not; the kernel stands for both frames, the last block begins every fusion block."""
    path = image_mae(tmp_path)
    pretrain(replace(config, init=path, steps=1, learning_rate=1e-12, weight_decay=0.0))
    said = capsys.readouterr()
    text = said.out + said.err
    assert f"--init {path}: not found, so as drawn:" in text and "target_pred_a.weight" in text
    state, model = torch.load(path)["model"], open_model(config.out / "model")
    kernel = state["patch_embed.proj.weight"]
    torch.testing.assert_close(model.video.patch_embed.proj.weight, torch.stack([kernel, kernel], dim=2))
    torch.testing.assert_close(model.audio.patch_embed.proj.weight, kernel.sum(dim=1, keepdim=True))
    last = state[f"blocks.{TINY['depth'] - 1}.attn.qkv.weight"]
    assert all(torch.allclose(block.attn.qkv.weight, last) for block in model.fusion.blocks)


def test_each_tower_from_its_own(config, tmp_path):
    """Sound from an audio MAE, pictures from one of a MAViL's towers; a MAViL whole, and one of its towers into an MAE."""
    still = {"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
    audio = randomize(MAE("a", **TINY), seed=5)
    other = randomize(MAViL(**MAVIL), seed=6)
    places = {"init_audio": audio.save_pretrained(tmp_path / "a"), "init_video": other.save_pretrained(tmp_path / "v")}
    pretrain(replace(config, **still, **places))
    model = open_model(config.out / "model")
    for name, want in (("audio", audio), ("video", other.video)):
        torch.testing.assert_close(getattr(model, name).blocks[0].attn.qkv.weight, want.blocks[0].attn.qkv.weight)
    assert not torch.allclose(model.fusion.blocks[0].attn.qkv.weight, other.fusion.blocks[0].attn.qkv.weight)
    whole, tower = replace(config, out=tmp_path / "whole"), replace(config, out=tmp_path / "tower", model="v-mae-small")
    for one in (whole, tower):
        pretrain(replace(one, **still, init=places["init_video"]))
    fused = open_model(whole.out / "model").fusion.blocks[0].attn.qkv.weight
    torch.testing.assert_close(fused, other.fusion.blocks[0].attn.qkv.weight)
    weight = open_model(tower.out / "model").blocks[1].mlp.fc1.weight
    torch.testing.assert_close(weight, other.video.blocks[1].mlp.fc1.weight)


def test_positions_of_another_length(config, tmp_path, capsys):
    place = MAE("a", **TINY | {"audio_length": 64}).save_pretrained(tmp_path / "longer")
    with pytest.raises(CheckpointError, match="adapt-positions"):
        pretrain(replace(config, model="a-mae-small", init=place))
    pretrain(replace(config, model="a-mae-small", init=place, adapt_positions=True, steps=1, recompute="mlp"))
    assert "adapted pos_embed" in "".join(capsys.readouterr())


def test_what_cannot_initialize(config, tmp_path):
    place = CAVMAE(**ENCODER).save_pretrained(tmp_path / "cavmae")
    with pytest.raises(CheckpointError, match=f"{place}.*no block for audio.blocks.0"):
        pretrain(replace(config, init=place))
    with pytest.raises(ValueError, match=r"--adapt-positions is given, but .* is of another class than MAViL"):
        pretrain(replace(config, init=place, adapt_positions=True))
    deeper = MAE("a", **TINY | {"embed_dim": 96}).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=f"{deeper}.*shape"):
        pretrain(replace(config, init_audio=deeper))


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "small", "raw_loss_weight": 1.0}, "--raw-loss-weight is for MAViL; --model is small"),
        ({"model": "small", "noise": "on"}, "--noise is for single-modality MAE and MAViL; --model is small"),
        ({"model": "a-mae-small", "teacher": Path("x")}, "--teacher is for MAViL; --model is a-mae-small"),
        ({"model": "a-mae-small", "init_video": Path("x")}, "--init-video is given, but --model is a-mae-small"),
        ({"mae_loss_weight": 1.0}, "--mae-loss-weight is for CAV-MAE; --model is mavil-small"),
        ({"mask_mode": "time"}, "--mask-mode is for CAV-MAE"),
        ({"inter_loss_weight": -1.0}, "--inter-loss-weight is -1.0; it must be 0 or more"),
        ({"regression_loss_weight": 1.0}, "without --teacher, in stage 1, it must be 0"),
        ({"cache_targets": Path("x")}, "--cache-targets is for stage 2, which needs --teacher"),
        ({"teacher_hash": "abc"}, "--teacher-hash is for stage 2"),
        ({"teacher": Path("x"), "regression_loss_weight": 0.0}, "--regression-loss-weight is 0, but --teacher is given"),
        (dict.fromkeys(("raw_loss_weight", "inter_loss_weight", "intra_loss_weight"), 0.0), "are all 0"),
        ({"teacher": Path("x"), "cache_targets": Path("y"), "noise": "on"}, "--noise is on, but with --cache-targets"),
        ({"teacher": Path("x"), "cache_targets": Path("y"), "cuda_graph": "on"}, "--cuda-graph is on, but with"),
        ({"mask_ratio": 0.0}, "mask_ratio_a is 0.0, which removes none"),
        ({"mask_ratio": 1.0}, "mask_ratio_a is 1.0"),
        ({"warmup_steps": 3, "warmup_share": 0.1}, "--warmup-steps and --warmup-share are both above 0"),
        ({"warmup_share": 1.0}, "--warmup-share is 1.0; it must be at least 0 and below 1"),
        ({"inter_temperature": 0.0}, "inter_temperature is 0.0; it must be above 0"),
        ({"model": "mavil-tiny"}, "--model is 'mavil-tiny'; it must be one of base"),
    ],
)
def test_what_is_refused(config, changes, words):
    with pytest.raises(ValueError, match=words):
        pretrain(replace(config, **changes))
    assert not (config.out / "config.json").exists()


def test_a_teacher_in_the_folder_of_the_run(config, teacher):
    """`--overwrite` would remove it."""
    shutil.copytree(teacher, config.out / "model")
    with pytest.raises(ValueError, match="lies in --out"):
        pretrain(replace(config, teacher=config.out / "model", overwrite=True))
    assert (config.out / "model" / "config.json").exists()
