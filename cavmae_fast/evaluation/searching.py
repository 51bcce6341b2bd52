"""`search`: the clips of an index that are nearest to a sound, an image or a video, by cosine."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from cavmae_fast.evaluation.index import Index, IndexFolderError
from cavmae_fast.evaluation.queries import Query, embed_query, read_query
from cavmae_fast.evaluation.running import Model, Running, ready_model
from cavmae_fast.models.opening import weights_hash
from cavmae_fast.models.precision import Precision

Match = Literal["auto", "other", "same", "all"]
Backend = Literal["auto", "exact", "faiss"]
EXACT_ROWS = 10_000_000
"Up to this many clips 'auto' compares the query with every one of them."
BLOCK = 65_536
"Rows that are read and compared at once."


@dataclass(frozen=True)
class Hit:
    """One answer: its rank from 1, its cosine, and which clip it is."""

    rank: int
    score: float
    id: str
    path: str
    number: int


@dataclass(frozen=True, eq=False)
class Answer:
    """The answers to one query.

    Attributes:
        query: what was searched for.
        pairs: which embedding of the query was compared with which of the clips: ('audio', 'video') is a sound against
            pictures. With several pairs, the score is the mean of the cosines.
        hits: best first.
        backend: 'exact' or 'faiss'.
        searched: clips in the index.
    """

    query: Query
    pairs: tuple[tuple[str, str], ...]
    hits: tuple[Hit, ...]
    backend: str
    searched: int


def search(
    index: Index | str | Path,
    *,
    audio: str | Path | None = None,
    image: str | Path | None = None,
    video: str | Path | None = None,
    top: int = 10,
    match: Match = "auto",
    model: Model | str | PathLike | None = None,
    backend: Backend = "auto",
    running: Running | None = None,
) -> Answer:
    """The `top` clips of an index nearest to one file.

    Args:
        index: an index, or its folder.
        audio, image, video: the file; exactly one of them.
        top: 1 to as many as the index holds.
        match: 'same': a sound is compared with the clips' sounds and a picture with their pictures; 'other': a sound with
            pictures and a picture with sounds, as the models are trained to; 'all': both. 'auto': 'same' where the index
            holds that stream, else 'other'.
        model: the model of the index, or its checkpoint; default: the checkpoint that the index names.
        backend: 'exact' compares with every clip; 'faiss' with those in the nearest cells of an index of its own, which is
            kept beside ours; 'auto': faiss beyond ten million clips.

    Raises:
        IndexFolderError: the index cannot be used, or is another model's.
        CheckpointError, MediaError: a file cannot be read.
        ValueError: an argument is out of range.
    """
    index = index if isinstance(index, Index) else Index(index)
    check_searchable(index, top)
    backend = choose_search(backend, len(index))
    running = running or Running()
    if running.dtype == "auto":
        running = replace(running, dtype=index.manifest["computed_in"])
    precision = running.precision()
    model = model_of(index, model, precision)
    query = read_query(model, audio=audio, image=image, video=video, frames=index.manifest["frames"])
    vectors = {name: x.numpy() for name, x in embed_query(model, query, precision).items()}
    pairs = choose_pairs(list(vectors), index.streams, match)
    wanted = [(vectors[mine], theirs) for mine, theirs in pairs]
    if backend == "faiss":
        from cavmae_fast.evaluation.faiss_search import candidates

        found = score_rows(index, wanted, candidates(index, wanted, top), top)
    else:
        found = nearest(index, wanted, top)
    hits = tuple(Hit(rank, score, *index[row]) for rank, (row, score) in enumerate(found, start=1))
    return Answer(query, tuple(pairs), hits, backend, len(index))


def check_searchable(index: Index, top: int) -> None:
    """IndexFolderError unless the index holds pooled embeddings of some clip; ValueError unless it holds `top` clips."""
    if not len(index):
        raise IndexFolderError(f"{index.folder}: the index is empty; there is nothing to search")
    if index.manifest["pooling"] != "mean":
        raise IndexFolderError(f"{index.folder}: holds tokens; searching needs an index with one embedding per clip")
    if not 1 <= top <= len(index):
        raise ValueError(f"top is {top}; allowed: 1 to {len(index)}, as many clips as the index holds")


def choose_search(backend: Backend, rows: int) -> str:
    """'exact' or 'faiss'. ValueError where faiss is meant and not installed."""
    if backend not in ("auto", "exact", "faiss"):
        raise ValueError(f"backend is {backend!r}; allowed: auto, exact or faiss")
    if backend == "exact" or (backend == "auto" and rows <= EXACT_ROWS):
        return "exact"
    if importlib.util.find_spec("faiss") is None:
        raise ValueError(
            f"backend is {backend!r}, which for {rows:,} clips means faiss, and faiss is not installed: "
            "pip install 'cavmae_fast[faiss]'; or take the backend 'exact'"
        )
    return "faiss"


def model_of(index: Index, model: Model | str | PathLike | None, precision: Precision) -> Model:
    """The model that made the index. IndexFolderError when it is another, or none is named."""
    named = index.manifest["model"]
    if model is None and named["path"] is None:
        raise IndexFolderError(f"{index.folder}: names no checkpoint, for it was made of a model in memory; give the model")
    opened = ready_model(named["path"] if model is None else model, precision)
    if weights_hash(opened) != named["sha256"]:
        where = "the model that was given" if model is not None else named["path"]
        raise IndexFolderError(
            f"{index.folder}: is an index of another model than {where} (the weights differ); allowed: the checkpoint that "
            "made it, or a new index"
        )
    return opened


def choose_pairs(query: Sequence[str], index: Sequence[str], match: Match) -> list[tuple[str, str]]:
    """Which streams of the query are compared with which of the index. ValueError when none can be."""
    if match not in ("auto", "other", "same", "all"):
        raise ValueError(f"match is {match!r}; allowed: auto, other, same or all")
    every = [(mine, theirs) for mine in query for theirs in index]
    other, same = ([pair for pair in every if (pair[0] != pair[1]) == crossed] for crossed in (True, False))
    pairs = {"auto": same or other, "other": other, "same": same, "all": every}[match]
    if not pairs:
        raise ValueError(f"match is {match!r}, but the query has {' and '.join(query)} and the index {' and '.join(index)}")
    return pairs


def nearest(index: Index, wanted: Sequence[tuple[np.ndarray, str]], top: int) -> list[tuple[int, float]]:
    """(row, score) of the `top` best rows, best first; equal scores in the order of the rows. `wanted`: the query's
    vectors `[D]` and the streams they are compared with."""
    rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    start = 0
    for part in index.parts:
        for begin in range(0, len(part), BLOCK):
            stop = min(begin + BLOCK, len(part))
            block = np.mean([part.streams[name][begin:stop].astype(np.float32) @ x for x, name in wanted], axis=0)
            _check_finite(block, part.path)
            rows = np.concatenate([rows, np.arange(start + begin, start + stop)])
            scores = np.concatenate([scores, block])
            best = np.argsort(-scores, kind="stable")[:top]
            rows, scores = rows[best], scores[best]
        start += len(part)
    return list(zip(rows.tolist(), scores.tolist(), strict=True))


def score_rows(
    index: Index, wanted: Sequence[tuple[np.ndarray, str]], rows: Sequence[int], top: int
) -> list[tuple[int, float]]:
    """As `nearest`, among these rows alone."""
    order = np.unique(np.asarray(rows, np.int64))
    scores, start = np.empty(len(order), np.float32), 0
    for part in index.parts:
        here = (order >= start) & (order < start + len(part))
        if here.any():
            places = order[here] - start
            scores[here] = np.mean([part.streams[name][places].astype(np.float32) @ x for x, name in wanted], axis=0)
            _check_finite(scores[here], part.path)
        start += len(part)
    best = np.argsort(-scores, kind="stable")[:top]
    return list(zip(order[best].tolist(), scores[best].tolist(), strict=True))


def _check_finite(scores: np.ndarray, path: Path) -> None:
    if not np.isfinite(scores).all():
        raise IndexFolderError(f"{path}: holds embeddings that are not finite; make the index again")
