"""An index: the embeddings of a data set in a folder, readable as NumPy memory maps.

    index.json                  which model (hash of its weights), which clips, what is embedded; written first and last
    part-000000.safetensors     of a fixed stretch of the data set: `audio`, `video` `[n, D]` or `[n, L, D]`; `numbers [n]`,
                                the clips' numbers in the data set; `names`, JSON: [id, path] of each row

A part is there whole or not at all. What an interrupted command wrote stays, and the same command goes on behind it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cavmae_fast.data.sets.shards import put_whole, write_whole
from cavmae_fast.errors import CavmaeError

VERSION = 1
MANIFEST = "index.json"
STORED = {"float32": np.float32, "float16": np.float16}
_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}
_REJECTS = "rejects"


class IndexFolderError(CavmaeError, ValueError):
    """A folder is no index that can be used; the message names the file and the cause."""


class Row(NamedTuple):
    """A clip in an index: its name, the file that it came from and its number in the data set."""

    id: str
    path: str
    number: int


class Part:
    """One part of an index.

    Attributes:
        path: the file.
        streams: by stream, the embeddings `[n, ...]`, mapped.
        numbers: `[n]` int64, of the clips in the data set.
    """

    def __init__(self, path: Path):
        self.path = path
        tensors, self._metadata = map_tensors(path)
        if not {"numbers", "names"} <= tensors.keys():
            raise IndexFolderError(f"{path}: lacks numbers or names; `cavmae-fast embed` writes both")
        self._names = tensors.pop("names")
        self.numbers = tensors.pop("numbers")
        self.streams = tensors
        for name, x in tensors.items():
            if len(x) != len(self):
                raise IndexFolderError(f"{path}: {name} has {len(x)} rows and numbers {len(self)}; they must be as many")

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def names(self) -> list[tuple[str, str]]:
        """(id, path) of each row."""
        try:
            names = [(str(name), str(path)) for name, path in json.loads(self._names.tobytes())]
        except (ValueError, TypeError) as error:
            raise IndexFolderError(f"{self.path}: its names cannot be read ({error})") from error
        if len(names) != len(self):
            raise IndexFolderError(f"{self.path}: has {len(names)} names for {len(self)} rows")
        return names

    @property
    def ids(self) -> list[str]:
        return [name for name, _ in self.names]

    @property
    def rejects(self) -> list[dict[str, str]]:
        """The clips of this stretch that could not be embedded: `path` and `reason`."""
        return json.loads(self._metadata.get(_REJECTS, "[]"))


class Index:
    """A finished index.

    Attributes:
        folder, manifest: where it lies and what `index.json` says.

    Raises:
        IndexFolderError: the folder is no finished index, or a part is missing, damaged or of another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise IndexFolderError(f"{self.folder}: the index is not finished; start the same `cavmae-fast embed` again")
        self.parts = [Part(self.folder / part_name(number)) for number in range(len(self.manifest["parts"]))]
        for part, rows in zip(self.parts, self.manifest["parts"], strict=True):
            if len(part) != rows:
                raise IndexFolderError(f"{part.path}: has {len(part)} rows; {MANIFEST} says {rows}")
            if missing := [name for name in self.streams if rows and name not in part.streams]:
                raise IndexFolderError(f"{part.path}: lacks {missing[0]}, which {MANIFEST} names")
        self._ends = np.cumsum([len(part) for part in self.parts])

    @property
    def streams(self) -> list[str]:
        """What is embedded: 'audio', 'video' or both."""
        return self.manifest["streams"]

    def __len__(self) -> int:
        """Clips in the index."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def arrays(self, stream: str) -> Iterator[np.ndarray]:
        """The embeddings of one stream, part by part, each `[n, D]` (or `[n, L, D]`), mapped from the file."""
        return (part.streams[stream] for part in self.parts if len(part))

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row is {row}; the index holds {len(self)} clips")
        number = int(np.searchsorted(self._ends, row, side="right"))
        part = self.parts[number]
        place = row - (int(self._ends[number]) - len(part))
        return Row(*part.names[place], int(part.numbers[place]))

    @property
    def ids(self) -> list[str]:
        return [name for part in self.parts for name in part.ids]

    @property
    def rejects(self) -> list[dict[str, str]]:
        return [reject for part in self.parts for reject in part.rejects]


def part_name(number: int) -> str:
    return f"part-{number:06d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `index.json` says, also of an index that is not finished. IndexFolderError when there is none."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["version"] != VERSION:
            raise IndexFolderError(f"{path}: version {manifest['version']}; this program reads version {VERSION}")
        for name in ("model", "clip", "streams", "pooling", "frames", "data", "complete", "parts"):
            manifest[name]
        return manifest
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexFolderError(f"{path}: no such file; `cavmae-fast embed` writes an index") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, IndexFolderError):
            raise
        raise IndexFolderError(f"{path}: not a readable manifest of an index ({error!r})") from error


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def write_part(
    path: Path,
    streams: dict[str, np.ndarray],
    numbers: Sequence[int],
    names: Sequence[tuple[str, str]],
    rejects: Sequence[dict[str, str]],
) -> None:
    """Writes one part, whole or not at all."""
    from safetensors.numpy import save

    # ASCII, because a file's name may be any bytes; as JSON, because it may hold any sign, also the end of a line.
    text = np.frombuffer(json.dumps([list(name) for name in names]).encode("ascii"), np.uint8)
    tensors = {**streams, "numbers": np.asarray(numbers, np.int64), "names": text}
    data = save(tensors, metadata={_REJECTS: json.dumps(list(rejects))})
    put_whole(path, lambda file: file.write(data))


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file as NumPy memory maps, and its metadata: only what is looked at is read.

    Raises:
        IndexFolderError: the file is missing, is no safetensors file or was cut off.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            dtype, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), entry["data_offsets"]
            shape = tuple(entry["shape"])
            if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"{name} does not lie within the file")
            if end == begin:  # NumPy maps nothing of size 0
                tensors[name] = np.empty(shape, dtype)
            else:
                tensors[name] = np.memmap(path, dtype, "r", 8 + length + begin, shape)
        return tensors, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFolderError(f"{path}: not a readable safetensors file ({error})") from error
