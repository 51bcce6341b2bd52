"""What is tuned: the calls of one training step of a model, grouped into units that are chosen for together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cavmae_fast.errors import CavmaeError
from cavmae_fast.models import PRESETS
from cavmae_fast.models.precision import DTYPES
from cavmae_fast.ops import catalogue
from cavmae_fast.ops.attention_kernels import launch_key
from cavmae_fast.ops.catalogue import Case, Sizes, calls
from cavmae_fast.ops.configuration import name_of
from cavmae_fast.ops.layout import StreamLayout

MODELS: dict[str, dict[str, Any]] = {
    "base": {"norm_pix_loss": True},
    "small": PRESETS["small"].model,
    "tiny": {
        "img_size": 64,
        "audio_length": 64,
        "embed_dim": 64,
        "depth": 2,
        "modality_specific_depth": 1,
        "num_heads": 2,
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
        "norm_pix_loss": True,
    },
}
"Model -> constructor arguments. 'tiny' is for tests."
MASK_RATIOS = {"small": PRESETS["small"].mask_ratio}
ORDER = (
    "attention",
    "stream_layer_norm",
    "linear_gelu",
    "stream_linear",
    "masked_patch_mse",
    "scatter_tokens",
    "gather_tokens",
    "embed_kept_patches",
    "contrastive_loss",
    "adam_update",
    "log_mel_fbank",
)
"Operators in the order of the time that is to be won, so that a run with little time spends it well."
BYTES_PER_SAMPLE = 0.3e9
"Of a clip of the base model in training in 16 bits, about: 164 MiB kept for backward, and what is formed meanwhile."
RESERVED = 8e9
"Bytes of a GPU that do not grow with the batch: parameters, gradients, optimizer, the reference's copies."


class TuneError(CavmaeError, RuntimeError):
    """Tuning that cannot be done here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What a run of the tuner is asked; a later run with the same settings goes on with it."""

    model: str
    batch: int
    dtype: str
    device: str
    operators: tuple[str, ...] = ()
    "Those to tune (empty: all)."
    rounds: int = 7
    "Turns in which each candidate is timed."

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"operators": list(self.operators)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Settings:
        return Settings(**(value | {"operators": tuple(value["operators"])}))


@dataclass(frozen=True)
class Call:
    """A call of an operator, and how often a training step makes it."""

    case: Case
    weight: float


@dataclass(frozen=True)
class Unit:
    """Calls that take one choice: those of an operator in one dtype, and of one key where the operator has keys."""

    operator: str
    dtype: torch.dtype
    key: str
    calls: tuple[Call, ...]
    proofs: tuple[Case, ...]
    "Cases in which a candidate must be right before it is timed: those of the calls, and awkward ones."

    @property
    def case(self) -> str:
        """The entry of the configuration: 'bfloat16 long 32'."""
        return f"{name_of(self.dtype)} {self.key}".rstrip()

    @property
    def name(self) -> str:
        """'attention, bfloat16 long 32'."""
        return f"{self.operator}, {self.case}"


def sizes_of(model: str) -> Sizes:
    """Token counts and widths of a model in `MODELS`."""
    config = MODELS[model]
    frames = config.get("audio_length", 1024)
    return Sizes(
        image=config.get("img_size", 224),
        frames=frames,
        width=config.get("embed_dim", 768),
        heads=config.get("num_heads", 12),
        decoder_width=config.get("decoder_embed_dim", 512),
        decoder_heads=config.get("decoder_num_heads", 16),
        seconds=frames / 100,
        mask_ratio=MASK_RATIOS.get(model, 0.75),
    )


def calls_per_step(model: str) -> dict[str, float]:
    """Case -> how often a training step calls it. A product that the catalogue does not have counts as its share of one
    that it has: by operations, proj and fc2 are 1/3 and 4/3 of qkv."""
    config = MODELS[model]
    depth, specific, width = config.get("depth", 12), config.get("modality_specific_depth", 11), config.get("embed_dim", 768)
    shared, decoder = depth - specific, config.get("decoder_depth", 8)
    return {
        "stream_layer_norm-encoders": 2 * specific,
        "stream_layer_norm-shared": 2 * shared + 1,
        "stream_layer_norm-decoder": 2 * decoder,
        "stream_linear-encoders-qkv": specific * 8 / 3 + shared * 16 / 3,
        "stream_linear-decoder-fc2": decoder * 2,
        "linear_gelu-encoders-fc1": specific + 2 * shared,
        "linear_gelu-decoder-fc1": decoder,
        "attention-encoders": specific,
        "attention-shared": shared,
        "attention-decoder": decoder - 1,
        "attention-decoder-last": 1,
        "gather_tokens-decoder": 2,
        "adam_update-block": 2 * specific + shared + decoder * config.get("decoder_embed_dim", 512) ** 2 / width**2,
        "log_mel_fbank-clips": 0,
    }


def units(settings: Settings) -> list[Unit]:
    """The units of a training step, those with most to win first."""
    sizes, counts = sizes_of(settings.model), calls_per_step(settings.model)
    trained = [c for c in catalogue.pretraining(settings.batch, sizes) if _wanted(c, settings)]
    others = [c for c in [*catalogue.variants(min(settings.batch, 8), sizes), *catalogue.small()] if _wanted(c, settings)]
    groups: dict[tuple[str, torch.dtype, str], list[Case]] = {}
    for case in trained:
        groups.setdefault((case.operator, _dtype(case, settings), _key(case)), []).append(case)
    found = []
    for (operator, dtype, key), cases in groups.items():
        timed = tuple(Call(case, float(counts.get(str(case), 1.0))) for case in cases)
        awkward = [c for c in others if c.operator == operator and dtype in c.dtypes and not key]
        if operator == "attention":
            awkward = _awkward_attention(key, cases[0].head_width)
        found.append(Unit(operator, dtype, key, timed, (*awkward, *cases)))
    return sorted(found, key=lambda unit: (ORDER.index(unit.operator), -sum(c.weight for c in unit.calls)))


def _awkward_attention(key: str, width: int) -> list[Case]:
    """Odd lengths of a unit's key: the choice for one key says nothing of another's kernels."""
    lengths, fewer = ((300,), (31,)) if key.startswith("long") else ((3, 7, 97), (1, 5, 33))
    layout = StreamLayout(2, lengths)
    return [
        calls.attend("odd", layout, layout, 2 * width, 2),
        calls.attend("odd-queries", StreamLayout(2, fewer), layout, 2 * width, 2),
    ]


def _wanted(case: Case, settings: Settings) -> bool:
    return not settings.operators or case.operator in settings.operators


def _dtype(case: Case, settings: Settings) -> torch.dtype:
    """That of the products, or the one that the case has."""
    wanted = DTYPES[settings.dtype]
    return wanted if wanted in case.dtypes else case.dtypes[-1]


def _key(case: Case) -> str:
    """What the choice depends on besides the dtype."""
    if case.attention_of is None:
        return ""
    queries, layout, _ = case.attention_of
    return launch_key((*queries.lengths, *layout.lengths), case.head_width)


def fitting_batch(model: str, device: torch.device) -> int:
    """What a run trains with if nobody says it: 256 clips on a GPU, or as many as fit; few on a CPU, which is slow."""
    if device.type == "cpu":
        return {"base": 4, "small": 16, "tiny": 2}[model]
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(8, min(256, math.floor((memory - RESERVED) / BYTES_PER_SAMPLE / 8) * 8))
