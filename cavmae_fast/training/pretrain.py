"""The pretraining run behind `cavmae-fast pretrain`: clips in, checkpoint, metrics and figures out."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cavmae_fast.data.decode.decoders import Reject, UnusableDataError
from cavmae_fast.data.decode.workers import default_count
from cavmae_fast.data.features import IMAGE_MEAN, IMAGE_STD, image_features
from cavmae_fast.data.loader import Batch, Clips, Loader, choose_backend, open_clips
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.errors import CavmaeError
from cavmae_fast.evaluation.retrieval import embed, retrieval_metrics
from cavmae_fast.models import CAVMAE, PRESETS, load_checkpoint
from cavmae_fast.training.figures import loss_curve, reconstructions
from cavmae_fast.training.metrics import JsonLines

LOSSES = ("loss", "loss_mae", "loss_mae_a", "loss_mae_v", "loss_c")
ALIASES = {"base": "cav-mae-base", "scale+": "cav-mae-scale+", "scale++": "cav-mae-scale++"}
CACHED_CLIPS = 2000
"Up to this many training clips stay decoded in memory when this process decodes them itself."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingError(CavmaeError, RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a CAV-MAE. Without --data it generates its own clips, in which sound and picture are related."""

    data: tuple[Path, ...] = ()
    """What to train on: a folder that `cavmae-fast prepare` wrote, or folders, media files, lists."""
    eval_data: tuple[Path, ...] = ()
    """Held out for retrieval, named like --data; with generated clips, their held-out split."""
    out: Path = Path("runs/pretrain")
    """Folder for checkpoint, metrics and figures."""
    model: str = "small"
    """System to train: small, base, scale+, scale++, cav, av-mae or vanilla-av-mae."""
    steps: int | None = None
    """Training steps; default: --epochs."""
    epochs: int | None = None
    """Passes over the clips; default: the system's recipe."""
    batch_size: int | None = None
    """Clips a step; default: the system's recipe."""
    learning_rate: float | None = None
    """Default: the system's recipe."""
    mask_ratio: float | None = None
    """Share of the patches of each modality that is removed; default: the system's recipe (published: 0.75)."""
    mask_mode: Literal["unstructured", "time", "freq", "tf"] = "unstructured"
    """How audio patches are masked."""
    mae_loss_weight: float | None = None
    """Default: the system's."""
    contrast_loss_weight: float | None = None
    """Default: the system's."""
    init: Path | None = None
    """Checkpoint to start from: .pth, .safetensors or a folder written by save_pretrained."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the matrix products; auto: bfloat16 where the device multiplies it fast, else float32."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """What decodes the clips: worker processes (torch), or DALI on the GPU."""
    workers: int | None = None
    """Decoding processes; 0 decodes in this one. Default: 0 for up to 2000 clips, which stay decoded in memory, else one
    a core."""
    seed: int = 0


def resolve(config: PretrainConfig) -> PretrainConfig:
    """`config` with every default filled in from the system's recipe and the machine. ValueError names a bad value."""
    name = ALIASES.get(config.model, config.model)
    if name not in PRESETS:
        raise ValueError(f"--model is {config.model!r}; it must be one of {', '.join([*ALIASES, *PRESETS])}")
    preset = PRESETS[name]
    for option in ("steps", "epochs", "batch_size", "learning_rate"):
        value = getattr(config, option)
        if value is not None and not value > 0:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be above 0")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device is {config.device!r}; here it must be auto, cpu{_cuda_choices()}")
    dtype = config.dtype
    if dtype == "auto":
        on_cuda, on_cpu = torch.cuda.is_bf16_supported, torch.cpu._is_amx_tile_supported
        fast = on_cuda(including_emulation=False) if kind == "cuda" else on_cpu()
        dtype = "bfloat16" if fast else "float32"
    defaults = {
        "model": name, "device": device, "dtype": dtype, "epochs": preset.epochs, "batch_size": preset.batch_size,
        "learning_rate": preset.learning_rate, "mask_ratio": preset.mask_ratio,
        "mae_loss_weight": preset.mae_loss_weight, "contrast_loss_weight": preset.contrast_loss_weight,
    }  # fmt: skip
    forced = {"model", "device", "dtype"}
    return replace(config, **{k: v for k, v in defaults.items() if k in forced or getattr(config, k) is None})


def _cuda_choices() -> str:
    return " or cuda" if torch.cuda.is_available() else " (PyTorch finds no CUDA device)"


