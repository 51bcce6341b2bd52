"""`embed`: a data set's embeddings into an index, part by part, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cavmae_fast.data.sets.opening import Clips, checksum, open_clips
from cavmae_fast.data.sets.shards import ShardSet
from cavmae_fast.evaluation.features import STREAMS, Pooling, Stream, check_frames, check_streams, embed_clips, streams_of
from cavmae_fast.evaluation.index import (
    MANIFEST,
    STORED,
    VERSION,
    Index,
    IndexFolderError,
    Part,
    part_name,
    read_manifest,
    write_manifest,
    write_part,
)
from cavmae_fast.evaluation.running import Model, Running, ready_model
from cavmae_fast.evaluation.sharing import from_first, is_first
from cavmae_fast.models.opening import weights_hash

PART_BYTES = 64 << 20
"A part holds as many clips as have embeddings of this size together: the memory that embedding takes."
MOST_PART_CLIPS = 20_000
"More would lose too much work when the command is interrupted."


def embed(
    model: Model | str | PathLike,
    data: str | Path | Sequence[str | Path] | Clips,
    out: str | Path,
    *,
    streams: Sequence[Stream] | None = None,
    pooling: Pooling = "mean",
    frames: int = 1,
    store: Literal["float32", "float16"] = "float32",
    running: Running | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Index:
    """Embeds every clip of `data` with `model` into the folder `out`, and goes on where an earlier call was interrupted. The
    ranks of `torch.distributed`, where it is initialized, share the clips, and the first one writes.

    Args:
        model: a model, or a checkpoint (see `open_model`).
        data: a folder of shards, folders of videos, media files, lists.
        out: folder of the index.
        streams: of 'audio' and 'video'; default: all that the model has.
        pooling: 'mean': one embedding of length 1 per clip and stream; 'tokens': all normed tokens `[L, D]`.
        frames: pictures per clip whose mean is taken; 1: the middle one, or, for a model of several, the crop in the middle.
        store: what the numbers are written as.
        progress: called with how many clips of how many have been looked at.

    Raises:
        CheckpointError, MediaError: model or data cannot be read.
        IndexFolderError: `out` holds another index, or what is no index, or no clip could be used.
        ValueError: an argument is out of range, or two clips have the same id.
    """
    running = running or Running()
    if pooling not in ("mean", "tokens") or store not in STORED:
        raise ValueError(f"pooling is {pooling!r} and store {store!r}; allowed: mean or tokens, and {' or '.join(STORED)}")
    out = Path(out)
    begun = from_first(lambda: _begun(out, overwrite))
    if begun is not None and running.dtype == "auto":
        running = replace(running, dtype=begun["computed_in"])  # a second measurement could come out otherwise
    running = running.settled()
    precision = running.precision()
    clips = open_clips(data)
    path = None if isinstance(model, Model) else str(Path(model).resolve())
    model = ready_model(model, precision)
    streams = list(streams or streams_of(model))
    check_streams(model, streams)
    check_frames(frames, clips, model)
    check_unique(clips)
    manifest = {
        "version": VERSION,
        "model": {"path": path, "class": type(model).__name__, "sha256": weights_hash(model)},
        "clip": asdict(model.clip_spec),
        "streams": streams,
        "pooling": pooling,
        "frames": frames,
        "store": store,
        "computed_in": str(precision.dtype).removeprefix("torch."),
        "data": {"places": _places(data), "clips": len(clips), "checksum": checksum(clips, None)},
        "part_clips": _part_clips(model, streams, pooling, store),
        "complete": False,
        "parts": [],
    }
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    if begun is not None:
        _check_same(out, begun, manifest)
    from_first(lambda: _begin(out, manifest, overwrite))
    _write_parts(model, clips, out, manifest, running, progress)
    from_first(lambda: _finish(out, manifest))
    return Index(out)


def _finish(out: Path, manifest: dict[str, Any]) -> None:
    """Says in the folder that all parts are there. IndexFolderError when they hold no clip."""
    parts = [Part(out / part_name(number)) for number in range(_count(manifest))]
    rows = [len(part) for part in parts]
    if not any(rows):
        reason = next(reject["reason"] for part in parts for reject in part.rejects)
        raise IndexFolderError(f"{out}: none of the {manifest['data']['clips']} clips can be embedded; the first: {reason}")
    write_manifest(out, manifest | {"complete": True, "parts": rows})


def _begun(out: Path, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of the index that was begun in `out`; None when there is none, or it is not to be kept.

    Raises IndexFolderError when `out` holds something else, which nothing here may remove."""
    if out.exists() and not out.is_dir():
        raise IndexFolderError(f"{out}: is a file; it must be a folder, or not yet exist")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / MANIFEST).exists():
        raise IndexFolderError(f"{out}: holds files, but no {MANIFEST}; it must be empty, an index, or not yet exist")
    return None if overwrite else read_manifest(out)


