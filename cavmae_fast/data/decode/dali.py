"""Decoding by NVIDIA DALI: encoded frames and sound to tensors, on its threads, and on the GPU where there is one.

The loader decides which clips come in which order and reads their encoded bytes; DALI only decodes. It is an optional
dependency, and nothing of it is imported before it is used.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cavmae_fast.clip import WINDOW_SECONDS, ClipSpec
from cavmae_fast.data.media.encoded import Encoded

_Arrays = tuple[list[np.ndarray], ...]  # for each input of the graph, one array per clip


class DaliError(RuntimeError):
    """DALI could not decode a batch, and gave itself up; the message is DALI's."""


class EncodedVideo(NamedTuple):
    """`video`: a whole file (any buffer) with H.264, H.265, AV1, VP9 or MPEG-4; `frame`: number of the frame to decode,
    from 0; `waveform`: its sound, `[samples]` int16 at the model's rate."""

    video: bytes
    frame: int
    waveform: np.ndarray


def available() -> str | None:
    """None where DALI can be imported, else the reason why not and what to install."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except (ImportError, OSError) as error:
        return f"nvidia.dali cannot be imported ({error}); install it with: pip install 'cavmae_fast[dali]'"
    return None


def decode_batches(
    batches: Iterator[Sequence[Encoded]],
    *,
    clip: ClipSpec,
    device: torch.device,
    threads: int,
    max_batch: int,
    prefetch: int = 2,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of encoded clips, decoded in the order they come.

    A picture whose shorter side has the model's size keeps its pixels: on the CPU exactly Pillow's (8 bits a channel, EXIF
    rotation not applied), on the GPU nvJPEG's. Any other has its shorter side scaled to that size (bicubic, antialiased)
    with torchvision's rounding of sizes; the center is cut out. Pillow rounds and clips between the two passes of the
    filter, DALI does not: video frames differ by at most 10 gray levels and 0.25 on average, saturating noise by 26 and
    0.55 (measured on the CPU). Sound is exactly what soundfile reads as int16.

    DALI gives up a whole batch, and itself, for one damaged clip. A JPEG, PNG or FLAC cut short, sound at another rate than
    the model's and sound under 25 ms are damage. Flipped bits that leave a JPEG or a WAV decodable go unnoticed: to notice
    them takes a checksum.

    The tensors given out are the caller's. On the CPU they own DALI's buffers, which DALI does not use again. On the GPU
    they are PyTorch's, copied on the stream that is current when a batch is asked for; use on another stream follows
    PyTorch's usual rules. **The GPU path has not been run yet.**

    Args:
        batches: 1 to `max_batch` clips each: as many pictures each as the model takes, of any size, and sound at the model's
            rate, of which the first channel counts, in any buffer (such as a memoryview of a mapped file). Advanced
            `prefetch` ahead, in the calling thread.
        clip: what the model takes of a clip.
        device: `cpu`, or `cuda`: pictures are decoded there, sound on the CPU.
        threads: DALI's, on the CPU.
        max_batch: clips in the largest batch.
        prefetch: batches under way while one is in use.

    Yields:
        image `[B, frames, S, S, 3]` uint8 and waveform `[B, samples]` int16 (from each clip's first sample that is heard,
        zero-padded or cut) on `device`, and num_samples `[B]` int64 (the clip's own, at most `samples`) on the CPU, where
        it is known first.

    Raises:
        ImportError: DALI is not installed.
        ValueError: an argument or the size of a batch is out of range.
        DaliError: a batch cannot be decoded. It and the batches that were taken after it do not come out; call again for
            what is left.
        Exception: what `batches` raises, unchanged, after the batches before it.
    """
    _check(device, threads=threads, max_batch=max_batch, prefetch=prefetch)
    graph = partial(_clips, clip=clip, gpu=device.type == "cuda")
    return _run(_Feed(batches, _clip_arrays, max_batch), graph, clip, device, threads, prefetch)


