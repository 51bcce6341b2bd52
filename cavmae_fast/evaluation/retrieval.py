"""Retrieval between sound and picture: embed clips with both streams, rank by cosine, score both directions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cavmae_fast.models import CAVMAE, CAVMAEFT

CHUNK = 4096
"Queries ranked at once: bounds the similarity matrix, whatever the number of clips."


@torch.no_grad()
def embed(model: CAVMAE | CAVMAEFT, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Batches of (audio `[B, T, 128]`, imgs `[B, C, H, W]`) -> L2-normalized token means, audio and video `[N, D]`."""
    was_training = model.training
    model.eval()
    parts = []
    for audio, imgs in batches:
        tokens = model.forward_feat(audio, imgs)
        parts.append([F.normalize(t.float().mean(dim=1), dim=-1).cpu() for t in tokens])
    model.train(was_training)
    audio, video = zip(*parts)
    return torch.cat(audio), torch.cat(video)


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """Rank, from 1, of each query's own candidate (same row) by dot product. queries, candidates `[N, D]` -> `[N]` int64.

    A candidate that ties with the own one counts as ahead of it: a model that gives every clip the same embedding gets
    the last rank, not the first.
    """
    result = []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ candidates.T
        own = scores.diagonal(start)[: len(scores)].unsqueeze(1)
        result.append((scores >= own).sum(dim=1))
    return torch.cat(result)


def retrieval_metrics(audio: Tensor, video: Tensor) -> dict[str, float]:
    """Matching rows of audio and video `[N, D]` (L2-normalized) -> R@1/5/10 in per cent and median rank, both directions.

    Keys: `A->V R@1`, ..., `V->A median rank`, and `chance R@1`, what a random ranking would reach. Raises ValueError
    when the shapes differ, when there is no clip, or when an embedding is not finite.
    """
    if audio.dim() != 2 or audio.shape != video.shape or len(audio) == 0:
        raise ValueError(f"audio {list(audio.shape)} and video {list(video.shape)} must be of one shape [N >= 1, D]")
    for name, x in (("audio", audio), ("video", video)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} embeddings hold NaN or infinity; they must be finite to be ranked")
    metrics: dict[str, float] = {"chance R@1": 100.0 / len(audio)}
    for name, queries, candidates in (("A->V", audio, video), ("V->A", video, audio)):
        rank = ranks(queries, candidates)
        for k in (1, 5, 10):
            metrics[f"{name} R@{k}"] = 100.0 * float((rank <= k).double().mean())
        metrics[f"{name} median rank"] = float(rank.double().quantile(0.5))
    return metrics
