"""What is tuned: the calls of one training step of a model, grouped into units that are chosen for together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from cavmae_fast.errors import CavmaeError
from cavmae_fast.models.precision import dtype_of
from cavmae_fast.models.systems import SYSTEMS, CAVMAESystem, MAESystem, MAViLSystem, System
from cavmae_fast.ops import catalogue
from cavmae_fast.ops.attention_tiles import launch_key
from cavmae_fast.ops.catalogue import Case, Sizes, calls, towers
from cavmae_fast.ops.catalogue.towers import TowerSizes
from cavmae_fast.ops.configuration import name_of
from cavmae_fast.ops.layout import StreamLayout


class Tuned(NamedTuple):
    """A model that is tuned for: the system, and for how many clips where nobody says it."""

    system: System
    cpu_batch: int
    "Clips of a step on a CPU, which is slow."
    bytes_per_clip: float = 0.3e9
    """Of a clip in training in 16 bits, about: 162 MiB kept for backward in the base model, and what is formed meanwhile; of
    others in proportion (`doctor --model` says what is kept)."""


TINY = {
    "img_size": 64,
    "audio_length": 64,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "norm_pix_loss": True,
}
MODELS = {
    "base": Tuned(SYSTEMS["cav-mae-base"], 4),
    "small": Tuned(SYSTEMS["small"], 16),
    "tiny": Tuned(SYSTEMS["cav-mae-base"].resized(TINY | {"modality_specific_depth": 1}), 2),
    "a-mae": Tuned(SYSTEMS["a-mae"], 4, 0.2e9),
    "v-mae": Tuned(SYSTEMS["v-mae"], 4, 0.3e9),
    "mavil": Tuned(SYSTEMS["mavil"], 2, 0.65e9),
    "mavil-stage-2": Tuned(SYSTEMS["mavil-stage-2"], 2, 0.7e9),
    "tiny-v-mae": Tuned(SYSTEMS["v-mae"].resized(TINY), 2),
    "tiny-mavil": Tuned(SYSTEMS["mavil"].resized(TINY), 2),
    "tiny-mavil-stage-2": Tuned(SYSTEMS["mavil-stage-2"].resized(TINY), 2),
}
"What a training step can be tuned for, and measured by the benchmarks. Those that are tiny are for tests."
ORDER = (
    "attention",
    "stream_layer_norm",
    "linear_gelu",
    "hidden_gradient",
    "weight_gradient",
    "stream_linear",
    "masked_patch_mse",
    "scatter_tokens",
    "distinct_tokens",
    "gather_tokens",
    "embed_kept_patches",
    "contrastive_loss",
    "fp8_product",
    "fp8_hidden_gradient",
    "fp8_gelu",
    "fp8_layer_norm",
    "quantize_rows",
    "adam_update",
    "log_mel_fbank",
)
"Operators in the order of the time that is to be won, so that a run with little time spends it well."
IN_FP8 = {name for name in ORDER if name.startswith("fp8_")} | {"quantize_rows"}
"Operators that a step calls in fp8 alone."
NOT_IN_FP8 = {"linear_gelu", "hidden_gradient"}
"Those that it does not call in fp8."
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

    @property
    def fp8(self) -> bool:
        """Whether blocks multiply 8-bit numbers."""
        return self.dtype == "fp8"

    @property
    def products(self) -> torch.dtype:
        """The dtype of the products, of all others in fp8."""
        return dtype_of(self.dtype)

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


def sizes_of(system: CAVMAESystem) -> Sizes:
    """Token counts and widths of a CAV-MAE."""
    config = system.arguments
    frames = config.get("audio_length", 1024)
    return Sizes(
        image=config.get("img_size", 224),
        frames=frames,
        width=config.get("embed_dim", 768),
        heads=config.get("num_heads", 12),
        decoder_width=config.get("decoder_embed_dim", 512),
        decoder_heads=config.get("decoder_num_heads", 16),
        seconds=frames / 100,
        mask_ratio=system.preset.mask_ratio,
    )


def tower_sizes_of(system: MAESystem | MAViLSystem) -> TowerSizes:
    """Sizes of a model of towers, and which of its parts a step runs."""
    config, names = system.arguments, {"img_size": "image", "embed_dim": "width", "num_heads": "heads"}
    names |= {"decoder_embed_dim": "decoder_width", "decoder_num_heads": "decoder_heads", "modality": "modalities"}
    names |= {"patch_size": "patch", "tubelet_size": "tubelet"}
    same = ("frames", "audio_length", "depth", "decoder_depth", "fusion_depth")
    given = {names.get(name, name): value for name, value in config.items() if name in names or name in same}
    if isinstance(system, MAESystem):
        given |= {"fusion_depth": 0, "views": 1}
    else:
        given |= {"views": 2 if system.in_force["intra"] else 1, "teacher": system.stage == 2}
    return TowerSizes(**given, mask_ratio=system.preset.mask_ratio)


def calls_per_step(system: CAVMAESystem) -> dict[str, float]:
    """Case -> how often a training step calls it. A product that the catalogue does not have counts as its share of one
    that it has: by operations, proj and fc2 are 1/3 and 4/3 of qkv, and a block's weight gradients three of fc1's."""
    config = system.arguments
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
        "hidden_gradient-encoders": specific + 2 * shared,
        "hidden_gradient-decoder": decoder,
        "weight_gradient-encoders-fc1": 3 * (specific + 2 * shared),
        "weight_gradient-decoder-fc2": 3 * decoder,
        "attention-encoders": specific,
        "attention-shared": shared,
        "attention-decoder": decoder - 1,
        "attention-decoder-last": 1,
        "gather_tokens-decoder": 2,
        "adam_update-block": 2 * specific + shared + decoder * config.get("decoder_embed_dim", 512) ** 2 / width**2,
        "log_mel_fbank-clips": 0,
    }


def fp8_calls_per_step(system: CAVMAESystem) -> dict[str, float]:
    """The same of what is called in fp8 besides. A shared block counts as two, because it has twice the rows."""
    config = system.arguments
    depth, specific = config.get("depth", 12), config.get("modality_specific_depth", 11)
    blocks = {"encoders": specific + 2 * (depth - specific), "decoder": config.get("decoder_depth", 8)}
    return {str(case): count * blocks[kind] for kind, case, count in catalogue.in_fp8(1, sizes_of(system))}


def step_calls(model: str, batch: int) -> list[Call]:
    """The calls of a training step of one of `MODELS`, in fp8 and not."""
    system = MODELS[model].system
    if isinstance(system, CAVMAESystem):
        counts = calls_per_step(system) | fp8_calls_per_step(system)
        return [Call(case, float(counts.get(str(case), 1.0))) for case in catalogue.pretraining(batch, sizes_of(system))]
    return [Call(case, float(weight)) for case, weight in towers.step(batch, tower_sizes_of(system))]


def other_cases(model: str, batch: int) -> list[Case]:
    """Awkward calls, in which a candidate must be right, too."""
    system = MODELS[model].system
    shapes = catalogue.variants(min(batch, 8), sizes_of(system)) if isinstance(system, CAVMAESystem) else []
    return [*shapes, *catalogue.small()]


def units(settings: Settings) -> list[Unit]:
    """The units of a training step, those with most to win first."""
    others = other_cases(settings.model, settings.batch)
    groups: dict[tuple[str, torch.dtype, str], list[Call]] = {}
    for call in step_calls(settings.model, settings.batch):
        if _wanted(call.case, settings):
            groups.setdefault((call.case.operator, _dtype(call.case, settings), _key(call.case)), []).append(call)
    found = []
    for (operator, dtype, key), timed in groups.items():
        cases = [call.case for call in timed]
        awkward = [c for c in others if c.operator == operator and dtype in c.dtypes and not key]
        if operator == "attention":
            awkward = _awkward_attention(key, cases[0].head_width)
        found.append(Unit(operator, dtype, key, tuple(timed), (*awkward, *cases)))
    return sorted(found, key=lambda unit: (ORDER.index(unit.operator), -sum(c.weight for c in unit.calls)))


def _awkward_attention(key: str, width: int) -> list[Case]:
    """Odd lengths of a unit's key: the choice for one key says nothing of another's kernels."""
    lengths, fewer = ((300,), (31,)) if key.startswith("long") else ((3, 7, 97), (1, 5, 33))
    layout = StreamLayout(2, lengths)
    return [
        calls.attend("odd", layout, layout, 2 * width, 2, owed=1),
        calls.attend("odd-queries", StreamLayout(2, fewer), layout, 2 * width, 2, owed=len(lengths)),
    ]


def _wanted(case: Case, settings: Settings) -> bool:
    if case.operator in (NOT_IN_FP8 if settings.fp8 else IN_FP8):
        return False
    return not settings.operators or case.operator in settings.operators


def _dtype(case: Case, settings: Settings) -> torch.dtype:
    """That of the products, or the one that the case has."""
    wanted = settings.products
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
        return MODELS[model].cpu_batch
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(8, min(256, math.floor((memory - RESERVED) / MODELS[model].bytes_per_clip / 8) * 8))
