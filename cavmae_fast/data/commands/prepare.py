"""`cavmae-fast prepare`: raw clips to shards, in parallel, resumable at any moment."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cavmae_fast.data.commands.options import check_ranges
from cavmae_fast.data.decode.workers import TIMEOUT, Lost, Workers, default_count, unusable
from cavmae_fast.data.media.encoded import SAMPLE_RATE, decode_image, decode_sound, encode_image, encode_sound
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.sets.labels import LabelSet, foreign_labels
from cavmae_fast.data.sets.shards import (
    INDEX,
    LABELS,
    MANIFEST,
    MAX_FRAMES,
    REJECTS,
    VERSION,
    PreparedClip,
    ShardWriter,
    finished,
    index_dtype,
    put_whole,
    read_record,
    to_json,
    write_whole,
)
from cavmae_fast.data.sets.sources import Source, find_sources, read_file
from cavmae_fast.errors import CavmaeError

_PLAN = "prepare.json"
_JOBS_A_WORKER = 16  # in flight: enough that a slow clip does not stop the others, few enough to hold in memory
_CLIP_BYTES = 64 << 20  # a clip of extracted files; one from a video takes 0.6 MB


class PrepareError(CavmaeError, RuntimeError):
    """Preparing cannot go on; the message says why, and that what is finished stays."""


@dataclass(frozen=True)
class PrepareConfig:
    """Decode clips once, into shards (tar files of JPEG frames and FLAC sound) that the loaders read.

    Killed at any moment and started again with the same options, it goes on where it was and ends with the same bytes.
    """

    src: tuple[str, ...]
    """Folders, media files, globs, CSV files of paths, or lists as published (JSON)."""
    out: Path = Path("shards")
    """Folder for the shards, their index, manifest.json and rejects.jsonl."""
    labels: Path | None = None
    """CSV of the classes (index,mid,display_name); clips with other labels are left out."""
    frames: int = 10
    """Frames a clip, spread evenly over its first ten seconds."""
    size: int = 224
    """Height and width of the frames."""
    seconds: float = 10.24
    """The most sound to keep."""
    quality: int = 90
    """JPEG quality of the frames, 1 to 95."""
    shard_clips: int = 1000
    """Clips of the list that a shard takes."""
    workers: int | None = None
    """Decoding processes; default: the cores there are."""
    timeout: float = TIMEOUT
    """Seconds a clip may take before it is left out."""


@dataclass(frozen=True)
class EncodeClip:
    """Runs in the workers: (number, source) -> the clip as it goes into a shard, or the reason why it cannot."""

    frames: int
    size: int
    seconds: float
    quality: int
    known_labels: frozenset[str] | None

    def __call__(self, item: tuple[int, Source]) -> PreparedClip | str:
        key, source = item
        try:
            if self.known_labels is not None and (unknown := set(source.labels) - self.known_labels):
                return foreign_labels(source, sorted(unknown))
            images, waveform = self._from_video(source) if source.video else self._from_files(source)
            sound = encode_sound(waveform)
        except Exception as error:
            return unusable(error, source)
        digest = hashlib.sha256(sound)
        for image in images:
            digest.update(image)
        meta = {
            "id": source.id, "labels": source.labels, "source": str(source), "duration": len(waveform) / SAMPLE_RATE,
            "samples": len(waveform), "hash": digest.hexdigest(),
        }  # fmt: skip
        return PreparedClip(key, meta, sound, images)

    def _from_video(self, source: Source) -> tuple[list[bytes], np.ndarray]:
        clip = read_clip(source.video, num_frames=self.frames, size=self.size, seconds=self.seconds)
        return [encode_image(frame, self.quality) for frame in clip.frames], clip.waveform

    def _from_files(self, source: Source) -> tuple[list[bytes], np.ndarray]:
        """Extracted frames are taken as they are, byte for byte, once they are known to decode."""
        images: list[bytes] = []
        for number in range(self.frames):
            images.append(source.image(number))
            if (size := sum(map(len, images))) > _CLIP_BYTES:
                raise MediaError(f"{source}: {len(images)} frames take {size} bytes; allowed: {_CLIP_BYTES} for a clip")
        for image in set(images):
            decode_image(image, self.size, source.frame_path(images.index(image)))
        waveform = decode_sound(read_file(source.sound), source.sound)
        return images, waveform[: int(self.seconds * SAMPLE_RATE)]


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Runs the whole job -> the manifest.

    Raises:
        ValueError: an option is out of range, or `out` holds shards of another list or with other settings.
        MediaError: `src` names no clip, or not one clip of it can be used.
        LabelError: the CSV of the classes.
        PrepareError: the disk is full or another `prepare` works on `out`.
    """
    _check(config)
    known = frozenset(LabelSet.from_csv(config.labels).mids) if config.labels else None
    sources = find_sources(config.src)
    encode = EncodeClip(config.frames, config.size, config.seconds, config.quality, known)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        with _locked(config.out):
            _match_plan(config, sources)
            if config.labels:
                write_whole(config.out / LABELS, config.labels.read_text(encoding="utf-8-sig"))
            for part in config.out.glob(".*.part"):
                part.unlink()
            _run(config, sources, encode)
            manifest = _publish(config, len(sources))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise PrepareError(
                f"{config.out}: {error.strerror}; finished shards are whole; make room and start the same command again"
            ) from error
        raise
    if not manifest["clips"]:
        reason = json.loads((config.out / REJECTS).open(encoding="utf-8").readline())["reason"]
        raise MediaError(f"none of the {len(sources)} clips can be used; the first: {reason}")
    return manifest


