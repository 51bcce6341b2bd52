"""The loader: a data set in, batches of model inputs on the training device out."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.batches import Batch, BatchBuilder
from cavmae_fast.data.decode.choosing import choose_backend
from cavmae_fast.data.decode.decoder import Decoder, InProcess, Reject, UnusableDataError
from cavmae_fast.data.decode.in_dali import InDali
from cavmae_fast.data.decode.in_workers import InWorkers
from cavmae_fast.data.decode.reading import Reader
from cavmae_fast.data.decode.workers import TIMEOUT, default_count
from cavmae_fast.data.draws import Augmentation
from cavmae_fast.data.plan import Order, Plan
from cavmae_fast.data.prefetch import Prefetcher, on_stream
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.data.sets.opening import Clips, checksum, clip_labels, clip_weights, frames_of, open_clips


class Loader:
    """Batches of a data set, decoded ahead, their features computed in batch on the training device.

    `for batch in loader` runs to the end of the epoch; the next loop is the next epoch. Clips, frames and all decisions of
    the augmentation depend on (seed, epoch, position in the epoch) alone: not on the back end, the workers, the ranks. (The
    noise field, drawn for a whole step, depends on how the epoch is cut into steps, and on the kind of device.)

    A clip that cannot be used is named in the batch's `rejects` and in `loader.rejects`; in training another clip, drawn by
    the same rule, takes its place, so that all ranks take as many full steps; in evaluation it is left out.

    Args:
        data: a folder that `cavmae-fast prepare` wrote; or folders, media files, globs, CSV or published JSON lists.
        batch_size: clips per step, on this rank.
        clip: what the model takes of a clip; default: CAV-MAE's `ClipSpec()`. With a frame rate, a crop is cut out of each
            clip: in training anywhere, in evaluation from its middle.
        training: shuffle, augment, leave out the last step when it is not full; else the data set's order, all of it.
        augmentation: default `Augmentation.PRETRAIN` in training, else `Augmentation.EVALUATE`.
        labels: the classes, as a `LabelSet` or its CSV; default: those the shards were prepared with.
        weights: `[clips]` or a file of them, for balanced sampling: clips drawn by weight, with replacement.
        backend: 'torch' (worker processes: PyAV, Pillow, FLAC), 'dali', or 'auto'; `loader.backend` and `loader.reason`
            say which it is and why.
        device: where the features are computed and the batches lie.
        workers: decoding processes ('torch'; 0 decodes in this process) or threads ('dali'); default: one per core.
        image_size, audio_length, mean, std: take the place of `clip.image_size` (one number for both sides, which must be
            equal), `clip.audio_length`, `clip.audio_mean` and `clip.audio_std`.
        normalize_images: give float32 images; else uint8, which the models normalize on the way into the patch
            projection (with mixup images are always float32).
        seed: of the order, the frames and the augmentation.
        rank, world_size: of this process and of all; default: torch.distributed's where it is initialized, else 0 of 1.
        frame: which frame to use, for evaluation on another than the middle one, where a clip is one picture.
        keep: hold decoded clips in memory, for small data sets (with `workers=0`).
        prefetch: steps decoded ahead.
        timeout: seconds a clip may take in a worker process.
        report: called with a sentence when a worker process died, or when DALI failed at clips that are not damaged.

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
        clip: ClipSpec | None = None,
        *,
        training: bool = False,
        augmentation: Augmentation | None = None,
        labels: LabelSet | str | Path | None = None,
        weights: str | Path | np.ndarray | None = None,
        backend: Literal["auto", "torch", "dali"] = "auto",
        device: str | torch.device = "cpu",
        workers: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        audio_length: int | None = None,
        mean: float | None = None,
        std: float | None = None,
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
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; allowed: 1 or more")
        clip = _with(clip or ClipSpec(), image_size, audio_length=audio_length, audio_mean=mean, audio_std=std)
        self.clips = open_clips(data)
        self.training = training
        augmentation = augmentation or (Augmentation.PRETRAIN if training else Augmentation.EVALUATE)
        num_frames = frames_of(self.clips, clip)
        if frame is not None and (clip.frame_rate is not None or not 0 <= frame < num_frames):
            whole = f"0 to {num_frames - 1}, or " if clip.frame_rate is None else ""
            raise ValueError(f"frame is {frame}; allowed: {whole}None")
        rank, world_size = _place(rank, world_size)
        self.order = Order(
            len(self.clips),
            batch_size,
            seed,
            shuffle=training,
            weights=None if weights is None else clip_weights(weights, self.clips),
            rank=rank,
            world_size=world_size,
            drop_last=training,
        )
        if training and not self.order.steps():
            raise ValueError(
                f"batch_size={batch_size} on {world_size} ranks; allowed: {len(self.clips)} clips, as the data set has, "
                "or fewer in all"
            )
        moment = None if frame is None else (frame + 0.5) / num_frames
        self.plan = Plan(self.order, augmentation, clip, training, moment)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # threads do not share the current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.backend, self.reason = choose_backend(backend, self.clips, self.device, clip)
        label_set = clip_labels(labels, self.clips)
        normalize_images = normalize_images or augmentation.mixup > 0
        self.builder = BatchBuilder(self.device, clip, augmentation, label_set, normalize_images, seed)
        self.epoch = self.position = 0
        self.waited = 0.0
        self._loops = 0
        self._process = os.getpid()
        self.rejects: dict[str, Reject] = {}
        reader = Reader(clip, num_frames, keep, label_set)
        self._exact = InProcess(self.clips, reader, self.plan.substitute)
        rows = 2 * batch_size if augmentation.mixup else batch_size
        # On a GPU all work for a batch runs on a stream of its own, beside the model's.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        options: dict[str, Any] = {"rows": rows, "prefetch": prefetch, "report": report}
        with on_stream(self._stream):
            self._decoder: Decoder = self._exact
            if self.backend == "dali":
                options |= {"threads": workers, "device": self.device}
                self._decoder = InDali(self.clips, reader, self.plan.substitute, **options)
            elif workers:
                options |= {"workers": workers, "timeout": timeout, "pin": self._stream is not None}
                self._decoder = InWorkers(self.clips, reader, self.plan.substitute, **options)
        self._prefetcher: Prefetcher | None = None
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
        if self.epoch_done:  # the last loop ended with the epoch's last batch
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
            if self._prefetcher is not None and self._prefetcher.stopped:  # its end was interrupted
                self._stop()
            if self._prefetcher is None:
                steps = self.plan.steps(self.epoch, self.position)
                self._prefetcher = Prefetcher(self._decoder, steps, self.builder, self._stream)
                self._open["prefetcher"] = self._prefetcher
            begin = time.perf_counter()
            ready = self._prefetcher.wait()
            self.waited += time.perf_counter() - begin
            if ready is None:
                if self.training:
                    raise RuntimeError("the loader's thread ended, though training has no end")
                return None
            batch = self._prefetcher.finish(ready)
        except BaseException:
            self._stop()
            raise
        self.position = min(batch.position + self.order.stride, self.order.clips)
        return batch

    @property
    def epoch_done(self) -> bool:
        """Whether the last batch of the epoch has been given out."""
        return not self.order.steps(self.position)

    def _next_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0

    def batch_at(self, epoch: int, position: int) -> Batch:
        """Builds a batch again, in this process, from the `epoch` and `position` that it carries."""
        step = self.plan.step(epoch, position, self.order.sequence(epoch))
        (decoded,) = self._exact.decode(iter([step]), threading.Event())
        return self.builder(decoded)

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
            "clips": self.order.clips,
            "seed": self.order.seed,
            "shuffle": self.order.shuffle,
            "data": self._checksum,
            "weighted": self.order.weights is not None,
        }

    @cached_property
    def _checksum(self) -> int:
        return checksum(self.clips, self.order.weights)

    # --------------------------------------------------------------------------------------------------------- threads

    def _stop(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = self._open["prefetcher"] = None

    def close(self) -> None:
        """Ends the loader's processes and threads; also done when it is collected and at exit."""
        self._finalizer()
        self._prefetcher = None


def _with(clip: ClipSpec, image_size: int | tuple[int, int] | None, **given: float | None) -> ClipSpec:
    """`clip` with the fields that are given. ValueError when its pictures are not square."""
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if image_size is not None:
        fields["image_size"] = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    clip = replace(clip, **fields)
    if clip.image_size[0] != clip.image_size[1]:
        raise ValueError(f"image_size is {clip.image_size}; allowed: height and width that are equal")
    return clip


def _close(parts: dict[str, Any], process: int) -> None:
    """Ends the thread and the decoder; nothing in a process that was forked from the loader's."""
    if os.getpid() != process:
        return
    prefetcher, decoder = parts.pop("prefetcher", None), parts.pop("decoder", None)
    if prefetcher is not None and prefetcher.thread is threading.current_thread():
        # The garbage collector ran in the prefetcher's thread, which cannot wait for its own end.
        threading.Thread(target=_close, args=({"prefetcher": prefetcher, "decoder": decoder}, process)).start()
        return
    if decoder is not None:
        decoder.closing = True
    try:
        if prefetcher is not None:
            prefetcher.close()
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
