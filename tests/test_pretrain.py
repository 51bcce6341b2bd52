"""The main job, end to end on small runs, as a user starts it: the command line in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cavmae_fast import CAVMAE, PRESETS
from cavmae_fast.data import batches
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.training import pretrain as job
from cavmae_fast.training.fit import TrainingError

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"


def cli(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from cavmae_fast.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> tuple[list[Path], list[Path]]:
    return generate_clips(tmp_path_factory.mktemp("clips"), num_train=136, num_test=8)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_with_bad_clips(clips, tmp_path):
    train, held_out = clips
    folder = tmp_path / "data"
    folder.mkdir()
    for path in train[:10]:
        shutil.copy(path, folder)
    (folder / "text.mp4").write_text("no film")
    (folder / "empty.mkv").touch()
    out = tmp_path / "out"
    run = cli(
        "pretrain",
        "--data",
        folder,
        "--eval-data",
        *held_out,
        "--out",
        out,
        "--steps",
        4,
        "--batch-size",
        4,
        "--device",
        "cpu",
    )
    assert run.returncode == 0, run.stderr
    assert "2 clips could not be used" in run.stdout and "A->V" in run.stdout
    assert f"cavmae-fast retrieve {out / 'model'}" in run.stdout  # the next command
    assert "clips/s" in run.stderr and "data wait" in run.stderr  # the progress bar
    steps = [row for row in rows(out / "metrics.jsonl") if "learning_rate" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(0 <= row["data_wait"] <= 1 and row["clips_per_s"] > 0 for row in steps)
    assert {Path(row["path"]).name for row in rows(out / "rejects.jsonl")} == {"text.mp4", "empty.mkv"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_clips"] == 8 and summary["rejected_clips"] == 2
    for figure in ("loss.png", "reconstruction.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    model = CAVMAE.from_pretrained(out / "model")
    again = cli("pretrain", "--data", folder, "--out", tmp_path / "b", "--steps", 1, "--init", out / "model")
    assert again.returncode == 0, again.stderr
    assert "not evaluated" in again.stdout
    assert model.config["img_size"] == 96


def test_training_learns_and_repeats(clips, tmp_path):
    config = job.PretrainConfig(
        data=tuple(clips[0][:32]), steps=12, batch_size=16, device="cpu", dtype="float32", out=tmp_path / "a"
    )
    first = job.pretrain(config)
    losses = [row["loss_mae"] for row in rows(tmp_path / "a" / "metrics.jsonl")[:12]]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    second = job.pretrain(replace(config, out=tmp_path / "b"))
    assert first["loss"] == second["loss"]


def test_all_clips_bad(tmp_path):
    (tmp_path / "a.mp4").write_text("no film")
    run = cli("pretrain", "--data", tmp_path, "--out", tmp_path / "out", "--steps", 1)
    assert run.returncode == 1
    assert "a.mp4" in run.stderr and "Traceback" not in run.stderr
    assert [Path(row["path"]).name for row in rows(tmp_path / "out" / "rejects.jsonl")] == ["a.mp4"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "nonsense"], 2, "--model is 'nonsense'"),
        (["--steps", "0"], 2, "--steps is 0"),
        (["--learning-rate", "-1"], 2, "--learning-rate is -1"),
        (["--log-every", "0"], 2, "--log-every is 0"),
        (["--mae-loss-weight", "0", "--contrast-loss-weight", "0"], 2, "both 0; one of them must be above 0"),
        (["--model", "cav", "--mae-loss-weight", "-1"], 2, "--mae-loss-weight is -1"),
        (["--device", "tpu"], 2, "--device is 'tpu'"),
        (["--mask-ratio", "1.0"], 2, "mask_ratio_a is 1.0"),
        (["--mask-ratio", "0"], 2, "removes none of"),
        (["--data", "not/there"], 1, "not/there"),
        (["--init", "not/there.pth"], 1, "not/there.pth"),
        (["--no-such-option", "1"], 2, "no-such-option"),
    ],
)
def test_bad_options(clips, tmp_path, arguments, code, words):
    data = [] if "--data" in arguments else ["--data", clips[0][0], clips[0][1]]
    run = cli("pretrain", *data, "--out", tmp_path, *arguments)
    assert run.returncode == code, run.stderr
    assert words in run.stderr
    assert "Traceback" not in run.stderr


def test_a_loss_that_is_never_finite_stops_the_run(clips, tmp_path, monkeypatch):
    features = batches.audio_features
    monkeypatch.setattr(batches, "audio_features", lambda *args: features(*args) * float("nan"))
    config = job.PretrainConfig(
        data=tuple(clips[0][:4]), steps=9, batch_size=2, device="cpu", out=tmp_path, max_skipped=3, save_every=2
    )
    words = r"3 steps in a row .* step 3: loss.* because the audio of .*train.*last good checkpoint is .*step-00000002\.pt"
    with pytest.raises(TrainingError, match=words):
        job.pretrain(config)
    assert [row["step"] for row in rows(tmp_path / "skipped.jsonl")] == [1, 2, 3]
    assert [row["loss"] for row in rows(tmp_path / "metrics.jsonl")] == [None] * 3


def test_a_skipped_step_is_named_and_the_run_goes_on(clips, tmp_path, monkeypatch, capsys):
    """Also when it is the last one."""
    features, calls = batches.audio_features, []

    def sometimes(*args):
        calls.append(1)
        return features(*args) * (float("nan") if len(calls) in (2, 3, 7, 8) else 1.0)  # 3 and 8: built again, to be named

    monkeypatch.setattr(batches, "audio_features", sometimes)
    config = job.PretrainConfig(data=tuple(clips[0][:4]), steps=6, batch_size=2, device="cpu", out=tmp_path, workers=0)
    summary = job.pretrain(config)
    recorded, named = rows(tmp_path / "metrics.jsonl"), rows(tmp_path / "skipped.jsonl")
    assert summary["steps"] == 6 and summary["skipped_steps"] == 2 and summary["loss"] == recorded[4]["loss"] > 0
    assert [row["loss"] is None for row in recorded] == [False, True, False, False, False, True, False]  # and the end
    assert [row["step"] for row in named] == [2, 6]
    assert len(named[0]["clips"]) == 2 and "because the audio of" in named[0]["reason"]
    assert capsys.readouterr().out.count("was skipped") == 1
    assert (tmp_path / "loss.png").exists()


def test_accumulation_average_and_the_rest_by_options(clips, tmp_path):
    """What is exported is the average of the weights, and the run's own configuration says what was in force."""
    config = job.PretrainConfig(
        data=tuple(clips[0][:8]),
        steps=3,
        batch_size=4,
        device="cpu",
        dtype="float32",
        out=tmp_path,
        accumulate=2,
        ema=0.9,
        clip_grad=1.0,
        drop_path=0.1,
        layer_decay=0.75,
        optimizer="adamw",
        schedule="cosine",
        warmup_steps=2,
    )
    job.pretrain(config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["ema"], written["end_factor"], written["betas"]) == (0.9, 0.0, [0.95, 0.999])
    saved = torch.load(tmp_path / "checkpoints" / "step-00000003.pt", weights_only=True)
    exported = CAVMAE.from_pretrained(tmp_path / "model").state_dict()
    name = "blocks_u.0.mlp.fc1.weight"
    assert torch.equal(exported[name], saved["average"][name]) and not torch.equal(exported[name], saved["model"][name])


