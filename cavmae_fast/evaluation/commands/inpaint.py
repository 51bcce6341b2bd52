"""`cavmae-fast inpaint`: what a pretrained model fills in, as pictures, sounds and numbers."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cavmae_fast.data.sets.shards import put_whole, write_whole
from cavmae_fast.evaluation.commands.options import data_of, printable, progress_bar
from cavmae_fast.evaluation.drawing import mosaic, new_figure
from cavmae_fast.evaluation.inpainting import Errors, Inpainted, InpaintedClip, Views, inpaint
from cavmae_fast.evaluation.running import Running
from cavmae_fast.evaluation.sound import require_librosa, spectrogram_to_sound
from cavmae_fast.models.opening import open_model


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(Running):
    """Remove patches of sound and picture, and show what a pretrained model fills in."""

    checkpoint: Path
    """A pretrained model: a folder written by save_pretrained, a published .pth, or .safetensors."""
    data: tuple[Path, ...] = ()
    """Clips: a folder that `cavmae-fast prepare` wrote, or folders of videos, media files, lists."""
    out: Path = Path("runs/inpaint")
    """Folder for pictures, sounds and numbers."""
    mask_mode: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    """How patches of the sound are chosen: anywhere, or whole stretches of time, frequency, or both (CAV-MAE's alone)."""
    mask_ratio: float | None = None
    """Share of the patches that is removed; default: as published, 0.75 for CAV-MAE and 0.8 for MAEs and MAViL."""
    clips: int = 8
    """How many clips, from the first on."""
    seed: int = 0
    """Of the choice of patches."""
    sound: bool = True
    """Make sounds of the spectrograms (needs librosa)."""
    norm_pix_loss: bool | None = None
    """Whether the model was trained on normalized patches; only for files that do not say (.pth; default there: yes)."""
    overwrite: bool = False
    """Write into a folder that is not empty; files of the same name are replaced."""


def run(config: InpaintConfig) -> Inpainted:
    """The command's job."""
    data = data_of(config.data)
    if config.out.is_dir() and any(config.out.iterdir()) and not config.overwrite:
        raise ValueError(f"--out is {config.out}, which is not empty; allowed: another folder, or --overwrite")
    known = {} if config.norm_pix_loss is None else {"norm_pix_loss": config.norm_pix_loss}
    model = open_model(config.checkpoint, **known)
    if config.sound and "a" in model.modalities:
        require_librosa()
    with progress_bar("clips") as progress:
        result = inpaint(
            model,
            data,
            mask_mode=config.mask_mode,
            mask_ratio=config.mask_ratio,
            clips=config.clips,
            seed=config.seed,
            running=config,
            progress=progress,
        )
    write_inpainted(result, config.out, config.sound)
    return result


def write_inpainted(result: Inpainted, folder: Path, sound: bool = True) -> None:
    """Writes each clip into a folder of its own, whose name is its number, and `clips.json` and `clips.csv` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, clip in enumerate(result.clips):
        own = folder / f"{number:04d}"
        own.mkdir(exist_ok=True)
        for kind, pictures in shown(clip).items():
            for name, pixels in zip(Views.__annotations__, pictures):
                _write_png(own / f"{kind}-{name}.png", pixels)
        _draw(result, clip, own / "overview.png")
        if sound and clip.spectrogram is not None:
            _write_wav(own / "sound-original.wav", clip.sound, result)
            # The original through the same way back: what the way itself loses is not the model's fault.
            for name, spectrogram in (("resynthesized", clip.spectrogram.original), ("filled", clip.spectrogram.filled)):
                _write_wav(own / f"sound-{name}.wav", spectrogram_to_sound(spectrogram, result.clip_spec), result)
        rows.append({"folder": own.name, "id": clip.id, "path": clip.path, **_known(clip.errors)})
    settings = {name: getattr(result, name) for name in ("mask_ratio", "mask_mode", "seed", "statistics_given")}
    rejects = [asdict(reject) for reject in result.rejects]
    write_whole(folder / "clips.json", json.dumps({**settings, "clips": rows, "rejects": rejects}, indent=2) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _printable(value) for name, value in row.items()} for row in rows)
    write_whole(folder / "clips.csv", text.getvalue())


def closing(config: InpaintConfig, result: Inpainted) -> str:
    """The mean errors, what they mean, and where the files are."""
    means = {name: np.mean([getattr(clip.errors, name) for clip in result.clips]) for name in _known(result.clips[0].errors)}
    lines = [f"{len(result.clips)} clips, {result.mask_ratio:.0%} of the patches removed ({result.mask_mode})"]
    if "audio_db" in means:
        lines.append(
            f"  sound    {means['audio_db']:.1f} dB off, {means['audio_mean_db']:.1f} dB by the mean of what was left"
        )
    if "video_psnr_db" in means:
        lines.append(
            f"  picture  {means['video_psnr_db']:.1f} dB PSNR, {means['video_mean_psnr_db']:.1f} dB by the mean color"
        )
    if result.statistics_given:
        lines.append("  the model predicts patches up to their mean and spread, which were given to it")
    if result.rejects:
        lines.append(f"{len(result.rejects)} clips could not be used; the first: {result.rejects[0].reason}")
    lines.append(f"pictures, sounds and numbers  {config.out}   (begin with {config.out / '0000' / 'overview.png'})")
    return printable(lines)


def _printable(value: object) -> object:
    """Text that is no UTF-8, as a file's name may be, with question marks."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _write_png(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    put_whole(path, lambda file: Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG"))


def _write_wav(path: Path, sound: np.ndarray, result: Inpainted) -> None:
    import soundfile

    put_whole(path, lambda file: soundfile.write(file, sound, result.clip_spec.sample_rate, format="WAV", subtype="PCM_16"))


def _colored(spectrogram: np.ndarray, views: Views) -> np.ndarray:
    """`[mel_bins, frames, 3]` uint8, low frequencies below; all three views of a clip share one scale."""
    from matplotlib import colormaps

    low, high = float(views.original.min()), float(views.original.max())
    scaled = np.clip((spectrogram.T[::-1] - low) / max(high - low, 1e-6), 0, 1)
    return (colormaps["magma"](scaled)[..., :3] * 255).round().astype(np.uint8)


def shown(clip: InpaintedClip) -> dict[str, list[np.ndarray]]:
    """What there is to see of a clip, `[H, W, 3]` uint8: its pictures and its spectrogram, each as it is, masked and filled
    in. The pictures of a model of several lie in a grid, row by row."""
    found = {}
    if clip.picture is not None:
        found["picture"] = [mosaic(getattr(clip.picture, name)) for name in Views.__annotations__]
    if clip.spectrogram is not None:
        found["spectrogram"] = [
            _colored(getattr(clip.spectrogram, name), clip.spectrogram) for name in Views.__annotations__
        ]
    return found


def _known(errors: Errors) -> dict[str, float]:
    """The errors of the modalities that the model has."""
    return {name: value for name, value in asdict(errors).items() if value is not None}


def _draw(result: Inpainted, clip: InpaintedClip, path: Path) -> None:
    """What there is to see of a clip in one figure, which says what was given to the model."""
    rows, errors = shown(clip), clip.errors
    several = clip.picture is not None and clip.picture.original.ndim == 4
    figure, axes = new_figure(len(rows), 3, (18 if several else 12, 0.2 + 2.7 * len(rows)))
    note = "; mean and spread of each patch were given" if result.statistics_given else ""
    figure.suptitle(f"{result.mask_ratio:.0%} of the patches removed, filled in by the model{note}", fontsize=11)
    words = {
        "picture": (
            "picture",
            lambda: f"{errors.video_psnr_db:.1f} dB PSNR (mean color: {errors.video_mean_psnr_db:.1f} dB)",
        ),
        "spectrogram": ("sound", lambda: f"{errors.audio_db:.1f} dB off (mean: {errors.audio_mean_db:.1f} dB)"),
    }
    for row, (kind, pictures) in zip(axes, rows.items()):
        name, error = words[kind]
        for axis, title, pixels in zip(row, ("original", "what the model got", "filled in"), pictures):
            axis.imshow(pixels, aspect="auto" if kind == "spectrogram" else "equal")
            axis.set_title(f"{name}, {title}", fontsize=10)
        row[2].set_xlabel(error())
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    put_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))
