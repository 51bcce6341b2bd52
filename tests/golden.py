"""Rebuilds the weights and inputs of the golden files (outputs and gradients of the published implementation)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and parsed metadata of a golden file; skips the test where the folder is absent."""
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"the golden files are not beside this checkout ({path.name})")
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Gives every parameter but the positions its golden value, drawn from the checksum of its name."""
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if name.endswith("weight") and ("norm" in name or "mlp_head.0" in name):
            parameter += 1
    return model


def inputs(metadata: dict, audio_length: int = 1024) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(metadata["input_seed"])
    audio = torch.randn(metadata["batch"], audio_length, 128, generator=generator)
    return audio, torch.randn(metadata["batch"], 3, 224, 224, generator=generator)
