"""The loader: a data set in, batches of model inputs on the training device out."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.data.augment import (
    Augmentation,
    Draws,
    generator_for,
    mask_spectrogram,
    mix_images,
    mix_waveforms,
    noise_and_roll,
)
from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.decoders import Decoded, InDali, InProcess, InWorkers, Reject, UnusableDataError
from cavmae_fast.data.decode.reading import Reader
from cavmae_fast.data.decode.workers import TIMEOUT, default_count
from cavmae_fast.data.features import AUDIO_MEAN, AUDIO_STD, audio_features, image_features, samples_of
from cavmae_fast.data.order import Order
from cavmae_fast.data.sets.labels import LabelSet, read_weights
from cavmae_fast.data.sets.shards import LABELS, ShardSet, shard_folder
from cavmae_fast.data.sets.sources import Source, find_sources
from cavmae_fast.data.steps import Plan, Step, Want

NUM_FRAMES = 10
BACKENDS = ("auto", "torch", "dali")


@dataclass(frozen=True)
class Batch:
    """What a model takes, on the loader's device.

    Attributes:
        ids: names of the clips.
        audio: `[B, audio_length, 128]` float32, normalized log-mel.
        image: `[B, 3, S, S]` RGB, as the channels lie last in memory: uint8 (the models normalize it), or float32
            normalized with ImageNet's mean and standard deviation.
        labels: `[B, classes]` float32, or None where the loader knows no classes.
        clips: `[B]` int64 NumPy array, the numbers in the data set of the clips that are there.
        epoch, position: of the step; `Loader.batch_at` rebuilds the batch from them.
        rejects: clips that could not be used and were replaced (in training) or left out (in evaluation).
    """

    ids: list[str]
    audio: Tensor
    image: Tensor
    labels: Tensor | None
    clips: np.ndarray
    epoch: int
    position: int
    rejects: list[Reject]


class Decoder(Protocol):
    """What a back end does: steps to decoded arrays, in order. `closing`: `close` is about to be called."""

    closing: bool

    def decode(self, steps: Iterator[Sequence[Want]], stopped: threading.Event) -> Iterator[Decoded]: ...

    def close(self) -> None: ...


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


def clip_weights(weights: str | Path | np.ndarray, clips: Clips) -> np.ndarray:
    """Sampling weights `[clips]` from an array or a file of one number a row; a file for the list from which shards were
    prepared has a row for each clip of that list. LabelError when it does not fit."""
    if isinstance(weights, np.ndarray):
        return weights
    if isinstance(clips, ShardSet) and clips.manifest["listed"] != len(clips) and Path(weights).is_file():
        with Path(weights).open() as file:
            rows = sum(1 for _ in file)
        if rows == clips.manifest["listed"]:
            return read_weights(weights, rows)[clips.index["key"]]
    return read_weights(weights, len(clips))


@dataclass(frozen=True)
class Features:
    """Decoded clips to a batch, on the device."""

    device: torch.device
    audio_length: int
    mean: float
    std: float
    augmentation: Augmentation
    label_set: LabelSet | None
    normalize_images: bool
    seed: int

    def __call__(self, step: Step, decoded: Decoded) -> Batch:
        rows, draws = len(step.draws), step.draws
        image, waveform = decoded.image, decoded.waveform
        used = np.flatnonzero([loaded is not None for loaded in decoded.loaded])
        loaded = [decoded.loaded[place] for place in used]
        clips = np.array([decoded.clips[place] for place in used], np.int64)
        if len(used) < len(step.wants):  # evaluation alone leaves places empty, and mixes nothing
            rows, draws = len(used), draws[used]
        count = torch.tensor([one.samples for one in loaded], dtype=torch.int64)
        labels = self._labels(loaded, draws)
        on_cpu = self.device.type == "cpu"
        image = image.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # [n, 3, S, S], channels last
        waveform = waveform.to(self.device, non_blocking=True)
        count = count if on_cpu else count.pin_memory().to(self.device, non_blocking=True)
        if self.normalize_images:
            image = image_features(image)
        elif on_cpu:
            image = image.clone()  # the memory it lies in is used again
        if draws.mixed.any():
            other = np.arange(rows)
            other[draws.mixed] = rows + np.arange(draws.mixed.sum())
            other = torch.from_numpy(other).to(self.device, non_blocking=True)
            image = mix_images(image[:rows], image[other], draws.lam)
            waveform, count = mix_waveforms(waveform[:rows], count[:rows], waveform[other], count[other], draws.lam)
        audio = audio_features(waveform, count, self.audio_length, self.mean, self.std)
        if self.augmentation.freq_mask or self.augmentation.time_mask:
            audio = mask_spectrogram(audio, draws.freq, draws.time, -self.mean / self.std)
        if self.augmentation.noise and rows:
            generator = generator_for(self.device, self.seed, step.epoch, step.wants[0].position)
            audio = noise_and_roll(audio, draws.level, draws.shift, generator)
        if labels is not None:
            labels = labels if on_cpu else labels.pin_memory().to(self.device, non_blocking=True)
        ids = [one.id for one in loaded[:rows]]
        return Batch(ids, audio, image, labels, clips[:rows], step.epoch, step.position, decoded.rejects)

    def _labels(self, loaded: Sequence, draws: Draws) -> Tensor | None:
        if self.label_set is None:
            return None
        rows, smoothing = len(draws), self.augmentation.label_smoothing
        indices = self.label_set.encode([one.labels for one in loaded])
        if not draws.mixed.any():
            return self.label_set.multi_hot(indices, smoothing)
        partner = np.full_like(indices[:rows], -1)
        partner[draws.mixed] = indices[rows:]
        return self.label_set.multi_hot(indices[:rows], smoothing, partner=partner, lam=draws.lam)


class Loader:
    """Batches of a data set, decoded ahead, their features computed in batch on the training device.

    `for batch in loader` runs to the end of the epoch; the next loop is the next epoch. Clips, frames and all decisions of
    the augmentation depend on (seed, epoch, position in the epoch) alone: not on the back end, the workers, the ranks. (The
    noise field, drawn for a whole batch, depends on how the epoch is cut into batches, and on the kind of device.)

    A clip that cannot be used is named in the batch's `rejects` and in `loader.rejects`; in training another clip, drawn by
    the same rule, takes its place, so that all ranks take as many full steps; in evaluation it is left out.

    Args:
        data: a folder that `cavmae-fast prepare` wrote; or folders, media files, globs, CSV or published JSON lists.
        batch_size: clips a step, on this rank.
        training: shuffle, augment, leave out the last step when it is not full; else the data set's order, all of it.
        augmentation: default `Augmentation.PRETRAIN` in training, else `Augmentation.EVALUATE`.
        labels: the classes, as a `LabelSet` or its CSV; default: those the shards were prepared with.
        weights: `[clips]` or a file of them, for balanced sampling: clips drawn by weight, with replacement.
        backend: 'torch' (worker processes: PyAV, Pillow, FLAC), 'dali', or 'auto'; `loader.backend` and `loader.reason`
            say which it is and why.
        device: where the features are computed and the batches lie.
        workers: decoding processes ('torch') or threads ('dali'); default: one a core; 0 decodes in this process ('torch').
        image_size, audio_length: of the model's inputs, in pixels and in frames of 10 ms.
        mean, std: of the log-mel values of the training data.
        normalize_images: give float32 images; else uint8, which the models normalize on the way into the patch
            projection (with mixup images are always float32).
        seed: of the order, the frames and the augmentation.
        rank, world_size: of this process and of all; default: torch.distributed's where it is initialized, else 0 of 1.
        frame: which frame to use, for evaluation on another than the middle one.
        keep: hold decoded clips in memory, for small data sets (with `workers=0`).
        prefetch: steps decoded ahead.
        timeout: seconds a clip may take in a worker process.
        report: called with a sentence when a worker process died.

    Attributes:
        clips: the data set.
        epoch, position: of the next batch.
        waited: seconds that iteration has waited for batches.
        rejects: every clip that could not be used so far, once, by its path.

    Raises:
        MediaError, LabelError: the data set, the classes or the weights cannot be read.
        ValueError: an argument is out of range, or the back end cannot read this data here.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path] | Clips,
        batch_size: int,
        *,
        training: bool = False,
        augmentation: Augmentation | None = None,
        labels: LabelSet | str | Path | None = None,
        weights: str | Path | np.ndarray | None = None,
        backend: Literal["auto", "torch", "dali"] = "auto",
        device: str | torch.device = "cpu",
        workers: int | None = None,
        image_size: int = 224,
        audio_length: int = 1024,
        mean: float = AUDIO_MEAN,
        std: float = AUDIO_STD,
        normalize_images: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        frame: int | None = None,
        keep: bool = False,
        prefetch: int = 3,
        timeout: float = TIMEOUT,
        report: Callable[[str], None] = lambda message: None,
    ):
        if workers is not None and workers < 0:
            raise ValueError(f"workers is {workers}; allowed: 0 or more")
        workers = default_count() if workers is None else workers
        if backend == "dali" and not workers:
            raise ValueError("workers is 0; allowed with backend='dali': 1 or more threads")
        if keep and workers:
            raise ValueError(f"keep=True with workers={workers}; allowed: workers=0, for kept clips are this process's")
        if not training and (weights is not None or (augmentation and augmentation.mixup)):
            raise ValueError("weights and mixup are for training=True; evaluation takes every clip once, as it is")
        if image_size < 1 or audio_length < 1 or prefetch < 1:
            raise ValueError(
                f"image_size={image_size}, audio_length={audio_length}, prefetch={prefetch}; allowed: 1 or more"
            )
        self.clips = open_clips(data)
        self.training = training
        augmentation = augmentation or (Augmentation.PRETRAIN if training else Augmentation.EVALUATE)
        num_frames = self.clips.num_frames if isinstance(self.clips, ShardSet) else NUM_FRAMES
        if frame is not None and not 0 <= frame < num_frames:
            raise ValueError(f"frame is {frame}; allowed: 0 to {num_frames - 1}, or None")
        rank, world_size = _place(rank, world_size)
        self.order = Order(
            len(self.clips), batch_size, seed, shuffle=training, rank=rank, world_size=world_size, drop_last=training,
            weights=None if weights is None else clip_weights(weights, self.clips),
        )  # fmt: skip
        if training and not self.order.steps():
            raise ValueError(
                f"batch_size={batch_size} on {world_size} ranks; allowed: {len(self.clips)} clips, as the data set has, "
                "or fewer in all"
            )
        self.plan = Plan(self.order, augmentation, num_frames, audio_length, training, frame)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # threads do not share the current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.backend, self.reason = choose_backend(backend, self.clips, self.device)
        self.features = Features(
            self.device, audio_length, mean, std, augmentation, _label_set(labels, self.clips),
            normalize_images or augmentation.mixup > 0, seed,
        )  # fmt: skip
        self.epoch = self.position = 0
        self.waited = 0.0
        self._loops = 0
        self._process = os.getpid()
        self.rejects: dict[str, Reject] = {}
        reader = Reader(num_frames, image_size, samples_of(audio_length), keep, self.features.label_set)
        self._exact = InProcess(self.clips, reader, self.plan.substitute)
        rows = 2 * batch_size if augmentation.mixup else batch_size
        # On a GPU all work for a batch runs on a stream of its own, beside the model's.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        options: dict[str, Any] = {"rows": rows, "prefetch": prefetch}
        with _beside(self._stream):
            if self.backend == "dali":
                options |= {"threads": workers, "device": self.device}
                self._decoder: Decoder = InDali(self.clips, reader, self.plan.substitute, **options)
            elif workers:
                options |= {"workers": workers, "timeout": timeout, "report": report, "pin": self._stream is not None}
                self._decoder = InWorkers(self.clips, reader, self.plan.substitute, **options)
            else:
                self._decoder = self._exact
        self._pump: _Pump | None = None
        self._open: dict[str, Any] = {"decoder": self._decoder}
        self._finalizer = weakref.finalize(self, _close, self._open, self._process)

    # ------------------------------------------------------------------------------------------------------- iteration

    def __len__(self) -> int:
        """Steps from here to the end of the epoch."""
        return self.order.steps(self.position) or self.order.steps()

    def __iter__(self) -> Iterator[Batch]:
        if not self._finalizer.alive:
            raise ValueError("the loader is closed; allowed: a new one")
        if self._process != os.getpid():
            raise RuntimeError(f"the loader was made in process {self._process}; make it in the process that loops over it")
        self._loops += 1
        loop = self._loops
        if not self.order.steps(self.position):  # the last loop ended with the epoch's last batch
            self._next_epoch()
        from_start, good, rejects = self.position == 0, False, []
        while self.order.steps(self.position):
            batch = self._next()
            if batch is None:  # evaluation: this rank has no clip in what is left
                break
            self.rejects |= {reject.path: reject for reject in batch.rejects}
            if not self.training:
                rejects += batch.rejects
            if batch.ids:
                good = True
                yield batch
            if self._loops != loop:
                raise RuntimeError("another loop over this loader has begun; a loader is where its last loop is")
        self._next_epoch()
        if not self.training:
            self._stop()
            # Of several ranks one may well have nothing but a clip that cannot be used.
            if from_start and not good and rejects and self.order.world_size == 1:
                raise UnusableDataError(rejects)

    def _next(self) -> Batch | None:
        """The next batch, and the state behind it; None after the last. What goes wrong leaves the state as it was."""
        try:
            if self._pump is not None and self._pump.stopped:  # its end was interrupted
                self._stop()
            if self._pump is None:
                steps = self.plan.steps(self.epoch, self.position)
                self._pump = self._open["pump"] = _Pump(self._decoder, steps, self._finisher(), self._stream)
            begin = time.perf_counter()
            ready = self._pump.get()
            self.waited += time.perf_counter() - begin
            if ready is None:
                if self.training:
                    raise RuntimeError("the loader's thread ended, though training has no end")
                return None
            batch = ready()
        except BaseException:
            self._stop()
            raise
        self.position = min(batch.position + self.order.stride, self.order.clips)
        return batch

    def _next_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0

    def batch_at(self, epoch: int, position: int) -> Batch:
        """Builds a batch again, in this process, from the `epoch` and `position` that it carries."""
        step = self.plan.step(epoch, position, self.order.sequence(epoch))
        (decoded,) = self._exact.decode(iter([step.wants]), threading.Event())
        return self.features(step, decoded)

    # ----------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: a loader with this state gives exactly the batches that are left, on the same number of
        ranks; on another, exactly the clips that are left. The same on every rank."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken. ValueError when it belongs to other data or another order."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"the state's {name} is {state.get(name)}; this loader's is {value}")
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or not isinstance(position, int) or epoch < 0 or not 0 <= position <= self.order.clips:
            raise ValueError(f"the state's epoch is {epoch} and its position {position}; allowed: what state_dict gives")
        self._stop()
        self.epoch, self.position = epoch, position

    def _identity(self) -> dict[str, Any]:
        return {
            "clips": self.order.clips, "seed": self.order.seed, "shuffle": self.order.shuffle, "data": self._checksum,
            "weighted": self.order.weights is not None,
        }  # fmt: skip

    @cached_property
    def _checksum(self) -> int:
        """CRC-32 of what tells this data set from others of its size, and of the weights."""
        if isinstance(self.clips, ShardSet):
            crc = zlib.crc32(np.ascontiguousarray(self.clips.index["crc"][:, 1]))
        else:
            crc = zlib.crc32("\n".join(clip.id for clip in self.clips).encode(errors="surrogateescape"))
        return crc if self.order.weights is None else zlib.crc32(np.ascontiguousarray(self.order.weights), crc)

    # --------------------------------------------------------------------------------------------------------- threads

    def _finisher(self) -> Callable[[Step, Decoded], Callable[[], Batch]]:
        """What the thread does with a decoded step, to give what the consumer calls for its batch.

        On a CPU the features are the consumer's work: two threads with products of their own would fight for the cores.
        """
        features, stream = self.features, self._stream

        def later(step: Step, decoded: Decoded) -> Callable[[], Batch]:
            def batch() -> Batch:
                result = features(step, decoded)
                decoded.release()
                return result

            return batch

        def at_once(step: Step, decoded: Decoded) -> Callable[[], Batch]:
            result = features(step, decoded)
            done = stream.record_event()

            def batch() -> Batch:
                done.synchronize()  # long past, as a rule; now the host memory it was copied from is free, too
                decoded.release()
                for tensor in (result.audio, result.image, result.labels):
                    if tensor is not None:
                        tensor.record_stream(torch.cuda.current_stream(stream.device))
                return result

            return batch

        return later if stream is None else at_once

    def _stop(self) -> None:
        if self._pump is not None:
            self._pump.close()
            self._pump = self._open["pump"] = None

    def close(self) -> None:
        """Ends the loader's processes and threads; also done when it is collected and at exit."""
        self._finalizer()
        self._pump = None


