"""Models small enough to build in a test, with weights that leave nothing at its neutral value, and their inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

OUTPUTS = ("loss", "loss_mae", "loss_mae_a", "loss_mae_v", "loss_c", "mask_a", "mask_v", "c_acc")
ENCODER = {
    "img_size": 32,
    "audio_length": 64,
    "embed_dim": 48,
    "num_heads": 3,
    "depth": 3,
    "modality_specific_depth": 2,
}
TINY = ENCODER | {"decoder_embed_dim": 32, "decoder_num_heads": 4, "decoder_depth": 2}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Imported by a test module, runs it on one thread: these models are too small for more, which only wait on a busy
    machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter but frozen positions: biases are not 0, norm weights not 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


def pair(fast: type, plain: type, *args, dtype: torch.dtype = torch.float64, **config) -> tuple[nn.Module, nn.Module]:
    """The fast and the reference model with the same random weights. `attention` is the fast one's alone."""
    attention = config.pop("attention", None)
    one, other = fast(*args, attention=attention, **config), plain(*args, **config)
    randomize(other)
    one.load_state_dict(other.state_dict())
    return one.to(dtype), other.to(dtype)


def inputs(config: dict | None = None, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Audio and images for a model of `config`."""
    config = TINY | (config or {})
    size = config["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(batch, config["audio_length"], 128, generator=generator, dtype=torch.float64)
    imgs = torch.randn(batch, config.get("in_chans", 3), height, width, generator=generator, dtype=torch.float64)
    return audio.to(dtype), imgs.to(dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`; NaN where either holds one.

    Fixed bounds of 1e-9 to 1e-12 on it, in float64, follow from the arithmetic and from no machine: sums of up to some
    thousand terms of 1.1e-16 each, through some ten layers that each enlarge an error a few times, stay below 1e-11.
    """
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
