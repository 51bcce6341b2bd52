"""`prepare`: killed at any moment it ends with the same bytes; nothing lost, nothing doubled, memory flat, errors clear."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from media_sets import write_labels, write_published

from cavmae_fast.data.commands import encoding, folder
from cavmae_fast.data.commands import prepare as module
from cavmae_fast.data.commands.encoding import EncodeClip
from cavmae_fast.data.commands.folder import OutputFolder, Part, PrepareError
from cavmae_fast.data.commands.prepare import PrepareConfig, prepare
from cavmae_fast.data.media.encoded import decode_image, decode_sound, encode_image
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.shards import ShardSet
from cavmae_fast.data.sets.sources import Source, find_sources

SCRIPT = """
import json, sys
from pathlib import Path
from cavmae_fast.data.commands.prepare import PrepareConfig, prepare
options = json.loads(sys.argv[1])
prepare(PrepareConfig(src=tuple(options.pop("src")), out=Path(options.pop("out")), **options))
"""
OPTIONS = {"size": 32, "shard_clips": 4, "workers": 2}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    return generate_clips(tmp_path_factory.mktemp("clips"), num_train=22, num_test=0, seconds=0.5, size=32)[0]


@pytest.fixture(scope="module")
def mixed(videos, tmp_path_factory) -> Path:
    """A folder of good and bad files: a whole shard of bad ones, and a name that is no text."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, path in enumerate(videos):
        shutil.copy(path, folder / f"{number:02d}.mp4")
    for number in range(7):
        (folder / f"08{number}.mp4").write_bytes(b"x" * number)
    shutil.copy(videos[0], os.fsencode(folder) + b"/12\xff.mp4")
    return folder


