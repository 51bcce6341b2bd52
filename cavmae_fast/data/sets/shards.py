"""Shards: prepared clips in tar files of the WebDataset layout, with an index for random access and one for DALI.

    shard-000012.tar     000012000.json 000012000.flac 000012000.0.jpg ... 000012000.9.jpg  000012001.json ...
    shard-000012.json    what the shard holds, clip by clip, and what was left out of it, and why
    shard-000012.idx     the index of DALI's `fn.readers.webdataset`
    index.npy            all clips' places, sizes and checksums: `[clips]` of `index_dtype(frames)`
    manifest.json        the data set: settings, totals, shards
    rejects.jsonl        every clip that was left out, and why
    labels.csv           the classes, where they were given

A key is the clip's number in the list it was prepared from. The names in the tar are therefore ours; no name that came
with the data is ever used as a path.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cavmae_fast.data.media.encoded import Encoded
from cavmae_fast.data.media.files import MediaError

VERSION = 1
MANIFEST, INDEX, REJECTS, LABELS = "manifest.json", "index.npy", "rejects.jsonl", "labels.csv"
MAX_FRAMES = 1000
"Frames a clip may have."
_BLOCK = 512  # tar


class ShardError(MediaError):
    """A set of shards cannot be used; the message is one sentence that names the file and the cause."""


class PreparedClip(NamedTuple):
    """One clip as it goes into a shard: its number, what its JSON file says, its sound (FLAC) and its frames (JPEG)."""

    key: int
    meta: dict[str, Any]
    sound: bytes
    images: list[bytes]


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def index_dtype(num_frames: int) -> np.dtype:
    """A row of the index: shard number, key, where the clip begins in the tar file, and of its members (JSON, FLAC, frames)
    the sizes in bytes and the CRC-32."""
    members = 2 + num_frames
    return np.dtype([("shard", "<u4"), ("key", "<u8"), ("offset", "<u8"), ("size", "<u4", members), ("crc", "<u4", members)])


def padded(size: Any) -> Any:
    """Bytes that a member of `size` takes in a tar file: its header, and its data in whole blocks. Also of an array."""
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def member_names(key: int, num_frames: int) -> list[str]:
    return [f"{key:09d}.{ending}" for ending in ("json", "flac", *(f"{k}.jpg" for k in range(num_frames)))]


class ShardWriter:
    """Writes the tar file of one shard, clip by clip; the same clips give the same bytes.

    The file grows under a hidden name. `finish` puts it under its own, beside its record and its DALI index, when it is
    whole and on the disk; `abandon` removes it.

    Args:
        folder: where the shard lies.
        number: the shard's.
        mark: goes into the hidden names, so that several writers may work in one folder.
    """

    def __init__(self, folder: Path, number: int, mark: str = ""):
        self.folder, self.number, self.mark = folder, number, mark
        self._part = folder / f".{shard_name(number)}.tar{mark}.part"
        self._file = self._part.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._offset = 0
        self._clips: list[dict[str, Any]] = []

    def add(self, clip: PreparedClip) -> None:
        members = [to_json(clip.meta).encode(), clip.sound, *clip.images]
        sizes = [len(data) for data in members]
        self._clips.append(
            {
                "key": clip.key,
                "offset": self._offset,
                "size": sizes,
                "crc": [zlib.crc32(data) for data in members],
                "meta": clip.meta,
            }
        )
        for name, data in zip(member_names(clip.key, len(clip.images)), members, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._offset += sum(map(padded, sizes))

    def finish(self, rejects: list[dict[str, Any]]) -> None:
        """Publishes the shard; one without a clip leaves a record alone. `rejects` go into the record."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        name = shard_name(self.number)
        if self._clips:
            write_whole(self.folder / f"{name}.idx", dali_index(self._clips), self.mark)
        record = {"number": self.number, "bytes": size if self._clips else 0, "clips": self._clips, "rejects": rejects}
        write_whole(self.folder / f"{name}.json", to_json(record), self.mark)
        if self._clips:
            self._part.replace(self.folder / f"{name}.tar")
        else:
            self._part.unlink(missing_ok=True)  # now that the record is there, another call may have tidied up

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # the disk may be full: closing writes the archive's end
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """One line of JSON, in UTF-8 as people read it; in ASCII where a name is no text (file names may be any bytes)."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def write_whole(path: Path, text: str, mark: str = "") -> None:
    """Writes a text file so that it is there whole or not at all; `mark` as in `put_whole`."""
    put_whole(path, lambda file: file.write(text.encode()), mark)


def put_whole(path: Path, write: Callable[[BinaryIO], Any], mark: str = "") -> None:
    """Lets `write` fill a hidden file, and gives it its name when it is on the disk. Who may write `path` at the same time
    as another gives a `mark` of its own, which goes into the hidden name."""
    part = path.with_name(f".{path.name}{mark}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def finished(folder: Path, number: int) -> dict[str, Any] | None:
    """The record of a shard that is complete, or None."""
    try:
        record = read_record(folder, number)
        tar = folder / f"{shard_name(number)}.tar"
        whole = not record["clips"] or (tar.is_file() and tar.stat().st_size == record["bytes"])
    except (ShardError, KeyError, TypeError):  # not there, or not what `finish` wrote
        return None
    return record if whole and "rejects" in record else None


def dali_index(clips: Sequence[dict[str, Any]]) -> str:
    """The text of the index that DALI's webdataset reader takes (version 1.2), from the clips of a shard's record."""
    lines = [f"v1.2 {len(clips)}"]
    for clip in clips:
        names = member_names(clip["key"], len(clip["size"]) - 2)
        members = zip(names, _starts(clip["offset"], clip["size"]), clip["size"], strict=True)
        lines.append(" ".join(f"{name.partition('.')[2]} {start} {size} {name}" for name, start, size in members))
    return "\n".join(lines) + "\n"


def _starts(offset: int, sizes: Sequence[int]) -> list[int]:
    """Where each member's data begins."""
    starts = []
    for size in sizes:
        starts.append(offset + _BLOCK)
        offset += padded(size)
    return starts


