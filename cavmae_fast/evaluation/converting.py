"""`average` and `convert`: weights from file to file, with every name that does not simply go along said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cavmae_fast.data.sets.shards import put_whole
from cavmae_fast.errors import CavmaeError
from cavmae_fast.models import CAVMAE, CAVMAEFT, PRESETS, PRETRAINED_TO_FINE_TUNED, CAVMAEFTAudio, load_checkpoint
from cavmae_fast.models.averaging import average_states
from cavmae_fast.models.imagenet_mae import load_imagenet_mae, places_of
from cavmae_fast.models.opening import open_model
from cavmae_fast.models.weights import CONFIG_FILE, WEIGHTS_FILE, read_state

Target = Literal["same", "fine-tuned", "fine-tuned-audio", "from-image-mae"]
SUFFIXES = (".pth", ".pt", ".safetensors")


class ConversionError(CavmaeError, ValueError):
    """A conversion that cannot be done; the message names the file."""

    exit_code = 2


@dataclass(frozen=True)
class Conversion:
    """What a conversion did to the names.

    Attributes:
        out: the file or folder that was written.
        names: how many tensors it holds.
        dropped: names of the source that are not in the result.
        added: names of the result that are in no source: they hold initial values.
        renamed: (name in the source, name in the result), also where a tensor went to several places.
        sources: files that were read.
    """

    out: Path
    names: int
    dropped: tuple[str, ...]
    added: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    sources: tuple[Path, ...]


def convert(
    source: str | PathLike,
    out: str | PathLike,
    *,
    to: Target = "same",
    classes: int | None = None,
    model: str = "cav-mae-base",
    seed: int = 0,
    overwrite: bool = False,
    **known: Any,
) -> Conversion:
    """Writes the weights in `source` in another form, or for another model.

    Args:
        source: a published `.pth`, a `.safetensors` file, or a folder that `save_pretrained` wrote.
        out: a name that ends in `.pth` or `.safetensors` for such a file; any other for a folder.
        to: 'same': the same model; 'fine-tuned' or 'fine-tuned-audio': a pretrained model's weights as a classifier's, whose
            head is new; 'from-image-mae': an image MAE's weights (He et al.) in both streams of a pretraining model.
        classes: of the new classifier.
        model: preset of the model that an image MAE goes into.
        seed: of weights that are new.
        overwrite: replace `out` where it is there.
        known: constructor arguments that a bare file does not say, such as `num_heads` or `norm_pix_loss`.

    Raises:
        CheckpointError: the source cannot be read or does not fit. ConversionError: an argument does not make sense.
    """
    source, out = Path(source), Path(out)
    check_out(out, overwrite, (source,))
    if (classes is None) == to.startswith("fine-tuned"):
        raise ConversionError(
            f"classes is {classes} and to is {to!r}; a new classifier needs classes, nothing else takes them"
        )
    if to == "same":
        built, report = open_model(source, **known), ((), (), ())
    elif to in ("fine-tuned", "fine-tuned-audio"):
        built, report = _classifier(source, to, classes, seed, known)
    elif to == "from-image-mae":
        built, report = _from_image_mae(source, model, seed)
    else:
        raise ConversionError(f"to is {to!r}; allowed: same, fine-tuned, fine-tuned-audio or from-image-mae")
    state = built.state_dict()
    if to == "same":
        report = (sorted(read_state(source).keys() - state.keys()), (), ())
    write_model(built, out)
    dropped, added, renamed = map(tuple, report)
    return Conversion(out, len(state), dropped, added, renamed, (source,))


def average(run: str | PathLike, out: str | PathLike, *, epochs: Sequence[int] = (), overwrite: bool = False) -> Conversion:
    """The mean of the checkpoints that a fine-tuning run wrote after some epochs, as published for the last ones.

    Args:
        run: folder in which checkpoints of epochs lie, by names such as `epoch-003.safetensors` or, as published,
            `audio_model.3.pth`; they may lie in its folder `epochs` or `models`.
        out: as in `convert`.
        epochs: which; default: all that are there.

    Raises:
        ConversionError: an epoch is not there. CheckpointError: checkpoints do not belong together.
    """
    run, out = Path(run), Path(out)
    found = epoch_checkpoints(run)
    chosen = sorted(set(epochs)) or sorted(found)
    if missing := [epoch for epoch in chosen if epoch not in found]:
        there = ", ".join(map(str, sorted(found)))
        raise ConversionError(f"{run}: has no checkpoint of epoch {missing[0]}; there are {there}")
    paths = [found[epoch] for epoch in chosen]
    check_out(out, overwrite, paths)
    state = average_states(paths)
    # The files of the epochs are bare weights; the run's own model says how they are to be read.
    described = [run / name for name in ("model", "best") if (run / name / CONFIG_FILE).is_file()]
    built = open_model([*described, paths[0]][0])
    load_checkpoint(built, state)
    write_model(built, out)
    dropped = tuple(sorted(state.keys() - built.state_dict().keys()))
    return Conversion(out, len(built.state_dict()), dropped, (), (), tuple(paths))


def epoch_checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder, by epoch. ConversionError when there is none, or two of one epoch."""
    if not run.is_dir():
        raise ConversionError(f"{run}: no such folder; it must be that of a run with a checkpoint per epoch")
    found: dict[int, Path] = {}
    for folder in (run, run / "models", run / "epochs"):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = re.fullmatch(r"(?:epoch|audio_model)[-_.]?(\d+)(?:\.pth|\.pt|\.safetensors)?", path.name)
            if match is None or (path.is_dir() and not (path / CONFIG_FILE).is_file()):
                continue
            epoch = int(match[1])
            if epoch in found:
                raise ConversionError(f"{run}: epoch {epoch} has two checkpoints: {found[epoch]} and {path}")
            found[epoch] = path
    if not found:
        raise ConversionError(f"{run}: holds no checkpoint of an epoch, such as epoch-3 or audio_model.3.pth")
    return found