@pytest.fixture(scope="module")
def undisturbed(mixed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    manifest = prepare(PrepareConfig(src=(str(mixed),), out=out, **OPTIONS))
    assert (manifest["listed"], manifest["clips"], manifest["rejects"]) == (30, 23, 7)
    return out


def run(options: dict, **kwargs) -> subprocess.Popen:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    command = [sys.executable, "-c", SCRIPT, json.dumps({**OPTIONS, **options})]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **kwargs)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def rejects(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_clips_and_rejects_are_the_files(mixed, undisturbed):
    data, rejected = ShardSet(undisturbed), rejects(undisturbed)
    assert sorted([*data.index["key"].tolist(), *(r["key"] for r in rejected)]) == list(range(30))
    assert [r["source"] for r in rejected] == [f"{mixed}/08{number}.mp4" for number in range(7)]
    assert all(r["source"] in r["reason"] for r in rejected) and "empty" in rejected[0]["reason"]
    assert "12\udcff" in {meta["id"] for meta in data.clips()}
    names = {path.name for path in undisturbed.iterdir()}
    ends = [f"shard-{n:06d}.{end}" for n in range(8) for end in ("tar", "idx", "json")]
    ends = [name for name in ends if name not in ("shard-000003.tar", "shard-000003.idx")]  # it has no clip
    assert names == {*ends, "index.npy", "manifest.json", "rejects.jsonl", "prepare.json", ".lock"}


def test_clips_are_what_the_file_holds(videos, tmp_path):
    prepare(PrepareConfig(src=(str(videos[3]),), out=tmp_path, size=48, quality=95, frames=4, seconds=0.25, workers=1))
    data = ShardSet(tmp_path)
    clip = read_clip(videos[3], num_frames=4, size=48, seconds=0.25)
    for frame in range(4):
        meta, encoded = data[0].read(frame)
        assert encoded.image == encode_image(clip.frames[frame], 95)
        np.testing.assert_array_equal(decode_sound(encoded.sound, ""), clip.waveform)
    assert meta["id"] == videos[3].stem and meta["samples"] == 4000 and meta["duration"] == 0.25
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        members = {name.partition(".")[2]: tar.extractfile(name).read() for name in tar.getnames()}
    content = members["flac"] + b"".join(members[f"{k}.jpg"] for k in range(4))
    assert meta["hash"] == hashlib.sha256(content).hexdigest()


def test_any_number_of_workers_gives_the_same_bytes(mixed, undisturbed, tmp_path):
    prepare(PrepareConfig(src=(str(mixed),), out=tmp_path / "out", **{**OPTIONS, "workers": 3}))
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_reasons_are_the_same_in_every_run(mixed, tmp_path):
    """Objects' addresses in a message would make every run's records differ."""
    (tmp_path / "frame_0").mkdir()
    for name, image, sound in (("a", b"x" * 100, b"RIFF"), ("b", b"x", b"y" * 99)):
        (tmp_path / "frame_0" / f"{name}.jpg").write_bytes(image)
        (tmp_path / f"{name}.wav").write_bytes(sound)
    encode = EncodeClip(2, 32, 1.0, 90, None)
    found = [encode((0, Source(name, frames=str(tmp_path), sound=f"{tmp_path}/{name}.wav"))) for name in "ab"]
    found += [encode((0, Source(path.stem, video=str(path)))) for path in sorted(mixed.glob("08?.mp4"))]
    assert all(isinstance(reason, str) and " 0x" not in reason for reason in found)


def kill_at(process: subprocess.Popen, out: Path, shards: int, seconds: float) -> None:
    """Kills `seconds` after so many shards are finished: by progress, for how fast a machine is changes."""
    while process.poll() is None and len(list(out.glob("shard-*.tar"))) < shards:
        time.sleep(0.001)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.communicate()


def finished_shards_are_whole(out: Path, undisturbed: Path) -> None:
    for tar in out.glob("shard-*.tar"):
        assert tar.read_bytes() == (undisturbed / tar.name).read_bytes()


def test_killed_at_any_moment(mixed, undisturbed, tmp_path):
    rng, out, killed = random.Random(0), tmp_path / "out", 0
    options = {"src": [str(mixed)], "out": str(out)}
    total = len(list(undisturbed.glob("shard-*.tar")))
    assert total >= 5
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        for shards in sorted(rng.sample(range(total), 4)):
            process = run(options)
            kill_at(process, out, shards, rng.uniform(0, 0.05))
            killed += process.returncode == -signal.SIGKILL
            if out.exists():
                finished_shards_are_whole(out, undisturbed)
        assert run(options).wait() == 0
        assert digests(out) == digests(undisturbed)
    assert killed >= 6  # a run may have ended before: the last shards come fast


@pytest.mark.parametrize("point", ["tar", "record", "index", "manifest"])
def test_killed_at_every_rename(mixed, undisturbed, tmp_path, point):
    """Dies right before and right after each kind of file gets its name."""
    names = {"tar": "shard-000002.tar", "record": "shard-000004.json", "index": "index.npy", "manifest": "manifest.json"}
    for before in (True, False):
        out = tmp_path / f"{before}"
        replace = "os.kill(os.getpid(), 9); old(self, to)" if before else "old(self, to); os.kill(os.getpid(), 9)"
        trap = (
            "import os, pathlib\nold = pathlib.Path.replace\ndef new(self, to):\n"
            f"    if pathlib.Path(to).name == {names[point]!r}: {replace}\n"
            "    return old(self, to)\npathlib.Path.replace = new\n"
        )
        options = json.dumps({**OPTIONS, "src": [str(mixed)], "out": str(out)})
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        died = subprocess.run([sys.executable, "-c", trap + SCRIPT, options], env=environment, stderr=subprocess.DEVNULL)
        assert died.returncode == -signal.SIGKILL and (out / names[point]).exists() != before
        finished_shards_are_whole(out, undisturbed)
        prepare(PrepareConfig(src=(str(mixed),), out=out, **OPTIONS))
        assert digests(out) == digests(undisturbed)


def test_killed_workers_cost_nothing(mixed, undisturbed, tmp_path):
    process = run({"src": [str(mixed)], "out": str(tmp_path / "out")})
    killed: set[int] = set()
    while process.poll() is None and len(killed) < 2:
        for pid in children(process.pid):
            if pid not in killed and "progress" in _mapped(pid) and len(killed) < 2:
                time.sleep(0.1)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)
    said = process.communicate()[1]
    assert process.returncode == 0 and len(killed) == 2, said
    assert "killed by signal 9, SIGKILL" in said
    assert digests(tmp_path / "out") == digests(undisturbed)


