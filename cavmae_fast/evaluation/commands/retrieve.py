"""`cavmae-fast retrieve`: recall and ranks of retrieval between sound and picture."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from cavmae_fast.data.sets.shards import write_whole
from cavmae_fast.evaluation.commands.options import data_of, next_line, printable, progress_bar
from cavmae_fast.evaluation.report.page import check_target
from cavmae_fast.evaluation.report.retrieved import QUERIES, write_retrieval_page
from cavmae_fast.evaluation.retrieval import TOP, ClassScores, metrics_of
from cavmae_fast.evaluation.retrieving import Retrieved, retrieve
from cavmae_fast.evaluation.running import Running
from cavmae_fast.evaluation.sharing import is_first


@dataclass(frozen=True, kw_only=True)
class RetrieveConfig(Running):
    """Score a model: does it find a clip's picture by its sound, and the reverse?"""

    checkpoint: Path
    """A folder written by save_pretrained, a published .pth, or .safetensors; pretrained or fine-tuned."""
    data: tuple[Path, ...] = ()
    """Clips: a folder that `cavmae-fast prepare` wrote, or folders of videos, media files, lists."""
    frames: int = 1
    """Pictures per clip whose mean is taken: 1, the middle one, as published, or up to 10. Models of several pictures at
    once take 1: the crop in the middle."""
    labels: Path | None = None
    """CSV of the classes, for scores by class; default: that of the shards."""
    out: Path | None = None
    """Folder for retrieval.json and, with labels, classes.csv."""
    report: Path | None = None
    """Write a page here (HTML, one file) on which queries and answers can be heard and seen."""
    report_queries: int = QUERIES
    """Queries that the page shows."""


def run(config: RetrieveConfig) -> Retrieved:
    """The command's job. Ranks share it, and the first one writes."""
    data = data_of(config.data)
    if not 1 <= config.report_queries <= 1000:
        raise ValueError(f"--report-queries is {config.report_queries}; it must be 1 to 1000")
    if config.report is not None:
        check_target(config.report)
    if config.out is not None and is_first():
        config.out.mkdir(parents=True, exist_ok=True)
    with progress_bar("clips") as progress:
        result = retrieve(
            config.checkpoint, data, frames=config.frames, labels=config.labels, running=config, progress=progress
        )
    if config.out is not None and is_first():
        _write_numbers(config, result)
    if config.report is not None and is_first():
        write_retrieval_page(result, config.report, str(config.checkpoint), config.report_queries)
    return result


def closing(config: RetrieveConfig, result: Retrieved) -> str:
    """The scores, beside those of chance, and what to do next."""
    scores = result.scores
    chance = ", ".join(f"R@{k} {scores.chance[k]:.1f} %" for k in TOP)
    lines = [f"retrieval among {scores.clips} clips (chance: {chance}, rank {scores.chance_rank:g})"]
    for way, found in (("A->V", scores.audio_to_video), ("V->A", scores.video_to_audio)):
        recalls = ", ".join(f"R@{k} {found.recall[k]:.1f} %" for k in TOP)
        lines.append(f"  {way}  {recalls}, median rank {found.median_rank:g}, mean rank {found.mean_rank:.1f}")
    if scores.classes:
        lines += ["by class, most clips first (R@5 A->V, V->A):", *_classes(scores.classes)]
    if result.rejects:
        lines.append(f"{len(result.rejects)} clips could not be used; the first: {result.rejects[0].reason}")
    if config.out is not None:
        lines.append(f"numbers  {config.out / 'retrieval.json'}")
    if config.report is not None:
        lines.append(f"page     {config.report}   (open it in a browser)")
    lines.append(next_line("embed", config.checkpoint, "--data", *config.data, "--out", "runs/index"))
    return printable(lines)


def _classes(classes: tuple[ClassScores, ...], most: int = 10) -> list[str]:
    ordered = sorted(classes, key=lambda one: -one.clips)
    lines = [
        f"  {one.audio_to_video.recall[5]:5.1f} %  {one.video_to_audio.recall[5]:5.1f} %  {one.clips:>6} clips  {one.name}"
        for one in ordered[:most]
    ]
    return [*lines, f"  ... and {len(ordered) - most} more classes"] if len(ordered) > most else lines


def _write_numbers(config: RetrieveConfig, result: Retrieved) -> None:
    scores = result.scores
    record = {
        "checkpoint": str(config.checkpoint),
        "data": [str(place) for place in config.data],
        "frames": config.frames,
        "clips": scores.clips,
        **metrics_of(scores),
        "rejects": [{"path": reject.path, "reason": reject.reason} for reject in result.rejects],
    }
    write_whole(config.out / "retrieval.json", json.dumps(record, indent=2) + "\n")
    if scores.classes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ways = [f"{way} R@{k}" for way in ("A->V", "V->A") for k in TOP]
        writer.writerow(["mid", "display_name", "clips", *ways, "A->V median rank", "V->A median rank"])
        for one in scores.classes:
            both = (one.audio_to_video, one.video_to_audio)
            recalls = [f"{way.recall[k]:.4f}" for way in both for k in TOP]
            writer.writerow([one.mid, one.name, one.clips, *recalls, *(f"{way.median_rank:g}" for way in both)])
        write_whole(config.out / "classes.csv", text.getvalue())
