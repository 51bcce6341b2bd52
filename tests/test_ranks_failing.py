"""Ranks that fail, are killed, hang or are asked to leave: all end soon, together, and one sentence says why."""

# ruff: noqa: F811 (fixtures of another file)

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks_run import Run, started
from test_ranks import arguments, clips, rows, runs, train, unfinished, weights  # noqa: F401

from cavmae_fast.training.checkpoint import checkpoints

LIMIT = 30
"Seconds in which every rank has to end after one of them has failed."
AT_STEP_2 = """
import os, signal, time
from cavmae_fast.training.state import RunState
update = RunState.update
def trouble(self, *args):
    if self.step == 2 and os.environ["RANK"] == "1":
        print("TROUBLE", time.time(), flush=True)
        {trouble}
    return update(self, *args)
RunState.update = trouble
"""
FASTER = """
from cavmae_fast.training import watchdog
watchdog.SILENCE, watchdog.HURRY, watchdog.GRACE = 6, 3, 1
"""


def fail(clips: Path, folder: Path, before: str, count: int = 2, *options: object) -> Run:
    """A run in which something goes wrong, which has to end in time."""
    words = arguments(clips, folder / "run", *options)
    with started(count, folder / "logs", words, FASTER + before) as run:
        run.finish()
        ended = time.time()
    began = [float(line.split()[1]) for text in run.texts for line in text.splitlines() if line.startswith("TROUBLE")]
    assert began and ended - began[0] < LIMIT
    return run


def errors(run: Run) -> list[str]:
    """What the ranks show of errors; no rank may show a traceback."""
    assert not any("Traceback" in text for text in run.texts), "\n".join(run.texts)
    return [line for text in run.texts for line in text.splitlines() if "error:" in line]


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["ddp", "shards"])
def test_a_rank_fails(clips, tmp_path, options):
    run = fail(clips, tmp_path, AT_STEP_2.format(trouble="raise OSError('the disk is on fire')"), 4, *options)
    (error,) = errors(run)
    assert error.startswith("cavmae-fast: error: rank 1 on ") and error.endswith(": the disk is on fire")
    assert error in run.texts[1] and run.codes == [1, 1, 1, 1]


def test_a_rank_is_killed(clips, tmp_path):
    run = fail(clips, tmp_path, AT_STEP_2.format(trouble="os.kill(os.getpid(), signal.SIGKILL)"), 4)
    (error,) = errors(run)
    assert "rank 1 on" in error and "no sign of life" in error and error in run.texts[0]
    assert run.codes == [1, -signal.SIGKILL, 1, 1]


def test_a_rank_stops_without_a_word(clips, tmp_path):
    """Its connections stay open, so that the others wait in a collective operation, as they do under NCCL."""
    words = arguments(clips, tmp_path / "run")
    trouble = AT_STEP_2.format(trouble="os.kill(os.getpid(), signal.SIGSTOP)")
    with started(2, tmp_path / "logs", words, FASTER + trouble) as run:
        run.ranks[0].join(90)
        text = run.texts[1]
        assert run.ranks[0].exitcode == 1
        assert time.time() - float(text.split("TROUBLE")[1].split()[0]) < LIMIT
        run.ranks[1].kill()
        run.finish()
    (error,) = errors(run)
    assert "rank 1 on" in error and "no sign of life for 6 s: it was killed or cannot be reached" in error


def test_a_rank_finds_no_clip_that_can_be_used(clips, tmp_path):
    trouble = """
import os, time
from cavmae_fast.data.decode import decoder
if os.environ["RANK"] == "1":
    print("TROUBLE", time.time(), flush=True)
    decoder.read_into = lambda reader, record, *_: f"{record}: damaged"
"""
    run = fail(clips, tmp_path, trouble)
    (error,) = errors(run)
    assert "rank 1 on" in error and "20 clips in a row cannot be used; the first:" in error and error in run.texts[1]
    assert len(set(run.codes)) == 1 and run.codes[0] in (1, 2)
    named = [json.loads(line)["path"] for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert 1 <= len(named) == len(set(named)) <= 20


def test_a_fault_of_the_program_shows_where_it_is(clips, tmp_path):
    run = fail(clips, tmp_path, AT_STEP_2.format(trouble="None.step"))
    assert "Traceback" not in run.texts[0] and "error" not in run.texts[0]
    assert "AttributeError: 'NoneType' object has no attribute 'step'" in run.texts[1]
    assert run.codes == [1, 1]


def test_a_batch_that_the_ranks_cannot_share(clips, tmp_path):
    with started(3, tmp_path / "logs", arguments(clips, tmp_path / "run")) as run:
        run.finish()
    (error,) = errors(run)
    assert "--batch-size is 8" in error and "on 3 processes" in error and "it must be a multiple of 3" in error
    assert run.codes == [2, 2, 2]
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["ddp", "shards"])
def test_one_rank_is_asked_to_leave(clips, runs, tmp_path, options):
    """All save after the same step and leave with code 75; gone on with, the run is the undisturbed one, bit for bit."""
    out = unfinished(runs(2, *options), tmp_path / "run")
    before = AT_STEP_2.replace("== 2", "== 3").format(trouble="os.kill(os.getpid(), signal.SIGUSR1)")
    with started(2, tmp_path / "logs", arguments(clips, out, *options), before) as run:
        run.finish()
    (error,) = errors(run)
    assert run.codes == [75, 75] and "SIGUSR1: left after step 5, which is saved" in error
    assert [step for step, _ in checkpoints(out / "checkpoints")] == [3, 5]
    assert "going on after step 5" in train(clips, out, 2, *options)
    assert_equal(out, runs(2, *options))


def assert_equal(out: Path, want: Path) -> None:
    """Two runs are the same, bit for bit."""
    timed = ("seconds", "clips_per_s", "data_wait", "product_share", "memory")
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows(out)] == [
        {k: v for k, v in row.items() if k not in timed} for row in rows(want)
    ]
    got, want = weights(out), weights(want)
    assert got.keys() == want.keys() and all(got[name].equal(weight) for name, weight in want.items())


ELASTIC = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from ranks_run import shrink
from cavmae_fast.cli import main
from cavmae_fast.training.state import RunState
update = RunState.update
def die_once(self, *args):
    if self.step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *args)
RunState.update = die_once
shrink()
main()
"""


@pytest.mark.slow
def test_torchrun_starts_a_run_again(clips, runs, tmp_path):
    """A rank is killed, torchrun restarts all, and they go on from the newest checkpoint."""
    program, out = tmp_path / "job.py", tmp_path / "run"
    program.write_text(ELASTIC.format(tests=str(Path(__file__).parent)))
    run = ["torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 1, "--standalone", program]
    command = [sys.executable, "-m", *map(str, run), *map(str, arguments(clips, out))]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "going on after step 3" in done.stdout + done.stderr
    assert_equal(out, runs(2))