def _check(config: PrepareConfig) -> None:
    if not config.src:
        raise ValueError("SRC names nothing; allowed: folders, media files, globs, CSV files, JSON lists")
    limits = {
        "frames": (1, MAX_FRAMES), "size": (1, 4096), "quality": (1, 95), "shard_clips": (1, 10**6),
        "seconds": (0.025, 3600), "timeout": (0.1, 86400), "workers": (1, 4096),
    }  # fmt: skip
    check_ranges(config, limits)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepareError(f"{out}: another `cavmae-fast prepare` is at work on it") from error
        yield


def _match_plan(config: PrepareConfig, sources: list[Source]) -> None:
    """Refuses a folder that was begun from another list or with other settings: its shards would not fit together."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr(source).encode())
    settings = {name: getattr(config, name) for name in ("frames", "size", "seconds", "quality", "shard_clips")}
    plan = {"version": VERSION, "clips": len(sources), "list": digest.hexdigest(), **settings}
    plan["labels"] = hashlib.sha256(config.labels.read_bytes()).hexdigest() if config.labels else None
    path = config.out / _PLAN
    if path.exists():
        begun = json.loads(path.read_text())
        if begun != plan:
            changed = [name for name in plan if begun.get(name) != plan[name]]
            now = ", ".join(f"{name} {begun.get(name)!s:.12} then, {plan[name]!s:.12} now" for name in changed)
            raise ValueError(f"--out {config.out} was begun from another list or with other settings ({now}); name another")
    elif any(config.out.glob("shard-*")):
        raise ValueError(f"--out {config.out} holds shards without {_PLAN}; name another folder")
    else:
        write_whole(path, json.dumps(plan, indent=1) + "\n")


def _run(config: PrepareConfig, sources: list[Source], encode: EncodeClip) -> None:
    from tqdm import tqdm

    shards = range(-(-len(sources) // config.shard_clips))
    missing, rejects = [], []
    for number in shards:
        record = finished(config.out, number)
        if record is None:
            missing.append(number)
        else:
            rejects += record["rejects"]
    write_whole(config.out / REJECTS, "".join(map(_line, rejects)))
    spans = [range(n * config.shard_clips, min((n + 1) * config.shard_clips, len(sources))) for n in missing]
    todo = sum(map(len, spans))
    count = min(config.workers or default_count(), max(todo, 1))
    left_out = len(rejects)
    with (
        tqdm(total=len(sources), initial=len(sources) - todo, unit="clip", dynamic_ncols=True, smoothing=0.05) as bar,
        (config.out / REJECTS).open("a", encoding="utf-8") as reject_file,
    ):
        if not todo:
            return
        with Workers(
            encode, count, timeout=config.timeout, describe=lambda item: str(item[1]),
            report=partial(tqdm.write, file=sys.stderr),  # which, unlike stdout, takes names that are no text
        ) as workers:  # fmt: skip
            items = ((key, sources[key]) for span in spans for key in span)
            results = workers.in_order(items, _JOBS_A_WORKER * count, _nbytes)
            for number, span in zip(missing, spans, strict=True):
                writer = ShardWriter(config.out, number)
                try:
                    own: list[dict[str, Any]] = []
                    for key in span:
                        result = next(results)
                        if isinstance(result, PreparedClip):
                            writer.add(result)
                        else:
                            reason = result.reason if isinstance(result, Lost) else result
                            own.append({"key": key, "id": sources[key].id, "source": str(sources[key]), "reason": reason})
                        bar.set_postfix_str(f"left out {left_out + len(own)}", refresh=False)
                        bar.update()
                    writer.finish(own)
                except BaseException:
                    writer.abandon()
                    raise
                left_out += len(own)
                reject_file.writelines(map(_line, own))
                reject_file.flush()


def _nbytes(result: PreparedClip | str | Lost) -> int:
    return len(result.sound) + sum(map(len, result.images)) if isinstance(result, PreparedClip) else 0


def _line(reject: dict[str, Any]) -> str:
    return to_json(reject) + "\n"


def _publish(config: PrepareConfig, total: int) -> dict[str, Any]:
    """Writes what is known only at the end: the index of all clips and the manifest."""
    shards = []
    rows: list[np.ndarray] = []
    dtype = index_dtype(config.frames)
    rejects: list[dict[str, Any]] = []
    for number in range(-(-total // config.shard_clips)):
        record = read_record(config.out, number)
        rejects += record["rejects"]
        if record["clips"]:
            shards.append({"number": number, "clips": len(record["clips"]), "bytes": record["bytes"]})
            places = [(number, c["key"], c["offset"], c["size"], c["crc"]) for c in record["clips"]]
            rows.append(np.array(places, dtype))
    write_whole(config.out / REJECTS, "".join(map(_line, rejects)))
    index = np.concatenate([*rows, np.zeros(0, dtype)])
    put_whole(config.out / INDEX, lambda file: np.save(file, index))
    manifest = {
        "version": VERSION, "listed": total, "clips": sum(shard["clips"] for shard in shards), "rejects": len(rejects),
        "frames": config.frames, "size": config.size, "seconds": config.seconds, "sample_rate": SAMPLE_RATE,
        "quality": config.quality, "labels": LABELS if config.labels else None,
        "bytes": sum(shard["bytes"] for shard in shards), "shards": shards,
    }  # fmt: skip
    write_whole(config.out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest

