"""`cavmae-fast check`: reads every clip of a data set once, before a training run does, and says what is wrong with which.

Worker processes decode all frames and the sound of a clip, and look at them (`inspecting.py`); this process computes the
log-mel statistics.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.commands.inspecting import InspectClip, Inspected, Item, Shards, Thresholds
from cavmae_fast.data.commands.options import check_ranges
from cavmae_fast.data.decode.workers import TIMEOUT, Lost, Workers, default_count
from cavmae_fast.data.media.encoded import SAMPLE_RATE
from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.sets.labels import (
    LabelError,
    LabelSet,
    balance_weights,
    class_counts,
    foreign_labels,
    read_weights,
    write_weights,
)
from cavmae_fast.data.sets.shards import (
    LABELS,
    ShardClip,
    shard_folder,
    write_whole,
)
from cavmae_fast.data.sets.sources import Source, find_sources

REPORT, FINDINGS, WEIGHTS = "check.json", "rejects.jsonl", "weights.csv"
ERRORS = {
    "missing": "a file is not there",
    "unreadable": "damaged, or not decodable",
    "shard": "a tar file and the manifest or the index of the shards do not agree",
    "label": "a label id is not in the CSV of the classes",
}
"What makes a data set not ok: kind of finding -> what it means."
WARNINGS = {
    "silent": "no sound above {silence_db:g} dBFS",
    "black": "the mean of every frame is below {black_level:g} of 255",
    "constant": "no frame has two pixels that differ by {flat_levels:g} of 255 or more",
    "short": "less than {min_seconds:g} s of sound",
    "frames": "extracted frames are not there (the nearest earlier one is used)",
    "duplicate": "an id that an earlier clip has, too",
    "unlabelled": "no label",
}
_PUBLISHED_BATCH = 1000  # clips; get_norm_stats.py takes mean and std of such batches, and the mean over the batches
_MEL_BINS = 128
_FRAME_SIZE = 224  # of extracted frames and videos; shards say their own
_NUM_FRAMES = 10
_LISTED = 1000  # findings of a kind that check.json lists
_JOBS_A_WORKER = 8  # in flight: a third of a megabyte each
_FEATURE_BATCH = 16
_ADVICE = (
    "To start from a published checkpoint, keep the loader's default mean and std: they belong to its weights. To train "
    "from scratch, give the loader `mean` and `std`. `published` is what the published get_norm_stats.py computes (without "
    "its augmentation): it counts the zeros behind short clips as sound; give it to repeat the published recipe."
)


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
    """The most sound of a clip that a model sees, 100 frames a second."""
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


class _LogMel:
    """Sums of the log-mel values, in float64, for each published batch of the list."""

    def __init__(self, audio_length: int):
        self.audio_length = audio_length
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._sums: dict[int, np.ndarray] = {}  # batch -> clips, values of their own, sum, sum of squares

    def add(self, number: int, waveform: np.ndarray) -> None:
        self._waiting.append((number, waveform))
        if len(self._waiting) == _FEATURE_BATCH:
            self._compute()

    def _compute(self) -> None:
        import torch

        from cavmae_fast.data.features import audio_features
        from cavmae_fast.reference.fbank import num_frames

        lengths = [len(waveform) for _, waveform in self._waiting]
        padded = torch.zeros(len(lengths), max(lengths, default=0), dtype=torch.int16)
        for row, (_, waveform) in zip(padded, self._waiting, strict=True):
            row[: len(waveform)] = torch.from_numpy(waveform.copy())
        values = audio_features(padded, torch.tensor(lengths), self.audio_length, 0.0, 1.0).double().flatten(1)
        # What lies past a clip's end is 0, so these are also the sums over its own frames.
        sums = torch.stack([values.sum(1), values.square().sum(1)], 1).numpy()
        for (number, _), length, (total, squares) in zip(self._waiting, lengths, sums, strict=True):
            own = _MEL_BINS * num_frames(length)  # no more than audio_length frames: the workers cut the sound
            batch = self._sums.setdefault(number // _PUBLISHED_BATCH, np.zeros(4))
            batch += (1, own, total, squares)
        self._waiting = []

    def report(self) -> dict[str, Any] | None:
        if self._waiting:
            self._compute()
        if not self._sums:
            return None
        batches = np.stack(list(self._sums.values()))  # [batches, 4]
        clips, values, _, _ = total = batches.sum(axis=0)
        padded = self.audio_length * _MEL_BINS  # values of a clip
        published = np.mean([_moments(count * padded, *sums) for count, _, *sums in batches], axis=0)
        mean, std = _moments(*total[1:])
        return {
            "clips": int(clips), "frames": int(values) // _MEL_BINS, "mean": mean, "std": std,
            "published": {"mean": float(published[0]), "std": float(published[1]), "audio_length": self.audio_length},
            "advice": _ADVICE,
        }  # fmt: skip


def _moments(n: float, total: float, squares: float) -> tuple[float, float]:
    """Mean and standard deviation (with n - 1, as torch.std) of n values, from their sum and sum of squares."""
    return float(total / n), float(np.sqrt(max(squares - total * total / n, 0.0) / (n - 1)))


class _Findings:
    """Writes every finding to rejects.jsonl as it comes, keeps their counts and the first of each kind."""

    def __init__(self, path: Path):
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[dict[str, Any]]] = {}
        self._path, self._part = path, path.with_name(f".{path.name}.part")
        self._file = self._part.open("w", encoding="utf-8")

    def add(self, kind: str, reason: str, **clip: Any) -> None:
        entry = {"kind": kind, **clip, "reason": reason}
        self._file.write(json.dumps(entry) + "\n")  # in ASCII: names need not be valid text
        self.counts[kind] += 1
        if len(first := self.first.setdefault(kind, [])) < _LISTED:
            first.append(entry)

    def __enter__(self) -> _Findings:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)


class _Census:
    """What is kept of the clips: a few bytes each."""

    def __init__(self, findings: _Findings, label_set: LabelSet | None, log_mel: _LogMel):
        self.findings, self.label_set, self.log_mel = findings, label_set, log_mel
        self.usable = self.samples = 0
        self.unknown: Counter[str] = Counter()
        self.labels: list[tuple[str, ...]] = []
        self.hashes = array("q")  # of the ids
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}

    def take(self, number: int, item: Source | ShardClip, result: Inspected) -> None:
        clip = {"clip": number, "id": result.id, "source": str(item)}
        if self.label_set is not None:
            if unknown := self.label_set.unknown(result.labels):
                self.unknown.update(unknown)
                result.findings.append(("label", foreign_labels(item, unknown)))
            elif not result.labels:
                result.findings.append(("unlabelled", f"{item}: no label"))
        for kind, reason in result.findings:
            self.findings.add(kind, reason, **clip)
        if not any(kind in ERRORS for kind, _ in result.findings):
            self.usable += 1
            self.samples += len(result.waveform)
            self.log_mel.add(number, result.waveform)
        self.hashes.append(hash(result.id))
        self.labels.append(self._same.setdefault(result.labels, result.labels))

    def find_duplicates(self, clips: Shards | list[Source]) -> None:
        """Reports the ids that come again."""
        hashes = np.frombuffer(self.hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(np.diff(hashes[order]) == 0)
        for number, earlier in sorted(zip(order[again + 1].tolist(), order[again].tolist(), strict=True)):
            name, source = _identity(clips, number)[0], str(clips[number])
            reason = f"{source}: its id {name} is also that of clip {earlier}, {clips[earlier]}"
            self.findings.add("duplicate", reason, clip=number, id=name, source=source)

    def classes(self) -> dict[str, Any] | None:
        if self.label_set is None:
            return None
        known = [tuple(mid for mid in labels if mid in self.label_set.index) for labels in self.labels]
        counts = class_counts(known, self.label_set).tolist()
        rows = zip(self.label_set.mids, self.label_set.names, counts, strict=True)
        counted = [{"index": k, "mid": mid, "name": name, "clips": n} for k, (mid, name, n) in enumerate(rows)]
        return {"counts": counted, "empty": [row for row in counted if not row["clips"]], "unknown": dict(self.unknown)}

    def write_weights(self, path: Path, overwrite: bool) -> dict[str, Any]:
        """The weights of all clips, those that cannot be used included, so that the file fits the list."""
        reason = None
        if self.label_set is None:
            reason = "the classes are not known (--labels)"
        elif self.unknown:
            reason = "there are labels that are not in the CSV of the classes"
        elif not any(self.labels):
            reason = "no clip has a label"
        else:
            weights = balance_weights(self.labels, self.label_set)
            if not overwrite and path.exists():
                with contextlib.suppress(LabelError):
                    overwrite = np.allclose(read_weights(path, len(weights)), weights, rtol=1e-6)
            if overwrite or not path.exists():
                write_weights(path, weights)
            else:
                reason = f"{path} is there and holds other weights than these clips have; --weights names another file"
        return {"path": str(path), "written": reason is None, "reason": reason}


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
    from tqdm import tqdm

    begin = time.monotonic()
    _validate(config)
    clips = _open(config.data)
    shards = clips if isinstance(clips, Shards) else None
    label_set = None
    if config.labels or (shards and shards.manifest["labels"]):
        label_set = LabelSet.from_csv(config.labels or shards.folder / LABELS)
    out, weights_path = _outputs(config, shards is not None, label_set is not None)
    audio_length = max(1, round(100 * config.seconds))
    limits = Thresholds(config.min_seconds, config.silence_db, config.black_level, config.flat_levels)
    inspect = InspectClip(
        limits, shards.num_frames if shards else _NUM_FRAMES, shards.manifest["size"] if shards else _FRAME_SIZE,
        ClipSpec(audio_length=audio_length).samples,
    )  # fmt: skip
    count = min(config.workers or default_count(), len(clips))
    sent: deque[tuple[int | None, Item]] = deque()

    def items() -> Iterator[Item]:
        for pair in shards.items() if shards else enumerate(clips):
            sent.append(pair)
            yield pair[1]

    with (
        _Findings(out / FINDINGS) as findings,
        tqdm(total=len(clips), unit="clip", dynamic_ncols=True, smoothing=0.05) as bar,
        Workers(inspect, count, timeout=config.timeout, report=partial(tqdm.write, file=sys.stderr)) as workers,
    ):
        census = _Census(findings, label_set, _LogMel(audio_length))
        for source, reason in shards.wrong() if shards else ():
            findings.add("shard", reason, source=source)
        for result in workers.in_order(items(), _JOBS_A_WORKER * count):
            number, item = sent.popleft()
            if isinstance(result, Lost):
                result = Inspected(findings=[("unreadable", result.reason)])
            if number is None:
                for kind, reason in result.findings:
                    findings.add(kind, reason, source=str(item))
                continue
            if result.id is None:
                result.id, result.labels = _identity(clips, number)
            census.take(number, item, result)
            bar.set_postfix_str(f"usable {census.usable}", refresh=False)
            bar.update()
        census.find_duplicates(clips)
        weights = census.write_weights(weights_path, overwrite=config.weights is not None)
        report = {
            "ok": not any(kind in ERRORS for kind in findings.counts),
            "data": list(config.data), "clips": len(clips), "usable": census.usable,
            "hours": census.samples / SAMPLE_RATE / 3600, "counts": dict(findings.counts), "findings": findings.first,
            "meaning": {**ERRORS, **{kind: text.format(**vars(config)) for kind, text in WARNINGS.items()}},
            "statistics": census.log_mel.report(), "classes": census.classes(), "weights": weights,
            "files": {"report": str(out / REPORT), "findings": str(out / FINDINGS)},
            "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
            "took": time.monotonic() - begin,
        }  # fmt: skip
    write_whole(out / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def _identity(clips: Shards | list[Source], number: int) -> tuple[str, tuple[str, ...]]:
    return clips.identity(number) if isinstance(clips, Shards) else (clips[number].id, clips[number].labels)


def _validate(config: CheckConfig) -> None:
    if not config.data:
        raise ValueError("DATA names nothing; allowed: a folder of shards, folders, media files, globs, CSV or JSON lists")
    limits = {
        "seconds": (0.05, 3600), "workers": (1, 4096), "timeout": (0.1, 86400), "min_seconds": (0, 3600),
        "silence_db": (-200, 0), "black_level": (0, 255), "flat_levels": (0, 255),
    }  # fmt: skip
    check_ranges(config, limits)


def _open(data: Sequence[str]) -> Shards | list[Source]:
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


def render(report: dict[str, Any]) -> str:
    """The report as text for people: what was found, with up to three examples each, statistics, classes, files."""
    counts, statistics, classes, weights = (report[key] for key in ("counts", "statistics", "classes", "weights"))
    lines = [
        f"{'ok' if report['ok'] else 'NOT OK'}: {report['usable']} of {report['clips']} clips can be used, "
        f"{report['hours']:.2f} hours of sound; checked in {report['took']:.1f} s"
    ]
    for kind in (kind for kind in (*ERRORS, *WARNINGS) if kind in counts):
        level = "error" if kind in ERRORS else "warning"
        lines.append(f"{level:7}  {kind:10} {counts[kind]:>7}  {report['meaning'][kind]}")
        lines += [f"{'':18} {entry['reason']}" for entry in report["findings"][kind][:3]]
        if counts[kind] > 3:
            lines.append(f"{'':18} ... and {counts[kind] - 3} more in {report['files']['findings']}")
    if statistics:
        pairs = ((statistics, "own frames"), (statistics["published"], "as published"))
        lines += [f"log-mel  mean {pair['mean']:8.4f}  std {pair['std']:7.4f}  ({name})" for pair, name in pairs]
        lines += textwrap.wrap(statistics["advice"], 110, initial_indent=" " * 9, subsequent_indent=" " * 9)
    if classes:
        used = sorted((row for row in classes["counts"] if row["clips"]), key=lambda row: row["clips"])
        lines.append(f"classes  {len(used)} of {len(classes['counts'])} have clips")
        named = [(f"{row['clips']} clips", row) for row in (used[:1] + used[1:][-1:])]
        named += [("no clip", row) for row in classes["empty"][:5]]
        lines += [f"         {what}: {row['index']}, {row['mid']}, {row['name']}" for what, row in named]
        if len(classes["empty"]) > 5:
            lines.append(f"         ... and {len(classes['empty']) - 5} more without a clip")
        unknown = sorted(classes["unknown"].items(), key=lambda pair: -pair[1])
        lines += [f"         not in the CSV: {mid!r}, in {clips} clips" for mid, clips in unknown[:5]]
    lines.append(f"weights  {weights['path']}" if weights["written"] else f"weights  not written: {weights['reason']}")
    lines.append(f"report   {report['files']['report']}")
    # Names come with the data: none may steer the terminal or break its encoding.
    return "\n".join(line if line.isprintable() else repr(line)[1:-1] for line in lines)
