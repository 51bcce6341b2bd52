"""Retrieval between sound and picture: embed clips with both streams, rank by cosine, score both directions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.evaluation.ranking import rank_both
from cavmae_fast.models.abilities import Embeds

TOP = (1, 5, 10)
"Ranks k of which R@k is said: the share of queries whose own clip is among the first k."


@torch.no_grad()
def embed(model: Embeds, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Batches of (audio, imgs), as a model of both takes them -> its embeddings of audio and video `[N, D]`, of length 1."""
    was_training = model.training
    model.eval()
    parts = []
    for audio, imgs in batches:
        model.check_inputs(audio=audio, imgs=imgs)
        found = model.embeddings({"a": audio, "v": imgs})
        parts.append([F.normalize(found[m].float(), dim=-1).cpu() for m in "av"])
    model.train(was_training)
    audio, video = zip(*parts)
    return torch.cat(audio), torch.cat(video)


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """Rank, from 1, of each query's own candidate (same row) by dot product. queries, candidates `[N, D]` -> `[N]` int64.
    Ties count as ahead, see `rank_both`, which gives both directions for the same work."""
    return rank_both(queries, candidates).audio_to_video


@dataclass(frozen=True)
class DirectionScores:
    """How one direction of retrieval does.

    Attributes:
        recall: R@k in per cent, by k.
        median_rank, mean_rank: of the own clip, from 1.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float

    @classmethod
    def of(cls, ranks: np.ndarray) -> DirectionScores:
        """The scores of these ranks `[N >= 1]`."""
        recall = {k: 100.0 * float((ranks <= k).mean()) for k in TOP}
        return cls(recall, float(np.median(ranks)), float(ranks.mean()))


@dataclass(frozen=True)
class ClassScores:
    """Both directions for the clips of one class, each ranked among all clips."""

    mid: str
    name: str
    clips: int
    audio_to_video: DirectionScores
    video_to_audio: DirectionScores


@dataclass(frozen=True)
class Retrieval:
    """The result of ranking N clips' sounds and pictures among each other.

    Attributes:
        audio_to_video: a sound is given, its picture sought.
        video_to_audio: the other direction.
        chance: R@k of a random order, in per cent, by k.
        chance_rank: mean and median rank of a random order.
        ranks_audio_to_video, ranks_video_to_audio: of each clip, `[N]` int64.
        classes: the same by class, where labels are known.
    """

    audio_to_video: DirectionScores
    video_to_audio: DirectionScores
    chance: dict[int, float]
    chance_rank: float
    ranks_audio_to_video: np.ndarray
    ranks_video_to_audio: np.ndarray
    classes: tuple[ClassScores, ...] = ()

    @property
    def clips(self) -> int:
        return len(self.ranks_audio_to_video)


def rank_clips(audio: Tensor, video: Tensor, device: torch.device | str | None = None) -> Retrieval:
    """Matching rows of audio and video `[N, D]` (L2-normalized), ranked in both directions (see `rank_both`).

    Raises:
        ValueError: the shapes differ, there is no clip, or an embedding is not finite.
    """
    if audio.dim() != 2 or audio.shape != video.shape or len(audio) == 0:
        raise ValueError(f"audio {list(audio.shape)} and video {list(video.shape)} must be of one shape [N >= 1, D]")
    for name, x in (("audio", audio), ("video", video)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} embeddings hold NaN or infinity; they must be finite to be ranked")
    a2v, v2a = (ranks.numpy() for ranks in rank_both(audio, video, device))
    count = len(audio)
    chance = {k: 100.0 * min(k, count) / count for k in TOP}
    return Retrieval(DirectionScores.of(a2v), DirectionScores.of(v2a), chance, (count + 1) / 2, a2v, v2a)


def score_classes(
    result: Retrieval, labels: Sequence[Sequence[int]], mids: Sequence[str], names: Sequence[str]
) -> tuple[ClassScores, ...]:
    """The scores of each class that a clip has: `labels` are the class indices of each clip, in the order of the ranks."""
    members: dict[int, list[int]] = {}
    for clip, indices in enumerate(labels):
        for index in set(indices):
            members.setdefault(index, []).append(clip)
    scores = []
    for index, clips in sorted(members.items()):
        both = (ranks[clips] for ranks in (result.ranks_audio_to_video, result.ranks_video_to_audio))
        scores.append(ClassScores(mids[index], names[index], len(clips), *map(DirectionScores.of, both)))
    return tuple(scores)


def metrics_of(result: Retrieval) -> dict[str, float]:
    """The result as one flat row: `chance R@1`, `A->V R@1`, ..., `V->A median rank`, `V->A mean rank`."""
    metrics = {f"chance R@{k}": value for k, value in result.chance.items()}
    for name, scores in (("A->V", result.audio_to_video), ("V->A", result.video_to_audio)):
        metrics |= {f"{name} R@{k}": value for k, value in scores.recall.items()}
        metrics |= {f"{name} median rank": scores.median_rank, f"{name} mean rank": scores.mean_rank}
    return metrics


def retrieval_metrics(audio: Tensor, video: Tensor) -> dict[str, float]:
    """`metrics_of` matching rows of audio and video `[N, D]` (L2-normalized). Raises as `rank_clips` does."""
    return metrics_of(rank_clips(audio, video))
