"""The line that a command prints for what to run next runs when it is copied into a shell: from the demo to a search."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import one_thread  # noqa: F401

from cavmae_fast import cli
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.evaluation.commands.evaluate import EvaluateConfig
from cavmae_fast.evaluation.commands.evaluate import closing as evaluated
from cavmae_fast.evaluation.commands.options import next_line
from cavmae_fast.training.closing import pretrained
from cavmae_fast.training.finetune_closing import finetuned
from cavmae_fast.training.finetune_config import FinetuneConfig
from cavmae_fast.training.pretrain_config import PretrainConfig

SUMMARY = dict.fromkeys(("loss", "loss_mae_a", "loss_mae_v", "loss_c", "clips_per_s"), 1.0)
PRETRAINED = {**SUMMARY, "steps": 1, "rejected_clips": 0, "skipped_steps": 0}
FINETUNED = {
    **PRETRAINED,
    "metric": "mAP",
    "averaged_epochs": [],
    "frames": 10,
    "clips": 1,
    "chance_mAP": 0.1,
    "modes": {},
    "classes_without_positives": [],
    "best_epoch": None,
}


def following(text: str) -> list[str]:
    """The words of the line that a closing text names, as a shell would read it."""
    (line,) = (line for line in text.splitlines() if line.startswith("next:  "))
    words = shlex.split(line.removeprefix("next:  "))
    assert words[0] == "cavmae-fast"
    return words[1:]


def parsed(words: list[str], monkeypatch):
    """What the program makes of these words: the configuration of the command that they name."""
    got = []
    command = cli.COMMANDS[words[0]]
    monkeypatch.setitem(cli.COMMANDS, words[0], command._replace(closing=""))
    module, _, name = command.job.partition(":")
    monkeypatch.setattr(f"cavmae_fast.{module}.{name}", got.append)
    monkeypatch.setattr(sys, "argv", ["cavmae-fast", *words])
    with pytest.raises(SystemExit):
        cli.main()
    return got[0]


def test_after_pretraining(monkeypatch, tmp_path):
    assert following(pretrained(PretrainConfig(), PRETRAINED)) == ["finetune"]
    other = PretrainConfig(out=tmp_path / "my run; rm")
    config = parsed(following(pretrained(other, PRETRAINED)), monkeypatch)
    assert config == FinetuneConfig(init=tmp_path / "my run; rm" / "model")
    own = PretrainConfig(data=(Path("a"), Path("b c")), eval_data=(Path("$HOME"),))
    config = parsed(following(pretrained(own, PRETRAINED)), monkeypatch)
    assert (config.checkpoint, config.data) == (Path("runs/pretrain/model"), (Path("$HOME"),))
    config = parsed(following(pretrained(replace(own, eval_data=()), PRETRAINED)), monkeypatch)
    assert config.data == (Path("a"), Path("b c"))


def test_after_fine_tuning(monkeypatch):
    lists = Path("runs/finetune/lists")
    config = parsed(following(finetuned(FinetuneConfig(), FINETUNED)), monkeypatch)
    assert (config.data, config.labels, config.frames) == ((lists / "test.json",), lists / "labels.csv", 10)
    own = FinetuneConfig(data=(Path("t.json"),), eval_data=(Path("e.json"),), labels=Path("l.csv"), out=Path("o"))
    config = parsed(following(finetuned(own, FINETUNED)), monkeypatch)
    assert (config.checkpoint, config.data, config.labels) == (Path("o/model"), (Path("e.json"),), Path("l.csv"))
    assert (
        parsed(following(finetuned(replace(own, labels=None), FINETUNED)), monkeypatch).labels is None
    )  # shards bring theirs


@pytest.mark.parametrize("text", [None, "no JSON", "[]", "{}", '{"init": "not/there"}'])
def test_after_judging_a_checkpoint_that_no_run_left(tmp_path, text):
    """The evaluation is done all the same, and no line is printed that would fail."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    figures = dict.fromkeys(("mAP", "AUC", "d_prime", "accuracy", "chance_mAP"), 0.5)
    report = {
        "frames": 1,
        "activation": "sigmoid",
        "rejects": [],
        "modes": {"multimodal": {**figures, "clips": 3, "classes_without_positives": []}},
        "classes": {"multimodal": []},
    }
    assert "next:" not in evaluated(EvaluateConfig(checkpoint=tmp_path / "model", data=(tmp_path,)), report)


def test_names_are_quoted():
    words = ["embed", "it's", "$(rm -rf x)", "a b", "--top", 3]
    assert following(next_line(*words)) == [str(word) for word in words]


def test_the_tour_from_line_to_line(tmp_path, monkeypatch, capsys):
    """pretrain, and then six times whatever line was printed, with a few clips and steps: it ends with what is filled in."""
    few = functools.partial(generate_clips, num_train=8, num_test=5)
    for module in ("run", "finetune_setup"):
        monkeypatch.setattr(f"cavmae_fast.training.{module}.generate_clips", few)
    monkeypatch.chdir(tmp_path)
    words, ran = ["pretrain", "--steps", "2", "--batch-size", "4"], []
    while words:
        if words[0] == "finetune":
            words += ["--epochs", "1"]  # the others take no longer than they must
        monkeypatch.setattr(sys, "argv", ["cavmae-fast", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        ran.append(words[0])
        words = following(printed.out) if "next:  " in printed.out else []
    assert ran == ["pretrain", "finetune", "evaluate", "retrieve", "embed", "search", "search", "inpaint"]
    shown = re.findall(
        r"^\$ cavmae-fast (\w+)", (Path(__file__).resolve().parents[1] / "README.md").read_text(), re.MULTILINE
    )
    assert shown == list(dict.fromkeys(ran))[:6]  # the README's tour
    assert (tmp_path / "found.html").exists() and (tmp_path / "runs" / "inpaint" / "0000" / "overview.png").exists()
