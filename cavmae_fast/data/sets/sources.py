"""Where clips come from: folders, globs, lists of paths, the published JSON lists and data sets of sound alone, each as
`Source` records."""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cavmae_fast.data.media.files import VIDEO_SUFFIXES, MediaError, find_media
from cavmae_fast.data.sets.audio_sets import read_audio_set
from cavmae_fast.data.sets.labels import LabelSet, split_labels

_MAX_FILE_BYTES = 1 << 30


class Source(NamedTuple):
    """One clip and where it is: a media file, the published layout of extracted frames and sound, or a sound alone.

    Attributes:
        id: its name, as retrieval and reports give it.
        labels: ids of its classes (`mid`).
        video: a media file with picture and sound, or None.
        frames: a folder with `frame_{k}/{id}.jpg`, or None.
        sound: a WAV or FLAC file, or None.
    """

    id: str
    labels: tuple[str, ...] = ()
    video: str | None = None
    frames: str | None = None
    sound: str | None = None

    def __str__(self) -> str:
        return self.video or self.sound or self.id

    @property
    def has_pictures(self) -> bool:
        """Whether there is more than a sound."""
        return self.video is not None or self.frames is not None

    def frame_path(self, number: int) -> str:
        """The frame's file, or that of the nearest earlier frame that is there, as published.

        Raises:
            MediaError: none is there.
        """
        for k in range(number, -1, -1):
            path = f"{self.frames}/frame_{k}/{self.id}.jpg"
            if os.path.exists(path):
                return path
        raise MediaError(f"{self.id}: no frame {number} or earlier in {self.frames}/frame_{{k}}/{self.id}.jpg")

    def picture_seconds(self) -> None:
        """Extracted frames do not say over which seconds they are spread."""

    def image(self, number: int) -> bytes:
        """The bytes of a frame's file."""
        return read_file(self.frame_path(number))

    def head(self) -> tuple[str, tuple[str, ...], bytes]:
        """Its name, its labels and the bytes of its sound (where that is a file of its own).

        Raises:
            MediaError: the file of the sound is missing or cannot be read.
        """
        return self.id, self.labels, read_file(self.sound)


def read_file(path: str) -> bytes:
    """The whole of a small file. Raises MediaError naming it when that fails."""
    try:
        # Non-blocking, so that a pipe among the files does not hang us; a regular file does not notice.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= _MAX_FILE_BYTES:
                raise MediaError(f"{path}: {size} bytes; allowed: 1 byte to 1 GiB")
            return file.read(size)
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a name that no file can have
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{path!a}: cannot be read ({error})") from error


class Sources(list[Source]):
    """Clips, and the classes where all the places that they come from say the same ones (`label_set`, else None)."""

    label_set: LabelSet | None = None


def find_sources(places: Sequence[str | Path]) -> Sources:
    """The clips that `places` name, in a fixed order.

    A place is a folder (searched recursively for media files, sorted), a media file, a glob, a CSV file of media paths
    (first column; an optional column of comma-joined label ids; a first row without folder and suffix is the heading), or
    a JSON list as published: `{"data": [{"video_id", "wav", "video_path", "labels"}]}`, where `video_path` is a folder of
    extracted frames or a video file, and `video` may name the video instead. Relative paths in a list start at the list.
    A folder may also be a data set of sound alone in its published layout (`audio_sets.read_audio_set`): ESC-50 or Speech
    Commands. Some of its splits are named behind an `@`: `ESC-50-master@1,2,3,4`, `speech_commands@testing`.

    Raises:
        MediaError: a place does not exist, a list cannot be read, or nothing was found. The message names it.
    """
    found = Sources()
    label_sets: list[LabelSet | None] = []
    for place in map(str, places):
        path = Path(place)
        if (listed := _audio_set(place)) is not None:
            sounds, label_set = listed
            found += sounds
            label_sets.append(label_set)
            continue
        label_sets.append(None)
        if path.suffix.lower() == ".json" and path.is_file():
            found += _published(path)
        elif path.suffix.lower() == ".csv" and path.is_file():
            found += _paths(path)
        elif not path.exists() and glob.has_magic(place):
            matches = sorted(glob.glob(place, recursive=True))
            if not matches:
                raise MediaError(f"{place}: the pattern matches no file")
            found += find_sources(matches)
        else:
            start = path if path.is_dir() else path.parent
            found += [Source(id=_id(file, start), video=str(file)) for file in find_media([path])]
    if not found:
        raise MediaError(f"{', '.join(map(str, places)) or 'an empty list'}: names no clip")
    if all(label_set == label_sets[0] for label_set in label_sets):
        found.label_set = label_sets[0]
    return found


