"""Classification of sound alone, end to end: recipes, folds and splits of data sets in the layouts of ESC-50 and Speech
Commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from media_sets import write_shards
from sound_sets import WORDS, write_esc50, write_speech_commands
from tiny import one_thread  # noqa: F401
from tiny_mavil import MAVIL, TINY

from cavmae_fast import CAVMAE, CAVMAEFTAudio
from cavmae_fast.evaluation.commands.evaluate import EvaluateConfig
from cavmae_fast.evaluation.commands.evaluate import run as evaluate
from cavmae_fast.models import MAE, MAEFT, MAViL
from cavmae_fast.models.opening import open_model
from cavmae_fast.training.finetune import FineTuneTask, finetune
from cavmae_fast.training.finetune_closing import finetuned
from cavmae_fast.training.finetune_config import FinetuneConfig, fine_tuning_in_force, resolve
from cavmae_fast.training.finetune_folds import folds_in_turn, with_splits


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Data sets and pretrained models by name."""
    folder = tmp_path_factory.mktemp("sets")
    torch.manual_seed(0)
    MAE("a", **TINY).save_pretrained(folder / "a-mae")
    MAViL(**MAVIL).save_pretrained(folder / "mavil")
    CAVMAE(**tiny.TINY | {"audio_length": 32}).save_pretrained(folder / "cav-mae")
    esc50 = write_esc50(folder / "esc50", folds=3, takes=2, seconds=0.4)
    speech = write_speech_commands(folder / "speech", training=4, seconds=0.4)
    return {"esc50": esc50, "speech": speech, **{name: folder / name for name in ("a-mae", "mavil", "cav-mae")}}


def config(sets: dict[str, Path], out: Path, data: str | Path, init: str, **options: Any) -> FinetuneConfig:
    plain = {
        "data": (Path(data),),
        "init": sets[init],
        "recipe": "esc50",
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "average_epochs": (2, 2),
        "freq_mask": 16,
        "time_mask": 4,
        "device": "cpu",
        "dtype": "float32",
        "workers": 0,
        "out": out,
    }
    return FinetuneConfig(**plain | options)


def test_cross_validation_in_one_command(sets, tmp_path):
    job = config(sets, tmp_path / "run", sets["esc50"], "a-mae", epochs=12, average_epochs=(12, 12), learning_rate=5e-4)
    assert folds_in_turn(job) == ("1", "2", "3")
    summary = finetune(job)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert set(summary["folds"]) == {"1", "2", "3"} and summary["mode"] == "audioonly"
    accuracies = []
    for name, figures in summary["folds"].items():
        own = json.loads((tmp_path / "run" / f"fold-{name}" / "summary.json").read_text())
        assert own["accuracy"] == figures["accuracy"] and own["clips"] == figures["clips"] == 6
        report = evaluate(
            EvaluateConfig(
                checkpoint=tmp_path / "run" / f"fold-{name}" / "model",
                data=(Path(f"{sets['esc50']}@{name}"),),
                device="cpu",
                dtype="float32",
                out=tmp_path / "report",
            )
        )
        assert report["modes"]["audioonly"]["accuracy"] == pytest.approx(own["accuracy"])
        accuracies.append(own["accuracy"])
    assert summary["accuracy"] == pytest.approx(sum(accuracies) / 3) and summary["accuracy"] > 0.6  # chance is a third
    text = finetuned(job, summary)
    assert "3 folds" in text and f"--data {sets['esc50']}@1" in text.splitlines()[-1]
    with pytest.raises(ValueError, match=r"--out .* holds a finished run"):
        finetune(job)
    one = finetune(replace(job, fold=2, out=tmp_path / "one"))
    other = json.loads((tmp_path / "run" / "fold-2" / "summary.json").read_text())
    assert all(one[key] == other[key] for key in ("accuracy", "loss", "modes"))


