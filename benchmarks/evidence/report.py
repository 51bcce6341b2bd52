"""The figures of `benchmarks/learning.py` as tables and as a picture, and its part of docs/learning.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.common import ROOT, table
from benchmarks.evidence.claims import Figures, Verdict, judge
from benchmarks.evidence.clips import ATTRIBUTES
from cavmae_fast.evaluation.drawing import new_figure

Record = dict[str, Any]
NAMES = {"untrained": "not pretrained", "cav": "CAV", "vanilla-av-mae": "vanilla AV-MAE", "av-mae": "AV-MAE"} | {
    "cav-mae": "CAV-MAE"
}
MODES = {
    "multimodal": "both",
    "audioonly": "sound, own norms",
    "videoonly": "picture, own norms",
    "missingaudioonly": "picture missing",
    "missingvideoonly": "sound missing",
}
PAGE = ROOT / "docs" / "learning.md"
BEGIN, END = "<!-- written by benchmarks/render.py -->", "<!-- until here -->"


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean and standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{deviation}"


def _systems(record: Record) -> list[str]:
    there = {row["system"] for row in record["runs"]}
    return [name for name in NAMES if name in there]


def figures_table(record: Record) -> str:
    """Three tables: without labels, the linear probe, and the fine-tuned classifier in each input mode."""
    figures, systems = Figures(record), _systems(record)
    chance = record["chance"]

    def percent(*place: str) -> Callable[[str], str]:
        return lambda system: spread([100 * value for value in figures.values(system, *place)])

    def of(*place: str, digits: int = 1) -> Callable[[str], str]:
        return lambda system: spread(figures.values(system, *place), digits)

    def error(stream: str) -> Callable[[str], str]:
        """Of the model's reconstruction, over that of the mean of the rest."""

        def cell(system: str) -> str:
            found = [value for value in figures.values(system, "reconstruction") if value is not None]
            return spread([value[stream] / value[f"{stream}_mean"] for value in found], 2)

        return cell

    def rows(columns: Sequence[Callable[[str], str]], by_chance: Sequence[str]) -> list[list[str]]:
        body = [[NAMES[system], *(column(system) for column in columns)] for system in systems]
        return [*body, ["chance", *by_chance]]

    clips = record["settings"]["test_clips"]
    first = record["runs"][0]["retrieval"]
    ways = ("A->V", "V->A")
    unlabeled = [of("retrieval", f"{way} {name}") for name in ("R@1", "R@5", "median rank") for way in ways]
    recall = [f"{first[f'chance R@{k}']:.1f}" for k in (1, 1, 5, 5)]
    headings = ["pretraining", *(f"{way} {name}" for name in ("R@1, %", "R@5, %", "median rank") for way in ways)]
    parts = [
        table(
            [*headings, "sound, error", "picture, error"],
            rows([*unlabeled, error("audio"), error("video")], [*recall, *[f"{(clips + 1) / 2:.1f}"] * 2, "1", "1"]),
        )
    ]
    streams = {"joint": "both", "audio": "sound", "video": "picture"}
    own = [f"{100 * chance[name]:.1f}" for name in ATTRIBUTES]
    mean = f"{100 * chance['accuracy']:.1f}"
    probes = [percent("probe", stream, "accuracy") for stream in streams]
    probes += [percent("probe", "joint", name) for name in ATTRIBUTES]
    kinds = [f"{name}, both" for name in ATTRIBUTES]
    parts.append(table(["linear probe, accuracy, %", *streams.values(), *kinds], rows(probes, [mean] * len(streams) + own)))
    tuned = [percent("finetuned", mode, "accuracy") for mode in MODES]
    tuned += [percent("finetuned", "multimodal", name) for name in ATTRIBUTES]
    tuned.append(of("finetuned", "multimodal", "mAP", digits=3))
    parts.append(
        table(
            ["fine-tuned, accuracy, %", *MODES.values(), *kinds, "mAP, both"],
            rows(tuned, [mean] * len(MODES) + own + ["-"]),
        )
    )
    return "\n\n".join(parts)


def verdicts_table(verdicts: Sequence[Verdict]) -> str:
    rule = ["| claim | outcome | numbers |", "| --- | --- | --- |"]
    return "\n".join([*rule, *(f"| {claim} | **{outcome}** | {why} |" for claim, outcome, why in verdicts)])


def rendered(record: Record) -> str:
    """Verdicts and tables, with what they were measured with."""
    settings, seeds = record["settings"], sorted({row["seed"] for row in record["runs"]})
    minutes = sum(sum(row["seconds"].values()) for row in record["runs"]) / 60
    text = (
        f"{settings['steps']} steps of pretraining with {settings['batch_size']} of {settings['train_clips']} clips each, "
        f"{settings['epochs']} epochs of fine-tuning, {settings['test_clips']} held-out clips, {len(seeds)} seeds, "
        f"{settings['dtype']}: {minutes:.0f} minutes in all on {record['provenance']['device']}, "
        f"{record['provenance']['threads']} threads. Mean ± standard deviation over the seeds."
    )
    return "\n\n".join([text, verdicts_table(judge(record)), figures_table(record)])


def draw(record: Record, path: Path) -> None:
    """Bars of the means, and a dot for each seed, into the PNG `path`."""
    figures, systems = Figures(record), _systems(record)
    probe = lambda stream: lambda system: [100 * v for v in figures.values(system, "probe", stream, "accuracy")]  # noqa: E731
    tuned = lambda mode: lambda system: figures.accuracy(system, mode)  # noqa: E731
    panels = (
        ("retrieval among held-out clips, R@1 (%)", {"": figures.recall}, figures.recall_chance()),
        (
            "linear probe, accuracy (%)",
            {"both": probe("joint"), "sound": probe("audio"), "picture": probe("video")},
            figures.accuracy_chance(),
        ),
        (
            "fine-tuned, accuracy (%)",
            {MODES[mode]: tuned(mode) for mode in ("multimodal", "missingvideoonly", "missingaudioonly")},
            figures.accuracy_chance(),
        ),
    )
    figure, axes = new_figure(1, len(panels), (15, 4.2))
    for axis, (title, series, chance) in zip(axes[0], panels):
        width = 0.8 / len(series)
        for place, (label, values) in enumerate(series.items()):
            for number, system in enumerate(systems):
                found, x = values(system), number + (place - (len(series) - 1) / 2) * width
                bar = {"color": f"C{place}", "alpha": 0.6, "label": label if number == 0 and label else None}
                axis.bar(x, fmean(found), 0.9 * width, **bar)
                axis.plot([x] * len(found), found, "k.", markersize=4)
        axis.axhline(chance, color="gray", linestyle="--", linewidth=1, label="chance")
        axis.set_xticks(range(len(systems)), [NAMES[system] for system in systems], rotation=20, fontsize="small")
        axis.set(title=title)
        axis.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def page_with(
    text: str,
    records: dict[str, Record],
    render: Callable[[Record], str] | None = None,
    picture: tuple[str, str] = ("learning.png", "Retrieval, linear probe and fine-tuned accuracy of each system"),
) -> str:
    """The page `text`, with what the records (by the name of their device's folder) say between the marks. `picture`: the
    figure's file and what it shows."""
    render = render or rendered
    name, shows = picture
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page lacks {BEGIN} or {END}, between which the results stand")
    parts = []
    for folder, record in records.items():
        figure = f"![{shows}](../benchmarks/results/{folder}/{name})"
        parts += [f"### {record['provenance']['device']}", figure, render(record)]
    return "\n\n".join([before + BEGIN, *(parts or ["No results yet."]), END + after])
