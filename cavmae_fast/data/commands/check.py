"""`cavmae-fast check`: reads every clip of a data set once, before a training run does, and says what is wrong with which.

Worker processes decode all frames and the sound of a clip, and look at them (`inspecting.py`); this process computes the
log-mel statistics (`log_mel.py`), counts (`census.py`), writes down what was found (`findings.py`) and reports
(`rendering.py`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.commands.census import Census, Clips, identity
from cavmae_fast.data.commands.findings import ERRORS, WARNINGS, Findings
from cavmae_fast.data.commands.inspecting import InspectClip, Inspected, Item, Shards, Thresholds
from cavmae_fast.data.commands.log_mel import LogMelStatistics
from cavmae_fast.data.commands.options import check_ranges
from cavmae_fast.data.decode.workers import TIMEOUT, Lost, Workers, default_count
from cavmae_fast.data.media.encoded import SAMPLE_RATE
from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.sets.opening import clip_labels
from cavmae_fast.data.sets.shards import shard_folder, write_whole
from cavmae_fast.data.sets.sources import find_sources

REPORT, FINDINGS, WEIGHTS = "check.json", "rejects.jsonl", "weights.csv"
_FRAME_SIZE = 224  # of extracted frames and videos; shards say their own
_NUM_FRAMES = 10
_JOBS_PER_WORKER = 8  # in flight: a third of a megabyte each


@dataclass(frozen=True)
class CheckConfig:
    """Read every clip of a data set once and report what cannot be trained on, the statistics, and the class counts."""

    data: tuple[str, ...]
    """A folder of shards; or folders, media files, globs, CSV files of paths, or lists as published (JSON)."""
    labels: Path | None = None
    """CSV of the classes (index,mid,display_name); default: the one the shards were prepared with."""
    out: Path | None = None
    """Folder for check.json and rejects.jsonl; default: `check` in a folder of shards, `LIST_check` beside a list, else
    `check` in the working directory."""
    weights: Path | None = None
    """File for the weights of balanced sampling; default: `LIST_weight.csv` beside a list, weights.csv in a folder of
    shards, else in `--out`. Written when the classes are known."""
    seconds: float = 10.24
    """The most sound of a clip that a model sees, 100 frames per second."""
    workers: int | None = None
    """Decoding processes; default: the cores there are."""
    timeout: float = TIMEOUT
    """Seconds a clip may take before it counts as unreadable."""
    min_seconds: float = 1.0
    """Clips with less sound are reported as short."""
    silence_db: float = -90.0
    """Clips whose sound swings less than this are reported as silent (dBFS; -90: one step of 16 bits)."""
    black_level: float = 2.0
    """Clips with no frame of at least this mean gray level, 0 to 255, are reported as black."""
    flat_levels: float = 4.0
    """Clips in which no channel of a frame spans at least so many of 255 levels are reported as constant."""


def check(config: CheckConfig) -> dict[str, Any]:
    """Reads every clip once -> the report, which also lies in check.json; rejects.jsonl holds every finding.

    The report's keys: `ok` (nothing of `ERRORS` was found), `clips`, `usable` (clips without an error), `hours` of their
    sound, `counts` (findings by kind), `findings` (by kind the first thousand: kind, clip number, id, source, reason; no
    clip and id where a shard is meant), `meaning` of the kinds, `statistics` of the log-mel values of the usable clips or
    None, `classes` (`counts`, `empty`, `unknown`) or None, `weights` (`path`, `written`, `reason`), `files`, `config`,
    `took` (seconds).

    Raises:
        ValueError: an option is out of range, or a folder cannot be written to.
        MediaError: `data` does not exist, names no clip, or is a damaged set of shards (manifest or index).
        LabelError: the CSV of the classes.
        WorkerError, OSError: the check itself failed.
    """
    begin = time.monotonic()
    _validate(config)
    clips = _open(config.data)
    shards = clips if isinstance(clips, Shards) else None
    label_set = clip_labels(config.labels, clips)
    out, weights_path = _outputs(config, shards is not None, label_set is not None)
    audio_length = max(1, round(100 * config.seconds))
    inspect = InspectClip(
        Thresholds(config.min_seconds, config.silence_db, config.black_level, config.flat_levels),
        num_frames=shards.num_frames if shards else _NUM_FRAMES,
        size=shards.manifest["size"] if shards else _FRAME_SIZE,
        samples=ClipSpec(audio_length=audio_length).samples,
    )
    with Findings(out / FINDINGS) as findings:
        census = Census(findings, label_set, LogMelStatistics(audio_length))
        for source, reason in shards.wrong() if shards else ():
            findings.add("shard", reason, source=source)
        _read_all(config, clips, inspect, census)
        census.find_duplicates(clips)
        weights = census.write_weights(weights_path, overwrite=config.weights is not None)
        report = {
            **_report(config, census, len(clips)),
            "weights": weights,
            "files": {"report": str(out / REPORT), "findings": str(out / FINDINGS)},
            "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
            "took": time.monotonic() - begin,
        }
    write_whole(out / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def _read_all(config: CheckConfig, clips: Clips, inspect: InspectClip, census: Census) -> None:
    """Has every clip inspected, and everything else that lies in the tar files, and tells the census."""
    from tqdm import tqdm

    sent: deque[tuple[int | None, Item]] = deque()

    def items() -> Iterator[Item]:
        for pair in clips.items() if isinstance(clips, Shards) else enumerate(clips):
            sent.append(pair)
            yield pair[1]

    count = min(config.workers or default_count(), len(clips))
    with (
        tqdm(total=len(clips), unit="clip", dynamic_ncols=True, smoothing=0.05) as bar,
        Workers(inspect, count, timeout=config.timeout, report=partial(tqdm.write, file=sys.stderr)) as workers,
    ):
        for result in workers.in_order(items(), _JOBS_PER_WORKER * count):
            number, item = sent.popleft()
            if isinstance(result, Lost):
                result = Inspected(findings=[("unreadable", result.reason)])
            if number is None:  # bytes of a tar file that are no clip's
                for kind, reason in result.findings:
                    census.findings.add(kind, reason, source=str(item))
                continue
            if result.id is None:
                result.id, result.labels = identity(clips, number)
            census.take(number, item, result)
            bar.set_postfix_str(f"usable {census.usable}", refresh=False)
            bar.update()


def _report(config: CheckConfig, census: Census, clips: int) -> dict[str, Any]:
    """What is known of the data set."""
    findings = census.findings
    return {
        "ok": not any(kind in ERRORS for kind in findings.counts),
        "data": list(config.data),
        "clips": clips,
        "usable": census.usable,
        "hours": census.samples / SAMPLE_RATE / 3600,
        "counts": dict(findings.counts),
        "findings": findings.first,
        "meaning": {**ERRORS, **{kind: text.format(**vars(config)) for kind, text in WARNINGS.items()}},
        "statistics": census.log_mel.report(),
        "classes": census.classes(),
    }


def _validate(config: CheckConfig) -> None:
    if not config.data:
        raise ValueError("DATA names nothing; allowed: a folder of shards, folders, media files, globs, CSV or JSON lists")
    limits = {
        "seconds": (0.05, 3600),
        "workers": (1, 4096),
        "timeout": (0.1, 86400),
        "min_seconds": (0, 3600),
        "silence_db": (-200, 0),
        "black_level": (0, 255),
        "flat_levels": (0, 255),
    }
    check_ranges(config, limits)


def _open(data: Sequence[str]) -> Clips:
    folder = shard_folder(data)
    clips = find_sources(data) if folder is None else Shards(folder)
    if not len(clips):
        raise MediaError(f"{data[0]}: holds no clip")
    return clips


def _outputs(config: CheckConfig, shards: bool, weighted: bool) -> tuple[Path, Path]:
    """The folder of the report, made, and the file of the weights. ValueError when they cannot be written."""
    first = Path(config.data[0])
    if shards:
        out, weights = first / "check", first / WEIGHTS  # a rejects.jsonl that is another's lies in the folder itself
    elif len(config.data) == 1 and first.is_file() and first.suffix.lower() in (".json", ".csv"):
        out, weights = first.with_name(f"{first.stem}_check"), first.with_name(f"{first.stem}_weight.csv")
    else:
        out, weights = Path("check"), Path(config.out or "check") / WEIGHTS
    out, weights = config.out or out, config.weights or weights
    for option, folder in [("out", out), ("weights", weights.parent)][: 1 + weighted]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{option}: {folder} cannot be made ({error.strerror}); name another") from error
        if not os.access(folder, os.W_OK):  # known before hours of reading, not after
            raise ValueError(f"--{option}: {folder} cannot be written to; name another")
    return out, weights
