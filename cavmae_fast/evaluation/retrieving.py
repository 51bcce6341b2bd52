"""`retrieve`: how well a model finds a clip's picture by its sound, and the reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from cavmae_fast.data.decode.decoder import Reject
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.data.sets.opening import Clips, clip_labels, open_clips
from cavmae_fast.data.sets.shards import ShardSet
from cavmae_fast.errors import CavmaeError
from cavmae_fast.evaluation.embedding import check_unique
from cavmae_fast.evaluation.features import check_frames, embed_clips, streams_of
from cavmae_fast.evaluation.retrieval import Retrieval, rank_clips, score_classes
from cavmae_fast.evaluation.running import Model, Running, ready_model


class RetrievalError(CavmaeError):
    """Clips that cannot be ranked among each other."""


@dataclass(frozen=True, eq=False)
class Retrieved:
    """The result of `retrieve`.

    Attributes:
        scores: both directions, also by class where labels are known.
        ids, numbers: name and number in the data set of each ranked clip, in the order of the ranks.
        audio, video: their embeddings `[N, D]`, of length 1.
        rejects: clips that could not be used, and why.
        clips: the data set.
    """

    scores: Retrieval
    ids: list[str]
    numbers: list[int]
    audio: Tensor
    video: Tensor
    rejects: list[Reject]
    clips: Clips


def retrieve(
    model: Model | str | PathLike,
    data: str | Path | Sequence[str | Path] | Clips,
    *,
    frames: int = 1,
    labels: LabelSet | str | Path | None = None,
    running: Running | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Retrieved:
    """Embeds sound and picture of every clip of `data`, each alone, and ranks all pictures for each sound and the reverse.
    The ranks of `torch.distributed`, where it is initialized, share the clips, and all of them have the whole result.

    Args:
        model: a model with both streams, or a checkpoint (see `open_model`).
        data: a folder of shards, folders of videos, media files, lists.
        frames: pictures per clip, whose mean is taken; 1: the middle one, as published, or, for a model of several, the crop
            in the middle.
        labels: the classes, as a `LabelSet` or its CSV, for scores by class; default: those the shards were prepared with.
        progress: called with how many clips of how many have been embedded.

    Raises:
        CheckpointError, MediaError, LabelError: model, data or labels cannot be read.
        RetrievalError: fewer than two clips can be used. EmbeddingError: an embedding is not finite.
        ValueError: an argument is out of range, or two clips have the same id.
    """
    running = (running or Running()).settled()
    precision = running.precision()
    clips = open_clips(data)
    if len(clips) < 2:
        raise RetrievalError(f"the data names {len(clips)} clip; retrieval needs two or more, to tell them apart")
    label_set = clip_labels(labels, clips)
    model = ready_model(model, precision)
    if len(there := streams_of(model)) < 2:
        raise ValueError(
            f"the model is a {type(model).__name__} of {there[0]} alone; allowed: one that embeds both, because retrieval "
            "compares sound with picture"
        )
    check_frames(frames, clips, model)
    check_unique(clips)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, len(clips))

    found = embed_clips(model, clips, running, frames=frames, progress=report)
    if len(found.numbers) < 2:
        reason = f"; the first that cannot: {found.rejects[0].reason}" if found.rejects else ""
        raise RetrievalError(f"{len(found.numbers)} of {len(clips)} clips can be used; retrieval needs two or more{reason}")
    audio, video = found.streams["audio"], found.streams["video"]
    scores = rank_clips(audio, video, precision.device)
    if label_set is not None:
        rows = label_set.encode(_labels(clips, found.numbers))
        indices = [row[row >= 0].tolist() for row in rows]
        scores = replace(scores, classes=score_classes(scores, indices, label_set.mids, label_set.names))
    return Retrieved(scores, found.ids, found.numbers, audio, video, found.rejects, clips)


def _labels(clips: Clips, numbers: Sequence[int]) -> list[tuple[str, ...]]:
    """The label ids of these clips."""
    if isinstance(clips, ShardSet):
        every = [tuple(said["labels"]) for said in clips.clips()]
        return [every[number] for number in numbers]
    return [clips[number].labels for number in numbers]
