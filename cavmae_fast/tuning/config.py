"""The options of `cavmae-fast tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TuneConfig:
    """Prove and time every operator's implementations on this machine, and keep the fastest right ones for later runs."""

    model: Literal[
        "base",
        "small",
        "tiny",
        "a-mae",
        "v-mae",
        "mavil",
        "mavil-stage-2",
        "tiny-v-mae",
        "tiny-mavil",
        "tiny-mavil-stage-2",
    ] = "base"
    """The model whose training step is tuned for."""
    batch: str = "auto"
    """Clips per step: a number, or auto: 256 or what fits on a GPU, a few on a CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto"
    """Of the matrix products; auto: as `pretrain` chooses."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    operators: tuple[str, ...] = ()
    """Tune these alone; default: all."""
    minutes: float = 5.0
    """Time for proving and timing; what does not fit keeps what it has, and the same command goes on with it."""
    limit: float = 60.0
    """Seconds after which an attempt counts as hanging."""
    rounds: int = 7
    """Turns in which each candidate is timed."""
    fresh: bool = False
    """Begin anew instead of going on with a run that was cut short."""
    export: Path | None = None
    """Also write what was chosen to this file, in the form of the files in `cavmae_fast/ops/configs`."""
