"""What a training command prints when it is done: what was reached, where it lies, and what to run next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cavmae_fast.evaluation.commands.options import next_line, printable
from cavmae_fast.training.dry_run import DryRun
from cavmae_fast.training.finetune_config import PRETRAINED
from cavmae_fast.training.pretrain_config import PretrainConfig, preset_name
from cavmae_fast.training.pretrain_options import family_of
from cavmae_fast.training.pretrain_setup import TASKS


def pretrained(config: PretrainConfig, summary: dict[str, Any] | DryRun) -> str:
    """The text after a pretraining run with this summary, or after a dry run."""
    if isinstance(summary, DryRun):
        return summary.render()
    family = family_of(preset_name(config.model))
    out = config.out
    lines = [f"{name}: {_reached(config, one)}" for name, one in summary.get("stages", {}).items()]
    lines = lines or [_reached(config, summary)]
    if "stages" in summary:
        out = out / list(summary["stages"])[-1]
    if summary["rejected_clips"]:
        lines.append(f"{summary['rejected_clips']} clips could not be used: see {out / 'rejects.jsonl'}")
    if summary["skipped_steps"]:
        lines.append(f"{summary['skipped_steps']} steps were skipped: see {out / 'skipped.jsonl'}")
    if "A->V R@1" in summary:
        count, chance = summary["held_out_clips"], summary["chance R@1"]
        lines.append(f"retrieval among {count} held-out clips (chance R@1 {chance:.1f} %):")
        for way in ("A->V", "V->A"):
            recalls = ", ".join(f"R@{k} {summary[f'{way} R@{k}']:.1f} %" for k in (1, 5, 10))
            lines.append(f"  {way}  {recalls}, median rank {summary[f'{way} median rank']:g}")
    elif "held_out_loss" in summary:
        lines.append(f"loss on {summary['held_out_clips']} held-out clips: {summary['held_out_loss']:.3f}")
    else:
        lines.append("the model was not evaluated: name held-out clips with --eval-data")
    model = config.out / "model"
    lines.append(f"checkpoint      {model}   (cavmae_fast.{_CLASSES[family]}.from_pretrained)")
    for name, what in (
        ("metrics.jsonl", "metrics"),
        ("loss.png", "losses"),
        ("reconstruction.png", "reconstruction"),
        ("summary.json", "summary"),
        ("rejects.jsonl", "rejected clips"),
    ):
        if (out / name).exists() or name != "reconstruction.png":
            lines.append(f"{what:<16}{out / name}")
    lines += _next(config, model, family)
    return printable(lines)


_CLASSES = {"CAV-MAE": "CAVMAE", "single-modality MAE": "MAE", "MAViL": "MAViL"}


def _reached(config: PretrainConfig, summary: dict[str, Any]) -> str:
    losses = TASKS[family_of(preset_name(config.model))].shown
    shown = [f"{name} {summary[loss]:.3f}" for name, loss in losses.items() if summary[loss] != 0]
    loss = f"loss {summary['loss']:.3f}" + (f" ({', '.join(shown)})" if shown else "")
    return f"{summary['steps']} steps, {loss}, {summary['clips_per_s']:.1f} clips/s"


def _next(config: PretrainConfig, model: Path, family: str) -> list[str]:
    """What to run next."""
    lines = []
    if family == "MAViL" and config.rounds is None:
        lines.append(f"a round of stage 2:  cavmae-fast pretrain --model {config.model} --teacher {model} --out DIR")
    if config.data and family == "single-modality MAE":
        return [*lines, next_line("inpaint", model, "--data", *(config.eval_data or config.data))]
    if config.data:
        return [*lines, next_line("retrieve", model, "--data", *(config.eval_data or config.data))]
    init = () if model == PRETRAINED else ("--init", model)
    lines.append(next_line("finetune", *init))
    lines.append("or your own clips, at full size:  cavmae-fast pretrain --data DIR --model base --steps 3")
    return lines