@pytest.mark.parametrize(
    ("weights", "moved", "still"),
    [
        ({"mae_loss_weight": 0.0}, "norm_a.weight", "decoder_pred_a.weight"),
        ({"contrast_loss_weight": 0.0}, "decoder_pred_a.weight", "norm_a.weight"),
        ({}, "decoder_pred_a.weight", None),
    ],
    ids=["contrast-alone", "reconstruction-alone", "both"],
)
def test_the_losses_in_force_decide_what_is_trained(clips, tmp_path, weights, moved, still):
    """Not the system's own weights: another loss may be switched on or off."""
    torch.manual_seed(0)
    before = PRESETS["small"].create().state_dict()
    config = job.PretrainConfig(
        data=tuple(clips[0][:8]), steps=2, batch_size=4, device="cpu", dtype="float32", out=tmp_path, **weights
    )
    job.pretrain(config)
    after = CAVMAE.from_pretrained(tmp_path / "model").state_dict()
    assert not torch.equal(before[moved], after[moved])
    assert still is None or torch.equal(before[still], after[still])


@pytest.mark.parametrize("log_every", [1, 3])
def test_one_row_per_step_whenever_losses_are_read(clips, tmp_path, log_every):
    config = job.PretrainConfig(
        data=tuple(clips[0][:8]), steps=5, batch_size=4, device="cpu", log_every=log_every, out=tmp_path
    )
    job.pretrain(config)
    steps = [row for row in rows(tmp_path / "metrics.jsonl") if "learning_rate" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert {"loss", "loss_mae", "loss_mae_a", "loss_mae_v", "loss_c", "c_acc", "epoch", "seconds"} <= steps[0].keys()


@pytest.mark.skipif(not MEDIA.exists(), reason="the folder of real clips is not beside this checkout")
def test_full_size_on_real_clips(tmp_path):
    run = cli("pretrain", "--data", MEDIA, "--model", "base", "--steps", 1, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["rejected_clips"] == 0 and 0 < summary["loss_mae_a"] < 5
    assert sum(p.numel() for p in CAVMAE.from_pretrained(tmp_path / "model").parameters()) == 191_036_160


def test_doctor():
    run = cli("doctor")
    assert run.returncode == 0, run.stderr
    assert torch.__version__ in run.stdout
    assert "--dtype auto" in run.stdout and "in float32" in run.stdout  # why: the measured times
    for name in ("attention", "stream_layer_norm", "contrastive_loss", "flash_attn", "xformers", "libcavmae.so"):
        assert name in run.stdout


def test_prepare_check_and_train_from_shards(clips, tmp_path):
    """The way of a user with many clips, on the command line alone."""
    folder, shards = tmp_path / "data", tmp_path / "shards"
    folder.mkdir()
    for path in clips[0][:12]:
        shutil.copy(path, folder)
    (folder / "text.mp4").write_text("no film")
    run = cli("prepare", folder, "--out", shards, "--size", 96, "--workers", 2, "--shard-clips", 5)
    assert run.returncode == 0, run.stderr
    assert "12 clips in 3 shards" in run.stdout and "1 clips could not be used" in run.stdout
    assert "clip/s" in run.stderr
    again = cli("prepare", folder, "--out", shards, "--size", 64)
    assert again.returncode == 2 and "size 96 then, 64 now" in again.stderr
    checked = cli("check", shards, "--workers", 1)
    assert checked.returncode == 0, checked.stderr + checked.stdout
    out = tmp_path / "out"
    run = cli("pretrain", "--data", shards, "--out", out, "--steps", 3, "--batch-size", 6, "--workers", 1, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    assert "loader torch: the device is a CPU" in run.stderr + run.stdout
    assert json.loads((out / "summary.json").read_text())["rejected_clips"] == 0
    with (shards / "shard-000001.tar").open("r+b") as file:
        file.seek(9000)
        file.write(bytes(200))
    assert (broken := cli("check", shards, "--workers", 1)).returncode == 1
    assert "shard-000001.tar" in broken.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prepare", "not/there", "--out", "x"], 1, "not/there: no such file or folder"),
        (["prepare", "README.md", "--quality", "200", "--out", "x"], 2, "--quality is 200; it must be in 1 to 95"),
        (["check", "not/there"], 1, "not/there"),
        (["prepare"], 2, "src"),
    ],
)
def test_bad_data_commands(tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    run = cli(*arguments)
    assert run.returncode == code, run.stderr
    assert words.lower() in run.stderr.lower() and "Traceback" not in run.stderr