def decode_videos(
    batches: Iterator[Sequence[EncodedVideo]],
    *,
    clip: ClipSpec,
    device: torch.device,
    threads: int,
    max_batch: int,
    prefetch: int = 2,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`decode_batches` for video files in memory, of which the model takes one frame: NVDEC seeks to it and decodes it.

    The frame is scaled and cut as `read_clip` does (bilinear, antialiased), but not turned: rotation metadata is not
    read. A frame number past the end of the video is damage.

    **It has not been run on a GPU.** Its graph is tested with DALI's CPU decoder; NVDEC and its colors are not.

    Args, yields, raises: as `decode_batches`, and ValueError for a device other than `cuda`.
    """
    if device.type != "cuda":
        raise ValueError(
            f"device is {device}: DALI decodes videos with NVDEC, which needs a CUDA device; "
            "allowed: a cuda device, or backend='torch', or shards"
        )
    _check(device, threads=threads, max_batch=max_batch, prefetch=prefetch)
    graph = partial(_videos, clip=clip, gpu=True)
    return _run(_Feed(batches, _video_arrays, max_batch), graph, clip, device, threads, prefetch)


def _check(device: torch.device, **sizes: int) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; allowed: cpu or cuda")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    if reason := available():
        raise ImportError(reason)


def _clip_arrays(batch: Sequence[Encoded]) -> _Arrays:
    images = zip(*(clip.images for clip in batch), strict=True)  # the first pictures of all clips, then the second ...
    files = [*images, [clip.sound for clip in batch]]
    first = [np.array([clip.first], np.int32) for clip in batch]
    return (*([np.frombuffer(data, np.uint8) for data in column] for column in files), first)


def _video_arrays(batch: Sequence[EncodedVideo]) -> _Arrays:
    videos, numbers, waveforms = zip(*batch, strict=True)
    views = [np.frombuffer(video, np.uint8) for video in videos]
    return views, [np.array([number], np.int32) for number in numbers], [np.ascontiguousarray(w) for w in waveforms]


class _Feed:
    """The source of a pipeline's batches.

    `flying` holds what DALI was given and has not given back, oldest first. It keeps the bytes alive, which DALI reads in
    place. An error of the iterator is kept until the batches before it are out.
    """

    def __init__(self, batches: Iterator[Sequence], arrays: Callable[[Sequence], _Arrays], max_batch: int):
        self.batches, self.arrays, self.max_batch = batches, arrays, max_batch
        self.flying: deque[_Arrays] = deque()
        self.ended = False
        self.error: Exception | None = None

    def __call__(self) -> _Arrays:
        if self.ended:
            raise StopIteration
        try:
            batch = next(self.batches)
            if not 1 <= len(batch) <= self.max_batch:
                raise ValueError(f"a batch holds {len(batch)} clips; allowed: 1 to max_batch={self.max_batch}")
            arrays = self.arrays(batch)
        except StopIteration:
            self.ended = True
            raise
        except Exception as error:
            self.ended, self.error = True, error
            raise StopIteration from None
        self.flying.append(arrays)
        return arrays


def _run(
    feed: _Feed,
    graph: Callable[[_Feed], tuple],
    clip: ClipSpec,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Runs `graph` over the batches of `feed`."""
    from nvidia.dali import Pipeline

    gpu = device.type == "cuda"
    index = None if not gpu else torch.cuda.current_device() if device.index is None else device.index
    pipe = Pipeline(feed.max_batch, threads, index, prefetch_queue_depth=prefetch, exec_dynamic=True)
    with pipe:
        pipe.set_outputs(*graph(feed))
    pipe.schedule_run()  # the first time, as many as are to be under way
    failure = None
    while True:
        try:
            # Bound to the caller's stream: the copies wait for DALI, and DALI's memory is freed after the copies.
            stream = torch.cuda.current_stream(index) if gpu else None
            batch = _collect(pipe.share_outputs(stream), clip, gpu)
        except StopIteration:
            break
        except Exception as error:
            failure = error.with_traceback(None)  # which would keep the pipeline alive
            break
        feed.flying.popleft()
        pipe.release_outputs()
        pipe.schedule_run()
        yield batch
    del pipe  # waits for what is under way, whose bytes `flying` still holds
    if failure is not None:
        raise DaliError(_cause(failure)) from failure
    if feed.error is not None:
        raise feed.error


def _collect(outputs: Sequence[Any], clip: ClipSpec, gpu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of one iteration's outputs: image, waveform, its length and its rate (the last two always on the CPU)."""
    image, waveform, length, *rate = (torch.from_dlpack(output.as_tensor()) for output in outputs)
    if rate and (rate[0] != clip.sample_rate).any():
        raise ValueError(f"sound at {rate[0].tolist()} Hz; allowed: {clip.sample_rate}")
    least = min(int(clip.sample_rate * WINDOW_SECONDS), waveform.shape[1])
    if length.min() < least:
        raise ValueError(f"sound of {length.tolist()} samples; allowed: {least} (25 ms) or more")
    return (image.clone(), waveform.clone(), length) if gpu else (image, waveform, length)


def _clips(feed: _Feed, *, clip: ClipSpec, gpu: bool) -> tuple:
    """Graph of `decode_batches`."""
    from nvidia.dali import fn, types

    # On the GPU, outputs are given out before the work on them is done: how long it reads the bytes is not known.
    *encoded, sound, first = fn.external_source(source=feed, num_outputs=clip.frames + 2, no_copy=not gpu)
    images = []
    for picture in encoded:
        image = fn.decoders.image(
            picture,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # of nvJPEG: chroma as libjpeg and Pillow scale it
        )
        sides = fn.peek_image_shape(picture, adjust_orientation=False)[:2]
        images.append(_square(image, sides, clip.image_size[0], types.INTERP_CUBIC))
    waveform, rate = fn.decoders.audio(sound, dtype=types.INT16)  # [samples, channels]
    return fn.stack(*images), *_heard(waveform[:, 0], first, clip.samples, gpu), rate


def _videos(feed: _Feed, *, clip: ClipSpec, gpu: bool) -> tuple:
    """Graph of `decode_videos`."""
    from nvidia.dali import fn, types

    encoded, number, waveform = fn.external_source(source=feed, num_outputs=3)
    # Without a padding mode, a frame past the end would be a constant picture.
    frames = fn.decoders.video(encoded, device="mixed" if gpu else "cpu", frames=number, pad_mode="none")
    image = fn.squeeze(frames, axes=[0])  # [1, H, W, 3] -> [H, W, 3]
    image = _square(image, frames.shape()[1:3], clip.image_size[0], types.INTERP_LINEAR)
    return fn.stack(image), *_heard(waveform, types.Constant(np.zeros(1, np.int32)), clip.samples, gpu)


def _square(image: Any, sides: Any, size: int, interpolation: Any) -> Any:
    """`[size, size, 3]`: the shorter side of `image` [H, W, 3] scaled to `size`, its center kept; `sides` is [H, W]."""
    from nvidia.dali import fn, math, types

    short = math.min(sides[0], sides[1])
    scaled = size * sides // short
    half = (scaled - size) // 2
    start = half + ((scaled - size) & half & 1)  # halves are rounded to even, as Python's round does
    scale = fn.cast(sides, dtype=types.FLOAT) / scaled
    # Where nothing is scaled, nearest neighbor (0) copies what a filter would copy as well, at several times the cost.
    kind = fn.cast(int(interpolation) * (short != size), dtype=types.INTERP_TYPE)
    # Scaling only the part that stays is the same arithmetic as scaling all and cropping, without the waste.
    window = {"roi_start": start * scale, "roi_end": (start + size) * scale}
    return fn.resize(image, size=[size, size], interp_type=kind, antialias=True, **window)


def _heard(waveform: Any, first: Any, samples: int, gpu: bool) -> tuple[Any, Any]:
    """`waveform` [n] from `first` [1] on, cut or zero-padded to `samples`, and how many of these are its own."""
    from nvidia.dali import fn, math

    cut = fn.slice(waveform, start=first, shape=[samples], axes=[0], out_of_bounds_policy="pad")
    return cut.gpu() if gpu else cut, math.min(waveform.shape()[0] - first[0], samples)


def _cause(error: Exception) -> str:
    """What DALI says went wrong, without its graph, its C++ source lines and its advice."""
    text = str(error).split("encountered:")[-1].split("C++ context")[0].split("Current pipeline object")[0]
    operator = re.search(r"operator `nvidia\.dali\.([\w.]+)`", str(error))
    return " ".join([f"{operator[1]}:" if operator else "", *text.split()]).strip()
