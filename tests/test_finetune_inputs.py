"""What fine-tuning is given that cannot work: one sentence each, before anything is trained or removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import finetuning
import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401

from cavmae_fast import CAVMAEFT
from cavmae_fast.data.decode.decoder import UnusableDataError
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.errors import CavmaeError
from cavmae_fast.models.opening import open_model
from cavmae_fast.training.dry_run import DryRun
from cavmae_fast.training.finetune import finetune
from cavmae_fast.training.finetune_config import FinetuneConfig


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> finetuning.Job:
    return finetuning.make_job(tmp_path_factory.mktemp("job"))


def damaged(path: Path) -> Path:
    path.write_bytes(b"no weights")
    return path


def classes(path: Path, count: int) -> Path:
    rows = "".join(f"{k},/m/{k},class {k}\n" for k in range(count))
    path.write_text("index,mid,display_name\n" + rows)
    return path


def relabeled(source: Path, path: Path, labels: str) -> Path:
    rows = json.loads(source.read_text())["data"]
    rows = [{**row, "video": str((source.parent / row["video"]).resolve()), "labels": labels} for row in rows]
    path.write_text(json.dumps({"data": rows}))
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "--steps is 0; it must be above 0"),
        (
            {"recipe": None},
            "--recipe is not given; with --data it must be one of as20k, as2m, vggsound, esc50, speechcommands,",
        ),
        ({"init": None}, "--init is not given"),
        ({"eval_data": ()}, "--eval-data is not given"),
        ({"model": "audio", "mode": "multimodal"}, "--mode is multimodal, and --init .* which takes --mode audioonly alone"),
        ({"model": "video"}, "--model is video, but of --init .*, a CAVMAE, it must be one of av, audio"),
        ({"average_epochs": (3, 2)}, "--average-epochs is 3 2"),
        ({"average_epochs": (0, 2)}, "--average-epochs is 0 2"),
        ({"weights": Path("weights.csv")}, "--weights is given, but sampling is not balanced; add --balanced on"),
        ({"balanced": "on", "weights": Path("not/there.csv")}, "not/there.csv: cannot be read"),
        ({"time_mask": 192}, "--time-mask is 192; for this model's spectrogram it must be in 0 to 64"),
        ({"freq_mask": 200}, "--freq-mask is 200; for this model's spectrogram it must be in 0 to 128"),
        ({"mixup": 2.0}, "mixup is 2.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"head_lr_factor": 0.0}, "--head-lr-factor is 0.0"),
        ({"labels": None}, "--labels is not given"),
        ({"labels": Path("not/there.csv")}, "not/there.csv: cannot be read"),
        ({"data": (Path("not/there"),)}, "not/there"),
        ({"eval_data": (Path("not/there"),)}, "not/there"),
        ({"init": Path("not/there.pth")}, "not/there.pth does not exist"),
        ({"audio_length": 0}, "--audio-length is 0"),
        ({"audio_length": 40}, "patch_size 16 does not divide audio_length, which is 40"),
        ({"new_head": True}, "--new-head is given, but --init .* has no head"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_options(job, tmp_path, options, words):
    with pytest.raises((CavmaeError, ValueError), match=words):
        finetune(job.config(tmp_path, **options))
    assert not (tmp_path / "config.json").exists()


def test_bad_files(job, tmp_path):
    empty = tmp_path / "empty.json"
    empty.write_text('{"data": []}')
    other = tiny.randomize(CAVMAEFT(26, **tiny.ENCODER | {"embed_dim": 64, "num_heads": 1}))
    state = other.state_dict()
    torch.save(state | {"norm.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    torch.save({"weights": [1, 2]}, tmp_path / "none.pth")
    for options, words in (
        ({"eval_data": (empty,)}, "names no clip"),
        ({"data": (empty,)}, "names no clip"),
        ({"init": damaged(tmp_path / "damaged.pth")}, "damaged.pth cannot be read as tensors alone"),
        ({"init": tmp_path / "shape.pth"}, r"norm.weight has shape \[3\]"),
        ({"init": tmp_path / "none.pth"}, "none.pth does not hold a state dict"),
        ({"labels": classes(tmp_path / "few.csv", 3)}, r"--data: \d+ labels are not among the 3 classes .*: 'shape/"),
        (
            {"eval_data": (relabeled(job.test, tmp_path / "foreign.json", "/m/foreign"),)},
            "--eval-data: 1 labels are not among the 26 classes of the labels CSV: '/m/foreign'",
        ),
        ({"data": (relabeled(job.train, tmp_path / "bare.json", ""),)}, "--data: none of the 14 clips has a label"),
    ):
        out = tmp_path / "out"
        with pytest.raises(CavmaeError, match=words):
            finetune(job.config(out, **options))
        assert not (out / "config.json").exists()


def test_a_finished_run_survives_a_bad_successor(job, tmp_path):
    finetune(job.config(tmp_path, steps=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CavmaeError):
        finetune(job.config(tmp_path, overwrite=True, init=Path("not/there")))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written(job, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        finetune(job.config(tmp_path / "file" / "out"))


def test_one_class(job, tmp_path):
    labels = classes(tmp_path / "one.csv", 1)
    data = {
        "data": (relabeled(job.train, tmp_path / "train.json", "/m/0"),),
        "eval_data": (relabeled(job.test, tmp_path / "test.json", "/m/0"),),
        "labels": labels,
    }
    summary = finetune(job.config(tmp_path / "bce", steps=3, **data))
    assert summary["mAP"] == 1.0 and summary["AUC"] is None and summary["accuracy"] == 1.0
    with pytest.raises(CavmaeError, match="holds 1 class, among which --loss ce has nothing to choose"):
        finetune(job.config(tmp_path / "ce", loss="ce", **data))


def test_ten_thousand_classes_most_of_them_without_a_clip(job, tmp_path, capfd):
    labels = classes(tmp_path / "many.csv", 10_000)
    data = {
        "data": (relabeled(job.train, tmp_path / "train.json", "/m/7,/m/9999"),),
        "eval_data": (relabeled(job.test, tmp_path / "test.json", "/m/7,/m/8"),),
        "labels": labels,
    }
    summary = finetune(job.config(tmp_path / "out", steps=3, epochs=1, average_epochs=(1, 1), **data))
    assert len(summary["classes_without_positives"]) == 9_998 and summary["mAP"] == 1.0
    assert "9998 of 10000 classes have no training clip and will not be learned: /m/0, " in "".join(capfd.readouterr())
    assert len(open_model(tmp_path / "out" / "model").mlp_head[1].bias) == 10_000


def test_a_batch_larger_than_the_data_and_odd_last_batches(job, tmp_path):
    summary = finetune(job.config(tmp_path, batch_size=1000, epochs=1, average_epochs=(1, 1)))
    assert summary["steps"] == 1 and summary["clips"] == 9
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 14


def test_no_clip_of_the_held_out_ones_can_be_used(job, tmp_path):
    rows = json.loads(job.test.read_text())["data"]
    (tmp_path / "bad.json").write_text(json.dumps({"data": [{**row, "video": "no-film.mp4"} for row in rows]}))
    (tmp_path / "no-film.mp4").write_text("no film")
    with pytest.raises(UnusableDataError, match="no-film"):
        finetune(job.config(tmp_path / "out", eval_data=(tmp_path / "bad.json",), epochs=1))


def test_without_a_checkpoint_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no runs/pretrain/model to start from; run `cavmae-fast pretrain` first"):
        finetune(FinetuneConfig())


def test_without_arguments_it_goes_on_from_the_demo(tmp_path, monkeypatch):
    """On the clips that pretraining left, whose attributes become the classes."""
    small = finetuning.make_job(tmp_path / "runs" / "pretrain", audio_length=192, img_size=64)
    assert small.init == tmp_path / "runs" / "pretrain" / "model"
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr("cavmae_fast.training.finetune_setup.generate_clips", lambda *args, **_: made.append(args[0]))
    summary = finetune(FinetuneConfig(steps=2, batch_size=4, device="cpu"))
    assert made == [Path("runs/pretrain/clips")] and summary["clips"] == 9 and summary["metric"] == "mAP"
    labels = LabelSet.from_csv("runs/finetune/lists/labels.csv")
    assert len(labels) == 26 and "shape/circle" in labels.mids and labels.names[0] == "circle, sine"


def test_a_dry_run_writes_nothing(job, tmp_path):
    found = finetune(job.config(tmp_path / "out", dry_run=True))
    assert isinstance(found, DryRun) and found.steps == 9 and not (tmp_path / "out").exists()


def test_on_the_command_line(job, tmp_path):
    """One line on stderr, exit code 2 for wrong usage; a configuration file starts a run again."""
    start = [sys.executable, "-c", "from cavmae_fast.cli import main; main()", "finetune"]
    bad = subprocess.run([*start, "--data", str(job.train), "--out", str(tmp_path)], capture_output=True, text=True)
    assert bad.returncode == 2 and "error: --recipe is not given" in bad.stderr and "Traceback" not in bad.stderr
    finetune(job.config(tmp_path / "a", steps=2))
    options = ["--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")]
    again = subprocess.run([*start, *options], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert ours["loss"] == theirs["loss"] and ours["modes"] == theirs["modes"]
