"""Batches of clips straight from media files: bad files are set aside by name, never replaced by something else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cavmae_fast.data.media import Clip, MediaError, read_clip

NUM_FRAMES = 10
SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Reject:
    """A clip that could not be used: its path and, in one sentence, why."""

    path: str
    reason: str


class NoUsableClipError(MediaError):
    """Not a single clip can be used; `rejects` says why, clip by clip."""

    def __init__(self, rejects: list[Reject]) -> None:
        super().__init__(f"none of the {len(rejects)} clips can be used; the first: {rejects[0].reason}")
        self.rejects = rejects


class Item(TypedDict):
    """One clip: `id` (its path), `frame` uint8 `[3, S, S]`, `waveform` int16 `[samples]`, `num_samples`."""

    id: str
    frame: Tensor
    waveform: Tensor
    num_samples: int


class Batch(TypedDict):
    """`ids` (paths), `image` uint8 `[B, 3, S, S]`, `waveform` int16 `[B, samples]`, `num_samples` int64 `[B]`, and the
    `rejects` met while the batch was gathered."""

    ids: list[str]
    image: Tensor
    waveform: Tensor
    num_samples: Tensor
    rejects: list[Reject]


# Decoded clips of this process, by file (path, size, time of change) and by what was asked of it. It outlives a single
# `load_clips`, so that the second epoch finds what the first one decoded.
_cache: dict[tuple, Clip | Reject] = {}


def clear_cache() -> None:
    """Forget every clip that `cache=True` kept in memory."""
    _cache.clear()


class ClipDataset(Dataset):
    """Clips by index: an `Item`, or a `Reject` when the file cannot be used.

    Args:
        paths: media files.
        training: draw one of the clip's 10 frames at random, the same one for the same (seed, epoch, index); else
            frame 5, as published.
        seed, epoch: of that draw.
        image_size: height and width of the frame.
        seconds: length of the returned waveform at 16 kHz; longer sound is cut, shorter zero-padded.
        cache: keep decoded clips (when training: all 10 frames of each, 1.8 MB a clip at 224 pixels and 10 s) in
            this process's memory, for small data sets; `clear_cache` lets them go.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        training: bool = False,
        seed: int = 0,
        epoch: int = 0,
        image_size: int = 224,
        seconds: float = 10.24,
        cache: bool = False,
    ):
        self.paths = [str(path) for path in paths]
        self.training, self.seed, self.epoch = training, seed, epoch
        self.image_size, self.seconds, self.cache = image_size, seconds, cache

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item | Reject:
        number = NUM_FRAMES // 2
        if self.training:
            number = int(np.random.default_rng([self.seed, self.epoch, index]).integers(NUM_FRAMES))
        clip = self._clip(self.paths[index], number)
        if isinstance(clip, Reject):
            return clip
        frame = clip.frames[number if len(clip.frames) > 1 else 0]
        samples = len(clip.waveform)
        waveform = torch.zeros(int(self.seconds * SAMPLE_RATE), dtype=torch.int16)
        waveform[:samples] = torch.from_numpy(clip.waveform)
        image = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))
        return Item(id=self.paths[index], frame=image, waveform=waveform, num_samples=samples)

    def _clip(self, path: str, number: int) -> Clip | Reject:
        if not self.cache:
            return self._read(path, number)
        try:
            status = Path(path).stat()
        except OSError:
            return self._read(path, number)  # names the cause
        wanted = None if self.training else number  # any of the ten frames may be next, or only ever this one
        key = (path, status.st_size, status.st_mtime_ns, self.image_size, self.seconds, wanted)
        if key not in _cache:
            _cache[key] = self._read(path, wanted)
        return _cache[key]

    def _read(self, path: str, number: int | None) -> Clip | Reject:
        try:
            return read_clip(
                path,
                num_frames=NUM_FRAMES,
                size=self.image_size,
                sample_rate=SAMPLE_RATE,
                seconds=self.seconds,
                frame=number,
            )
        except MediaError as error:
            return Reject(path, str(error))


def collate(items: Sequence[Item | Reject]) -> Batch:
    """One batch of the good items, in their order; the rejects are carried along.

    Raises:
        ValueError: there is no good item to make a batch of.
    """
    good = [item for item in items if not isinstance(item, Reject)]
    if not good:
        raise ValueError(f"items holds {len(items)} rejects and no clip; allowed: at least one clip")
    return Batch(
        ids=[item["id"] for item in good],
        image=torch.stack([item["frame"] for item in good]),
        waveform=torch.stack([item["waveform"] for item in good]),
        num_samples=torch.tensor([item["num_samples"] for item in good], dtype=torch.int64),
        rejects=[item for item in items if isinstance(item, Reject)],
    )


def load_clips(
    paths: Sequence[str | Path],
    batch_size: int,
    *,
    training: bool = False,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 0,
    image_size: int = 224,
    seconds: float = 10.24,
    cache: bool = False,
    drop_last: bool = False,
) -> Iterator[Batch]:
    """One epoch of batches, decoded from media files on the way.

    Batches are full: a clip that cannot be used is replaced by the next good one of the epoch, never by constants, and
    listed once in the `rejects` of the batch being gathered when it was met (those met after the last clip: in the last
    batch). Only the last batch may be smaller. Clips and frames depend on (seed, epoch) alone, not on `workers`.

    Args:
        paths: media files.
        batch_size: clips a batch.
        training: shuffle by (seed, epoch) and draw a random frame of each clip; else the given order and frame 5.
        seed, epoch: of the shuffle and the frames.
        workers: decoding processes; 0 decodes in this process.
        image_size, seconds, cache: as for `ClipDataset`.
        drop_last: leave out the last batch when it is not full, as far as there is a full one before it.

    Raises:
        ValueError: a number is out of range, or `cache` together with `workers` (each worker would keep its own copy
            and lose it at the end of the epoch).
        NoUsableClipError: not a single clip of `paths` can be used.
    """
    if not paths:
        raise ValueError("paths is empty; allowed: at least one media file")
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size={batch_size}, workers={workers}; allowed: batch_size >= 1, workers >= 0")
    if cache and workers:
        raise ValueError(f"cache=True with workers={workers}; allowed: workers=0, for the cache is this process's")
    dataset = ClipDataset(
        paths, training=training, seed=seed, epoch=epoch, image_size=image_size, seconds=seconds, cache=cache
    )
    return _batches(dataset, batch_size, workers, drop_last)


def _batches(dataset: ClipDataset, batch_size: int, workers: int, drop_last: bool) -> Iterator[Batch]:
    order = np.arange(len(dataset))
    if dataset.training:
        np.random.default_rng([dataset.seed, dataset.epoch]).shuffle(order)
    loader = DataLoader(
        dataset, batch_size=None, sampler=order.tolist(), num_workers=workers, prefetch_factor=4 if workers else None
    )
    gathered: list[Item | Reject] = []
    full: list[Item | Reject] | None = None  # held back until more clips are sure to come, to take late rejects along
    good = 0  # clips in `gathered`
    for item in loader:
        gathered.append(item)
        if isinstance(item, Reject):
            continue
        good += 1
        if full is not None and (good == batch_size or not drop_last):
            yield collate(full)
            full = None
        if good == batch_size:
            full, gathered, good = gathered, [], 0
    rejects = [item for item in gathered if isinstance(item, Reject)]
    if full is not None:
        yield collate(full + rejects)
    elif good:
        yield collate(gathered)
    else:
        raise NoUsableClipError(rejects)
