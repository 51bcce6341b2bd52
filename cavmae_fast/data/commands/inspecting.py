"""What `cavmae-fast check` looks at, clip by clip: runs in worker processes, and so imports no torch."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cavmae_fast.data.decode.workers import unusable
from cavmae_fast.data.media.encoded import SAMPLE_RATE, decode_image, decode_sound
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.sets.shards import (
    INDEX,
    MANIFEST,
    ShardClip,
    ShardError,
    ShardSet,
    member_names,
    padded,
    read_record,
    shard_name,
)
from cavmae_fast.data.sets.sources import Source, read_file


@dataclass(frozen=True)
class Thresholds:
    """When a clip is worth a warning: less sound than `min_seconds`, a swing below `silence_db` dBFS, no frame with a mean
    of `black_level` or more, none with a span of `flat_levels` or more (of 255)."""

    min_seconds: float
    silence_db: float
    black_level: float
    flat_levels: float


class Unclaimed(NamedTuple):
    """A stretch of bytes of a shard's tar file that is no clip's of the index."""

    path: str
    start: int
    stop: int

    def __str__(self) -> str:
        return self.path


Item = Source | ShardClip | Unclaimed


@dataclass
class Inspected:
    """What a worker found: `waveform` `[samples]` int16, or None when the clip cannot be used; findings (kind, reason)."""

    id: str | None = None
    labels: tuple[str, ...] = ()
    waveform: np.ndarray | None = None
    findings: list[tuple[str, str]] = field(default_factory=list)


class Found(MediaError):
    """A clip cannot be used, and `kind` says in which way."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class InspectClip:
    """Runs in the workers: an item -> what is known of it and what is wrong with it.

    Attributes:
        limits: when to warn.
        num_frames, size: frames of a clip, and their height and width.
        samples: most samples of the sound.
    """

    limits: Thresholds
    num_frames: int
    size: int
    samples: int

    def __call__(self, item: Item) -> Inspected:
        result = Inspected()
        try:
            if isinstance(item, Unclaimed):
                _check_unclaimed(item)
                return result
            read = self._from_shard if isinstance(item, ShardClip) else self._from_source
            images, waveform = read(item, result)
            result.findings += self._look(str(item), images, waveform)
            result.waveform = waveform
        except Exception as error:
            result.findings.append((error.kind if isinstance(error, Found) else "unreadable", unusable(error, item)))
        return result

    def _from_source(self, source: Source, result: Inspected) -> tuple[Sequence[np.ndarray], np.ndarray]:
        result.id, result.labels = source.id, source.labels
        for path in (source.video, source.sound):
            if path and not os.path.exists(path):
                raise Found("missing", f"{path}: no such file")
        if source.video:
            seconds = self.samples / SAMPLE_RATE
            clip = read_clip(source.video, num_frames=self.num_frames, size=self.size, seconds=seconds)
            return clip.frames, clip.waveform
        if not source.has_pictures:
            return [], decode_sound(read_file(source.sound), source.sound)[: self.samples]
        try:
            paths = [source.frame_path(k) for k in range(self.num_frames)]
        except MediaError as error:
            raise Found("missing", str(error)) from error
        if missing := [k for k in range(1, self.num_frames) if paths[k] == paths[k - 1]]:
            names = ", ".join(f"frame_{k}" for k in missing)
            result.findings.append(("frames", f"{source.id}: has no {names} in {source.frames}"))
        images = [decode_image(read_file(path), self.size, path) for path in dict.fromkeys(paths)]
        return images, decode_sound(read_file(source.sound), source.sound)[: self.samples]

    def _from_shard(self, clip: ShardClip, result: Inspected) -> tuple[Sequence[np.ndarray], np.ndarray]:
        data = _read(clip.path, clip.offset, clip.offset + sum(map(padded, clip.sizes)), str(clip))
        members, parts = _members(data), []
        for number, name in enumerate(member_names(clip.key, self.num_frames)):
            size = clip.sizes[number]
            found = members[number] if number < len(members) else None
            if found is None or (found.name, found.size) != (name, size) or not found.isreg():
                is_now = "no readable header"
                if found:
                    is_now = f"{found.name!r} of {found.size} bytes" + ", no regular file" * (not found.isreg())
                raise Found("shard", f"{clip}: the tar file holds {is_now}; the index says {name!r} of {size} bytes")
            parts.append(data[found.offset_data : found.offset_data + size])
            if zlib.crc32(parts[-1]) != clip.crcs[number]:
                raise MediaError(f"{clip}: {name} is damaged (it does not match its checksum)")
        meta = json.loads(parts[0])
        result.id, result.labels = str(meta["id"]), tuple(map(str, meta["labels"]))
        images = [decode_image(image, self.size, f"{clip}, frame {k}") for k, image in enumerate(parts[2:])]
        return images, decode_sound(parts[1], str(clip))[: self.samples]

    def _look(self, name: str, images: Sequence[np.ndarray], waveform: np.ndarray) -> Iterator[tuple[str, str]]:
        """images: each `[S, S, 3]` uint8; none of a clip that is a sound alone."""
        # Half the span, not the largest sample: the features lose a constant offset, so it is no sound.
        swing = (int(waveform.max()) - int(waveform.min())) / 2
        level = 20 * np.log10(swing / 32768) if swing else -np.inf
        if level < self.limits.silence_db:
            yield "silent", f"{name}: " + (f"its sound swings by {level:.1f} dBFS" if swing else "all samples are equal")
        if len(waveform) < self.limits.min_seconds * SAMPLE_RATE:
            yield "short", f"{name}: {len(waveform) / SAMPLE_RATE:.3f} s of sound"
        if not len(images):
            return
        brightest = max(float(image.mean()) for image in images)
        if brightest < self.limits.black_level:
            yield "black", f"{name}: its brightest frame has a mean of {brightest:.1f}"
        # By channel: a picture of one color is constant, too.
        elif (span := max(int(np.ptp(image, axis=(0, 1)).max()) for image in images)) < self.limits.flat_levels:
            yield "constant", f"{name}: the pixels of a frame differ by {span} at most"


