from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cavmae_fast.evaluation import retrieval


def test_perfect_and_reversed():
    x = torch.eye(8)
    metrics = retrieval.retrieval_metrics(x, x)
    assert metrics["chance R@1"] == 12.5
    for way in ("A->V", "V->A"):
        assert metrics[f"{way} R@1"] == 100 and metrics[f"{way} median rank"] == 1
    rolled = retrieval.retrieval_metrics(x, x.roll(1, 0))
    assert rolled["A->V R@1"] == 0 and rolled["V->A median rank"] > 1


def test_ties_do_not_inflate():
    x = F.normalize(torch.ones(20, 4), dim=-1)
    metrics = retrieval.retrieval_metrics(x, x)
    assert metrics["A->V R@1"] == metrics["A->V R@10"] == 0
    assert metrics["V->A median rank"] == 20


def test_against_plain_loops(monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 7)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    audio, video = (F.normalize(torch.randn(31, 5, generator=generator), dim=-1) for _ in range(2))
    for queries, candidates in ((audio, video), (video, audio)):
        expected = [
            1 + sum(float(q @ c) >= float(q @ candidates[i]) for j, c in enumerate(candidates) if j != i)
            for i, q in enumerate(queries)
        ]
        assert retrieval.ranks(queries, candidates).tolist() == expected


def test_errors():
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"one shape"):
        retrieval.retrieval_metrics(x, torch.eye(4))
    with pytest.raises(ValueError, match=r"one shape"):
        retrieval.retrieval_metrics(x[:0], x[:0])
    with pytest.raises(ValueError, match=r"video embeddings hold NaN"):
        retrieval.retrieval_metrics(x, x * float("nan"))