class _File:
    """An open file; closed when nobody holds it any more, so also not while another thread reads it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, start)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.descriptor)


_open = lru_cache(maxsize=128)(_File)  # the shards read last stay open


class ShardClip(NamedTuple):
    """Where one clip lies in a shard: a row of the index and the shard's path."""

    path: str
    key: int
    offset: int
    sizes: tuple[int, ...]
    crcs: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path}: clip {self.key:09d}"

    def read(self, frame: int) -> tuple[dict[str, Any], Encoded]:
        """What its JSON file says, and the bytes of a frame and of the sound, each checked against its checksum.

        Raises:
            MediaError: the shard cannot be read, or the clip in it is damaged.
        """
        meta, sound = self._members(0, 1)
        return json.loads(meta), Encoded((self.image(frame),), sound)

    def head(self) -> tuple[str, tuple[str, ...], bytes]:
        """Its name, its labels and the bytes of its sound; raises as `read` does."""
        meta, sound = self._members(0, 1)
        said = json.loads(meta)
        return said["id"], tuple(said["labels"]), sound

    def picture_seconds(self) -> float | None:
        """Over which seconds its frames are spread; None where that was not noted, and they are as long as the sound: in
        shards of extracted frames, and of earlier versions."""
        (meta,) = self._members(0, 0)
        return json.loads(meta).get("picture_seconds")

    def image(self, frame: int) -> bytes:
        """The bytes of a frame; raises as `read` does."""
        return self._members(2 + frame, 2 + frame)[0]

    def _members(self, first: int, last: int) -> list[bytes]:
        """The bytes of these members, which are neighbors, each checked against its checksum."""
        starts = _starts(self.offset, self.sizes)
        try:
            file = _open(self.path)
            if starts[-1] + self.sizes[-1] > os.fstat(file.descriptor).st_size:
                raise MediaError(f"{self}: {INDEX} places it past the end of the file")
            data = file.read(starts[first], starts[last] + self.sizes[last] - starts[first])
        except OSError as error:
            raise MediaError(f"{self}: cannot be read ({error.strerror})") from error
        found = []
        for number in range(first, last + 1):
            begin = starts[number] - starts[first]
            found.append(data[begin : begin + self.sizes[number]])
            if len(found[-1]) != self.sizes[number] or zlib.crc32(found[-1]) != self.crcs[number]:
                name = member_names(self.key, len(self.sizes) - 2)[number]
                raise MediaError(f"{self}: {name} is damaged (it does not match its checksum)")
        return found


