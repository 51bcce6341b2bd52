"""What a person sees of runs: progress in a log, trackers, the list of runs, a dry run, a run's configuration used again."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.training.closing import pretrained
from cavmae_fast.training.config_file import expand
from cavmae_fast.training.dry_run import DryRun
from cavmae_fast.training.metrics import JsonLines
from cavmae_fast.training.pretrain import pretrain
from cavmae_fast.training.pretrain_config import PretrainConfig
from cavmae_fast.training.progress import Progress, duration
from cavmae_fast.training.runs import RunsConfig, list_runs, render
from cavmae_fast.training.trackers import Recorder, TrackerError, numbers_of, open_trackers


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> tuple[list[Path], list[Path]]:
    return generate_clips(tmp_path_factory.mktemp("clips"), num_train=8, num_test=4)


def options(clips, out: Path, **changed) -> PretrainConfig:
    given = {"data": tuple(clips[0]), "eval_data": tuple(clips[1]), "out": out, "steps": 2, "batch_size": 4}
    return PretrainConfig(**{**given, "device": "cpu", "dtype": "float32", **changed})


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory) -> Path:
    """A folder with one finished run."""
    out = tmp_path_factory.mktemp("runs") / "first"
    pretrain(options(clips, out, track=("tensorboard",)))
    return out


# ------------------------------------------------------------------------------------------------------------ progress


def test_a_log_file_gets_lines(capsys):
    with Progress(3, 0, lambda row: f"loss {row['loss']}", terminal=False) as progress:
        for step in (1, 2, 3):
            progress.step()
            progress.show({"step": step, "loss": step / 2})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 1/3 loss 0.5", "step 3/3 loss 1.5"]  # the second came at once
    assert lines[0].endswith("left") and "done after" in lines[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min 0 s"), (725, "12 min 5 s"), (12_000, "3 h 20 min"), (4 * 86400 + 7 * 3600, "4 d 7 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_rows_say_how_much_of_the_machine_is_used(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["product_share"] < 2 for row in rows if "learning_rate" in row)


# ------------------------------------------------------------------------------------------------------------ trackers


def test_tensorboard_shows_what_was_recorded(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wanted = [row["loss"] for row in rows if "learning_rate" in row]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(wanted)
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_tensorboard_hides_steps_that_come_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0})):
        with Recorder(JsonLines(tmp_path / "metrics.jsonl"), open_trackers(["tensorboard"], tmp_path, {}, done)) as recorder:
            for step, value in values.items():
                recorder.write({"step": step, "loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for done in (0, 2):
        with Recorder(JsonLines(tmp_path / "metrics.jsonl"), open_trackers(["wandb"], tmp_path, {"a": 1}, done)) as recorder:
            recorder.write({"step": done + 1, "loss": 1.0, "evaluation": {"mAP": 0.5}})
    name = (tmp_path / "wandb_run.txt").read_text()
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) >= 1 and all(folder.endswith(name) for folder in folders)


def test_a_tracker_that_is_not_installed(clips, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrackerError, match=r"--track wandb needs it installed: pip install 'cavmae_fast\[wandb\]'"):
        pretrain(options(clips, tmp_path / "out", track=("wandb",)))
    assert not list((tmp_path / "out").iterdir())


def test_numbers_of_a_row():
    row = {"step": 3, "loss": 1.5, "name": "x", "final": True, "missing": None, "evaluation": {"mAP": 0.25, "names": ["a"]}}
    assert numbers_of(row) == {"loss": 1.5, "evaluation/mAP": 0.25}


# ---------------------------------------------------------------------------------------------------------------- runs


def test_runs_are_listed_and_drawn(run, tmp_path):
    second = run.parent / "_deep" / "$er"
    second.mkdir(parents=True, exist_ok=True)
    (second / "config.json").write_text(json.dumps({"model": "cav", "dtype": "bfloat16"}))
    (second / "metrics.jsonl").write_text(json.dumps({"step": 7, "loss": 2.5, "learning_rate": 1e-3}) + "\n")
    os.utime(second / "metrics.jsonl", (1e9, 1e9))
    os.utime(second / "config.json", (1e9, 1e9))
    config = RunsConfig(run.parent, tmp_path / "losses.png")
    runs = list_runs(config)
    text = render(config, runs)
    assert [each.path for each in runs] == [run, second]  # the newest first
    assert "finished, step 2" in text and "A->V R@1" in text
    assert re.search(r"cav, bfloat16: stopped \d+ d \d+ h ago, step 7; loss 2.5", text)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        list_runs(RunsConfig(tmp_path))
    with pytest.raises(ValueError, match="is no folder"):
        list_runs(RunsConfig(tmp_path / "nothing"))


# ------------------------------------------------------------------------------------------------- dry run, configuration


def test_a_dry_run_writes_nothing(clips, tmp_path):
    config = options(clips, tmp_path / "out", dry_run=True, steps=None, epochs=3)
    result = pretrain(config)
    assert isinstance(result, DryRun) and not (tmp_path / "out").exists()
    assert result.steps == 6 and result.batch == 4
    assert result.memory.model == 4 * (result.parameters + 2 * result.trained)
    assert result.memory.peak > result.memory.model + result.memory.kept
    text = pretrained(config, result)
    assert "6 steps" in text and "4 clips" in text and "nothing was written" in text


def test_what_is_kept_per_clip(clips, tmp_path):
    """The small model keeps a few MB for each clip, and less where more is formed again."""
    kept = []
    for recompute in ("none", "mlp", "block"):
        result = pretrain(options(clips, tmp_path / "out", dry_run=True, recompute=recompute))
        kept.append(result.memory.kept / result.batch)
    assert 40e6 > kept[0] > 2 * kept[1] > 3 * kept[2] > 1e6


def test_a_runs_configuration_starts_it_again(run, tmp_path):
    words = expand(["--config", str(run / "config.json"), "--out", str(tmp_path)], PretrainConfig)
    import tyro

    again = tyro.cli(PretrainConfig, args=words)
    assert again.out == tmp_path and again.steps == 2 and again.track == ("tensorboard",) and again.dtype == "float32"
    assert [path.name for path in again.data] == [
        Path(p).name for p in json.loads((run / "config.json").read_text())["data"]
    ]
    assert expand(["--steps", "3"], PretrainConfig) == ["--steps", "3"]


@dataclass
class Options:
    flag: bool = True
    choice: bool | None = None
    pair: tuple[float, float] | None = None
    names: tuple[str, ...] = ("a",)
    number: float = 1.0
    absent: int | None = None


def test_every_option_of_a_configuration_is_typed_as_it_was(tmp_path):
    import tyro

    given = Options(flag=False, choice=False, pair=(0.5, 0.25), names=("b", "c"), number=2e-5)
    file = tmp_path / "options.json"
    file.write_text(json.dumps(asdict(given)))
    assert tyro.cli(Options, args=expand(["--config", str(file)], Options)) == given


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds a list"),
        ('{"stepz": 3}', "holds stepz, which this command does not have"),
    ],
)
def test_bad_configurations(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        expand([f"--config={file}"], PretrainConfig)


@pytest.mark.parametrize("arguments", [["--config"], ["--config", "a", "--config", "b"]])
def test_one_configuration(arguments):
    with pytest.raises(ValueError, match="takes one file, once"):
        expand(arguments, PretrainConfig)


def test_the_program_takes_a_configuration(run, tmp_path, monkeypatch, capsys):
    from cavmae_fast import cli

    monkeypatch.setattr(sys, "argv", ["cavmae-fast", "pretrain", "--config", str(tmp_path / "no.json")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "no.json cannot be read" in capsys.readouterr().err
