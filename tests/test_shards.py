"""Shards: the same bytes for the same clips, an index that is right, and damage that is named, never read past."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.sets import shards
from cavmae_fast.data.sets.shards import (
    INDEX,
    MANIFEST,
    PreparedClip,
    ShardError,
    ShardSet,
    ShardWriter,
    finished,
    index_dtype,
    shard_name,
    to_json,
    write_whole,
)

FRAMES = 3


def clip(key: int, name: str | None = None) -> PreparedClip:
    rng = np.random.default_rng(key)
    sound, *images = (rng.bytes(int(size)) for size in (*rng.integers(1, 3000, FRAMES), 512))
    return PreparedClip(key, {"id": name or f"clip-{key}", "labels": ["/m/ä"]}, sound, images)


def write(folder: Path, number: int, keys: list[int], rejects: list[dict] | None = None) -> list[PreparedClip]:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, number)
    clips = [clip(key) for key in keys]
    for one in clips:
        writer.add(one)
    writer.finish(rejects or [])
    return clips


def publish(folder: Path, numbers: list[int], **changes: object) -> Path:
    """The index and the manifest of shards that `write` made."""
    rows, entries = [], []
    for number in numbers:
        record = json.loads((folder / f"{shard_name(number)}.json").read_text())
        rows += [(number, c["key"], c["offset"], c["size"], c["crc"]) for c in record["clips"]]
        entries.append({"number": number, "clips": len(record["clips"]), "bytes": record["bytes"]})
    np.save(folder / INDEX, np.array(rows, index_dtype(FRAMES)))
    manifest = {"version": 1, "listed": len(rows), "clips": len(rows), "frames": FRAMES, "shards": entries} | changes
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def made(tmp_path) -> tuple[Path, list[PreparedClip]]:
    clips = write(tmp_path / "s", 0, [0, 1, 2]) + write(tmp_path / "s", 1, [5, 6])
    return publish(tmp_path / "s", [0, 1]), clips


def test_what_was_written_is_read(made):
    folder, clips = made
    data = ShardSet(folder)
    assert len(data) == 5 and data.num_frames == FRAMES
    for number, expected in enumerate(clips):
        for frame in range(FRAMES):
            meta, encoded = data[number].read(frame)
            assert meta == expected.meta and encoded.sound == expected.sound and encoded.image == expected.images[frame]
    assert list(data.clips()) == [c.meta for c in clips]
    assert str(data[3]) == f"{folder}/shard-000001.tar: clip 000000005"


def test_webdataset_layout(made):
    folder, clips = made
    with tarfile.open(folder / "shard-000001.tar") as tar:
        members = tar.getmembers()
        names = [f"{key:09d}.{end}" for key in (5, 6) for end in ("json", "flac", "0.jpg", "1.jpg", "2.jpg")]
        assert [m.name for m in members] == names and all(m.isreg() and m.mtime == 0 for m in members)
        expected = [x for c in clips[3:] for x in (json.dumps(c.meta, ensure_ascii=False).encode(), c.sound, *c.images)]
        assert [tar.extractfile(m).read() for m in members] == expected
        places = [(m.offset_data, m.size) for m in members]
    lines = (folder / "shard-000001.idx").read_text().splitlines()
    assert lines[0] == "v1.2 2"
    words = [word for line in lines[1:] for word in line.split()]
    assert words[0::4] == ["json", "flac", "0.jpg", "1.jpg", "2.jpg"] * 2 and words[3::4] == names
    assert list(zip(map(int, words[1::4]), map(int, words[2::4]), strict=True)) == places


def test_same_clips_same_bytes(made, tmp_path):
    folder, _ = made
    write(tmp_path / "t", 1, [5, 6])
    for end in ("tar", "idx", "json"):
        assert (tmp_path / f"t/shard-000001.{end}").read_bytes() == (folder / f"shard-000001.{end}").read_bytes()


def test_nothing_has_its_name_before_it_is_whole(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, 4)
    writer.add(clip(1))
    assert [p.name for p in tmp_path.iterdir()] == [".shard-000004.tar.part"]
    order = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append(Path(to).name) or replace(self, to))
    writer.finish([])
    assert order == ["shard-000004.idx", "shard-000004.json", "shard-000004.tar"]
    writer = ShardWriter(tmp_path, 5)
    writer.add(clip(2))
    writer.abandon()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(order)


def test_a_shard_without_clips_is_a_record(tmp_path):
    write(tmp_path, 3, [], [{"key": 0, "reason": "r"}])
    assert [p.name for p in tmp_path.iterdir()] == ["shard-000003.json"]
    assert finished(tmp_path, 3)["rejects"] == [{"key": 0, "reason": "r"}]


@pytest.mark.parametrize("damage", ["no tar", "short tar", "no record", "half a record", "foreign record", "list"])
def test_finished_means_whole(tmp_path, damage):
    write(tmp_path, 0, [1, 2])
    assert finished(tmp_path, 0)["number"] == 0
    tar, record = tmp_path / "shard-000000.tar", tmp_path / "shard-000000.json"
    if damage == "no tar":
        tar.unlink()
    elif damage == "short tar":
        os.truncate(tar, 1024)
    elif damage == "no record":
        record.unlink()
    elif damage == "half a record":
        record.write_text(record.read_text()[:100])
    else:
        record.write_text({"foreign record": '{"clips": [1]}', "list": "[1]"}[damage])
    assert finished(tmp_path, 0) is None


@pytest.mark.parametrize("member, name", [(0, "json"), (1, "flac"), (2, "0.jpg"), (4, "2.jpg")])
def test_a_flipped_bit_is_named(made, member, name):
    folder, clips = made
    tar = folder / "shard-000000.tar"
    with tarfile.open(tar) as file:
        info = file.getmembers()[5 + member]
    data = bytearray(tar.read_bytes())
    data[info.offset_data + info.size - 1] ^= 4
    tar.write_bytes(data)
    data = ShardSet(folder)
    reads = {"0.jpg": [0], "2.jpg": [2]}.get(name, range(FRAMES))
    for frame in range(FRAMES):
        if frame in reads:
            with pytest.raises(MediaError, match=rf"shard-000000.tar: clip 000000001: 000000001.{name} is damaged"):
                data[1].read(frame)
        else:
            assert data[1].read(frame)[1].image == clips[1].images[frame]
    assert [data[n].read(0)[1].sound for n in (0, 2)] == [clips[0].sound, clips[2].sound]


@pytest.mark.parametrize("what", ["truncated", "longer", "missing", "folder"])
def test_a_shard_of_another_size(made, what):
    folder, _ = made
    opened = ShardSet(folder)
    tar = folder / "shard-000001.tar"
    size = tar.stat().st_size
    if what == "truncated":
        os.truncate(tar, 600)
    elif what == "longer":
        os.truncate(tar, size + 512)
    else:
        tar.unlink()
        if what == "folder":
            tar.mkdir()
    is_now = {"truncated": "has 600 bytes", "longer": f"has {size + 512} bytes"}.get(what, "is missing")
    with pytest.raises(ShardError, match=rf"shard-000001.tar: {is_now}; manifest.json says {size} bytes"):
        ShardSet(folder)
    if what != "longer":
        with pytest.raises(MediaError, match=r"shard-000001.tar: clip 000000006: "):
            opened[4].read(2)
    assert opened[0].read(0)


@pytest.mark.parametrize(
    "row", [{"offset": 2**63}, {"offset": 2**64 - 1}, {"offset": 10**12}, {"size": 2**32 - 1}, {"shard": 77}]
)
def test_a_hostile_index_reads_nothing_outside(made, row):
    folder, _ = made
    index = np.load(folder / INDEX)
    for name, value in row.items():
        index[name][1] = value
    np.save(folder / INDEX, index)
    data = ShardSet(folder)
    tracemalloc.start()
    with pytest.raises(MediaError, match="clip 000000001: "):
        data[1].read(0)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    assert data[0].read(0)


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/escaped", "a/../../escaped"])
def test_names_in_the_tar_lead_nowhere(made, name):
    folder, clips = made
    tar = folder / "shard-000000.tar"
    with tarfile.open(tar) as file:
        infos = file.getmembers()
    data = bytearray(tar.read_bytes())
    for info in infos:
        info.name = name
        data[info.offset : info.offset + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    tar.write_bytes(data)
    before = sorted(folder.parent.rglob("*"))
    meta, encoded = ShardSet(folder)[1].read(1)
    assert (meta, encoded.image) == (clips[1].meta, clips[1].images[1])
    assert sorted(folder.parent.rglob("*")) == before and not Path("/tmp/escaped").exists()


def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_open", lru_cache(maxsize=3)(shards._File))
    for number in range(8):
        write(tmp_path / "s", number, [number])
    data = ShardSet(publish(tmp_path / "s", list(range(8))))
    for _ in range(2):
        for number in range(8):
            assert data[number].read(0)[0]["id"] == f"clip-{number}"
    descriptors = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    opened = [os.readlink(path) for path in descriptors if path.is_symlink()]
    assert sum(path.startswith(str(tmp_path)) and path.endswith(".tar") for path in opened) == 3


def test_a_file_stays_open_while_it_is_read(made, monkeypatch):
    """Another thread may open so many shards meanwhile that this one is closed."""
    monkeypatch.setattr(shards, "_open", lru_cache(maxsize=1)(shards._File))
    folder, _ = made
    data, pread = ShardSet(folder), os.pread

    def crowded(descriptor, *place):
        shards._open.cache_clear()
        return pread(descriptor, *place)

    monkeypatch.setattr(os, "pread", crowded)
    assert data[0].read(1)[0]["id"] == "clip-0"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "version 2; this program reads version 1"),
        ({"version": None}, "version None"),
        ({"clips": 4}, "does not fit manifest.json"),
        ({"frames": 4}, "does not fit manifest.json"),
        ({"clips": "5"}, "not a manifest"),
        ({"frames": 0}, "does not fit manifest.json"),
        ({"frames": 10**9}, "not a manifest"),
        ({"frames": -1}, "not a manifest"),
        ({"shards": [{"number": 0}]}, "not a readable manifest"),
        ({"shards": 5}, "not a readable manifest"),
        ({"shards": [{"number": "../x", "clips": 1, "bytes": 1}]}, "not a manifest"),
        ({"shards": None}, "not a readable manifest"),
        ({"shards": [1]}, "not a readable manifest"),
    ],
)
def test_foreign_manifests(made, changes, message):
    folder, _ = made
    with pytest.raises(ShardError, match=message):
        ShardSet(publish(folder, [0, 1], **changes))


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"version": 1}', "{", "\0"])
def test_damaged_manifests(made, text):
    folder, _ = made
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ShardError, match=rf"{folder}/manifest.json: not a readable manifest"):
        ShardSet(folder)


def test_unfinished_shards(made):
    folder, _ = made
    (folder / MANIFEST).unlink()
    with pytest.raises(ShardError, match="`cavmae-fast prepare` writes it when all shards are done"):
        ShardSet(folder)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "pickle", "transposed", "huge"])
def test_damaged_index(made, damage, tmp_path):
    folder, _ = made
    path = folder / INDEX
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    elif damage == "transposed":
        np.save(path, np.load(path)[None])
    else:
        huge = data.replace(b"'shape': (5,)", b"'shape': (5" + b"0" * 9 + b",)")[: len(data)]
        path.write_bytes({"empty": b"", "truncated": data[:-10], "text": b"x" * 500, "huge": huge}[damage])
    with pytest.raises(ShardError, match=r"index.npy: (not a readable index|does not fit manifest.json)"):
        ShardSet(folder)
    assert not (tmp_path / "ran").exists()


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_names_that_are_no_text(tmp_path):
    assert to_json({"a": "ä"}) == '{"a": "ä"}'
    text = to_json({"a": "ä\udcff"})
    assert text.encode() and json.loads(text) == {"a": "ä\udcff"}
    writer = ShardWriter(tmp_path, 0)
    writer.add(clip(0, "bad\udcff"))
    writer.finish([{"key": 1, "id": "\ud800"}])
    data = ShardSet(publish(tmp_path, [0]))
    assert data[0].read(0)[0]["id"] == "bad\udcff" and [c["id"] for c in data.clips()] == ["bad\udcff"]


def test_write_whole_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "x" * 100000 + "\ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_copy_elsewhere_is_the_same_set(made, tmp_path):
    folder, clips = made
    shutil.move(folder, tmp_path / "moved")
    assert ShardSet(tmp_path / "moved")[2].read(2)[1].image == clips[2].images[2]
