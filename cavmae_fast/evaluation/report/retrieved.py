"""The page of a retrieval: the scores, and some queries with the clips that were ranked first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cavmae_fast.evaluation.ranking import best_candidates
from cavmae_fast.evaluation.report.media import exhibit_clip
from cavmae_fast.evaluation.report.page import Answers, Case, Page, Table, plural, write_page
from cavmae_fast.evaluation.retrieval import TOP
from cavmae_fast.evaluation.retrieving import Retrieved

ANSWERS = 5
"Clips shown for each query and direction."
QUERIES = 12
"Queries shown, spread evenly over the data set: neither the best nor the worst were chosen."


def write_retrieval_page(result: Retrieved, path: Path, model: str, queries: int = QUERIES) -> None:
    """Writes the page of `queries` clips, or of all where they are fewer. MediaError when a clip cannot be read any more."""
    rows = np.unique(np.linspace(0, len(result.ids) - 1, min(queries, len(result.ids))).round().astype(int)).tolist()
    directions = (
        ("Pictures found for this sound", result.audio, result.video, result.scores.ranks_audio_to_video),
        ("Sounds found for this picture", result.video, result.audio, result.scores.ranks_video_to_audio),
    )
    found = [best_candidates(mine[rows], theirs, ANSWERS) for _, mine, theirs, _ in directions]
    cases = []
    for place, row in enumerate(rows):
        groups = tuple(
            _group(result, title, row, int(ranks[row]), scores[place].tolist(), best[place].tolist())
            for (title, _, _, ranks), (scores, best) in zip(directions, found, strict=True)
        )
        cases.append(Case(exhibit_clip(result.clips, result.numbers[row], result.ids[row]), groups))
    page = Page(
        title="Retrieval between sound and picture",
        lead=f"{plural(result.scores.clips, 'clip')}, ranked by cosine with {model}. "
        f"Queries shown: {len(cases)}, spread evenly over the data.",
        tables=(_scores(result),),
        cases=tuple(cases),
    )
    write_page(page, path)


def _group(result: Retrieved, title: str, row: int, rank: int, scores: list[float], best: list[int]) -> Answers:
    exhibits = tuple(
        exhibit_clip(result.clips, result.numbers[k], result.ids[k], f"cosine {score:.3f}", k == row)
        for score, k in zip(scores, best, strict=True)
    )
    return Answers(title, f"The right clip has rank {rank} of {result.scores.clips}.", exhibits)


def _scores(result: Retrieved) -> Table:
    scores = result.scores
    rows = [
        (
            name,
            *(f"{way.recall[k]:.1f} %" for k in TOP),
            f"{way.median_rank:g}",
            f"{way.mean_rank:.1f}",
        )
        for name, way in (("sound to picture", scores.audio_to_video), ("picture to sound", scores.video_to_audio))
    ]
    chance = ("chance", *(f"{scores.chance[k]:.1f} %" for k in TOP), f"{scores.chance_rank:g}", f"{scores.chance_rank:.1f}")
    headings = ("direction", *(f"R@{k}" for k in TOP), "median rank", "mean rank")
    return Table("Share of queries whose own clip is among the first k", headings, (*rows, chance))
