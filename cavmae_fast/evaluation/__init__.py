"""What a trained model is for: classification, retrieval, embeddings, search, inpainting. Nothing prints; all is typed.

    from cavmae_fast.evaluation import embed, search

    embed("runs/pretrain/model", "videos", "runs/index")
    for hit in search("runs/index", audio="rain.wav", top=5).hits:
        ...

Names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cavmae_fast.evaluation.classifying import classify
    from cavmae_fast.evaluation.converting import average, convert
    from cavmae_fast.evaluation.embedding import embed
    from cavmae_fast.evaluation.index import Index
    from cavmae_fast.evaluation.inpainting import inpaint
    from cavmae_fast.evaluation.retrieving import retrieve
    from cavmae_fast.evaluation.running import Running
    from cavmae_fast.evaluation.searching import search

_PLACES = {
    "Index": "index",
    "Running": "running",
    "average": "converting",
    "classify": "classifying",
    "convert": "converting",
    "embed": "embedding",
    "inpaint": "inpainting",
    "retrieve": "retrieving",
    "search": "searching",
}
__all__ = ["Index", "Running", "average", "classify", "convert", "embed", "inpaint", "retrieve", "search"]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
