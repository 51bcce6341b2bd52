from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cavmae_fast.evaluation import ranking, retrieval
from cavmae_fast.evaluation.ranking import rank_both


def pair(count: int, width: int = 5, seed: int = 0, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    audio, other = (torch.randn(count, width, generator=generator) for _ in range(2))
    return F.normalize(audio, dim=-1), F.normalize(audio + noise * other, dim=-1)


def test_perfect_and_reversed():
    x = torch.eye(8)
    metrics = retrieval.retrieval_metrics(x, x)
    assert metrics["chance R@1"] == 12.5 and metrics["chance R@10"] == 100
    for way in ("A->V", "V->A"):
        assert metrics[f"{way} R@1"] == 100 and metrics[f"{way} median rank"] == metrics[f"{way} mean rank"] == 1
    rolled = retrieval.retrieval_metrics(x, x.roll(1, 0))
    assert rolled["A->V R@1"] == 0 and rolled["V->A median rank"] > 1


def test_ties_do_not_inflate():
    x = F.normalize(torch.ones(20, 4), dim=-1)
    metrics = retrieval.retrieval_metrics(x, x)
    assert metrics["A->V R@1"] == metrics["A->V R@10"] == 0
    assert metrics["V->A median rank"] == 20


@pytest.mark.parametrize("block", [1, 7, 31, 4096])
def test_against_plain_loops(block):
    audio, video = pair(31)
    result = rank_both(audio, video, block=block)
    scores = (audio.double() @ video.double().T).tolist()
    rows = range(31)
    assert result.audio_to_video.tolist() == [1 + sum(scores[i][j] >= scores[i][i] for j in rows if j != i) for i in rows]
    assert retrieval.ranks(audio, video).tolist() == result.audio_to_video.tolist()
    assert result.video_to_audio.tolist() == [1 + sum(scores[j][i] >= scores[i][i] for j in rows if j != i) for i in rows]


@pytest.mark.parametrize("count", [100, 333, 1000])
@pytest.mark.parametrize("block", [64, 96])
def test_copies_of_a_clip_tie_in_every_block(count, block):
    """Equal scores come out equal, wherever in the matrix they are: a clip and its copies share one rank, and no row
    misses itself. Padding counts for nothing, though its score of 0 is above some that are negative."""
    audio, video = pair(count, width=768, noise=-3.0)
    copies = list(range(0, count, 17))
    audio[copies], video[copies] = audio[0].clone(), video[0].clone()
    result = rank_both(audio, video, block=block)
    for ranks in result:
        assert len(set(ranks[copies].tolist())) == 1 and int(ranks[0]) >= len(copies)
        assert int(ranks.min()) >= 1 and int(ranks.max()) <= count


def test_the_score_matrix_is_never_whole(monkeypatch):
    """The largest tensor that is made has a block's size, not the square of the number of clips."""
    largest = 0
    for name in ("mm", "ge"):
        original = getattr(torch, name)

        def watched(*args, original=original, **kwargs):
            nonlocal largest
            result = original(*args, **kwargs)
            largest = max(largest, result.numel())
            return result

        monkeypatch.setattr(ranking.torch, name, watched)
    rank_both(*pair(500), block=32)
    assert largest == 32 * 32


def test_scores():
    ranks = np.array([1, 1, 4, 10, 100])
    scores = retrieval.DirectionScores.of(ranks)
    assert scores.recall == {1: 40, 5: 60, 10: 80} and scores.median_rank == 4
    assert scores.mean_rank == pytest.approx(23.2)


def test_by_class():
    audio, video = pair(12)
    result = retrieval.rank_clips(audio, video)
    labels = [[0, 0] if i < 6 else [2] for i in range(11)] + [[]]
    first, third = retrieval.score_classes(result, labels, "abc", ["A", "B", "C"])
    assert (first.mid, first.name, first.clips) == ("a", "A", 6) and (third.name, third.clips) == ("C", 5)
    assert first.audio_to_video == retrieval.DirectionScores.of(result.ranks_audio_to_video[:6])
    assert third.video_to_audio == retrieval.DirectionScores.of(result.ranks_video_to_audio[6:11])


def test_errors():
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"one shape"):
        retrieval.retrieval_metrics(x, torch.eye(4))
    with pytest.raises(ValueError, match=r"one shape"):
        retrieval.retrieval_metrics(x[:0], x[:0])
    with pytest.raises(ValueError, match=r"video embeddings hold NaN"):
        retrieval.retrieval_metrics(x, x * float("nan"))
