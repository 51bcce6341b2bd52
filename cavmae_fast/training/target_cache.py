"""`--cache-targets`: a teacher's tokens on the disk, so that no step of stage 2 computes them again.

    targets.json               what they were made of: teacher, clips, what the teacher takes of a clip, dtype
    part-000012.safetensors    the targets of a fixed stretch of the data set, and which clips of it there are

A target belongs to a clip and to the crop that the teacher saw of it. Crops are drawn anew in every epoch, and targets of
all of them cannot be kept; so a run with a cache takes one crop of each clip, its middle, and adds no noise to its sound.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.decoder import UnusableDataError
from cavmae_fast.data.draws import Augmentation
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.sets.opening import Clips, checksum
from cavmae_fast.data.sets.shards import ShardSet, put_whole, write_whole
from cavmae_fast.errors import CavmaeError
from cavmae_fast.models.precision import Precision
from cavmae_fast.reference.outputs import FeatureOutput
from cavmae_fast.training.ranks import Ranks
from cavmae_fast.training.teacher import Teacher

VERSION = 1
MANIFEST = "targets.json"
PART_CLIPS = 64
"Clips per file: of ViT-B in 16 bits, 128 MB."
STEP_CLIPS = 16
"Clips that the teacher sees together while the cache is made; `PART_CLIPS` is a multiple of it."
FIXED_CROPS = Augmentation.EVALUATE
"What is done to clips whose targets are kept: nothing, and the crop is the middle one."


class TargetCacheError(CavmaeError):
    """A folder that does not hold the targets that are asked for; the message names it and says what it holds."""


class TargetCache:
    """The targets of a data set, as `Teacher.targets` gave them once, to the bit.

    Args:
        folder: a finished cache.
        device: where the targets are wanted.

    Raises:
        TargetCacheError: a file is missing or cannot be read.
    """

    macs = 0.0

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._rows: dict[int, tuple[Path, int]] = {}
        for path in sorted(folder.glob("part-*.safetensors")):
            with _open(path) as part:
                for row, clip in enumerate(part.get_tensor("clips").tolist()):
                    self._rows[clip] = path, row

    def targets(self, batch: Batch) -> FeatureOutput:
        """The tokens of the batch's clips, found by their numbers in the data set. TargetCacheError for one that the cache
        lacks, because it could not be used when the cache was made."""
        found: list[tuple[Tensor, ...]] = []
        for clip, name in zip(batch.clips.tolist(), batch.ids, strict=True):
            if clip not in self._rows:
                raise TargetCacheError(
                    f"{self.folder} holds no targets of clip {name!r}, which could not be used when they were made; remove "
                    f"{self.folder / part_name(clip // PART_CLIPS)} and start the same command again"
                )
            path, row = self._rows[clip]
            with _open(path) as part:
                found.append(tuple(part.get_slice(stream)[row : row + 1] for stream in FeatureOutput._fields))
        return FeatureOutput(*(torch.cat(parts).to(self.device, non_blocking=True) for parts in zip(*found)))


def fill(
    folder: Path,
    teacher: Teacher,
    clips: Clips,
    spec: ClipSpec,
    precision: Precision,
    ranks: Ranks,
    loader_of: Callable[[Clips], Loader],
) -> TargetCache:
    """The cache in `folder`, whose missing parts are made now, each whole or not at all; ranks share them.

    Args:
        teacher: says the targets.
        clips: the data set.
        spec: what the teacher takes of a clip.
        precision: in which the teacher computes. Targets are kept in the dtype in which they come.
        loader_of: a loader of a stretch of the data set, of `STEP_CLIPS` clips per step, in order, for this rank alone.

    Raises:
        TargetCacheError: the folder holds the targets of another teacher, of other clips or of other crops, or no cache.
    """
    said = {
        "version": VERSION,
        "teacher": teacher.hash,
        "clips": len(clips),
        "data": checksum(clips, None),
        "clip": asdict(spec),
        "crop": "middle",
        "computed_in": str(precision.dtype).removeprefix("torch."),
        "part_clips": PART_CLIPS,
    }
    ranks.from_first(lambda: _begin(folder, json.loads(json.dumps(said))))
    numbers = range(-(-len(clips) // PART_CLIPS))
    missing = [number for number in numbers if not (folder / part_name(number)).exists()]
    ranks.barrier()  # all have looked before anybody writes
    if missing:
        ranks.say(f"--cache-targets: {len(missing)} of {len(numbers)} parts are to be made in {folder}")
    for run in _runs(missing, ranks):
        first, last = run.start * PART_CLIPS, min(run.stop * PART_CLIPS, len(clips))
        piece = clips.part(first, last) if isinstance(clips, ShardSet) else clips[first:last]
        _write(folder, run, teacher, loader_of(piece), precision)
    ranks.barrier()
    return TargetCache(folder, precision.device)


def _runs(missing: list[int], ranks: Ranks) -> list[range]:
    """This rank's share of the missing parts, in runs of consecutive numbers: a loader for each run."""
    own = np.array_split(np.array(missing, np.int64), ranks.world_size)[ranks.rank]
    pieces = np.split(own, np.flatnonzero(np.diff(own) != 1) + 1) if len(own) else []
    return [range(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]


def part_name(number: int) -> str:
    return f"part-{number:06d}.safetensors"


def _begin(folder: Path, said: dict[str, Any]) -> None:
    """Notes in `folder` what it will hold. TargetCacheError when it holds something else."""
    path = folder / MANIFEST
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(folder.iterdir()):
            raise TargetCacheError(f"--cache-targets {folder} holds files, but no {MANIFEST}; it must be empty or a cache")
        write_whole(path, json.dumps(said, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text())
        names = [name for name in said if before.get(name) != said[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise TargetCacheError(f"{path} cannot be read ({error}); name another folder") from error
    if names:
        changed = ", ".join(f"{name} {before.get(name)} there, {said[name]} now" for name in names)
        raise TargetCacheError(f"--cache-targets {folder} holds other targets ({changed}); name another folder")


@torch.no_grad()
def _write(folder: Path, run: range, teacher: Teacher, loader: Loader, precision: Precision) -> None:
    """Writes the parts of a run. Clips that cannot be used are left out: training will not meet them either.

    A step of the loader lies within one part, because parts hold whole steps (`STEP_CLIPS`).
    """
    left = set(run)
    try:
        for number, batches in itertools.groupby(loader, lambda batch: run.start + int(batch.clips[0]) // PART_CLIPS):
            clips, targets = [], []
            for batch in batches:
                with precision.autocast():
                    targets.append(tuple(tokens.cpu() for tokens in teacher.targets(batch)))
                clips.append(torch.from_numpy(batch.clips + run.start * PART_CLIPS))
            tensors = {stream: torch.cat(parts).contiguous() for stream, parts in zip(FeatureOutput._fields, zip(*targets))}
            _put(folder / part_name(number), tensors | {"clips": torch.cat(clips)})
            left.remove(number)
    except UnusableDataError:  # of this run no clip can be used; training says so, and why
        pass
    finally:
        loader.close()
    for number in left:
        _put(folder / part_name(number), {"clips": torch.zeros(0, dtype=torch.int64)})


def _put(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    data = save(tensors)
    mark = f".{socket.gethostname()}.{os.getpid()}"  # runs with the same teacher may share a cache
    put_whole(path, lambda file: file.write(data), mark)


def _open(path: Path) -> Any:
    """A part, of which only what is asked for is read. TargetCacheError when it cannot be."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise TargetCacheError(
            f"{path} cannot be read ({error}); remove it and start the same command again, which makes it anew"
        ) from error