class ShardSet:
    """The clips of a folder that `cavmae-fast prepare` wrote, in the order of the list they were prepared from.

    Attributes:
        folder, manifest: the folder and what its manifest says.
        num_frames: frames per clip.
        index: `[clips]` of `index_dtype(num_frames)`, mapped from the file.

    Raises:
        ShardError: the folder is no finished set of shards, or (where it must be `complete`) a shard is missing or has
            another size than it was written with.
    """

    def __init__(self, folder: str | Path, complete: bool = True):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.num_frames = self.manifest["frames"]
        try:
            self.index = np.load(self.folder / INDEX, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy lets through what a damaged header makes it meet
            raise ShardError(f"{self.folder / INDEX}: not a readable index ({error})") from error
        if self.index.dtype != index_dtype(self.num_frames) or self.index.shape != (self.manifest["clips"],):
            raise ShardError(f"{self.folder / INDEX}: does not fit {MANIFEST}; prepare the shards again")
        self._paths = {n: str(self.folder / f"{shard_name(n)}.tar") for n in np.unique(self.index["shard"]).tolist()}
        if complete:
            for _, reason in self.incomplete():
                raise ShardError(reason)

    def incomplete(self) -> Iterator[tuple[str, str]]:
        """(tar file, reason) for shards that are missing or have another size than they were written with."""
        for shard in self.manifest["shards"]:
            path = self.folder / f"{shard_name(shard['number'])}.tar"
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                is_now = "is missing" if size is None else f"has {size} bytes"
                yield str(path), f"{path}: {is_now}; {MANIFEST} says {shard['bytes']} bytes"

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> ShardClip:
        row = self.index[number]
        path = self._paths[int(row["shard"])]
        return ShardClip(path, int(row["key"]), int(row["offset"]), tuple(row["size"].tolist()), tuple(row["crc"].tolist()))

    def part(self, start: int, stop: int) -> ShardSet:
        """The clips `start` to `stop` - 1, as a set of their own."""
        part = copy.copy(self)
        part.index = self.index[start:stop]
        return part

    def clips(self) -> Iterator[dict[str, Any]]:
        """What each clip's JSON file says, in order, from the shards' own records (no tar file is read)."""
        for shard in self.manifest["shards"]:
            yield from (clip["meta"] for clip in read_record(self.folder, shard["number"])["clips"])


def shard_folder(places: Sequence[str | Path]) -> str | Path | None:
    """The place that is a folder of finished shards; None when none is. MediaError when there is anything beside it."""
    shards = [place for place in places if (Path(place) / MANIFEST).is_file()]
    if shards and len(places) > 1:
        raise MediaError(f"{shards[0]}: is a folder of shards; allowed: one such folder, and nothing beside it")
    return shards[0] if shards else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished set of shards. ShardError when there is none or it cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["version"] != VERSION:
            raise ShardError(f"{path}: version {manifest['version']}; this program reads version {VERSION}")
        counts = [manifest[name] for name in ("listed", "clips", "frames")]
        counts += [shard[name] for shard in manifest["shards"] for name in ("number", "clips", "bytes")]
        if not all(isinstance(count, int) and count >= 0 for count in counts) or not manifest["frames"] <= MAX_FRAMES:
            raise ShardError(f"{path}: not a manifest that `cavmae-fast prepare` wrote (a number is out of range)")
        return manifest
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such file; `cavmae-fast prepare` writes it when all shards are done") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path}: not a readable manifest ({error!r})") from error


def read_record(folder: Path, number: int) -> dict[str, Any]:
    """What `shard-N.json` says: `clips` (key, meta), `rejects`, `bytes` of the tar file."""
    path = folder / f"{shard_name(number)}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: not a readable record of a shard ({error})") from error