def _audio_set(place: str) -> tuple[list[Source], LabelSet] | None:
    """The clips and classes of a data set of sound alone, or of the splits of it that `place` names; None where the place
    is something else."""
    root, splits = place, []
    if "@" in place and not os.path.exists(place):
        root, _, names = place.rpartition("@")
        splits = [name.strip() for name in names.split(",")]
    audio_set = read_audio_set(Path(root))
    if audio_set is None:
        return None
    sounds = audio_set.of(place, splits or audio_set.splits)
    return [Source(one.id, (one.label,), sound=one.path) for one in sounds], audio_set.label_set


def _id(file: Path, start: Path) -> str:
    return file.relative_to(start).with_suffix("").as_posix() if file.is_relative_to(start) else file.stem


def _paths(path: Path) -> list[Source]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row and row[0].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MediaError(f"{path}: not a readable CSV list ({error})") from error
    first = rows[0][0].strip() if rows else ""
    if not ("/" in first or Path(first).suffix or (path.parent / first).is_file()):
        rows = rows[1:]  # the heading
    found = []
    for row in rows:
        file = path.parent / row[0].strip()
        labels = split_labels(row[1]) if len(row) > 1 else ()
        found.append(Source(id=Path(row[0].strip()).with_suffix("").as_posix(), labels=labels, video=str(file)))
    return found


def _published(path: Path) -> list[Source]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MediaError(f'{path}: not a readable list; allowed: JSON {{"data": [...]}} ({error!r})') from error
    if not isinstance(rows, list):
        raise MediaError(f'{path}: "data" is {type(rows).__name__}; allowed: a list of clips')
    return [_published_row(path, number, row) for number, row in enumerate(rows)]


def _published_row(path: Path, number: int, row: Any) -> Source:
    where = f"{path}: clip {number}"
    if not isinstance(row, dict):
        raise MediaError(f"{where} is {type(row).__name__}; allowed: an object with video_id, wav, video_path, labels")
    for key in ("video_id", "wav", "video_path", "video", "labels"):
        if not isinstance(row.get(key, ""), str):
            raise MediaError(f"{where}: {key} is {row[key]!r}; allowed: text")
    if not row.get("video_id"):
        raise MediaError(f"{where} has no video_id")
    # A list of two million clips names the same folder and the same classes over and over.
    labels = tuple(map(sys.intern, split_labels(row.get("labels", ""))))
    folder, video = row.get("video_path", ""), row.get("video", "")
    if folder.lower().endswith(VIDEO_SUFFIXES):
        folder, video = "", video or folder
    base = path.parent
    # A list that names both is read as the published pipeline reads it, where the extracted frames are there.
    if row.get("wav") and folder and not (video and not os.path.isdir(base / folder)):
        frames = sys.intern(os.path.join(base, folder.rstrip("/") or "/"))
        return Source(row["video_id"], labels, frames=frames, sound=os.path.join(base, row["wav"]))
    if video:
        return Source(row["video_id"], labels, video=os.path.join(base, video))
    raise MediaError(f"{where} ({row['video_id']}) names neither wav and video_path nor a video")
