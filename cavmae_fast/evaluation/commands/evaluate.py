"""`cavmae-fast evaluate`: a fine-tuned model on labeled clips."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cavmae_fast.data.sets.shards import write_whole
from cavmae_fast.evaluation.class_figures import draw_classes
from cavmae_fast.evaluation.classification import write_classes
from cavmae_fast.evaluation.classifying import classify
from cavmae_fast.evaluation.commands.options import data_of, next_line, printable
from cavmae_fast.evaluation.running import Running
from cavmae_fast.evaluation.sharing import is_first
from cavmae_fast.models.opening import open_model

SHOWN = 5
"Classes that are printed from either end of the list by average precision."


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Running):
    """Judge a fine-tuned model on labeled clips: mAP, AUC, d', accuracy, and each class."""

    checkpoint: Path
    """A folder written by save_pretrained (`cavmae-fast finetune` leaves one in RUN/model), a published .pth, or
    .safetensors."""
    data: tuple[Path, ...] = ()
    """Clips with labels: a folder that `cavmae-fast prepare` wrote, or lists."""
    labels: Path | None = None
    """CSV of the classes: index, mid, display_name. Default: that of the shards."""
    frames: Literal[1, 10] = 1
    """Pictures per clip: the middle one, or all, whose scores are averaged."""
    mode: Literal["multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly", "all"] | None = None
    """What of a clip the model is given; all: each of the modes that it has, one after the other. Default: multimodal; of a
    model with one encoder, that one."""
    activation: Literal["auto", "sigmoid", "softmax"] = "auto"
    """Of the logits: sigmoid for clips with any number of labels, softmax for those with one; auto looks at the labels."""
    out: Path = Path("runs/evaluate")
    """Folder for evaluation.json, and for a CSV and a figure of the classes for each mode; files of an earlier evaluation
    are replaced."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """The command's job: the report that is also written to `evaluation.json`. Ranks share it, and the first one writes."""
    data, config = data_of(config.data), config.settled()
    precision = config.precision()
    model = open_model(config.checkpoint)
    of_model = getattr(model, "modes", ())
    modes = of_model if config.mode == "all" else of_model[:1] if config.mode is None else (config.mode,)
    if is_first():
        config.out.mkdir(parents=True, exist_ok=True)
    found = classify(
        model,
        data,
        config.labels,
        frames=config.frames,
        modes=modes,
        activation=config.activation,
        running=config,
    )
    report = {
        "checkpoint": str(config.checkpoint),
        "data": [str(place) for place in data],
        "labels": None if config.labels is None else str(config.labels),
        "frames": found.frames,
        "activation": found.activation,
        "device": str(precision.device),
        "dtype": str(precision.dtype).removeprefix("torch."),
        "rejects": [{"path": reject.path, "reason": reject.reason} for reject in found.rejects],
        "modes": {mode: result.summary() for mode, result in found.results.items()},
        "classes": {mode: [row._asdict() for row in result.classes] for mode, result in found.results.items()},
    }
    if is_first():
        for mode, result in found.results.items():
            write_classes(config.out / f"classes-{mode}.csv", result)
            draw_classes(found.predictions[mode], result, config.out / f"classes-{mode}.png")
        write_whole(config.out / "evaluation.json", json.dumps(report, indent=2) + "\n")
    return report


def closing(config: EvaluateConfig, report: dict[str, Any]) -> str:
    """The figures, the best and worst classes, what was left out, and where everything lies."""
    first, summary = next(iter(report["modes"].items()))
    pictures = "1 picture" if report["frames"] == 1 else f"{report['frames']} pictures"
    chance = f"chance mAP {_figure(summary['chance_mAP'])}"
    lines = [f"{summary['clips']} clips, {pictures} of each, {report['activation']} of the logits ({chance}):"]
    for mode, figures in report["modes"].items():
        shown = ", ".join(f"{name} {_figure(figures[name])}" for name in ("mAP", "AUC", "d_prime", "accuracy"))
        lines.append(f"  {mode:<17}{shown}")
    if left_out := summary["classes_without_positives"]:
        names = ", ".join(left_out[:8]) + ", ..." * (len(left_out) > 8)
        lines.append(f"{len(left_out)} classes have no clip here and are left out of the means: {names}")
    known = sorted((row for row in report["classes"][first] if row["ap"] is not None), key=lambda row: -row["ap"])
    lines.append("classes by average precision:")
    for row in known if len(known) <= 2 * SHOWN else [*known[:SHOWN], None, *known[-SHOWN:]]:
        lines.append("  ..." if row is None else f"  {row['ap']:.3f}  {row['name'] or row['mid']} ({row['clips']} clips)")
    if report["rejects"]:
        lines.append(f"{len(report['rejects'])} clips could not be used; the first: {report['rejects'][0]['reason']}")
    lines.append(f"report          {config.out / 'evaluation.json'}")
    lines.append(f"each class      {config.out / f'classes-{first}.csv'}, {config.out / f'classes-{first}.png'}")
    if (pretrained := _pretrained(config.checkpoint)) is not None:
        labels = () if config.labels is None else ("--labels", config.labels)
        lines.append(next_line("retrieve", pretrained, "--data", *config.data, *labels))
    return printable(lines)


def _pretrained(checkpoint: Path) -> str | None:
    """What the run that left `checkpoint` began from: for retrieval, which fine-tuning is not for. None where it is not
    known or not there any more."""
    try:
        run = json.loads((checkpoint.parent / "config.json").read_text())
    except (OSError, ValueError):  # no run's folder: the evaluation needs none
        return None
    # Retrieval is between sound and pictures: a classifier of one of them says nothing of the data's other one.
    init = run.get("init") if isinstance(run, dict) and run.get("model", "av") == "av" else None
    return init if isinstance(init, str) and Path(init).exists() else None


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
