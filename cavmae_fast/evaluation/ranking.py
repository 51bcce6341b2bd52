"""Ranks of matching rows by dot product: both directions from one pass over blocks of the score matrix.

The score of query i and candidate j is needed by both directions: row i of `audio @ video.T` ranks the videos for a sound,
column j ranks the sounds for a video. So each block of the matrix is computed once, gives the counts of its rows and of its
columns, and is forgotten. The whole matrix, 40 GB for 100,000 clips, exists at no time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 4096
"Rows and columns of a block of scores: 64 MB in float32."


class Ranks(NamedTuple):
    """Of each row its own candidate's rank, from 1: `[N]` int64 on the CPU."""

    audio_to_video: Tensor
    video_to_audio: Tensor


@torch.no_grad()
def rank_both(audio: Tensor, video: Tensor, device: torch.device | str | None = None, block: int = BLOCK) -> Ranks:
    """Ranks the matching rows of audio and video `[N, D]` among all rows of the other, by dot product in float32.

    A candidate that ties with the own one counts as ahead of it, so that ties cannot inflate a result: a model that gives
    every clip the same embedding gets the last rank everywhere, not the first. For this, scores that are equal must also
    come out equal. All products therefore have the same shape (the last rows are padded with zeros), and the own score is
    read from the same product as the others.

    Args:
        device: where the products are computed; the embeddings themselves stay where they are. Default: audio's.
        block: rows and columns of a product. Memory beyond the embeddings: about `8 * block * (block + D)` bytes.
    """
    count = len(audio)
    device = torch.device(device) if device is not None else audio.device
    block = _even_block(count, block)
    starts = range(0, count, block)
    scores, ahead = (torch.empty(block, block, device=device) for _ in range(2))
    ones = torch.ones(block, device=device)
    own = torch.empty(len(starts) * block, device=device)
    ranks = [torch.zeros(len(starts) * block, dtype=torch.int64, device=device) for _ in range(2)]

    def multiply(queries: Tensor, left: int) -> None:
        torch.mm(queries, _rows(video, left, block, device).T, out=scores)

    def count_ahead(top: int, left: int) -> None:
        rows, columns = slice(top, top + block), slice(left, left + block)
        # What pads the last blocks scores 0, which may be ahead of a true one: it does not take part.
        height, width = min(block, count - top), min(block, count - left)
        # A product with ones sums zeros and ones exactly, and faster than a sum of booleans.
        torch.ge(scores, own[rows, None], out=ahead)
        ranks[0][rows] += (ahead[:, :width] @ ones[:width]).long()
        torch.ge(scores, own[None, columns], out=ahead)
        ranks[1][columns] += (ones[:height] @ ahead[:height]).long()

    for start in starts:  # the blocks on the diagonal come first: they hold the own scores, which all others need
        multiply(_rows(audio, start, block, device), start)
        own[start : start + block] = scores.diagonal()
        count_ahead(start, start)
    for top in starts:
        queries = _rows(audio, top, block, device)
        for left in starts:
            if left != top:
                multiply(queries, left)
                count_ahead(top, left)
    return Ranks(*(rank[:count].cpu() for rank in ranks))


@torch.no_grad()
def best_candidates(queries: Tensor, candidates: Tensor, top: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The `top` best candidates `[N, D]` of each of a few queries `[Q, D]`, best first: scores and rows, each
    `[Q, min(top, N)]`. Of equal scores the earlier row comes first."""
    scores = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(candidates), block):
        part = candidates[start : start + block].float()
        scores = torch.cat([scores, queries.float() @ part.T], dim=1)
        rows = torch.cat([rows, torch.arange(start, start + len(part)).expand(len(queries), -1)], dim=1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :top]
        scores, rows = scores.gather(1, order), rows.gather(1, order)
    return scores, rows


def _even_block(count: int, largest: int) -> int:
    """The size of as few equal blocks as possible, at most `largest`, so that little of the last one is padding; whole
    cache lines of scores where that is possible."""
    size = -(-count // -(-count // largest))
    return min(largest, -(-size // 64) * 64) if size >= 64 else size


def _rows(x: Tensor, start: int, block: int, device: torch.device) -> Tensor:
    """`block` rows of `x` in float32 on the device, zeros past its end."""
    rows = x[start : start + block].to(device, torch.float32)
    return rows if len(rows) == block else torch.nn.functional.pad(rows, (0, 0, 0, block - len(rows)))
