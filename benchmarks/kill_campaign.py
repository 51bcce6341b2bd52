"""Kills training runs at random moments and compares what they become with a run that nobody disturbed, bit for bit.

    python benchmarks/kill_campaign.py --kills 100

A run is started, killed (SIGKILL) and started again with the same command, some times in a row, and then left to its end.
Its losses and final weights must be those of the undisturbed run, and no start may fail. Moments: within the first second,
at random in what a run takes, and while a checkpoint is being written. With two ranks, one of them or all are killed. The
short form of this, in the tests, is tests/test_resume.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import BenchmarkError, provenance, table, write_json
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.media.synthetic_lists import write_lists
from cavmae_fast.models import CAVMAE, PRESETS
from cavmae_fast.training.metrics import read_rows

ROOT = Path(__file__).resolve().parents[1]
KILLS_PER_RUN = 6
MOMENTS = ("first second", "anywhere", "in a save")
ENDING_SECONDS = 60
"In which the ranks that were left must have ended, too."


@dataclass
class Job:
    """A command whose runs are killed.

    Attributes:
        name: command and ranks.
        command: without `--out`.
        loss_keys: of a row, those that must be equal.
        weights: the final weights, in the run's folder.
        seconds: that the undisturbed run took.
        wanted: its losses.
        wanted_weights: its final weights.
    """

    name: str
    command: list[str]
    weights: str
    seconds: float = 0.0
    wanted: list[tuple] = field(default_factory=list)
    wanted_weights: dict[str, torch.Tensor] = field(default_factory=dict)


def launcher(ranks: int) -> list[str]:
    """The program, in one process or in as many as there are ranks."""
    if ranks == 1:
        return [sys.executable, "-m", "cavmae_fast"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, "-m", "cavmae_fast"]


def start(job: Job, out: Path) -> subprocess.Popen:
    """Starts the job in a process group of its own; what it prints goes to a file beside its folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*job.command, "--out", str(out)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def descendants(process: int) -> list[int]:
    """The processes that `process` and its own started and that are alive. (torchrun gives each rank a group of its own.)"""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    found = [process]
    for one in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def kill(process: subprocess.Popen, one: bool, draw: random.Random) -> None:
    """SIGKILL to all of a command's processes, or to one that it started, whose end must then end the rest."""
    started = descendants(process.pid)
    if one and started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(started), signal.SIGKILL)
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"the other ranks had not ended {ENDING_SECONDS} s after one was killed") from error
        finally:
            started += descendants(process.pid)
    for number in [process.pid, *started]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def wait_for_moment(process: subprocess.Popen, moment: str, out: Path, seconds: float, draw: random.Random) -> bool:
    """Until the moment has come. False when the process ended before."""
    deadline = time.monotonic() + draw.uniform(0, 1 if moment == "first second" else seconds)
    if moment == "in a save":
        deadline = time.monotonic() + 2 * seconds
        skipped = draw.randrange(3)
        while process.poll() is None and time.monotonic() < deadline:
            if any(out.glob("checkpoints/.*")):
                if skipped == 0:
                    time.sleep(draw.uniform(0, 0.01))
                    break
                skipped -= 1
                time.sleep(0.1)
            time.sleep(0.0005)
    while process.poll() is None and moment != "in a save" and time.monotonic() < deadline:
        time.sleep(0.002)
    return process.poll() is None


def losses(out: Path) -> list[tuple]:
    """Each step's numbers that follow from the options alone."""
    names = ("step", "epoch", "loss", "learning_rate")
    return [tuple(row[name] for name in names) for row in read_rows(out / "metrics.jsonl") if "learning_rate" in row]


def reason(out: Path) -> str:
    return out.with_suffix(".log").read_text(errors="replace")[-2000:]


