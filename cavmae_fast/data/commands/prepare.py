"""`cavmae-fast prepare`: raw clips to shards, in parallel, on one machine or several, resumable at any moment."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cavmae_fast.clip import WINDOW_SECONDS
from cavmae_fast.data.commands.encoding import EncodeClip
from cavmae_fast.data.commands.folder import OutputFolder, Part, PrepareError, reject_lines
from cavmae_fast.data.commands.options import check_ranges
from cavmae_fast.data.decode.workers import TIMEOUT, Lost, Workers, default_count
from cavmae_fast.data.media.encoded import SAMPLE_RATE
from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.data.sets.opening import NUM_FRAMES
from cavmae_fast.data.sets.shards import (
    INDEX,
    LABELS,
    MANIFEST,
    MAX_FRAMES,
    REJECTS,
    VERSION,
    PreparedClip,
    finished,
    index_dtype,
    read_record,
)
from cavmae_fast.data.sets.sources import Source, find_sources

_JOBS_PER_WORKER = 16  # in flight: enough that a slow clip does not stop the others, few enough to hold in memory


@dataclass(frozen=True)
class PrepareConfig:
    """Decode clips once, into shards (tar files of JPEG frames and FLAC sound) that the loaders read.

    Killed at any moment and started again with the same options, it goes on where it was and ends with the same bytes.
    """

    src: tuple[str, ...]
    """Folders, media files, globs, CSV files of paths, lists as published (JSON), or ESC-50 or Speech Commands."""
    out: Path = Path("shards")
    """Folder for the shards, their index, manifest.json and rejects.jsonl."""
    labels: Path | None = None
    """CSV of the classes (index,mid,display_name); clips with other labels are left out. Default: those of ESC-50 or Speech
    Commands, else none."""
    frames: int | None = None
    """Frames per clip, spread evenly over its first ten seconds; 0: the sound alone. Default: 10; 0 where there is nothing
    else."""
    size: int = 224
    """Height and width of the frames."""
    seconds: float = 10.24
    """The most sound to keep."""
    quality: int = 90
    """JPEG quality of the frames, 1 to 95."""
    shard_clips: int = 1000
    """Clips of the list per shard."""
    part: str | None = None
    """I/N: make only part I of N (1/N to N/N), so that N machines share the work; the last to finish writes the index."""
    workers: int | None = None
    """Decoding processes; default: the cores there are."""
    timeout: float = TIMEOUT
    """Seconds a clip may take before it is left out."""


class Unfinished(NamedTuple):
    """What `prepare` returns for a part that is done while shards of other parts are missing.

    Attributes:
        part: the part that is done.
        own: how many shards it has.
        missing: the numbers of the shards that are not there yet.
        total: how many shards there will be.
    """

    part: Part
    own: int
    missing: list[int]
    total: int

    @property
    def parts(self) -> list[Part]:
        """The parts that have missing shards."""
        return [Part(number + 1, self.part.count) for number in sorted({n % self.part.count for n in self.missing})]


def prepare(config: PrepareConfig) -> dict[str, Any] | Unfinished:
    """Runs the whole job, or one part of it -> the manifest; `Unfinished` when shards of other parts are missing.

    Raises:
        ValueError: an option is out of range, or `out` holds shards of another list or with other settings.
        MediaError: `src` names no clip, or not one clip of it can be used.
        LabelError: the CSV of the classes.
        PrepareError: the disk is full or another `prepare` is at the same work.
    """
    part = _check(config)
    label_set = LabelSet.from_csv(config.labels) if config.labels else None
    sources = find_sources(config.src)
    label_set = label_set or sources.label_set
    known = frozenset(label_set.mids) if label_set else None
    labels = config.labels.read_text(encoding="utf-8-sig") if config.labels else label_set.to_csv() if label_set else None
    config = replace(config, frames=_frames(config, sources))
    encode = EncodeClip(config.frames, config.size, config.seconds, config.quality, known)
    total = -(-len(sources) // config.shard_clips)  # shards
    try:
        with OutputFolder(config.out, part, _plan(config, sources, labels)) as folder:
            if labels:
                folder.write(LABELS, labels)
            _make_shards(config, folder, sources, encode, part.shards(total))
            if missing := folder.unfinished(total):
                return Unfinished(part, len(part.shards(total)), missing, total)
            manifest = _publish(config, folder, len(sources), total, labels is not None)
    except OSError as error:
        if reason := _explained(error):
            raise PrepareError(f"{config.out}: {reason}") from error
        raise
    if not manifest["clips"]:
        reason = json.loads((config.out / REJECTS).open(encoding="utf-8").readline())["reason"]
        raise MediaError(f"none of the {len(sources)} clips can be used; the first: {reason}")
    return manifest


def _check(config: PrepareConfig) -> Part:
    if not config.src:
        raise ValueError("SRC names nothing; allowed: folders, media files, globs, CSV files, JSON lists")
    limits = {
        "frames": (0, MAX_FRAMES),
        "size": (1, 4096),
        "quality": (1, 95),
        "shard_clips": (1, 10**6),
        "seconds": (WINDOW_SECONDS, 3600),
        "timeout": (0.1, 86400),
        "workers": (1, 4096),
    }
    check_ranges(config, limits)
    return Part.parse(config.part)


def _frames(config: PrepareConfig, sources: list[Source]) -> int:
    """Frames per clip. ValueError when some are asked for of clips that have none."""
    without = next((source for source in sources if not source.has_pictures), None)
    if config.frames is None:
        return NUM_FRAMES if without is None else 0
    if config.frames and without is not None:
        raise ValueError(f"--frames is {config.frames}, but {without} is a sound alone; it must be 0")
    return config.frames


def _explained(error: OSError) -> str | None:
    """What the user can do about an error of the disk; None for errors that say it themselves."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror}; finished shards are whole; make room and start the same command again"
    if error.errno == errno.ENOENT and str(error.filename).endswith(".part"):
        return f"another call for the same shards removed {Path(error.filename).name}; run one call for each part at a time"
    return None


