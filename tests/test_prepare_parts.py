"""`prepare --part I/N`: calls that share a folder, in any order, at once, killed or with other settings, give byte for byte
the folder of one call without `--part`."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import OPTIONS, SCRIPT, digests, finished_shards_are_whole, kill_at, mixed, run, undisturbed, videos

from cavmae_fast.data.commands import folder as module
from cavmae_fast.data.commands.check import CheckConfig, check
from cavmae_fast.data.commands.folder import OutputFolder, Part, PrepareError
from cavmae_fast.data.commands.prepare import PrepareConfig, Unfinished, prepare
from cavmae_fast.data.loader import Loader

__all__ = ["mixed", "undisturbed", "videos"]  # fixtures
SHARDS = 8  # of `mixed`


def config(mixed: Path, out: Path, part: str | None, **options) -> PrepareConfig:
    return PrepareConfig(src=(str(mixed),), out=out, part=part, **{**OPTIONS, **options})


def usable(out: Path) -> None:
    """`check` finds nothing wrong, and the loader gives every clip."""
    assert check(CheckConfig(data=(str(out),), out=out.parent / "report", workers=1))["ok"]
    with_ids = [batch.ids for batch in Loader(out, 8, workers=0, image_size=32, audio_length=32)]
    assert len(set(itertools.chain(*with_ids))) == 23


@pytest.mark.parametrize("count", [2, 3, 7, 11])
def test_parts_one_after_the_other(mixed, undisturbed, tmp_path, count):
    order = list(range(1, count + 1))
    random.Random(count).shuffle(order)
    left = set(range(SHARDS))
    for number in order:
        assert not (tmp_path / "out" / "manifest.json").exists()
        result = prepare(config(mixed, tmp_path / "out", f"{number}/{count}"))
        left -= set(range(number - 1, SHARDS, count))
        if not left:
            break
        assert isinstance(result, Unfinished) and set(result.missing) == left and result.total == SHARDS
        assert {part.number for part in result.parts} == {n % count + 1 for n in left}
        finished_shards_are_whole(tmp_path / "out", undisturbed)
    assert digests(tmp_path / "out") == digests(undisturbed)
    assert result == json.loads((undisturbed / "manifest.json").read_text())
    usable(tmp_path / "out")
    for number in order[-2:]:  # one that had nothing to do where there are more parts than shards; one that is repeated
        assert prepare(config(mixed, tmp_path / "out", f"{number}/{count}")) == result
    assert digests(tmp_path / "out") == digests(undisturbed)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_at_once(mixed, undisturbed, tmp_path, count):
    out = tmp_path / "out"
    options = {"src": [str(mixed)], "out": str(out), "workers": 1}
    processes = [run({**options, "part": f"{number}/{count}"}) for number in range(1, count + 1)]
    for process in processes:
        said = process.communicate()[1]
        assert process.returncode == 0, said
    assert digests(out) == digests(undisturbed)


def test_killed_parts_go_on(mixed, undisturbed, tmp_path):
    """Each of three parts is killed twice while the others are at work, and started again."""
    out, rng, killed = tmp_path / "out", random.Random(0), 0
    options = {"src": [str(mixed)], "out": str(out), "workers": 1}
    for shards in (0, 2):
        processes = [run({**options, "part": f"{number}/3"}) for number in (1, 2, 3)]
        for process in processes:
            kill_at(process, out, shards, rng.uniform(0, 0.05))
            killed += process.returncode == -signal.SIGKILL
        finished_shards_are_whole(out, undisturbed)
        assert not (out / "manifest.json").exists()
    processes = [run({**options, "part": f"{number}/3"}) for number in (1, 2, 3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert digests(out) == digests(undisturbed) and killed >= 4


@pytest.mark.parametrize("name", ["rejects.jsonl", "index.npy", "manifest.json"])
def test_killed_while_it_publishes(mixed, undisturbed, tmp_path, name):
    out = tmp_path / "out"
    prepare(config(mixed, out, "1/2"))
    trap = (
        "import os, pathlib\nold = pathlib.Path.replace\ndef new(self, to):\n"
        f"    if pathlib.Path(to).name == {name!r}: os.kill(os.getpid(), 9)\n"
        "    return old(self, to)\npathlib.Path.replace = new\n"
    )
    options = json.dumps({**OPTIONS, "src": [str(mixed)], "out": str(out), "part": "2/2"})
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    died = subprocess.run([sys.executable, "-c", trap + SCRIPT, options], env=environment, stderr=subprocess.DEVNULL)
    assert died.returncode == -signal.SIGKILL and list(out.glob(f".{name}.2-of-2.*.part"))
    shutil.copytree(out, tmp_path / "other")
    prepare(config(mixed, out, "2/2"))
    assert digests(out) == digests(undisturbed)
    prepare(config(mixed, tmp_path / "other", None))
    assert digests(tmp_path / "other") == digests(undisturbed)


def test_two_publish_at_once(mixed, undisturbed, tmp_path, monkeypatch):
    """While one part publishes, another finishes, too, and publishes all of it."""
    out = tmp_path / "out"
    prepare(config(mixed, out, "1/2"))
    put, other = module.put_whole, []

    def interrupted(path: Path, write, mark: str) -> None:
        def write_slowly(file) -> None:
            write(file)
            if path.name == "index.npy" and not other:
                other.append(run({"src": [str(mixed)], "out": str(out), "part": "1/2"}))
                assert other[0].wait() == 0
                assert digests(out).items() >= digests(undisturbed).items()

        put(path, write_slowly, mark)

    monkeypatch.setattr(module, "put_whole", interrupted)
    assert isinstance(prepare(config(mixed, out, "2/2")), dict) and other
    assert digests(out) == digests(undisturbed)


def test_without_part_completes(mixed, undisturbed, tmp_path):
    out = tmp_path / "out"
    prepare(config(mixed, out, "2/3"))
    before = (out / "shard-000001.tar").stat().st_ino
    (out / ".shard-000000.tar.1-of-3.0123abcd.part").write_bytes(b"what a killed part left")
    (out / ".index.npy.3-of-3.0123abcd.part").write_bytes(b"what a killed part left")
    prepare(config(mixed, out, None))
    assert digests(out) == digests(undisturbed) and (out / "shard-000001.tar").stat().st_ino == before


def test_parts_that_overlap(mixed, undisturbed, tmp_path):
    """Split anew while the old parts are at work: shards are made twice, and are the same."""
    options = {"src": [str(mixed)], "out": str(tmp_path / "out"), "workers": 1}
    processes = [run({**options, "part": part}) for part in ("1/2", "1/3", "2/3", "3/3")]
    said = [process.communicate()[1] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0 or "another call for the same shards removed" in text, text
    assert digests(tmp_path / "out").items() >= digests(undisturbed).items()
    prepare(config(mixed, tmp_path / "out", None))
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_a_part_with_other_settings(mixed, undisturbed, tmp_path):
    out = tmp_path / "out"
    prepare(config(mixed, out, "1/2"))
    before = digests(out)
    for options in ({"quality": 80}, {"shard_clips": 5}, {"seconds": 1.0}):
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=rf"from another list or with other settings \({name} .* {value} now\)"):
            prepare(config(mixed, out, "2/2", **options))
    (mixed / "new.mp4").write_bytes(b"")
    try:
        with pytest.raises(ValueError, match=r"\(clips 30 then, 31 now, list "):
            prepare(config(mixed, out, "2/2"))
    finally:
        (mixed / "new.mp4").unlink()
    assert {name: digest for name, digest in digests(out).items() if ".lock" not in name} == {
        name: digest for name, digest in before.items() if ".lock" not in name
    }
    prepare(config(mixed, out, "2/2"))
    assert digests(out) == digests(undisturbed)


def test_a_plan_that_is_replaced(mixed, tmp_path):
    """Two parts with different settings begin in the same moment: the one whose plan is lost publishes no shard."""
    out = tmp_path / "out"
    process = run({"src": [str(mixed)], "out": str(out), "part": "1/2", "workers": 1})
    while not (out / "prepare.json").exists() and process.poll() is None:
        pass
    plan = json.loads((out / "prepare.json").read_text())
    (out / "prepare.json").write_text(json.dumps({**plan, "quality": 80}))
    said = process.communicate()[1]
    assert process.returncode == 1 and "(quality 80 then, 90 now)" in said
    assert not list(out.glob("shard-*")) and not list(out.glob(".*.part"))


def test_a_part_already_at_work(tmp_path):
    with OutputFolder(tmp_path, Part(1, 3), {}):
        with pytest.raises(PrepareError, match="another `cavmae-fast prepare --part 1/3` is at work on it"):
            OutputFolder(tmp_path, Part(1, 3), {}).__enter__()
        with pytest.raises(PrepareError, match="another `cavmae-fast prepare` is at work on it"):
            OutputFolder(tmp_path, Part(1, 1), {}).__enter__()
        with OutputFolder(tmp_path, Part(2, 3), {}):
            pass
    with (
        OutputFolder(tmp_path, Part(1, 1), {}),
        pytest.raises(PrepareError, match="a `cavmae-fast prepare` without --part is at work on it"),
    ):
        OutputFolder(tmp_path, Part(1, 3), {}).__enter__()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(mixed, undisturbed, tmp_path, monkeypatch, capsys, code):
    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for number in (1, 2):
        prepare(config(mixed, tmp_path / "out", f"{number}/2"))
    assert f"{tmp_path / 'out'}: its file system has no locks ({os.strerror(code)})" in capsys.readouterr().err
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_other_errors_of_a_lock_are_errors(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        OutputFolder(tmp_path, Part(1, 3), {}).__enter__()


BAD = ["0/8", "9/8", "3", "3/", "/8", "3/0", "0/0", "-1/8", "3/8/2", " 3/8", "3/8 ", "a/b", "3 of 8", "", "1.0/2", "٣/٨"]


@pytest.mark.parametrize("text", BAD)
def test_bad_parts(tmp_path, text):
    with pytest.raises(ValueError, match=re.escape(f"--part is {text!r}; it must be I/N, part I of N, with I from 1 to N")):
        prepare(PrepareConfig(src=("/no/such",), out=tmp_path / "out", part=text))
    assert not (tmp_path / "out").exists()


def test_command_line(videos, tmp_path):
    def call(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", "from cavmae_fast.cli import main; main()", "prepare", str(videos[0].parent)]
        command += ["--out", str(tmp_path / "out"), "--size", "32", "--shard-clips", "4", "--workers", "1", *options]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    wrong = call("--part", "9/8")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("cavmae-fast: error: --part is '9/8'; it must be I/N, part I of N, with")
    first = call("--part", "1/3")
    assert first.returncode == 0 and "part 1/3: 100%" in first.stderr
    done, what_next = first.stdout.splitlines()
    assert done == "part 1/3 is done (2 shards), but 4 of all 6 shards are missing: --part 2/3, --part 3/3"
    assert what_next.startswith("next:  let these parts end, and the last one writes the index; or run the same command")
    prepare(config(videos[0].parent, tmp_path / "out", "3/3"))
    last = call("--part", "2/3")
    assert last.returncode == 0 and last.stdout.startswith("22 clips in 6 shards, ")
