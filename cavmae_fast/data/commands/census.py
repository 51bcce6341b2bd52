"""What `cavmae-fast check` keeps of the clips it has seen: ids, labels, counts; a few bytes each."""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cavmae_fast.data.commands.findings import ERRORS, Findings
from cavmae_fast.data.commands.inspecting import Inspected, Shards
from cavmae_fast.data.commands.log_mel import LogMelStatistics
from cavmae_fast.data.sets.labels import (
    LabelError,
    LabelSet,
    balance_weights,
    class_counts,
    foreign_labels,
    read_weights,
    write_weights,
)
from cavmae_fast.data.sets.shards import ShardClip
from cavmae_fast.data.sets.sources import Source

Clips = Shards | list[Source]
"""Where the clips of a data set are, by number."""


class Census:
    """What is kept of the clips that were inspected.

    Attributes:
        findings: where everything that is wrong is written down.
        label_set: the classes, or None where they are not known.
        log_mel: what the sound of the usable clips goes into.
        usable, samples: clips without an error, and their samples of sound.
        unknown: label ids that are no class's, and how often each occurs.
        labels: of every clip, in the order of the list.
    """

    def __init__(self, findings: Findings, label_set: LabelSet | None, log_mel: LogMelStatistics):
        self.findings, self.label_set, self.log_mel = findings, label_set, log_mel
        self.usable = self.samples = 0
        self.unknown: Counter[str] = Counter()
        self.labels: list[tuple[str, ...]] = []
        self._hashes = array("q")  # of the ids
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}

    def take(self, number: int, item: Source | ShardClip, result: Inspected) -> None:
        """Takes what a worker found in clip `number`, and looks at its labels."""
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
        self._hashes.append(hash(result.id))
        self.labels.append(self._same.setdefault(result.labels, result.labels))

    def find_duplicates(self, clips: Clips) -> None:
        """Reports the ids that come again."""
        hashes = np.frombuffer(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(np.diff(hashes[order]) == 0)
        for number, earlier in sorted(zip(order[again + 1].tolist(), order[again].tolist(), strict=True)):
            name, source = identity(clips, number)[0], str(clips[number])
            reason = f"{source}: its id {name} is also that of clip {earlier}, {clips[earlier]}"
            self.findings.add("duplicate", reason, clip=number, id=name, source=source)

    def classes(self) -> dict[str, Any] | None:
        """Clips per class, the classes without a clip and the unknown label ids; None where the classes are not known."""
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


def identity(clips: Clips, number: int) -> tuple[str, tuple[str, ...]]:
    """Id and labels of a clip, as the list or the shards' records give them."""
    return clips.identity(number) if isinstance(clips, Shards) else (clips[number].id, clips[number].labels)
