"""Runs that are stopped and go on: killed anywhere, asked to leave, out of disk, started with other options."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.training import checkpoint
from cavmae_fast.training.checkpoint import CheckpointWriter, SaveError, checkpoints, host_copy, read_newest

STEPS = 11
TRAINED = ("step", "epoch", "loss", "loss_mae_a", "loss_mae_v", "loss_c", "c_acc", "learning_rate")
DIE = """
import os, signal
from pathlib import Path
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
"""
DEATHS = {
    "before the first step": "from cavmae_fast.training.state import RunState\nRunState.update = die",
    "in a step": """
from cavmae_fast.training.state import RunState
update = RunState.update
RunState.update = lambda self, loss: die() if self.step == 5 else update(self, loss)""",
    "while a checkpoint is written": """
import torch
def half(state, file):
    file.write(bytes(100_000))
    file.flush()
    die()
torch.save = half""",
    "before a checkpoint has its name": """
replace = Path.replace
Path.replace = lambda self, to: die() if str(to).endswith(".pt") else replace(self, to)""",
    "when a checkpoint has its name": """
replace = Path.replace
def named(self, to):
    done = replace(self, to)
    return die() if str(to).endswith(".pt") else done
Path.replace = named""",
    "while metrics are cut back": """
replace = Path.replace
Path.replace = lambda self, to: die() if str(to).endswith("metrics.jsonl") else replace(self, to)""",
    "after the last step": "from cavmae_fast.models import CAVMAE\nCAVMAE.save_pretrained = die",
    "before the summary": "import cavmae_fast.training.pretrain as job\njob.draw_reconstructions = die",
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    return generate_clips(tmp_path_factory.mktemp("clips"), num_train=12, num_test=4)[0]


def start(clips: list[Path], out: Path, *options: object, before: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", f"{before}\nfrom cavmae_fast.cli import main; main()", "pretrain", "--data", *clips]
    command += ["--out", out, "--batch-size", 4, "--device", "cpu", "--dtype", "float32", *options]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(run: subprocess.Popen) -> tuple[int, str]:
    out, err = run.communicate(timeout=300)
    return run.returncode, out + err


def steps_of(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in TRAINED) for row in rows if "learning_rate" in row]


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    code, text = finish(start(clips, out, "--steps", STEPS))
    assert code == 0, text
    assert len(steps_of(out)) == STEPS
    return out


@pytest.mark.slow
def test_killed_again_and_again(clips, undisturbed, tmp_path):
    """At every kind of moment, in one folder; what is left in the end is, bit for bit, the undisturbed run."""
    options = ("--steps", STEPS, "--save-every", 2)
    for when, patch in DEATHS.items():
        code, text = finish(start(clips, tmp_path, *options, before=DIE + patch))
        assert code == -signal.SIGKILL, f"{when}: {text}"
        assert not (tmp_path / "summary.json").exists()
        read_newest(tmp_path / "checkpoints")  # never an unreadable one
    code, text = finish(start(clips, tmp_path, *options))
    assert code == 0, text
    assert steps_of(tmp_path) == steps_of(undisturbed)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, undisturbed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [step for step, _ in checkpoints(tmp_path / "checkpoints")] == [10, STEPS]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_asked_to_leave(clips, undisturbed, tmp_path, number):
    """A checkpoint and exit code 75; a longer way to go than the test has time for. Nothing else may write there before."""
    run = start(clips, tmp_path, "--steps", 100_000)
    for _ in range(600):
        if (tmp_path / "metrics.jsonl").exists() and len((tmp_path / "metrics.jsonl").read_text().splitlines()) > 2:
            break
        assert run.poll() is None, finish(run)[1]
        time.sleep(0.1)
    code, text = finish(start(clips, tmp_path, "--steps", 100_000, "--overwrite"))
    assert code == 1 and f"{tmp_path} is in use by process {run.pid} on" in text and "Traceback" not in text
    run.send_signal(number)
    code, text = finish(run)
    assert code == 75 and f"{number.name}: left after step" in text and "Traceback" not in text
    ((step, _),) = checkpoints(tmp_path / "checkpoints")
    rows = steps_of(tmp_path)
    assert [row[0] for row in rows] == list(range(1, step + 1))
    assert rows[:STEPS] == steps_of(undisturbed)[: len(rows)]


def test_another_run_in_the_same_folder(clips, tmp_path):
    assert finish(start(clips, tmp_path, "--steps", 2))[0] == 0
    code, text = finish(start(clips, tmp_path, "--steps", 2))
    assert code == 2 and "holds a finished run; name another folder, or add --overwrite" in text
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for bad, code in ((("--init", "not/there"), 1), (("--mask-ratio", 0), 2)):
        assert finish(start(clips, tmp_path, "--steps", 2, "--overwrite", *bad))[0] == code
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "summary.json").unlink()
    code, text = finish(start(clips, tmp_path, "--steps", 3, "--mask-ratio", 0.6))
    assert code == 2 and "mask_ratio 0.5 then, 0.6 now, steps 2 then, 3 now" in text
    code, text = finish(start(clips, tmp_path, "--steps", 3, "--overwrite"))
    assert code == 0 and len(steps_of(tmp_path)) == 3, text


def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch):
    """The old checkpoint stays, the run is told, and a later write makes up for it."""
    said = []
    writer = CheckpointWriter(tmp_path, keep=1, report=said.append)
    writer.save(1, {"x": torch.arange(3)})
    writer.wait()
    save = torch.save

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    writer.save(2, {"x": torch.arange(4)})
    writer.wait()
    assert len(said) == 1 and "step-00000002.pt could not be written" in said[0] and "No space left" in said[0]
    assert [step for step, _ in checkpoints(tmp_path)] == [1] and not list(tmp_path.glob(".*"))
    with pytest.raises(SaveError, match="No space left"):
        writer.close()
    monkeypatch.setattr(checkpoint.torch, "save", save)
    writer.save(3, {"x": torch.arange(5)})
    writer.close()
    assert [step for step, _ in checkpoints(tmp_path)] == [3]
    assert torch.equal(read_newest(tmp_path)["x"], torch.arange(5))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2, report=pytest.fail)
    for step in (1, 2, 3):
        writer.save(step, {"step": step})
    writer.close()
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    (tmp_path / "step-00000003.pt").write_bytes(b"damaged")
    assert read_newest(tmp_path) == {"step": 2}
    (tmp_path / "step-00000002.pt").write_bytes(b"")
    with pytest.raises(SaveError, match=r"none of the 2 checkpoints can be read; the newest is .*step-00000003\.pt"):
        read_newest(tmp_path)


def test_training_goes_on_while_a_checkpoint_is_written():
    """What is written is a copy: a step that follows at once does not reach it."""
    x = torch.zeros(3)
    copied = host_copy({"a": [x, (x, "text")], "b": 1})
    x.add_(1)
    assert not copied["a"][0].any() and not copied["a"][1][0].any()
    assert copied["a"][1][1] == "text" and copied["b"] == 1
