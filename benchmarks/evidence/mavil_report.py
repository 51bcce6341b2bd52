"""The figures of `benchmarks/mavil_learning.py` as a table and as a picture, and its part of docs/mavil-learning.md."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import ROOT, table
from benchmarks.evidence.claims import judge
from benchmarks.evidence.mavil_claims import CLAIMS, NAMES, MAViLFigures
from benchmarks.evidence.report import spread, verdicts_table
from cavmae_fast.evaluation.drawing import new_figure

Record = dict[str, Any]
PAGE = ROOT / "docs" / "mavil-learning.md"
PICTURE = ("mavil-learning.png", "Retrieval, linear probe and fine-tuned accuracy of each part of MAViL")
STREAMS = {"audio": "sound", "video": "video", "joint": "both"}
TUNED = {"audio": "sound", "video": "video", "av": "both"}


def systems_of(record: Record) -> list[str]:
    """Those that the record has runs of, in the order of the paper."""
    there = {row["system"] for row in record["runs"]}
    return [name for name in NAMES if name in there]


def numbers(record: Record, system: str, *place: str) -> list[float]:
    """The numbers at `place` of a system's runs, without those runs that have none there."""
    found = []
    for row in record["runs"]:
        value: Any = row if row["system"] == system else None
        for key in place:
            value = None if value is None else value.get(key)
        if value is not None:
            found.append(value)
    return found


def figures_table(record: Record) -> str:
    """A line for each system: the mean and the standard deviation over the seeds."""
    ways = ("A->V", "V->A")
    headings = ["pretraining", *(f"{way} R@1, %" for way in ways), *(f"{way} median rank" for way in ways)]
    headings += [f"probe, {name}, %" for name in STREAMS.values()]
    headings += [f"fine-tuned, {name}, %" for name in TUNED.values()]
    rows = []
    for system in systems_of(record):
        cells = [spread(numbers(record, system, "retrieval", f"{way} R@1")) for way in ways]
        cells += [spread(numbers(record, system, "retrieval", f"{way} median rank")) for way in ways]
        for kind, names in (("probe", STREAMS), ("finetuned", TUNED)):
            for name in names:
                cells.append(spread([100 * value for value in numbers(record, system, kind, name, "accuracy")]))
        rows.append([NAMES[system], *cells])
    clips, chance = record["settings"]["test_clips"], f"{100 * record['chance']['accuracy']:.1f}"
    by_chance = [f"{100 / clips:.1f}"] * 2 + [f"{(clips + 1) / 2:.1f}"] * 2 + [chance] * 6
    return table(headings, [*rows, ["chance", *by_chance]])


def verdicts(record: Record) -> str:
    return verdicts_table(judge(record, CLAIMS, MAViLFigures))


def rendered(record: Record) -> str:
    """Verdicts and table, with what they were measured with."""
    settings, seeds = record["settings"], {row["seed"] for row in record["runs"]}
    minutes = sum(sum(row["seconds"].values()) for row in record["runs"]) / 60
    machine = f"{record['provenance']['device']}, {record['provenance']['threads']} threads"
    text = (
        f"{settings['steps']} steps of pretraining per system and round with {settings['batch_size']} of "
        f"{settings['train_clips']} clips each, {settings['epochs']} epochs of fine-tuning, {settings['test_clips']} "
        f"held-out clips, {len(seeds)} seeds, {settings['dtype']}: {minutes:.0f} minutes in all on {machine}. "
        "Mean ± standard deviation over the seeds."
    )
    return "\n\n".join([text, verdicts(record), figures_table(record)])


def draw(record: Record, path: Path) -> None:
    """Bars of the means, and a dot for each seed, into the PNG `path`."""
    names = systems_of(record)
    recalls = {"": ("retrieval",)}
    panels = (
        ("retrieval among held-out clips, R@1 (%)", recalls, 100 / record["settings"]["test_clips"]),
        (
            "linear probe, accuracy (%)",
            {word: ("probe", name, "accuracy") for name, word in STREAMS.items()},
            100 * record["chance"]["accuracy"],
        ),
        (
            "fine-tuned, accuracy (%)",
            {word: ("finetuned", name, "accuracy") for name, word in TUNED.items()},
            100 * record["chance"]["accuracy"],
        ),
    )
    figure, axes = new_figure(1, len(panels), (16, 4.4))
    for axis, (title, series, chance) in zip(axes[0], panels):
        width = 0.8 / len(series)
        for place, (label, where) in enumerate(series.items()):
            for number, system in enumerate(names):
                if where == ("retrieval",):
                    ways = (numbers(record, system, "retrieval", f"{way} R@1") for way in ("A->V", "V->A"))
                    found = [fmean(both) for both in zip(*ways)]
                else:
                    found = [100 * value for value in numbers(record, system, *where)]
                if not found:
                    continue
                x = number + (place - (len(series) - 1) / 2) * width
                axis.bar(x, fmean(found), 0.9 * width, color=f"C{place}", alpha=0.6)
                axis.plot([x] * len(found), found, "k.", markersize=4)
            if label:
                axis.bar(0, 0, color=f"C{place}", alpha=0.6, label=label)
        axis.axhline(chance, color="gray", linestyle="--", linewidth=1, label="chance")
        axis.set_xticks(range(len(names)), [NAMES[system] for system in names], rotation=25, ha="right", fontsize="small")
        axis.set(title=title)
        axis.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
