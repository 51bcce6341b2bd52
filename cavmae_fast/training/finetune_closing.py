"""What `cavmae-fast finetune` prints when it is done: what was reached, where it lies, and what to run next."""

from __future__ import annotations

from typing import Any

from cavmae_fast.evaluation.commands.options import next_line, printable
from cavmae_fast.training.dry_run import DryRun
from cavmae_fast.training.finetune_config import FinetuneConfig


def finetuned(config: FinetuneConfig, summary: dict[str, Any] | DryRun) -> str:
    """The text after a fine-tuning run with this summary, or after a dry run."""
    if isinstance(summary, DryRun):
        return summary.render()
    if "folds" in summary:
        return _cross_validated(config, summary)
    out, metric = config.out, summary["metric"]
    lines = [f"{summary['steps']} steps, loss {summary['loss']:.4f}, {summary['clips_per_s']:.1f} clips/s"]
    if summary["rejected_clips"]:
        lines.append(f"{summary['rejected_clips']} clips could not be used: see {out / 'rejects.jsonl'}")
    if summary["skipped_steps"]:
        lines.append(f"{summary['skipped_steps']} steps were skipped: see {out / 'skipped.jsonl'}")
    if summary["averaged_epochs"]:
        epochs = summary["averaged_epochs"]
        lines.append(f"the model is the average of epochs {epochs[0]} to {epochs[-1]}")
    else:
        lines.append("the model is that of the last step: no epoch that the recipe averages was done")
    pictures = f", with 1 and with {summary['frames']} pictures of each" if summary["frames"] > 1 else ""
    lines.append(f"on {summary['clips']} held-out clips{pictures} (chance mAP {_figure(summary['chance_mAP'])}):")
    for mode, by_frames in summary["modes"].items():
        shown = "   and   ".join(shown_figures(figures, metric) for figures in by_frames.values())
        lines.append(f"  {mode:<17}{shown}{'   (trained in this mode)' if mode == summary['mode'] else ''}")
    if left_out := summary["classes_without_positives"]:
        lines.append(f"{len(left_out)} classes have no held-out clip and are left out: see {out / 'classes.csv'}")
    if summary["best_epoch"]:
        best = summary["best_epoch"]
        lines.append(f"the best single epoch was {best['epoch']}, {metric} {_figure(best[metric])}: {out / 'best'}")
    lines.append(f"checkpoint      {out / 'model'}   (cavmae_fast.models.opening.open_model)")
    for name, what in (
        ("metrics.jsonl", "metrics"),
        ("curves.png", "curves"),
        ("classes.csv", "each class"),
        ("classes.png", "classes"),
        ("summary.json", "summary"),
    ):
        lines.append(f"{what:<16}{out / name}")
    lists = out / "lists"  # of generated clips
    labels = config.labels if config.data else config.labels or lists / "labels.csv"
    named = () if labels is None else ("--labels", labels)
    if config.eval_data or not config.data:
        data = config.eval_data or (lists / "test.json",)
    else:  # a published data set, of which a fold has judged, or the validation split, so that testing is still unseen
        data = (f"{config.data[0]}@{config.fold or 'testing'}",)
    frames = ("--frames", 10) if summary["frames"] > 1 else ()
    lines.append(next_line("evaluate", out / "model", "--data", *data, *named, *frames))
    return printable(lines)


def _cross_validated(config: FinetuneConfig, summary: dict[str, Any]) -> str:
    """The text after a cross-validation."""
    lines = [f"{len(summary['folds'])} folds, each judged by what was trained on the others ({summary['mode']}):"]
    for name, figures in summary["folds"].items():
        lines.append(f"  fold {name:<12}{shown_figures(figures, summary['metric'])}   ({figures['clips']} clips)")
    mean, deviation = summary["accuracy"], summary["accuracy_deviation"]
    lines.append(
        f"  {'mean':<17}accuracy {mean:.3f} (standard deviation over folds {deviation:.3f}), mAP {summary['mAP']:.3f}"
    )
    lines.append(f"summary         {config.out / 'summary.json'}")
    first = next(iter(summary["folds"]))
    model, data = config.out / f"fold-{first}" / "model", f"{config.data[0]}@{first}"
    lines.append(
        next_line("evaluate", model, "--data", data, *(() if config.labels is None else ("--labels", config.labels)))
    )
    return printable(lines)


def shown_figures(figures: dict[str, Any], metric: str) -> str:
    """The figures that belong to a metric, in one line. (The accuracy of clips with several labels says little.)"""
    names = ("accuracy", "mAP") if metric == "accuracy" else ("mAP", "AUC", "d_prime")
    return ", ".join(f"{name} {_figure(figures[name])}" for name in names)


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