def undisturbed(job: Job, out: Path) -> None:
    """Runs the job once to its end and notes what came of it."""
    begin = time.monotonic()
    if start(job, out).wait() != 0:
        raise BenchmarkError(f"{job.name} fails when nobody disturbs it: {reason(out)}")
    job.seconds = time.monotonic() - begin
    job.wanted, job.wanted_weights = losses(out), load_file(out / job.weights)


def campaign(job: Job, out: Path, kills: int, draw: random.Random, several: bool) -> dict[str, Any]:
    """Kills one run `kills` times, lets it end, and compares."""
    done: Counter[str] = Counter()
    for number in range(kills):
        if (out / "summary.json").exists():
            break  # it was killed when all was done, or got there before
        moment = MOMENTS[(number + draw.randrange(3)) % 3]
        process = start(job, out)
        if not wait_for_moment(process, moment, out, job.seconds, draw):
            if process.returncode != 0:
                raise BenchmarkError(f"{job.name} failed when it was started again: {reason(out)}")
            continue
        one = several and draw.random() < 0.5
        kill(process, one, draw)
        done[moment + (", one rank" if one else "")] += 1
    if not (out / "summary.json").exists():
        process = start(job, out)
        if process.wait() != 0:
            raise BenchmarkError(f"{job.name} failed when it was started again: {reason(out)}")
    got = load_file(out / job.weights)
    same_losses = losses(out) == job.wanted
    same_weights = got.keys() == job.wanted_weights.keys() and all(
        torch.equal(got[name], job.wanted_weights[name]) for name in got
    )
    return {"kills": dict(done), "losses_equal": same_losses, "weights_equal": same_weights}


def jobs(folder: Path, steps: int) -> list[Job]:
    """Pretraining and fine-tuning of the small model, with one rank and with two, saving every third step."""
    generate_clips(folder / "clips", num_train=24, num_test=8)
    lists = write_lists(folder / "clips", folder / "lists")
    common = ["--data", str(lists.train), "--eval-data", str(lists.test), "--steps", str(steps), "--save-every", "3"]
    common += ["--batch-size", "4", "--device", "cpu", "--dtype", "float32"]
    model = CAVMAE(**PRESETS["small"].model).save_pretrained(folder / "model")
    tuning = ["--init", str(model), "--labels", str(lists.labels), "--recipe", "small", "--average-epochs", "3", "4"]
    return [
        Job(f"{name}, {ranks} rank{'s' * (ranks > 1)}", [*launcher(ranks), name, *options], "model/model.safetensors")
        for name, options in (("pretrain", common), ("finetune", [*common, *tuning]))
        for ranks in (1, 2)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of all jobs together")
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="the jobs whose names contain this")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill-campaign.json")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    records: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [job for job in jobs(folder, options.steps) if options.only in job.name]
        per_job = -(-options.kills // len(chosen))
        for job in chosen:
            undisturbed(job, folder / "whole")
            shutil.rmtree(folder / "whole")
            records[job.name] = []
            killed = 0
            while killed < per_job:
                out = folder / "run"
                record = campaign(job, out, min(KILLS_PER_RUN, per_job - killed), draw, "2 ranks" in job.name)
                records[job.name].append(record)
                killed += max(1, sum(record["kills"].values()))
                print(f"{job.name}: {killed} of {per_job} kills, {record}", flush=True)
                shutil.rmtree(out)
                out.with_suffix(".log").unlink()
                write_json(
                    options.out, {**provenance(torch.device("cpu"), sys.argv), "steps": options.steps, "jobs": records}
                )
    rows = []
    for name, runs in records.items():
        kills = sum((Counter(run["kills"]) for run in runs), Counter())
        equal = sum(run["losses_equal"] and run["weights_equal"] for run in runs)
        rows.append([name, str(sum(kills.values())), f"{equal} of {len(runs)}"])
    print(table(["job", "kills", "runs equal to the undisturbed one"], rows))
    return 0 if all(run["losses_equal"] and run["weights_equal"] for runs in records.values() for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
