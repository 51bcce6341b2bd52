"""`cavmae-fast convert` and `average`: weights from file to file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cavmae_fast.evaluation.commands.options import printable
from cavmae_fast.evaluation.converting import Conversion, average, convert, parse_epochs


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write weights in another form, or for another model; every name that changes is listed."""

    source: Path
    """A published .pth, a .safetensors file, or a folder written by save_pretrained."""
    out: Path
    """A name ending in .pth or .safetensors for such a file, any other for a folder."""
    to: Literal["same", "fine-tuned", "fine-tuned-audio", "from-image-mae"] = "same"
    """fine-tuned, fine-tuned-audio: a pretrained model as a classifier with a new head; from-image-mae: an image MAE into
    both streams."""
    classes: int | None = None
    """Of the new classifier."""
    model: str = "cav-mae-base"
    """Preset that an image MAE goes into."""
    num_heads: int | None = None
    """Attention heads, which a .pth or .safetensors file does not say; default: one per 64 channels."""
    norm_pix_loss: bool | None = None
    """Whether the model was trained on normalized patches, which such a file does not say either; default: yes."""
    seed: int = 0
    """Of weights that are new."""
    overwrite: bool = False
    """Replace OUT where it is there."""


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Write the mean of the weights that a run had after some epochs."""

    run: Path
    """Folder of the run: epochs/epoch-003.safetensors, ..., or audio_model.3.pth, ..."""
    epochs: str = ""
    """Which, such as 3-15 or 1,3-5; default: all that are there."""
    out: Path = Path("averaged.safetensors")
    """A name ending in .pth or .safetensors for such a file, any other for a folder."""
    overwrite: bool = False
    """Replace --out where it is there."""


def run_convert(config: ConvertConfig) -> Conversion:
    """The job of `convert`."""
    known = {"num_heads": config.num_heads, "norm_pix_loss": config.norm_pix_loss}
    return convert(
        config.source,
        config.out,
        to=config.to,
        classes=config.classes,
        model=config.model,
        seed=config.seed,
        overwrite=config.overwrite,
        **{name: value for name, value in known.items() if value is not None},
    )


def run_average(config: AverageConfig) -> Conversion:
    """The job of `average`."""
    epochs = parse_epochs(config.epochs) if config.epochs else ()
    return average(config.run, config.out, epochs=epochs, overwrite=config.overwrite)


def closing(config: ConvertConfig | AverageConfig, result: Conversion) -> str:
    """Every name that was dropped, added or renamed, and what was written."""
    lines = [f"read     {path}" for path in result.sources]
    lines += [f"dropped  {name}" for name in result.dropped]
    lines += [f"added    {name}   (new)" for name in result.added]
    lines += [f"renamed  {old} -> {new}" for old, new in result.renamed]
    if result.out.suffix in (".pth", ".pt"):
        lines.append("all names begin with module., as published")
    counts = f"{len(result.dropped)} dropped, {len(result.added)} added, {len(result.renamed)} renamed"
    lines.append(f"wrote    {result.out}   ({result.names} tensors; {counts})")
    return printable(lines)
