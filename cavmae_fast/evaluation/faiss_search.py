"""Approximate search with faiss, for indexes of more clips than a query can be compared with one by one.

faiss names candidates; their cosines are then computed exactly, from the index itself. Its own index (inverted lists of
8-bit codes: a quarter of the memory of the embeddings) is made once, at the first search, and kept in the index's folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cavmae_fast.evaluation.index import Index, IndexFolderError

FLAT_ROWS = 10_000
"Below this many rows faiss compares with all of them, too: there is too little to learn cells from."
BLOCK = 65_536
SAMPLES_PER_CELL = 64
MORE = 10
"Candidates per answer: what the codes' rounding puts into the wrong order is put right among them."


def candidates(index: Index, wanted: Sequence[tuple[np.ndarray, str]], top: int) -> list[int]:
    """Rows that are likely among the `top` nearest; `wanted` as in `searching.nearest`."""
    rows: set[int] = set()
    for vector, stream in wanted:
        built = faiss_index(index, stream)
        _, found = built.search(np.ascontiguousarray(vector, np.float32)[None], min(MORE * top, len(index)))
        rows.update(row for row in found[0].tolist() if row >= 0)
    return sorted(rows)


def faiss_index(index: Index, stream: str) -> Any:
    """faiss's index of one stream, read from the folder, or made and written there. IndexFolderError when it is damaged."""
    import faiss

    path = index.folder / f"faiss-{stream}.index"
    if not path.exists():
        _build(index, stream, path)
    try:
        built = faiss.read_index(str(path))
    except RuntimeError as error:
        raise IndexFolderError(f"{path}: cannot be read by faiss; remove it, and it is made again") from error
    if built.ntotal != len(index):
        raise IndexFolderError(f"{path}: holds {built.ntotal} rows, the index {len(index)}; remove it, and it is made again")
    if hasattr(built, "nprobe"):
        built.nprobe = max(16, built.nlist // 16)
    return built


def _build(index: Index, stream: str, path: Path) -> None:
    import faiss

    arrays = list(index.arrays(stream))
    width, count = arrays[0].shape[1], len(index)
    if count < FLAT_ROWS:
        built = faiss.index_factory(width, "Flat", faiss.METRIC_INNER_PRODUCT)
    else:
        cells = int(4 * math.sqrt(count))
        built = faiss.index_factory(width, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
        step = max(1, count // (SAMPLES_PER_CELL * cells))
        built.train(np.concatenate([np.asarray(array[::step], np.float32) for array in arrays]))
    for array in arrays:
        for begin in range(0, len(array), BLOCK):
            built.add(np.ascontiguousarray(array[begin : begin + BLOCK], np.float32))
    part = path.with_name(f".{path.name}.part")
    try:
        faiss.write_index(built, str(part))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