def test_a_cross_validation_that_was_cut_short_goes_on(sets, tmp_path, monkeypatch):
    job = config(sets, tmp_path / "cut", sets["esc50"], "a-mae", epochs=1, average_epochs=(1, 1))
    whole = finetune(replace(job, out=tmp_path / "whole"))
    losses, taken = FineTuneTask.losses, []

    def stop(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 5:  # in the second fold, of three steps each
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(FineTuneTask, "losses", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(job)
    done = (tmp_path / "cut" / "fold-1" / "summary.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"was begun with other options \(learning_rate"):
        finetune(replace(job, learning_rate=1.0))
    monkeypatch.undo()
    assert finetune(job) == whole
    assert (tmp_path / "cut" / "fold-1" / "summary.json").stat().st_mtime_ns == done  # not done again
    again = finetune(replace(job, overwrite=True, learning_rate=1e-30))
    assert again["folds"].keys() == whole["folds"].keys() and again != whole
    (tmp_path / "strange" / "fold-1").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds fold-1 of another run"):
        finetune(replace(job, out=tmp_path / "strange"))


@pytest.mark.parametrize(
    ("init", "encoders", "kind"), [("mavil", "audio", MAEFT), ("cav-mae", "audio", CAVMAEFTAudio), ("a-mae", None, MAEFT)]
)
def test_speech_commands_with_every_model_of_sound(sets, tmp_path, init, encoders, kind):
    job = config(sets, tmp_path / "run", sets["speech"], init, model=encoders, recipe="speechcommands")
    summary = finetune(job)
    assert summary["clips"] == 3 and summary["modes"].keys() == {"audioonly"} and summary["frames"] == 1
    begun = json.loads((tmp_path / "run" / "config.json").read_text())
    assert begun["data"] == [f"{sets['speech']}@training"] and begun["eval_data"] == [f"{sets['speech']}@validation"]
    model = open_model(tmp_path / "run" / "model")
    assert type(model) is kind and len(model.mlp_head[1].bias) == len(WORDS) and model.clip_spec.frames == 0
    assert f"--data {sets['speech']}@testing" in finetuned(job, summary).splitlines()[-1]


def test_from_shards(sets, tmp_path):
    """They bring their classes along, and give the run that the files give."""
    places = {split: f"{sets['speech']}@{split}" for split in ("training", "validation")}
    shards = {split: write_shards(tmp_path / split, place) for split, place in places.items()}
    options = {"recipe": "speechcommands", "steps": 3}
    one = finetune(config(sets, tmp_path / "files", sets["speech"], "a-mae", **options))
    data = {"eval_data": (shards["validation"],), **options}
    other = finetune(config(sets, tmp_path / "shards", shards["training"], "a-mae", **data))
    assert {key: one[key] for key in ("loss", "modes")} == {key: other[key] for key in ("loss", "modes")}


def test_what_does_not_go_together_is_refused(sets, tmp_path):
    for data, init, options, words in (
        ("esc50", "cav-mae", {"fold": 1}, "holds sound alone, and the model takes pictures, too .*--model audio"),
        ("esc50", "mavil", {"fold": 1}, "holds sound alone, and the model takes pictures"),
        ("esc50", "a-mae", {"fold": 4}, "--fold is 4; it must be a fold of --data, which has 1, 2, 3"),
        ("speech", "a-mae", {"fold": 1}, "--fold is 1; it must be a fold of --data, the folder of a data set in folds"),
        ("esc50", "a-mae", {"fold": 1, "eval_data": (sets["esc50"],)}, "in folds, without --eval-data"),
        ("esc50", "cav-mae", {}, "holds sound alone, and the model takes pictures"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(config(sets, tmp_path, sets[data], init, **options))
        assert not list(tmp_path.rglob("config.json"))


def test_a_dry_run_is_of_the_first_fold(sets, tmp_path):
    found = finetune(config(sets, tmp_path / "out", sets["esc50"], "a-mae", dry_run=True))
    assert found.steps == 2 * 3 and found.shapes == ([4, 32, 128], [4, 0, 3, 32, 32]) and not (tmp_path / "out").exists()


def test_the_recipes(sets):
    for recipe, data, fold, *expected in (
        ("esc50", "esc50", 1, 48, 25, "ce", 0.0),
        ("speechcommands", "speech", None, 128, 30, "bce", 0.6),
    ):
        plain = FinetuneConfig(data=(sets[data],), init=sets["a-mae"], recipe=recipe, fold=fold)
        found = resolve(with_splits(plain))
        assert [found.batch_size, found.epochs, found.loss, found.mixup] == expected and found.metric == "accuracy"
        assert found.fold is None and len(found.eval_data) == 1 and found.average_epochs[1] == found.epochs
        schedule = fine_tuning_in_force(found).optimization.schedule
        assert [round(schedule.scale(epoch), 4) for epoch in (4, 5, 6)] == [1.0, 0.85, 0.7225]
