"""`evaluate` and `classify`: the figures of a run again, from its checkpoint; what cannot be judged is said."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import finetuning
import numpy as np
import pytest
from tiny import one_thread  # noqa: F401

from cavmae_fast import CheckpointError
from cavmae_fast.data.sets.labels import LabelError, LabelSet
from cavmae_fast.evaluation import classify
from cavmae_fast.evaluation.class_figures import draw_classes
from cavmae_fast.evaluation.classification import evaluate_scores
from cavmae_fast.evaluation.commands.evaluate import EvaluateConfig, closing, run
from cavmae_fast.evaluation.predicting import Predictions
from cavmae_fast.evaluation.running import Running
from cavmae_fast.models.opening import open_model
from cavmae_fast.reference.cavmae_parameters import MODES
from cavmae_fast.training.finetune import finetune

RUNNING = {"device": "cpu", "dtype": "float32", "batch_size": 4}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> finetuning.Job:
    return finetuning.make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def trained(job, tmp_path_factory) -> tuple[Path, dict]:
    """The run's folder and its summary."""
    out = tmp_path_factory.mktemp("run")
    return out, finetune(job.config(out, steps=6))


def test_the_figures_of_the_run_again(job, trained, tmp_path):
    out, summary = trained
    options = {"checkpoint": out / "model", "data": (job.test,), "labels": job.labels, "mode": "all", **RUNNING}
    for frames in (1, 10):
        report = run(EvaluateConfig(frames=frames, out=tmp_path, **options))
        assert set(report["modes"]) == set(MODES) and report["activation"] == "sigmoid" and report["frames"] == frames
        for mode, figures in report["modes"].items():
            assert {name: figures[name] for name in ("mAP", "AUC", "d_prime", "accuracy")} == pytest.approx(
                summary["modes"][mode][str(frames)], abs=1e-6
            )
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    for mode in MODES:
        with (tmp_path / f"classes-{mode}.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == 26
        assert (tmp_path / f"classes-{mode}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "classes-multimodal.csv").read_text() == (out / "classes.csv").read_text()
    text = closing(EvaluateConfig(frames=10, out=tmp_path, **options), report)
    assert "9 clips, 10 pictures of each, sigmoid of the logits (chance mAP 0." in text and "left out of the means" in text


def test_on_the_command_line(job, trained, tmp_path):
    start = [sys.executable, "-c", "from cavmae_fast.cli import main; main()", "evaluate"]
    options = ["--data", job.test_shapes, "--labels", job.labels, "--out", tmp_path, "--device", "cpu"]
    done = subprocess.run([*start, *map(str, [trained[0] / "model", *options])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "softmax of the logits" in done.stdout and "mAP" in done.stdout
    bad = subprocess.run([*start, *map(str, [job.init, *options])], capture_output=True, text=True)
    assert bad.returncode == 2 and "which has no classes" in bad.stderr and "Traceback" not in bad.stderr


def test_in_python(job, trained):
    model = open_model(trained[0] / "model")
    found = classify(model, [job.test], job.labels, modes=["audioonly"], running=Running(**RUNNING))
    assert found.results["audioonly"].map == pytest.approx(trained[1]["modes"]["audioonly"]["1"]["mAP"], abs=1e-6)
    assert found.rejects == [] and len(found.predictions["audioonly"].ids) == 9


def test_what_cannot_be_judged(job, trained, tmp_path):
    out = trained[0]
    for arguments, options, words in (
        ((job.init, [job.test], job.labels), {}, "the checkpoint is a CAVMAE, which has no classes"),
        ((out / "model", [job.test], job.shapes), {}, "a head for 26 classes, and the labels CSV 5"),
        ((out / "model", [job.test]), {}, "labels is not given"),
        ((out / "model", [job.test], job.labels), {"modes": ["both"]}, "mode is 'both'"),
        ((out / "model", [job.test], job.labels), {"frames": 5}, "frames is 5; it must be 1 or 10"),
        ((out / "model", [job.test], job.labels), {"activation": "relu"}, "activation is 'relu'"),
        ((out / "model", list((job.test.parent.parent / "clips" / "test").glob("*.mp4")), job.labels), {}, "has a label"),
        ((out, [job.test], job.labels), {}, "the model of this run lies in"),
    ):
        with pytest.raises((ValueError, LabelError, CheckpointError), match=words):
            classify(*arguments, running=Running(**RUNNING), **options)
    with pytest.raises(ValueError, match="--data is missing"):
        run(EvaluateConfig(checkpoint=out / "model", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_clip_that_cannot_be_used_is_named(job, trained, tmp_path):
    rows = json.loads(job.test.read_text())["data"]
    for row in rows:
        row["video"] = str((job.test.parent / row["video"]).resolve())
    rows[2]["video"] = "no-film.mp4"
    (tmp_path / "no-film.mp4").write_text("no film")
    (tmp_path / "list.json").write_text(json.dumps({"data": rows}))
    options = {"data": (tmp_path / "list.json",), "labels": job.labels, **RUNNING}
    config = EvaluateConfig(checkpoint=trained[0] / "model", out=tmp_path / "out", **options)
    report = run(config)
    assert report["modes"]["multimodal"]["clips"] == 8
    assert [Path(reject["path"]).name for reject in report["rejects"]] == ["no-film.mp4"]
    assert "1 clips could not be used; the first: " in closing(config, report)


def test_figures_take_any_name_and_any_number_of_classes(tmp_path):
    """A dollar sign would be read as mathematics, and fail."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 60):
        targets = np.eye(count, dtype=bool)[rng.integers(count, size=30)]
        names = tuple(f"$x_{k} <b>\N{SNOWMAN}" for k in range(count))
        scores = rng.random((30, count))
        result = evaluate_scores(scores, targets, LabelSet(tuple(map(str, range(count))), names))
        predictions = Predictions([f"{k}" for k in range(30)], scores, targets)
        draw_classes(predictions, result, tmp_path / "single.png")
        several = predictions._replace(targets=targets | (rng.random(targets.shape) < 0.2))
        draw_classes(several, result, tmp_path / "several.png")
        for name in ("single.png", "several.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