def _read(path: str, start: int, stop: int, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if stop > size:  # before any memory is taken for what a damaged index asks for
                raise MediaError(f"{name}: should end at byte {stop}, but the file has {size} bytes")
            file.seek(start)
            return file.read(stop - start)
    except FileNotFoundError as error:
        raise Found("missing", f"{name}: the tar file is not there") from error
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror})") from error


def _members(data: bytes) -> list[tarfile.TarInfo]:
    """The headers of a piece of a tar file, up to the first that is none. Nothing is extracted."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return tar.getmembers()
    except tarfile.TarError:
        return []


def _check_unclaimed(gap: Unclaimed) -> None:
    data = _read(gap.path, gap.start, gap.stop, str(gap))
    if gap.stop == os.path.getsize(gap.path) and not data.strip(b"\0"):
        return  # the zeros that end an archive
    names = ", ".join(repr(member.name) for member in _members(data)[:3]) or "no readable header"
    raise Found("shard", f"{gap}: bytes {gap.start} to {gap.stop} belong to no clip of the index; they hold {names}")


class Shards(ShardSet):
    """Opens also when a shard is missing or has another size: that is what is to be reported."""

    def __init__(self, folder: str | Path):
        super().__init__(folder, complete=False)
        self._names = lru_cache(maxsize=1)(self._record)

    def _record(self, shard: int) -> dict[int, tuple[str, tuple[str, ...]]]:
        """Id and labels by key, as the shard's record gives them."""
        try:
            clips = read_record(self.folder, shard)["clips"]
            return {c["key"]: (str(c["meta"]["id"]), tuple(map(str, c["meta"]["labels"]))) for c in clips}
        except (ShardError, KeyError, TypeError):
            return {}

    def identity(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Id and labels of a clip, also of one that cannot be read from the tar file; its key and none when unknown."""
        shard, key = int(self.index["shard"][number]), int(self.index["key"][number])
        return self._names(shard).get(key, (f"{key:09d}", ()))

    def wrong(self) -> Iterator[tuple[str, str]]:
        """(tar file, reason) for shards that are not what the manifest says."""
        yield from self.incomplete()
        counts = Counter(np.asarray(self.index["shard"]).tolist())
        for shard in self.manifest["shards"]:
            if (found := counts[shard["number"]]) != shard["clips"]:
                path = self.folder / f"{shard_name(shard['number'])}.tar"
                yield str(path), f"{path}: {INDEX} lists {found} clips of it; {MANIFEST} says {shard['clips']}"

    def items(self) -> Iterator[tuple[int | None, ShardClip | Unclaimed]]:
        """All clips with their numbers, in order, and after each shard what of it is no clip's."""
        shards = np.asarray(self.index["shard"])
        bounds = [0, *(np.flatnonzero(np.diff(shards.astype(np.int64))) + 1).tolist(), len(shards)]
        for first, last in pairwise(bounds):
            for number in range(first, last):
                yield number, (clip := self[number])
            rows, place = self.index[first:last], 0
            size = os.path.getsize(clip.path) if os.path.isfile(clip.path) else 0
            ends = rows["offset"].astype(np.int64) + padded(rows["size"].astype(np.int64)).sum(axis=1)
            for offset, end in [*sorted(zip(rows["offset"].tolist(), ends.tolist(), strict=True)), (size, size)]:
                if place < min(offset, size):
                    yield None, Unclaimed(clip.path, place, min(offset, size))
                place = max(place, end)