@contextlib.contextmanager
def _beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """On this stream and its device; threads have a current device and stream of their own."""
    if stream is None:
        yield
    else:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            yield


class _Pump:
    """Runs a decoder over steps, in a thread where it does not decode in this process; knows nothing of the loader, which
    can so be collected."""

    def __init__(self, decoder: Decoder, steps: Iterator[Step], finish: Callable, stream: torch.cuda.Stream | None):
        self._stopped, self._stream = threading.Event(), stream
        self._batches = self._decode(decoder, steps, finish)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        if not isinstance(decoder, InProcess):
            self.thread = threading.Thread(target=self._run, name="loader", daemon=True)
            self.thread.start()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def _decode(self, decoder: Decoder, steps: Iterator[Step], finish: Callable) -> Iterator[Callable[[], Batch]]:
        begun: deque[Step] = deque()

        def wants() -> Iterator[list[Want]]:
            for step in steps:
                begun.append(step)
                yield step.wants

        for decoded in decoder.decode(wants(), self._stopped):
            yield finish(begun.popleft(), decoded)

    def _run(self) -> None:
        try:
            with _beside(self._stream):
                for batch in self._batches:  # the decoder, which has so much memory and no more, keeps it from running ahead
                    self._queue.put(batch)
            self._queue.put(None)
        except BaseException as error:  # raised where the batch is asked for
            self._queue.put(error)

    def get(self) -> Callable[[], Batch] | None:
        """The next batch, to be called for; None after the last."""
        if self.thread is None:
            with _beside(self._stream):
                return next(self._batches, None)
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; may be called again when it was interrupted."""
        self._stopped.set()
        if self.thread is not None:
            self.thread.join()
        self._batches.close()


def _close(parts: dict[str, Any], process: int) -> None:
    """Ends the thread and the decoder; nothing in a process that was forked from the loader's."""
    if os.getpid() != process:
        return
    pump, decoder = parts.pop("pump", None), parts.pop("decoder", None)
    if pump is not None and pump.thread is threading.current_thread():  # the collector ran there: it cannot wait for itself
        threading.Thread(target=_close, args=({"pump": pump, "decoder": decoder}, process)).start()
        return
    if decoder is not None:
        decoder.closing = True
    try:
        if pump is not None:
            pump.close()
    finally:
        if decoder is not None:
            decoder.close()


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank is {rank} and world_size {world_size}; allowed: both, or neither")
    if rank is not None:
        return rank, world_size
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _label_set(labels: LabelSet | str | Path | None, clips: Clips) -> LabelSet | None:
    if isinstance(labels, str | Path):
        return LabelSet.from_csv(labels)
    if labels is None and isinstance(clips, ShardSet) and clips.manifest["labels"]:
        return LabelSet.from_csv(clips.folder / LABELS)
    return labels


def choose_backend(backend: str, clips: Clips, device: torch.device) -> tuple[str, str]:
    """The back end for these clips on this device, and in a few words why. ValueError when it cannot be the named one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "torch":
        return "torch", "asked for"
    if backend == "dali":
        if missing := dali.available():
            raise ValueError(f"backend is 'dali', but {missing}")
        videos = not isinstance(clips, ShardSet) and any(clip.video for clip in clips)
        if videos and (device.type != "cuda" or not all(clip.video for clip in clips)):
            raise ValueError(
                "backend is 'dali', which decodes videos with NVDEC, on a CUDA device, and no mixture of videos and "
                "extracted frames; allowed: backend='torch', or shards (`cavmae-fast prepare`)"
            )
        return "dali", "asked for"
    if device.type == "cpu":
        return "torch", "the device is a CPU"
    # As with kernels: what never ran on a GPU is not the default on one.
    return "torch", "DALI has not been proven on a GPU; backend='dali' asks for it"
