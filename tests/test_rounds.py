"""`--rounds`: stage 1 and rounds of stage 2, one after the other, killed anywhere, on one process and on two."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from ranks_run import started
from safetensors.torch import load_file

from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.models.opening import open_model, weights_hash

STEPS = 4
STAGES = ("stage-1", "round-1", "round-2")
DIE = """
import os, signal
from pathlib import Path
from cavmae_fast.training.state import RunState
from cavmae_fast.training.run_folder import RunFolder
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
"""
DEATHS = {
    "inside of stage 1": """
update = RunState.update
RunState.update = lambda self, loss: die() if self.step == 3 else update(self, loss)""",
    "between stage 1 and round 1": """
finish = RunFolder.finish
def finished(self, *args):
    finish(self, *args)
    die()
RunFolder.finish = finished""",
    "inside of round 1": """
update = RunState.update
RunState.update = lambda self, loss: die() if self.step == 3 else update(self, loss)""",
    "before the last of round 1": "from cavmae_fast.models import MAViL\nMAViL.save_pretrained = die",
    "inside of round 2": """
update = RunState.update
def late(self, loss):
    round_2 = (Path(os.environ["CHAIN"]) / "round-1" / "summary.json").exists()
    return die() if round_2 and self.step == 1 else update(self, loss)
RunState.update = late""",
    "when all is done but for the end": "import cavmae_fast.training.rounds as rounds\nrounds.open_model = die",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    generate_clips(folder, num_train=12, num_test=4, seconds=2.5, size=48)
    return folder


def arguments(clips: Path, out: Path, *options: object) -> list[object]:
    data = ["--data", clips / "train", "--batch-size", 4, "--steps", STEPS, "--save-every", 2]
    return ["pretrain", "--model", "mavil-small", *data, "--device", "cpu", "--dtype", "float32", "--out", out, *options]


def run(out: Path, words: list[object], before: str = "", count: int = 1) -> tuple[list[int], str]:
    before = f"import os\nos.environ['CHAIN'] = {str(out)!r}\n{before}"
    with started(count, out.with_name(f"{out.name}.logs"), words, before) as one:
        one.finish()
    return one.codes, "\n".join(one.texts)


def losses(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["loss_regression"], row["c_acc"]) for row in rows if "learning_rate" in row]


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "chain"
    codes, text = run(out, arguments(clips, out, "--rounds", 2))
    assert codes == [0], text
    return out


def test_each_run_teaches_the_next(undisturbed):
    for name in STAGES:
        rows = losses(undisturbed / name)
        assert [step for step, *_ in rows] == list(range(1, STEPS + 1))
        assert all((regression > 0) == (name != "stage-1") for _, _, regression, _ in rows)
    models = {name: open_model(undisturbed / name / "model") for name in STAGES}
    hashes = [weights_hash(model) for model in models.values()]
    assert len(set(hashes)) == 3
    noted = [json.loads((undisturbed / name / "config.json").read_text())["teacher_hash"] for name in STAGES]
    assert noted == [None, *hashes[:2]]
    assert weights_hash(open_model(undisturbed / "model")) == hashes[-1]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert list(summary["stages"]) == list(STAGES) and summary["loss"] == losses(undisturbed / "round-2")[-1][1]


def test_killed_anywhere_it_goes_on_to_the_same_bits(clips, undisturbed, tmp_path):
    out = tmp_path / "chain"
    words = arguments(clips, out, "--rounds", 2)
    for when, patch in DEATHS.items():
        codes, text = run(out, words, DIE + patch)
        assert codes == [-signal.SIGKILL], f"{when}: {text}"
        assert not (out / "summary.json").exists()
    codes, text = run(out, words)
    assert codes == [0], text
    assert "round-2 of stage-1, round-1, round-2 is finished" in text
    for name in STAGES:
        assert losses(out / name) == losses(undisturbed / name)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out, undisturbed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    codes, text = run(out, words)
    assert codes == [2] and "holds a finished run" in text


def test_started_again_with_other_options(clips, undisturbed, tmp_path):
    out = tmp_path / "chain"
    codes, _ = run(out, arguments(clips, out, "--rounds", 1), DIE + DEATHS["inside of stage 1"])
    assert codes == [-signal.SIGKILL]
    codes, text = run(out, arguments(clips, out, "--rounds", 2))
    assert codes == [2] and "rounds 1 then, 2 now" in text


@pytest.mark.parametrize("options", [(), ("--shard", "--cache-targets", "cache")], ids=["ddp", "shards-cached"])
def test_on_two_ranks(clips, undisturbed, tmp_path, options):
    """The same steps as on one process, in another order of sums; with a cache, other crops."""
    out = tmp_path / "chain"
    options = [tmp_path / word if word == "cache" else word for word in options]
    codes, text = run(out, arguments(clips, out, "--rounds", 1, *options), count=2)
    assert codes == [0, 0], text
    assert "Traceback" not in text
    for name in ("stage-1",) if options else ("stage-1", "round-1"):
        for got, want in zip(losses(out / name), losses(undisturbed / name), strict=True):
            assert got == pytest.approx(want, rel=1e-4)
    model = open_model(out / "model")
    assert weights_hash(model) != weights_hash(open_model(out / "stage-1" / "model"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rounds", 0), "--rounds is 0; it must be 1 or more"),
        (("--rounds", -1), "--rounds is -1; it must be 1 or more"),
        (("--rounds", 1, "--model", "a-mae-small"), "--rounds is for MAViL; --model is a-mae-small"),
        (("--rounds", 1, "--model", "small"), "--rounds is for MAViL; --model is small"),
        (("--rounds", 1, "--teacher", "x"), "--teacher is given beside --rounds"),
        (("--rounds", 1, "--regression-loss-weight", 0), "--regression-loss-weight is 0"),
        (("--rounds", 1, "--dry-run"), "--dry-run is for one run; leave out --rounds"),
    ],
)
def test_what_a_chain_refuses(clips, tmp_path, options, words):
    """Before anything is trained; nothing is written."""
    out = tmp_path / "chain"
    codes, text = run(out, arguments(clips, out, *options))
    assert codes == [2] and words in text and "Traceback" not in text
    assert not out.exists() or not [path for path in out.rglob("*") if path.is_file()]