def _plan(config: PrepareConfig, sources: list[Source], labels: str | None) -> dict[str, Any]:
    """What decides the bytes of the shards. How the work is split (`part`, `workers`) does not."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr(source).encode())
    settings = {name: getattr(config, name) for name in ("frames", "size", "seconds", "quality", "shard_clips")}
    csv = config.labels.read_bytes() if config.labels else labels.encode() if labels else None
    known = None if csv is None else hashlib.sha256(csv).hexdigest()
    return {"version": VERSION, "clips": len(sources), "list": digest.hexdigest(), **settings, "labels": known}


def _make_shards(
    config: PrepareConfig, folder: OutputFolder, sources: list[Source], encode: EncodeClip, numbers: Sequence[int]
) -> None:
    """Makes those of the shards `numbers` that are not there."""
    from tqdm import tqdm

    spans = {n: range(n * config.shard_clips, min((n + 1) * config.shard_clips, len(sources))) for n in numbers}
    total = sum(map(len, spans.values()))  # clips
    rejects: list[dict[str, Any]] = []
    for number in numbers:
        if (record := finished(folder.path, number)) is not None:
            rejects += record["rejects"]
            del spans[number]
    folder.begin_rejects(rejects)
    if not spans:
        return
    todo = sum(map(len, spans.values()))
    count = min(config.workers or default_count(), todo)
    description = None if folder.part.whole else f"part {folder.part}"
    with (
        tqdm(total=total, initial=total - todo, desc=description, unit="clip", dynamic_ncols=True, smoothing=0.05) as bar,
        Workers(
            encode,
            count,
            timeout=config.timeout,
            describe=lambda item: str(item[1]),
            report=partial(tqdm.write, file=sys.stderr),  # which, unlike stdout, takes names that are no text
        ) as workers,
    ):
        items = ((key, sources[key]) for span in spans.values() for key in span)
        results = _counted(workers.in_order(items, _JOBS_PER_WORKER * count, _nbytes), bar, len(rejects))
        for number, span in spans.items():
            folder.log_rejects(_make_shard(folder, number, [(key, sources[key]) for key in span], results))


def _counted(results: Iterator[Any], bar: Any, left_out: int) -> Iterator[PreparedClip | str | Lost]:
    """The results as they come, with the progress bar moved on by each."""
    for result in results:
        left_out += not isinstance(result, PreparedClip)
        bar.set_postfix_str(f"left out {left_out}", refresh=False)
        bar.update()
        yield result


def _make_shard(
    folder: OutputFolder, number: int, clips: list[tuple[int, Source]], results: Iterator[PreparedClip | str | Lost]
) -> list[dict[str, Any]]:
    """Takes a result for each of the clips, and publishes the shard -> the clips that were left out."""
    rejects: list[dict[str, Any]] = []
    writer = folder.writer(number)
    try:
        for (key, source), result in zip(clips, results, strict=False):  # the results after them are other shards'
            if isinstance(result, PreparedClip):
                writer.add(result)
            else:
                reason = result.reason if isinstance(result, Lost) else result
                rejects.append({"key": key, "id": source.id, "source": str(source), "reason": reason})
        folder.check_plan()
        writer.finish(rejects)
    except BaseException:
        writer.abandon()
        raise
    return rejects


def _nbytes(result: PreparedClip | str | Lost) -> int:
    return len(result.sound) + sum(map(len, result.images)) if isinstance(result, PreparedClip) else 0


def _publish(config: PrepareConfig, folder: OutputFolder, listed: int, total: int, labeled: bool) -> dict[str, Any]:
    """Writes what is known only when all `total` shards are there: rejects, the index of all clips and the manifest."""
    shards = []
    rows: list[np.ndarray] = []
    dtype = index_dtype(config.frames)
    rejects: list[dict[str, Any]] = []
    for number in range(total):
        record = read_record(folder.path, number)
        rejects += record["rejects"]
        if record["clips"]:
            shards.append({"number": number, "clips": len(record["clips"]), "bytes": record["bytes"]})
            places = [(number, c["key"], c["offset"], c["size"], c["crc"]) for c in record["clips"]]
            rows.append(np.array(places, dtype))
    folder.write(REJECTS, reject_lines(rejects))
    index = np.concatenate([*rows, np.zeros(0, dtype)])
    folder.put(INDEX, lambda file: np.save(file, index))
    manifest = {
        "version": VERSION,
        "listed": listed,
        "clips": sum(shard["clips"] for shard in shards),
        "rejects": len(rejects),
        "frames": config.frames,
        "size": config.size,
        "seconds": config.seconds,
        "sample_rate": SAMPLE_RATE,
        "quality": config.quality,
        "labels": LABELS if labeled else None,
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
    }
    folder.write(MANIFEST, json.dumps(manifest, indent=1) + "\n")
    folder.tidy()
    return manifest