def _mapped(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


class Deadly(EncodeClip):
    """Two of the clips kill the process that decodes them, one hangs."""

    def __call__(self, item):
        if item[0] in (5, 6):
            os.kill(os.getpid(), signal.SIGSEGV)
        if item[0] == 20:
            time.sleep(60)
        return super().__call__(item)


def test_clips_that_kill_or_hang_are_named(mixed, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "EncodeClip", Deadly)
    sources = find_sources([mixed])
    manifest = prepare(PrepareConfig(src=(str(mixed),), out=tmp_path / "out", timeout=2.0, **OPTIONS))
    found = {r["key"]: r["reason"] for r in rejects(tmp_path / "out")}
    assert manifest["clips"] == 20 and manifest["rejects"] == len(found) == 10
    assert all(found[key].endswith("its worker process died (killed by signal 11, SIGSEGV)") for key in (5, 6))
    assert found[20] == f"{sources[20]}: it took longer than 2 s"
    assert capfd.readouterr().err.count("it is tried once more") >= 2


def test_repeated_when_finished(mixed, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    before = (tmp_path / "out" / "shard-000000.tar").stat().st_ino
    prepare(PrepareConfig(src=(str(mixed),), out=tmp_path / "out", **OPTIONS))
    assert digests(tmp_path / "out") == digests(undisturbed)
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_ino == before


@pytest.mark.parametrize("lost", ["shard-000005.tar", "shard-000003.json", "index.npy", "rejects.jsonl", "manifest.json"])
def test_what_is_lost_is_made_again(mixed, undisturbed, tmp_path, lost):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / lost).unlink()
    (out / ".shard-000003.tar.part").write_bytes(b"half")
    prepare(PrepareConfig(src=(str(mixed),), out=out, **OPTIONS))
    assert digests(out) == digests(undisturbed)


@pytest.mark.parametrize(
    "option, value",
    [
        ("frames", -1),
        ("frames", 1001),
        ("size", 0),
        ("size", 4097),
        ("seconds", 0.02),
        ("seconds", float("nan")),
        ("seconds", 3601.0),
        ("quality", 0),
        ("quality", 96),
        ("shard_clips", 0),
        ("shard_clips", 10**6 + 1),
        ("workers", 0),
        ("workers", -1),
        ("timeout", 0.0),
        ("timeout", float("inf")),
    ],
)
def test_options_out_of_range(tmp_path, option, value):
    with pytest.raises(ValueError, match=rf"--{option.replace('_', '-')} is {value}; it must be in"):
        prepare(PrepareConfig(src=("/no/such",), out=tmp_path / "out", **{option: value}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"size": 33}, {"quality": 80}, {"frames": 9}, {"seconds": 2.0}, {"shard_clips": 5}, {"src": ()}, {"labels": True}],
)
def test_another_list_or_other_settings(mixed, videos, undisturbed, tmp_path, change):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    options = {"src": (str(mixed),), **OPTIONS, **change}
    if "src" in change:
        options["src"] = tuple(map(str, videos))
    if "labels" in change:
        options["labels"] = write_labels(tmp_path / "labels.csv")
    name = {"src": "list", "labels": "labels"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(ValueError, match=rf"--out {re.escape(str(out))} was begun from another list .*{name}"):
        prepare(PrepareConfig(out=out, **options))
    assert digests(out) == digests(undisturbed)


def test_shards_of_somebody_else(videos, tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds shards without prepare.json"):
        prepare(PrepareConfig(src=(str(videos[0]),), out=tmp_path, **OPTIONS))
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"mine"


def test_two_at_once(videos, tmp_path):
    with (
        OutputFolder(tmp_path, Part(1, 1), {}),
        pytest.raises(PrepareError, match=rf"{re.escape(str(tmp_path))}: another `cavmae-fast prepare` is at work on it"),
    ):
        prepare(PrepareConfig(src=(str(videos[0]),), out=tmp_path, **OPTIONS))
    (tmp_path / "prepare.json").unlink()
    assert prepare(PrepareConfig(src=(str(videos[0]),), out=tmp_path, **OPTIONS))["clips"] == 1


def test_no_clip_can_be_used(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    with pytest.raises(MediaError, match=r"none of the 1 clips can be used; the first: .*a.mp4: not a readable media file"):
        prepare(PrepareConfig(src=(str(tmp_path),), out=tmp_path / "out", **OPTIONS))
    assert len(rejects(tmp_path / "out")) == 1


def test_published_layout_is_kept_byte_for_byte(videos, tmp_path):
    lst = write_published(tmp_path / "p", videos[:5], size=40, num_frames=6)
    (tmp_path / "p" / "frame_2" / f"{videos[1].stem}.jpg").unlink()
    (tmp_path / "p" / "frame_4" / f"{videos[2].stem}.jpg").write_bytes(b"damaged")
    (tmp_path / "p" / "sound" / f"{videos[3].stem}.flac").unlink()
    labels = write_labels(tmp_path / "labels.csv")
    out = tmp_path / "out"
    manifest = prepare(PrepareConfig(src=(str(lst),), out=out, labels=labels, **OPTIONS))
    assert (manifest["clips"], manifest["rejects"], manifest["labels"]) == (3, 2, "labels.csv")
    assert (out / "labels.csv").read_text() == labels.read_text()
    data = ShardSet(out)
    assert data.index["key"].tolist() == [0, 1, 4]
    meta, encoded = data[0].read(3)
    assert encoded.image == (tmp_path / "p" / "frame_3" / f"{videos[0].stem}.jpg").read_bytes()
    assert data[1].read(2)[1].image == (tmp_path / "p" / "frame_1" / f"{videos[1].stem}.jpg").read_bytes()
    assert data[0].read(9)[1].image == (tmp_path / "p" / "frame_5" / f"{videos[0].stem}.jpg").read_bytes()
    assert meta["labels"] == ["/m/a", "/m/d"] and decode_image(encoded.image, 32, "").shape == (32, 32, 3)
    found = rejects(out)
    assert "frame_4" in found[0]["reason"] and f"{videos[3].stem}.flac: cannot be read" in found[1]["reason"]


def test_unknown_labels_are_left_out(videos, tmp_path):
    (tmp_path / "l.csv").write_text(f"{videos[0]},/m/a\n{videos[1]},/m/zzz\n{videos[2]},\n")
    labels = write_labels(tmp_path / "classes.csv")
    prepare(PrepareConfig(src=(str(tmp_path / "l.csv"),), out=tmp_path / "o", labels=labels, **OPTIONS))
    assert ShardSet(tmp_path / "o").index["key"].tolist() == [0, 2]
    assert "its labels /m/zzz are not in the CSV of the classes" in rejects(tmp_path / "o")[0]["reason"]


def test_names_never_become_paths(videos, tmp_path):
    names = ("../../evil", "/evil", "..", "a/b", "\0", "x" * 5000, "\ud800")
    rows = [{"video_id": name, "video": str(videos[0])} for name in names]
    (tmp_path / "l.json").write_text(json.dumps({"data": rows}))
    before = set(tmp_path.iterdir())
    prepare(PrepareConfig(src=(str(tmp_path / "l.json"),), out=tmp_path / "a" / "out", **OPTIONS))
    assert set(tmp_path.iterdir()) - before == {tmp_path / "a"} and [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    assert [meta["id"] for meta in ShardSet(tmp_path / "a" / "out").clips()] == [row["video_id"] for row in rows]
    with tarfile.open(tmp_path / "a" / "out" / "shard-000000.tar") as tar:
        assert all(re.fullmatch(r"\d{9}\.(json|flac|\d\.jpg)", name) for name in tar.getnames())


def test_a_clip_of_huge_files_is_left_out(tmp_path):
    frame = encode_image(np.zeros((32, 32, 3), np.uint8), 90) + bytes(30 << 20)
    (tmp_path / "frame_0").mkdir()
    (tmp_path / "frame_0" / "v.jpg").write_bytes(frame)
    result = EncodeClip(10, 32, 1.0, 90, None)((0, Source("v", frames=str(tmp_path), sound="/no/such")))
    assert re.fullmatch(r"/no/such: 3 frames take \d+ bytes; allowed: 67108864 for a clip", result)


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("odd"), "v.mp4: RuntimeError: odd"),
        (MemoryError(), "v.mp4: needs more than the 2048 MiB of memory"),
        (MediaError("v.mp4: damaged"), "v.mp4: damaged"),
        (struct.error("short"), "v.mp4: error: short"),
    ],
)
def test_whatever_a_library_raises_names_the_clip(monkeypatch, error, reason):
    def broken(*_: object, **__: object):
        raise error

    monkeypatch.setattr(encoding, "read_clip", broken)
    assert EncodeClip(2, 32, 1.0, 90, None)((0, Source("v", video="v.mp4"))).startswith(reason)


@pytest.mark.parametrize("limit", [60_000, 200_000])
def test_disk_full(videos, tmp_path, limit):
    """RLIMIT_FSIZE stands for the full disk: writes beyond it fail."""
    src, out = [str(videos[0].parent)], tmp_path / "out"
    whole = {"src": src, "out": str(tmp_path / "whole"), "shard_clips": 11, "size": 64}
    assert run(whole).wait() == 0
    expected = digests(tmp_path / "whole")
    small = min(path.stat().st_size for path in (tmp_path / "whole").glob("*.tar"))
    limit = min(limit, small - 5000)
    trap = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))\n"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    options = json.dumps({**OPTIONS, **whole, "out": str(out)})
    failed = subprocess.run([sys.executable, "-c", trap + SCRIPT, options], env=environment, capture_output=True, text=True)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert f"PrepareError: {out}: File too large; finished shards are whole; make room and start the same" in last
    assert not list(out.glob("*.tar")) and not list(out.glob(".*.part")) and not (out / "manifest.json").exists()
    assert run({**whole, "out": str(out)}).wait() == 0
    assert digests(out) == expected


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small disk")
def test_disk_really_full(mixed, undisturbed, tmp_path):
    size = sum(path.stat().st_size for path in undisturbed.iterdir()) >> 10
    disk = tmp_path / "disk"
    with small_disk(disk, size * 2 // 3):
        config = PrepareConfig(src=(str(mixed),), out=disk / "out", **OPTIONS)
        with pytest.raises(PrepareError, match="No space left on device; finished shards are whole"):
            prepare(config)
        assert 1 <= len(list((disk / "out").glob("shard-*.tar"))) < 8
        finished_shards_are_whole(disk / "out", undisturbed)
        with pytest.raises(PrepareError):
            prepare(config)
        subprocess.run(["mount", "-o", f"remount,size={4 * size}k", str(disk)], check=True)
        prepare(config)
        assert digests(disk / "out") == digests(undisturbed)
        shutil.rmtree(disk / "out")
    shutil.rmtree(disk)
    with small_disk(disk, 4), pytest.raises(PrepareError):
        (disk / "filler").write_bytes(bytes(4096))
        prepare(PrepareConfig(src=(str(mixed),), out=disk / "out", **OPTIONS))


def test_no_space_for_the_plan(videos, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder, "put_whole", full)
    with pytest.raises(PrepareError, match="No space left on device"):
        prepare(PrepareConfig(src=(str(videos[0]),), out=tmp_path, **OPTIONS))


def rss(pid: int) -> int:
    """MiB."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
    except (OSError, IndexError):
        return 0


@pytest.mark.slow
def test_memory_is_flat(videos, tmp_path):
    """3,000 clips, a tenth of them bad: no process grows after the first fifth of the run."""
    rows = [str(path) for path in videos] * 140
    rows[::10] = ["/no/such.mp4"] * len(rows[::10])
    (tmp_path / "l.csv").write_text("\n".join(rows))
    process = run({"src": [str(tmp_path / "l.csv")], "out": str(tmp_path / "out"), "shard_clips": 100, "frames": 4})
    profile: list[tuple[int, int]] = []
    while process.poll() is None:
        profile.append((rss(process.pid), max(map(rss, children(process.pid)), default=0)))
        time.sleep(0.1)
    process.communicate()
    assert process.returncode == 0 and len(profile) > 20
    fifth = len(profile) // 5
    early, late = np.array(profile[fifth : 2 * fifth]), np.array(profile[-fifth:-2])
    assert (late.max(0) - early.max(0) <= [8, 12]).all(), profile[:: max(1, len(profile) // 20)]
    assert np.max(profile) < 400