def check_unique(clips: Clips) -> None:
    """ValueError when two clips have the same id: an answer must name one clip."""
    seen: dict[str, object] = {}
    if isinstance(clips, ShardSet):
        records: Iterator[tuple[str, object]] = ((said["id"], f"shard clip {n}") for n, said in enumerate(clips.clips()))
    else:
        records = ((source.id, source) for source in clips)
    for name, record in records:
        if name in seen:
            raise ValueError(f"the data names the id {name!r} twice: {seen[name]} and {record}; ids must be unique")
        seen[name] = record


def _places(data: str | Path | Sequence[str | Path] | Clips) -> list[str]:
    """Where the clips are, for those who want to see and hear them again; empty where they were given as records."""
    if isinstance(data, ShardSet):
        return [str(data.folder.resolve())]
    places = [data] if isinstance(data, str | Path) else list(data)
    return [str(Path(place).resolve()) for place in places] if isinstance(places[0], str | Path) else []


def _part_clips(model: Model, streams: Sequence[str], pooling: Pooling, store: str) -> int:
    rows = sum(model.lengths[STREAMS[name]] if pooling == "tokens" else 1 for name in streams)
    size = rows * model.config["embed_dim"] * np.dtype(STORED[store]).itemsize
    return max(1, min(PART_BYTES // size, MOST_PART_CLIPS))


def _count(manifest: dict[str, Any]) -> int:
    return -(-manifest["data"]["clips"] // manifest["part_clips"])


def _check_same(out: Path, begun: dict[str, Any], manifest: dict[str, Any]) -> None:
    """IndexFolderError unless the index in `out` was begun with the same model, clips and options."""
    for name in ("model", "clip", "streams", "pooling", "frames", "store", "computed_in", "data", "part_clips"):
        was, is_now = begun.get(name), manifest[name]
        if name == "model":  # a checkpoint may have been moved
            was, is_now = was["sha256"], is_now["sha256"]
        if was != is_now:
            what = {"model": "of another model", "data": "of other clips"}.get(name, f"with another {name}")
            raise IndexFolderError(
                f"{out}: holds an index {what} ({was}, now {is_now}); allowed: the same again, another folder, or overwrite"
            )


def _begin(out: Path, manifest: dict[str, Any], clear: bool) -> None:
    """Makes the folder and says in it what it will hold; `clear` removes the parts of an earlier index."""
    out.mkdir(parents=True, exist_ok=True)
    if clear:
        (out / MANIFEST).unlink(missing_ok=True)
        for path in [*out.glob("part-*.safetensors"), *out.glob("faiss-*.index")]:
            path.unlink()
    write_manifest(out, manifest)


def _write_parts(
    model: Model,
    clips: Clips,
    out: Path,
    manifest: dict[str, Any],
    running: Running,
    progress: Callable[[int, int], object],
) -> None:
    size, total = manifest["part_clips"], len(clips)
    there = from_first(lambda: [(out / part_name(number)).exists() for number in range(_count(manifest))])
    for number, is_there in enumerate(there):
        path, start = out / part_name(number), number * size
        stop = min(start + size, total)
        if is_there:
            progress(stop, total)
            continue
        piece = clips.part(start, stop) if isinstance(clips, ShardSet) else clips[start:stop]
        done = start

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        found = embed_clips(
            model,
            piece,
            running,
            streams=manifest["streams"],
            frames=manifest["frames"],
            pooling=manifest["pooling"],
            progress=report,
        )
        kept = [start + place for place in found.numbers]
        arrays = {name: x.numpy().astype(STORED[manifest["store"]]) for name, x in found.streams.items() if kept}
        names = [(name, str(clips[clip])) for name, clip in zip(found.ids, kept, strict=True)]
        if is_first():
            write_part(path, arrays, kept, names, [asdict(reject) for reject in found.rejects])
        progress(stop, total)
