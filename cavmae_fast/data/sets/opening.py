"""Opening a data set: its clips, its classes, its weights, and the number that tells it from others."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.media.crop import FRAME_SECONDS
from cavmae_fast.data.sets.labels import LabelSet, read_weights
from cavmae_fast.data.sets.shards import LABELS, ShardSet, shard_folder
from cavmae_fast.data.sets.sources import Source, find_sources

NUM_FRAMES = 10
"Frames of a clip that is not in shards, as published."
Clips = ShardSet | Sequence[Source]
"""Where the clips of a data set are, by number."""


def open_clips(data: str | Path | Sequence[str | Path] | Clips) -> Clips:
    """The clips of a data set: a folder of shards, or whatever `find_sources` takes; opened ones come back as they are.

    Raises:
        MediaError: it does not exist, cannot be read or names no clip.
    """
    if isinstance(data, ShardSet) or (not isinstance(data, str | Path) and data and isinstance(data[0], Source)):
        return data
    places = [data] if isinstance(data, str | Path) else list(data)
    folder = shard_folder(places)
    return find_sources(places) if folder is None else ShardSet(folder)


def frames_of(clips: Clips, clip: ClipSpec) -> int:
    """Into how many frames a clip's first ten seconds are cut, from which the model's pictures are chosen.

    Shards say what they were prepared with; the published layout has ten; videos are cut as finely as the frame rate needs.

    A model that takes no pictures needs no frames: 1.

    Raises:
        ValueError: the data set has no pictures, or fewer per second than the model takes.
    """
    if clip.frames == 0:
        return 1
    if isinstance(clips, ShardSet):
        without = None if clips.num_frames else clips.folder
    else:
        without = next((source for source in clips if not source.has_pictures), None)
    if without is not None:
        raise ValueError(
            f"{without} holds sound alone, and the model takes pictures, too (clip.frames is {clip.frames}); allowed: a "
            "model of sound alone, such as `finetune --model audio` makes"
        )
    needed = 1 if clip.frame_rate is None else math.ceil(FRAME_SECONDS * clip.frame_rate)
    if isinstance(clips, ShardSet):
        found, seconds = clips.num_frames, clips.manifest["seconds"]
        if clip.frame_rate is not None and seconds < FRAME_SECONDS:
            raise ValueError(
                f"clip.frame_rate is {clip.frame_rate:g}, but {clips.folder} holds {seconds:g} s of sound beside frames of "
                f"{FRAME_SECONDS} s; allowed: shards prepared with --seconds {FRAME_SECONDS} or more"
            )
    elif needed > NUM_FRAMES and all(source.video for source in clips):
        found = needed
    else:
        found = NUM_FRAMES
    if found < needed:
        raise ValueError(
            f"clip.frame_rate is {clip.frame_rate:g}, but the data set has {found} frames of each clip's {FRAME_SECONDS} s; "
            f"allowed: {found / FRAME_SECONDS:g} or less, or shards prepared with --frames {needed} or more"
        )
    return found


def views_of(clips: Clips, clip: ClipSpec) -> int:
    """How often a clip can be judged, with another picture each time: as often as it has frames, where the model takes one
    of them; once where it takes none, or a crop."""
    return frames_of(clips, clip) if clip.frames and clip.frame_rate is None else 1


def clip_weights(weights: str | Path | np.ndarray, clips: Clips) -> np.ndarray:
    """Sampling weights `[clips]` from an array, or from a file with one number per row.

    A file that was made for the list from which shards were prepared has a row for each clip of that list; the rows of the
    clips that are in the shards are taken.

    Raises:
        LabelError: the file cannot be read or does not fit.
    """
    if isinstance(weights, np.ndarray):
        return weights
    if isinstance(clips, ShardSet) and clips.manifest["listed"] != len(clips) and Path(weights).is_file():
        with Path(weights).open() as file:
            rows = sum(1 for _ in file)
        if rows == clips.manifest["listed"]:
            return read_weights(weights, rows)[clips.index["key"]]
    return read_weights(weights, len(clips))


def clip_labels(labels: LabelSet | str | Path | None, clips: Clips) -> LabelSet | None:
    """The classes: as given, from a CSV, or those that the shards or the published data set say. LabelError when they cannot
    be read."""
    if isinstance(labels, str | Path):
        return LabelSet.from_csv(labels)
    if labels is None and isinstance(clips, ShardSet) and clips.manifest["labels"]:
        return LabelSet.from_csv(clips.folder / LABELS)
    return getattr(clips, "label_set", None) if labels is None else labels


def labels_of(clips: Clips) -> list[tuple[str, ...]]:
    """The label ids of every clip, by its number in the data set. Nothing is decoded."""
    if isinstance(clips, ShardSet):
        return [tuple(said["labels"]) for said in clips.clips()]
    return [clip.labels for clip in clips]


def checksum(clips: Clips, weights: np.ndarray | None) -> int:
    """CRC-32 of what tells this data set from others of its size, and of the weights."""
    if isinstance(clips, ShardSet):
        crc = zlib.crc32(np.ascontiguousarray(clips.index["crc"][:, 1]))  # of each clip's sound
    else:
        crc = zlib.crc32("\n".join(clip.id for clip in clips).encode(errors="surrogateescape"))
    return crc if weights is None else zlib.crc32(np.ascontiguousarray(weights), crc)