def parse_epochs(text: str) -> tuple[int, ...]:
    """`3-15`, `3,5,9` or `1,3-5` as numbers. ValueError for anything else."""
    epochs: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(f"--epochs is {text!r}; allowed: numbers and ranges such as 3-15 or 1,3-5")
        epochs += range(first, last + 1)
    return tuple(epochs)


def check_out(out: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """ConversionError when `out` is there and may not be replaced, or is what is read."""
    if any(out.resolve() == source.resolve() for source in sources):
        raise ConversionError(f"{out}: is what is read; allowed: another name")
    if out.suffix in SUFFIXES:
        taken = out if out.exists() else None
    else:
        taken = next((out / name for name in (CONFIG_FILE, WEIGHTS_FILE) if (out / name).exists()), None)
        taken = out if out.is_file() else taken
    if out.is_dir() and out.suffix in SUFFIXES:
        raise ConversionError(f"{out}: is a folder; allowed: a name without {out.suffix}, or another one")
    if taken is not None and not overwrite:
        raise ConversionError(f"{taken}: is there already; allowed: another name, or overwrite")
    if not out.parent.is_dir():
        raise ConversionError(f"{out}: {out.parent} is no folder; it must be there")


def write_model(model: CAVMAE | CAVMAEFT | CAVMAEFTAudio, out: Path) -> None:
    """Writes the model as the name asks: a PyTorch file with the published prefix `module.`, a safetensors file, or a
    folder. Files appear whole or not at all."""
    if out.suffix not in SUFFIXES:
        model.save_pretrained(out)
        return
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if out.suffix == ".safetensors":
        from safetensors.torch import save

        data = save(state)
        put_whole(out, lambda file: file.write(data))
    else:
        published = {f"module.{name}": value for name, value in state.items()}
        put_whole(out, lambda file: torch.save(published, file))


Report = tuple[Sequence[str], Sequence[str], Sequence[tuple[str, str]]]
"Names that were dropped, added and renamed."


def _classifier(source: Path, to: str, classes: int, seed: int, known: dict[str, Any]) -> tuple[nn.Module, Report]:
    """A pretrained model's weights as a classifier's."""
    opened = open_model(source, **known)
    if not isinstance(opened, CAVMAE):
        raise ConversionError(f"{source}: holds a {type(opened).__name__}; only a pretrained CAVMAE becomes a classifier")
    kind = CAVMAEFT if to == "fine-tuned" else CAVMAEFTAudio
    taken = (
        "img_size audio_length patch_size in_chans embed_dim modality_specific_depth num_heads mlp_ratio depth norm_pix_loss"
    )
    arguments = {name: opened.config[name] for name in taken.split()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = kind(classes, **arguments, clip=opened.clip_spec)
    report = load_checkpoint(built, opened.state_dict(), **PRETRAINED_TO_FINE_TUNED)
    return built, (report.unexpected, report.missing, ())


def _from_image_mae(source: Path, preset: str, seed: int) -> tuple[nn.Module, Report]:
    """An image MAE's weights in both streams of a new pretraining model."""
    if preset not in PRESETS:
        raise ConversionError(f"model is {preset!r}; allowed: {', '.join(PRESETS)}")
    state: dict[str, Tensor] = read_state(source)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = PRESETS[preset].create()
    report = load_imagenet_mae(built, source)
    own = built.state_dict().keys()
    renamed = [(key, name) for key in state for name, _ in places_of(built, key, state[key]) if name in own and name != key]
    dropped = sorted({*report.unexpected, *(state.keys() & {"cls_token"})})
    return built, (dropped, report.missing, sorted(renamed))
