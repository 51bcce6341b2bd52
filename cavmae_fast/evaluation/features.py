"""Embeddings of clips: what a model makes of the sound and of the picture, each seen alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.decoder import Reject, UnusableDataError
from cavmae_fast.data.sets.opening import Clips, frames_of
from cavmae_fast.errors import CavmaeError
from cavmae_fast.evaluation.running import Model, Running
from cavmae_fast.evaluation.sharing import gather

STREAMS = {"audio": "a", "video": "v"}
"The streams of a clip, and what the models call them."
Stream = Literal["audio", "video"]
Pooling = Literal["mean", "tokens"]


class EmbeddingError(CavmaeError):
    """A model that gives what is no embedding; the message names the clip."""


@dataclass
class Embedded:
    """Embeddings of those clips that could be used.

    Attributes:
        numbers: of the clips in the data set that was embedded, ascending.
        ids: their names.
        streams: by stream `[N, D]` (pooled: means of the tokens, of length 1) or `[N, L, D]` (normed tokens), float32, on
            the CPU.
        rejects: the clips that could not be used, and why.
    """

    numbers: list[int]
    ids: list[str]
    streams: dict[str, Tensor]
    rejects: list[Reject]


def check_streams(model: Model, streams: Sequence[str]) -> None:
    """ValueError unless `streams` are some, and the model has them."""
    if not streams or any(name not in STREAMS for name in streams):
        raise ValueError(f"streams is {list(streams)}; allowed: audio, video, or both")
    there = streams_of(model)
    for name in streams:
        if name not in there:
            raise ValueError(
                f"streams holds {name!r}, but {type(model).__name__} has no such stream; allowed: {' or '.join(there)}"
            )


def streams_of(model: Model) -> list[str]:
    """What the model can embed: 'audio', 'video' or both."""
    return [name for name, modality in STREAMS.items() if modality in model.modalities]


def check_frames(frames: int, clips: Clips, model: Model) -> None:
    """ValueError unless a clip of the data set has this many frames to choose, for a model that looks at one of them."""
    there = frames_of(clips, model.clip_spec)
    if model.clip_spec.frame_rate is not None and frames != 1:
        raise ValueError(
            f"frames is {frames}, but {type(model).__name__} sees {model.clip_spec.frames} pictures of a crop at once; "
            "allowed: 1, the crop in the middle"
        )
    if not 1 <= frames <= there:
        raise ValueError(f"frames is {frames}; allowed: 1 (the middle one) to {there}, as many as the clips have")


@torch.no_grad()
def embed_inputs(model: Model, inputs: dict[str, Tensor], pooling: Pooling) -> dict[str, Tensor]:
    """Inputs by stream -> by stream the model's embeddings `[B, D]`, not yet of length 1, or all its tokens `[B, L, D]`;
    float32, CPU."""
    named = {STREAMS[name]: x for name, x in inputs.items()}
    model.check_inputs(**named)
    found = model.embeddings(named) if pooling == "mean" else model.features(named)
    return {name: found[STREAMS[name]].float().cpu() for name in inputs}


def finish(x: Tensor, frames: int, pooling: Pooling) -> Tensor:
    """The sum over frames as an embedding: pooled ones get the length 1, tokens become a mean."""
    return F.normalize(x, dim=-1) if pooling == "mean" else x / frames


def embed_clips(
    model: Model,
    clips: Clips,
    running: Running,
    *,
    streams: Sequence[str] = ("audio", "video"),
    frames: int = 1,
    pooling: Pooling = "mean",
    progress: Callable[[int], object] = lambda clips: None,
) -> Embedded:
    """Embeds all of `clips`, whose results must fit into memory. The ranks of `torch.distributed`, where it is initialized,
    share the clips, and all of them have the whole result.

    With several frames, the picture's embedding is the mean over frames spread over the clip; each frame is a pass over the
    data of its own, in which the sound is not embedded again.

    Args:
        streams: of 'audio' and 'video'.
        frames: pictures per clip: 1, the middle one, as published, or more.
        pooling: 'mean', one embedding per clip (see `Embeds.embeddings`), or all 'tokens'.
        progress: called with the number of clips after each batch of the first pass, those of this rank.

    Raises:
        ValueError: an argument is out of range. EmbeddingError: a value is not finite.
    """
    check_streams(model, streams)
    check_frames(frames, clips, model)
    precision = running.precision()
    there = frames_of(clips, model.clip_spec)
    chosen: list[int | None] = [None] if frames == 1 else [int((i + 0.5) * there / frames) for i in range(frames)]
    if "video" not in streams:
        chosen = [None]
    ids: dict[int, str] = {}
    sums: dict[str, Tensor] = {}
    passes = torch.zeros(len(clips), dtype=torch.int64)
    rejects: dict[str, Reject] = {}

    def add(batch: Batch, first: bool) -> None:
        inputs = {"audio": batch.audio, "video": batch.image}
        wanted = [name for name in streams if first or name == "video"]
        with precision.autocast():
            found = embed_inputs(model, {name: inputs[name] for name in wanted}, pooling)
        rows = torch.from_numpy(batch.clips)
        for name, x in found.items():
            if not bool(x.isfinite().all()):
                bad = batch.ids[int((~x.flatten(1).isfinite().all(dim=1)).nonzero()[0])]
                raise EmbeddingError(f"the {name} embedding of clip {bad!r} is not finite; the weights may be damaged")
            if name not in sums:
                sums[name] = torch.zeros(len(clips), *x.shape[1:])
            sums[name][rows] += x
        passes[rows] += 1
        ids.update(zip(batch.clips.tolist(), batch.ids, strict=True))

    for number, frame in enumerate(chosen):
        loader = running.open_loader(clips, model, precision.device, frame)
        try:
            for batch in loader:
                add(batch, number == 0)
                if number == 0:
                    progress(len(batch.ids))
        except UnusableDataError as error:
            rejects |= {reject.path: reject for reject in error.rejects}
        finally:
            rejects |= loader.rejects
            loader.close()
    whole = (passes == len(chosen)).nonzero().flatten()
    numbers = whole.tolist()
    found = {
        name: finish(x[whole], len(chosen) if name == "video" else 1, pooling) for name, x in sums.items() if name in streams
    }
    return of_all_ranks(Embedded(numbers, [ids[i] for i in numbers], found, list(rejects.values())))


def of_all_ranks(own: Embedded) -> Embedded:
    """What all ranks embedded, in the order of the data set, on every rank."""
    parts = gather(own)
    if len(parts) == 1:
        return own
    numbers = [number for part in parts for number in part.numbers]
    ids = [name for part in parts for name in part.ids]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    names = list(dict.fromkeys(name for part in parts for name in part.streams))
    streams = {name: torch.cat([p.streams[name] for p in parts if name in p.streams])[order] for name in names}
    rejects = {reject.path: reject for part in parts for reject in part.rejects}
    return Embedded([numbers[i] for i in order], [ids[i] for i in order], streams, list(rejects.values()))
