"""Two hosts, each a network namespace with one process of torchrun in it; and a link between them that is cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_ranks import arguments, assert_same_training, clips, runs  # noqa: F401

# ruff: noqa: F811 (fixtures of another file)
from cavmae_fast.training.checkpoint import read_newest

LIMIT = 30
"Seconds in which both ends have to end after the link was cut."
JOB = """
import os, socket, sys, time
sys.path.insert(0, {tests!r})
from ranks_run import shrink
from cavmae_fast.cli import main
from cavmae_fast.training.state import RunState
socket.gethostname = lambda: "host" + os.environ["GROUP_RANK"]
update = RunState.update
def slowly(self, *args):
    time.sleep({seconds})
    return update(self, *args)
RunState.update = slowly
shrink()
main()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces with addresses 10.99.0.1 and 10.99.0.2, joined by a cable whose ends are called `cable`."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip")
    names = [f"cavmae-{uuid.uuid4().hex[:8]}-{number}" for number in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.99.0.{number + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(hosts: list[str], folder: Path, words: list[object], seconds: float) -> list[subprocess.Popen]:
    """torchrun on both hosts; what each says goes into `host<number>.log`."""
    job = folder / "job.py"
    job.write_text(JOB.format(tests=str(Path(__file__).parent), seconds=seconds))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"GLOO_SOCKET_IFNAME": "cable"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 0]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.99.0.1:29400", "--rdzv-id", "cavmae"]
    started = []
    for number, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host, *torchrun, "--local-addr", f"10.99.0.{number + 1}"]
        command += ["--rdzv-conf", f"is_host={1 - number}", job, *words]
        with (folder / f"host{number}.log").open("w") as log:
            command = [str(word) for word in command]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
    return started


def kill(started: list[subprocess.Popen]) -> None:
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


@pytest.mark.slow
def test_two_hosts_train_as_one(clips, runs, hosts, tmp_path):
    started = start(hosts, tmp_path, arguments(clips, tmp_path / "run"), 0)
    try:
        codes = [process.wait(200) for process in started]
    finally:
        kill(started)
    assert codes == [0, 0], "".join(log.read_text() for log in sorted(tmp_path.glob("*.log")))
    assert_same_training(tmp_path / "run", runs(1))


@pytest.mark.slow
def test_a_link_that_is_cut(clips, hosts, tmp_path):
    """Both processes end in time and say in one sentence why; what was saved is whole."""
    started = start(hosts, tmp_path, [*arguments(clips, tmp_path / "run"), "--save-every", 1, "--steps", 10_000], 0.3)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        end = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            assert time.monotonic() < end and all(process.poll() is None for process in started)
            time.sleep(0.2)
        ip("-n", hosts[0], "link", "set", "cable", "down")
        cut = time.monotonic()
        said: dict[int, float] = {}
        while len(said) < 2 and time.monotonic() < cut + LIMIT + 5:
            for number in set(range(2)) - said.keys():
                if "cavmae-fast: error:" in (tmp_path / f"host{number}.log").read_text():
                    said[number] = time.monotonic() - cut
            time.sleep(0.2)
        time.sleep(7)
        texts = [(tmp_path / f"host{number}.log").read_text() for number in range(2)]
        assert len(said) == 2 and max(said.values()) < LIMIT, texts
        assert "rank 1 on host1: no sign of life for" in texts[0] and "the other ranks could not be reached" in texts[1]
        assert read_newest(tmp_path / "run" / "checkpoints")["step"] >= 3
    finally:
        kill(started)
