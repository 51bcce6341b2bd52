"""Fast audio-visual masked autoencoders that drop into existing CAV-MAE training scripts.

Importing needs torch and numpy alone (Triton where kernels run); names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cavmae_fast.data.draws import Augmentation
    from cavmae_fast.data.loader import Loader
    from cavmae_fast.models import (
        CAVMAE,
        CAVMAEFT,
        MAE,
        MAEFT,
        PRESETS,
        PRETRAINED_TO_FINE_TUNED,
        CAVMAEFTAudio,
        CheckpointError,
        MAViL,
        MAViLFT,
        create_model,
        load_checkpoint,
        load_imagenet_mae,
        load_mae,
        load_tower,
    )
    from cavmae_fast.training.adam import Adam, AdamW

__all__ = [
    "CAVMAE",
    "CAVMAEFT",
    "MAE",
    "MAEFT",
    "PRESETS",
    "PRETRAINED_TO_FINE_TUNED",
    "Adam",
    "AdamW",
    "Augmentation",
    "CAVMAEFTAudio",
    "CheckpointError",
    "Loader",
    "MAViL",
    "MAViLFT",
    "create_model",
    "load_checkpoint",
    "load_imagenet_mae",
    "load_mae",
    "load_tower",
]


_ELSEWHERE = {
    "Adam": ".training.adam",
    "AdamW": ".training.adam",
    "Augmentation": ".data.draws",
    "Loader": ".data.loader",
}
"Names that are not in `models`, and where they are."


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module(_ELSEWHERE.get(name, ".models"), __name__), name)
    if name in ("data", "evaluation", "models", "ops", "reference", "training"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
