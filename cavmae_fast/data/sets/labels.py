"""Class labels: the labels CSV, multi-hot targets with smoothing and mixup, and the weights of balanced sampling."""

import csv
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cavmae_fast.errors import CavmaeError

if TYPE_CHECKING:  # worker processes read labels, and need no torch for it
    from torch import Tensor

_COLUMNS = ("index", "mid", "display_name")


class LabelError(CavmaeError, ValueError):
    """A labels or weights file, or a label, cannot be used; the message is one sentence that names it and the cause."""


def split_labels(text: str) -> tuple[str, ...]:
    """The ids of a comma-joined `labels` entry of a data list, without blanks: `"/m/a, /m/b"` -> `("/m/a", "/m/b")`."""
    return tuple(part for part in map(str.strip, text.split(",")) if part)


@dataclass(frozen=True)
class LabelSet:
    """The classes of a data set, in the order of the model's outputs.

    Attributes:
        mids: label ids, by class index (527 in AudioSet, 309 in VGGSound).
        names: display names, by class index.
    """

    mids: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def from_csv(cls, path: str | Path) -> "LabelSet":
        """Read a labels CSV with the columns `index`, `mid` and `display_name`, its rows in any order.

        Raises:
            LabelError: the file cannot be read, a column is missing, a row has another number of fields, an id is
                empty, holds a comma or comes twice, or the indices are not 0 to K - 1, each once.
        """
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets write a byte order mark
                reader = csv.reader(file, strict=True)
                header = [name.strip() for name in next(reader, [])]
                rows = [(reader.line_num, row) for row in reader if row]
        except OSError as error:
            raise LabelError(f"{path}: cannot be read ({error.strerror})") from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise LabelError(f"{path}: not a CSV file in UTF-8 ({error})") from error
        if missing := [name for name in _COLUMNS if header.count(name) != 1]:
            raise LabelError(
                f"{path}, row 1: has no column {', '.join(missing)} or has it twice; allowed: {','.join(_COLUMNS)}"
            )
        if not rows:
            raise LabelError(f"{path}: holds no class; allowed: a row for each class after the header")

        free = {str(index): index for index in range(len(rows))}
        found: dict[int, tuple[str, str]] = {}
        mids: set[str] = set()
        for line, row in rows:
            if len(row) != len(header):
                raise LabelError(
                    f"{path}, row {line}: has {len(row)} fields; allowed: {len(header)}, those with a comma in quotes"
                )
            index, mid, name = (row[header.index(column)].strip() for column in _COLUMNS)
            if (number := free.pop(index, None)) is None:
                raise LabelError(
                    f"{path}, row {line}: index is {index!r}; allowed: 0 to {len(rows) - 1}, each once, for {len(rows)} rows"
                )
            if not mid or "," in mid or mid in mids:
                raise LabelError(f"{path}, row {line}: mid is {mid!r}; allowed: an id without comma that no other row has")
            found[number] = mid, name
            mids.add(mid)
        ordered = [found[index] for index in range(len(rows))]
        return cls(tuple(mid for mid, _ in ordered), tuple(name for _, name in ordered))

    def to_csv(self) -> str:
        """The text that `from_csv` reads."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((index, *row) for index, row in enumerate(zip(self.mids, self.names, strict=True)))
        return text.getvalue()

    @cached_property
    def index(self) -> dict[str, int]:
        """Class index of each id."""
        return {mid: index for index, mid in enumerate(self.mids)}

    def __len__(self) -> int:
        return len(self.mids)

    def unknown(self, labels: Iterable[str]) -> tuple[str, ...]:
        """Those of `labels` that are no ids of this set, each once."""
        return tuple(dict.fromkeys(label for label in labels if label not in self.index))

    def encode(self, labels: Sequence[Sequence[str]]) -> np.ndarray:
        """Class indices of clips given by their label ids: `[clips, most labels of a clip]` int64, filled with -1.

        Raises:
            LabelError: a clip has an id that is not of this set.
        """
        lengths = np.fromiter(map(len, labels), np.int64, len(labels))
        indices = np.full((len(labels), lengths.max(initial=0)), -1, np.int64)
        used = np.arange(indices.shape[1]) < lengths[:, None]
        try:
            indices[used] = np.fromiter((self.index[mid] for ids in labels for mid in ids), np.int64, lengths.sum())
        except KeyError as error:
            mid = error.args[0]
            clip = next(clip for clip, ids in enumerate(labels) if mid in ids)
            raise LabelError(
                f"labels[{clip}] holds {mid!r}, which is no label id; allowed: the {len(self)} ids of the labels CSV"
            ) from None
        return indices

    def multi_hot(
        self,
        indices: np.ndarray,
        smoothing: float = 0.0,
        *,
        partner: np.ndarray | None = None,
        lam: np.ndarray | None = None,
    ) -> "Tensor":
        """Targets of a batch, smoothed and mixed as published (`src/dataloader.py`, `__getitem__`).

        With `K` classes, a class that the clip lacks gets `smoothing / K` and one that it has `1 - smoothing`. In a mixed
        clip every class gets `smoothing / K`, and each of the clip's labels adds `lam * (1 - smoothing)` and each of its
        partner's `(1 - lam) * (1 - smoothing)`, repeats included.

        Args:
            indices: `[batch, any]` integers from `encode`, -1 where there is no label; a clip may have none.
            smoothing: label smoothing, 0 to less than 1.
            partner: `[batch, any]` integers, the labels of the clips mixed in.
            lam: `[batch]`, the share of the first clip, above 0; 1 marks a clip that is not mixed, whose `partner` is
                ignored.

        Returns:
            `[batch, K]` float32 on the CPU.

        Raises:
            ValueError: a wrong shape or dtype, or a number out of range.
        """
        import torch

        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is {smoothing}; allowed: 0 to less than 1")
        if (partner is None) != (lam is None):
            raise ValueError("only one of partner and lam is given; allowed: both, or neither")
        indices = self._checked("indices", indices)
        batch, classes = len(indices), len(self)
        lam = np.ones(batch) if lam is None else np.asarray(lam, np.float64)
        if lam.shape != (batch,) or not ((lam > 0) & (lam <= 1)).all():
            raise ValueError(f"lam has shape {list(lam.shape)} or leaves its range; allowed: [{batch}] in (0, 1]")
        mixed = lam < 1
        targets = np.full((batch, classes), smoothing / classes)
        rows, slots = np.nonzero((indices >= 0) & ~mixed[:, None])
        targets[rows, indices[rows, slots]] = 1 - smoothing
        if partner is not None:
            partner = self._checked("partner", partner)
            if len(partner) != batch:
                raise ValueError(f"partner has {len(partner)} rows; allowed: {batch}, as indices has")
            for theirs, share in ((indices, lam), (partner, 1 - lam)):
                rows, slots = np.nonzero((theirs >= 0) & mixed[:, None])
                np.add.at(targets, (rows, theirs[rows, slots]), share[rows] * (1 - smoothing))
        return torch.from_numpy(targets.astype(np.float32))

    def _checked(self, name: str, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.ndim != 2 or indices.dtype.kind not in "iu":
            raise ValueError(f"{name} is {indices.dtype} {list(indices.shape)}; allowed: integers of shape [batch, any]")
        if indices.size and not -1 <= indices.min() <= indices.max() < len(self):
            raise ValueError(f"{name} lies in [{indices.min()}, {indices.max()}]; allowed: -1 to {len(self) - 1}")
        return indices


def foreign_labels(clip: object, unknown: Iterable[str]) -> str:
    """Why a clip with these labels cannot be used, in one sentence that names it."""
    return f"{clip}: its labels {', '.join(unknown)} are not in the CSV of the classes"


def check_labels(what: str, labels: Sequence[Sequence[str]], label_set: LabelSet) -> None:
    """LabelError, which begins with `what` these clips are, when one has a label that is no class, or none has a label."""
    unknown: dict[str, int] = {}
    for ids in labels:
        for mid in label_set.unknown(ids):
            unknown[mid] = unknown.get(mid, 0) + 1
    if unknown:
        names = ", ".join(f"{mid!r}" for mid in list(unknown)[:8]) + ", ..." * (len(unknown) > 8)
        raise LabelError(
            f"{what}: {len(unknown)} labels are not among the {len(label_set)} classes of the labels CSV: {names}; "
            "every label must be one of them"
        )
    if not any(labels):
        raise LabelError(f"{what}: none of the {len(labels)} clips has a label; name a list with labels, or shards of one")


def class_counts(labels: Sequence[Sequence[str]], label_set: LabelSet) -> np.ndarray:
    """How often each class occurs among the labels of all clips: `[K]` int64.

    Raises:
        LabelError: a clip has an id that is not of `label_set`.
    """
    indices = label_set.encode(labels)
    return np.bincount(indices[indices >= 0], minlength=len(label_set))


def balance_weights(labels: Sequence[Sequence[str]], label_set: LabelSet) -> np.ndarray:
    """Sampling weights that favor clips of rare classes, as published (`src/gen_weight_file.py`).

    Returns:
        `[clips]` float64: the sum over a clip's labels of `1000 / (count of the class + 0.01)`; 0 without labels.

    Raises:
        LabelError: a clip has an id that is not of `label_set`.
    """
    indices = label_set.encode(labels)
    clips, slots = np.nonzero(indices >= 0)
    classes = indices[clips, slots]
    class_weight = 1000 / (np.bincount(classes, minlength=len(label_set)) + 0.01)
    return np.bincount(clips, weights=class_weight[classes], minlength=len(labels))


def write_weights(path: str | Path, weights: np.ndarray) -> None:
    """Write the published `<list>_weight.csv`: one number a row, in list order. The file appears whole or not at all.

    Raises:
        LabelError: the weights are none to draw clips with.
        OSError: the folder cannot be written to.
    """
    path, weights = Path(path), np.asarray(weights, np.float64)
    _check_weights(path, weights)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        np.savetxt(part, weights)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_weights(path: str | Path, count: int) -> np.ndarray:
    """The sampling weights `[count]` float64 of a data list with `count` clips.

    Raises:
        LabelError: the file cannot be read, has another number of rows, or holds what is no weight.
    """
    try:
        with open(path, encoding="utf-8-sig") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # said below, as an error
            table = np.loadtxt(file, delimiter=",", comments=None, ndmin=2)
    except OSError as error:
        raise LabelError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LabelError(f"{path}: not one number a row ({error})") from error
    if table.size != count or len(table) != count:
        raise LabelError(
            f"{path}: holds {len(table)} rows and {table.size} numbers; allowed: {count} rows, a number for each clip"
        )
    _check_weights(path, table[:, 0])
    return table[:, 0]


def _check_weights(path: str | Path, weights: np.ndarray) -> None:
    if weights.ndim != 1:
        raise LabelError(f"{path}: weights have shape {list(weights.shape)}; allowed: [clips]")
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        raise LabelError(f"{path}, row {bad[0] + 1}: weight is {weights[bad[0]]}; allowed: finite numbers of 0 or more")
    if not weights.any():
        raise LabelError(f"{path}: no weight is above 0, so no clip could be drawn; allowed: at least one")
