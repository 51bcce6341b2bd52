"""Fine-tuning and judging on several ranks: the same figures and weights as one process, also resumed on another number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import finetuning
import pytest
import torch
from ranks_run import Run, started
from safetensors.torch import load_file

STEPS, RATE, HEAD_RATE = 6, 1e-3, 1e-2
FEWER = "from cavmae_fast.training import finetune_results as job; job.frames_of = lambda *_: 2"
"Judges the final model on 2 of the 10 pictures of each clip, which takes less time."


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> finetuning.Job:
    return finetuning.make_job(tmp_path_factory.mktemp("job"))


def finetune(job: finetuning.Job, out: Path, count: int, *options: object) -> Run:
    """Two epochs of three steps, the second of which is what is left."""
    words = ["finetune", "--data", job.train_shapes, "--eval-data", job.test_shapes, "--labels", job.shapes]
    words += ["--init", job.init, "--recipe", "as20k", "--epochs", 2, "--batch-size", 4, "--average-epochs", 2, 2]
    words += [
        "--freq-mask",
        16,
        "--time-mask",
        8,
        "--learning-rate",
        RATE,
        "--head-lr-factor",
        HEAD_RATE / RATE,
        "--decay-start",
        1,
    ]
    words += ["--device", "cpu", "--dtype", "float32", "--save-every", 3, "--out", out, *options]
    with started(count, out.with_name(f"{out.name}.logs"), words, FEWER) as run:
        return run.finish()


def assert_done(run: Run) -> None:
    assert not any(run.codes), "\n".join(run.texts)
    assert not any("Traceback" in text for text in run.texts)
    assert all("mAP" not in text for text in run.texts[1:]), "more than one rank shows what was reached"


@pytest.fixture(scope="module")
def runs(job, tmp_path_factory):
    """(ranks, options) -> the folder of a finished run, which is made once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(count: int, *options: object) -> Path:
        key = (count, *options)
        if key not in made:
            made[key] = root / "-".join(map(str, key))
            assert_done(finetune(job, made[key], count, *options))
        return made[key]

    return run


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_result(out: Path, want: Path) -> None:
    """As in `test_ranks`: losses within 1e-5, an element of the weights within 1 % of the way that Adam can move it, and
    scores that differ by that little rank the clips alike."""
    for got, row in zip(rows(out), rows(want), strict=True):
        if "learning_rate" in row:
            assert got["loss"] == pytest.approx(row["loss"], rel=1e-5)
        elif "evaluation" in row:
            assert got["evaluation"] == row["evaluation"]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, want)]
    for name in ("modes", "clips", "best_epoch", "averaged_epochs", "rejected_clips", "skipped_steps"):
        assert summaries[0][name] == summaries[1][name], name
    assert (out / "classes.csv").read_text() == (want / "classes.csv").read_text()
    for place in ("model/model.safetensors", "best/model.safetensors", "epochs/epoch-002.safetensors"):
        got, whole = load_file(out / place), load_file(want / place)
        assert got.keys() == whole.keys()
        for name, weight in whole.items():
            difference = (got[name] - weight).abs()
            farthest = STEPS * (HEAD_RATE if name.startswith("mlp_head") else RATE)
            if name.endswith("qkv.bias"):  # the keys' true gradient is 0
                q, k, v = difference.chunk(3)
                assert k.max() <= 2 * farthest
                difference = torch.cat([q, v])
            assert difference.max() <= 0.01 * farthest, f"{place} {name}"


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["ddp", "shards"])
def test_two_ranks_are_as_one(runs, options):
    assert_same_result(runs(2, *options), runs(1))


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["ddp", "shards"])
def test_resumed_from_two_ranks_onto_one(job, runs, tmp_path, options):
    out = tmp_path / "run"
    shutil.copytree(runs(2, *options), out)
    (out / "summary.json").unlink()
    (last,) = (out / "checkpoints").glob(f"step-{STEPS:08d}*")
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    run = finetune(job, out, 1)
    assert_done(run)
    assert "going on after step 3" in run.texts[0]
    assert_same_result(out, runs(1))


@pytest.mark.parametrize(
    "options",
    [
        ("--mode", "audioonly", "--shard"),
        ("--mode", "audioonly", "--model", "audio", "--shard"),
        ("--recipe", "linear-probe"),
        ("--recipe", "linear-probe", "--shard"),
        ("--recompute", "block", "--shard"),
    ],
    ids=["one-modality-shards", "audio-branch-shards", "frozen-ddp", "frozen-shards", "recomputed-shards"],
)
def test_what_is_trained_in_part(runs, options):
    alone = tuple(option for option in options if option != "--shard")
    assert_same_result(runs(2, *options), runs(1, *alone))


OTHER_DTYPES = """
import os
from cavmae_fast.evaluation import running
running.choose_dtype = lambda device: ("bfloat16" if os.environ.get("RANK") == "1" else "float32", "measured")
"""


def test_two_ranks_judge_as_one(job, runs, tmp_path):
    """A clip that cannot be used included, whichever rank met it (here the second), and a dtype that each would choose
    otherwise."""
    listed = json.loads(job.test_shapes.read_text())["data"]
    for row in listed:
        row["video"] = str((job.test.parent / row["video"]).resolve())
    (tmp_path / "no-film.mp4").write_text("no film")
    listed[-1]["video"] = str(tmp_path / "no-film.mp4")
    (tmp_path / "list.json").write_text(json.dumps({"data": listed}))
    words = ["evaluate", runs(1) / "model", "--data", tmp_path / "list.json", "--labels", job.shapes, "--mode", "all"]
    words += ["--frames", 10, "--device", "cpu", "--batch-size", 3, "--out"]
    reports = []
    for count in (1, 2):
        out = tmp_path / str(count)
        with started(count, tmp_path / f"logs{count}", [*words, out], OTHER_DTYPES) as run:
            run.finish()
        assert not any(run.codes), "\n".join(run.texts)
        assert "8 clips, 10 pictures of each" in run.texts[0] and not any("mAP" in text for text in run.texts[1:])
        reports.append(json.loads((out / "evaluation.json").read_text()))
    one, two = reports
    assert [Path(reject["path"]).name for reject in one["rejects"]] == ["no-film.mp4"]
    assert one == two and one["dtype"] == "float32"


@pytest.mark.parametrize("batch", [3, 99], ids=["odd", "more-than-there-are-clips"])
def test_a_batch_that_the_ranks_cannot_share(job, tmp_path, batch):
    """Of 14 clips: a batch of 3 on two ranks, and all of them on three."""
    count = 2 if batch == 3 else 3
    run = finetune(job, tmp_path / "run", count, "--batch-size", batch)
    (error,) = [line for text in run.texts for line in text.splitlines() if "error:" in line]
    assert f"--batch-size is {min(batch, 14)}" in error and f"it must be a multiple of {count}" in error
    assert run.codes == [2] * count and not (tmp_path / "run" / "config.json").exists()