class ClipSource:
    """The run's loaders; names each clip that cannot be used in the run's rejects, once."""

    def __init__(self, config: PretrainConfig, model: CAVMAE, rejects: JsonLines) -> None:
        self.config, self.rejects = config, rejects
        self.sizes = {"image_size": model.patch_embed_v.img_size[0], "audio_length": model.patch_embed_a.img_size[1]}
        self.named: set[str] = set()

    def loader(self, clips: Clips, training: bool) -> Loader:
        """A loader of these clips for the run's model."""
        from tqdm import tqdm

        config = self.config
        backend, _ = choose_backend(config.loader, clips, torch.device(config.device))
        small = backend == "torch" and len(clips) <= CACHED_CLIPS
        workers = config.workers if config.workers is not None else 0 if small else default_count()
        return Loader(
            clips, min(config.batch_size, len(clips)), training=training, backend=backend, device=config.device,
            workers=workers, seed=config.seed, keep=training and small and not workers, report=tqdm.write, **self.sizes,
        )  # fmt: skip

    def batches(self, loader: Loader) -> Iterator[Batch]:
        """One epoch."""
        try:
            for batch in loader:
                self.name(loader.rejects.values())
                yield batch
        except UnusableDataError as error:
            self.name(error.rejects)
            raise
        finally:
            self.name(loader.rejects.values())

    def name(self, rejects: Iterable[Reject]) -> None:
        for reject in rejects:
            if reject.path not in self.named:
                self.named.add(reject.path)
                self.rejects.write({"path": reject.path, "reason": reject.reason})


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Runs the whole job and returns the summary that is also written to `summary.json`.

    Raises ValueError for a bad option, MediaError (a ValueError) naming the file when no clip can be used, TrainingError
    when a loss is not finite, CheckpointError for `init`.
    """
    from tqdm import tqdm

    config = resolve(config)
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[config.model]
    if config.data:
        train_clips, held_out = open_clips(config.data), []
    else:
        tqdm.write("no --data: generating clips in which sound and picture are related")
        train_clips, held_out = map(open_clips, generate_clips(out / "clips", seed=0))
    if config.eval_data:
        held_out = open_clips(config.eval_data)
    torch.manual_seed(config.seed)
    model = preset.create()
    if config.init is not None:
        load_checkpoint(model, config.init)
    model.to(config.device).train()
    batch_size = min(config.batch_size, len(train_clips))
    config = replace(config, batch_size=batch_size)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2, default=str) + "\n")
    tqdm.write(
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.device}, "
        f"{config.dtype}; {len(train_clips)} clips, batch {batch_size}, held out {len(held_out)}"
    )
    for name in ("metrics.jsonl", "rejects.jsonl"):
        (out / name).unlink(missing_ok=True)  # of an earlier run into this folder
    with JsonLines(out / "metrics.jsonl") as metrics, JsonLines(out / "rejects.jsonl") as rejects:
        source = ClipSource(config, model, rejects)
        loader = source.loader(train_clips, training=True)
        tqdm.write(f"loader {loader.backend}: {choose_backend(config.loader, train_clips, loader.device)[1]}")
        rows = train(model, source, loader, config, metrics)
        loader.close()
        model.save_pretrained(out / "model")
        loss_curve(rows, out / "loss.png")
        summary = {"steps": len(rows), **{k: rows[-1][k] for k in LOSSES}, "clips_per_s": rows[-1]["clips_per_s"]}
        batches = source.batches(source.loader(held_out or train_clips, training=False))
        first = next(batches)
        imgs, mean, std = image_features(first.image[:4]), torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
        with autocast(config):
            reconstructions(model, first.audio[:4], imgs, config.mask_ratio, mean, std, out / "reconstruction.png")
        if held_out:
            unseen = ((batch.audio, batch.image) for batch in itertools.chain([first], batches))
            with autocast(config):
                features = embed(model, unseen)
            summary |= {"held_out_clips": len(features[0]), **retrieval_metrics(*features)}
            metrics.write({"step": len(rows), **summary})
        summary["rejected_clips"] = rejects.count
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def train(
    model: CAVMAE, source: ClipSource, loader: Loader, config: PretrainConfig, metrics: JsonLines
) -> list[dict[str, Any]]:
    """The published recipe: Adam with L2 5e-7 and betas (0.95, 0.999), step decay by epochs. Returns the logged rows."""
    from tqdm import tqdm

    preset = PRESETS[config.model]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        trainable, config.learning_rate, betas=(0.95, 0.999), weight_decay=5e-7, fused=True
    )  # fmt: skip
    milestones = list(range(preset.decay_start, preset.epochs + 1, preset.decay_every))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.5)
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.dtype == "float16")
    total = config.steps or config.epochs * len(loader)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    clips = 0
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for epoch in itertools.count():
            for batch in source.batches(loader):
                with autocast(config):
                    outputs = model(
                        batch.audio, batch.image, config.mask_ratio, config.mask_ratio, config.mae_loss_weight,
                        config.contrast_loss_weight, config.mask_mode,
                    )  # fmt: skip
                scaler.scale(outputs[0]).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                clips += len(batch.ids)
                losses = dict(zip(LOSSES, torch.stack(outputs[:5]).tolist()))
                if not all(map(math.isfinite, losses.values())):
                    raise TrainingError(_diverged(len(rows) + 1, losses, batch))
                elapsed = time.perf_counter() - start
                rows.append(
                    {
                        "step": len(rows) + 1, "epoch": epoch, **losses, "c_acc": float(outputs[7]),
                        "learning_rate": schedule.get_last_lr()[0], "clips_per_s": clips / elapsed,
                        "data_wait": loader.waited / elapsed, "seconds": elapsed,
                    }
                )  # fmt: skip
                metrics.write(rows[-1])
                bar.set_postfix_str(
                    f"loss {losses['loss']:.3f} audio {losses['loss_mae_a']:.3f} video {losses['loss_mae_v']:.3f} "
                    f"contrast {losses['loss_c']:.3f} | {clips / elapsed:.0f} clips/s, "
                    f"data wait {loader.waited / elapsed:.0%}, rejected {source.rejects.count}",
                    refresh=False,
                )
                bar.update()
                if len(rows) == total:
                    return rows
            schedule.step()
    raise AssertionError("epochs do not end")


def autocast(config: PretrainConfig) -> contextlib.AbstractContextManager:
    """Autocast to the run's dtype; nothing for float32."""
    if config.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, DTYPES[config.dtype])


def _diverged(step: int, losses: dict[str, float], batch: Batch) -> str:
    bad = ", ".join(name for name, value in losses.items() if not math.isfinite(value))
    for name, x in (("audio", batch.audio), ("imgs", batch.image)):
        broken = [clip for clip, ok in zip(batch.ids, x.flatten(1).isfinite().all(dim=1).tolist()) if not ok]
        if broken:
            return f"step {step}: {bad} not finite because the {name} of {', '.join(broken)} is not finite"
    return f"step {step}: {bad} not finite though the inputs are; try a lower --learning-rate or --dtype float32"
