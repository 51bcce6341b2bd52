"""MAViL and single-modality autoencoders small enough to build in a test, and their inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cavmae_fast.models.mavil_presets import TOWER_PRESETS, MAEPreset, MAViLPreset

TOWER = {
    "img_size": 32,
    "frames": 4,
    "tubelet_size": 2,
    "audio_length": 32,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}
DECODER = {"decoder_embed_dim": 32, "decoder_num_heads": 4, "decoder_depth": 2}
TINY = TOWER | DECODER
MAVIL = TINY | {"fusion_depth": 2}


def tiny_presets() -> dict[str, MAEPreset | MAViLPreset]:
    """The small presets with models of these sizes."""
    models = {"a-mae-small": {"modality": "a", **TINY}, "v-mae-small": {"modality": "v", **TINY}, "mavil-small": MAVIL}
    return {name: replace(TOWER_PRESETS[name], model=model) for name, model in models.items()}


def clips(config: dict | None = None, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Audio `[B, T, 128]` and clips `[B, F, 3, S, S]` for a model of `config`."""
    config = TINY | (config or {})
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(batch, config["audio_length"], 128, generator=generator, dtype=torch.float64)
    shape = ([] if config["frames"] == 1 else [config["frames"]]) + [3, config["img_size"], config["img_size"]]
    imgs = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    return audio.to(dtype), imgs.to(dtype)
