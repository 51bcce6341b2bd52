"""Published data sets of sound alone, read from their folders as they are published: ESC-50 and Speech Commands."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cavmae_fast.data.media.files import MediaError
from cavmae_fast.data.sets.labels import LabelSet

ESC50_LIST = Path("meta/esc50.csv")
_ESC50_COLUMNS = ("filename", "fold", "target", "category")
SPEECH_LISTS = {"validation": "validation_list.txt", "testing": "testing_list.txt"}
"The lists that Speech Commands comes with, by split; all other clips are its training split."


class Sound(NamedTuple):
    """One clip: its name in the data set, the id of its class, its file, and the split (or fold) that it belongs to."""

    id: str
    label: str
    path: str
    split: str


class AudioSet(NamedTuple):
    """A data set of sound alone.

    Attributes:
        sounds: all clips, in a fixed order.
        label_set: the classes, in the published order.
        splits: the names of its splits, in order.
    """

    sounds: list[Sound]
    label_set: LabelSet
    splits: tuple[str, ...]

    @property
    def folds(self) -> tuple[str, ...]:
        """The splits, where they are folds of a cross-validation, whose names are numbers; else none."""
        return self.splits if all(split.isdecimal() for split in self.splits) else ()

    def of(self, place: str, splits: Sequence[str]) -> list[Sound]:
        """The clips of some splits. MediaError, which begins with `place`, for a split that is not there."""
        for split in splits:
            if split not in self.splits:
                raise MediaError(f"{place}: has no split {split!r}; allowed: {', '.join(self.splits)}")
        return [sound for sound in self.sounds if sound.split in splits]


def read_audio_set(folder: Path) -> AudioSet | None:
    """The data set in a folder that has the layout of one; None for any other folder.

    ESC-50 has `audio/*.wav` and `meta/esc50.csv` (filename, fold, target, category, ...), and its splits are the folds.
    Speech Commands has a folder of WAV files for each word, `validation_list.txt` and `testing_list.txt`; folders whose
    names begin with `_` (`_background_noise_`) are left out, and its splits are training, validation and testing.

    Raises:
        MediaError: its list or folders cannot be read or do not fit together; the message names file and row.
    """
    if (folder / ESC50_LIST).is_file():
        return _esc50(folder)
    if all((folder / name).is_file() for name in SPEECH_LISTS.values()):
        return _speech_commands(folder)
    return None


def _esc50(folder: Path) -> AudioSet:
    path = folder / ESC50_LIST
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MediaError(f"{path}: not a readable CSV list ({error})") from error
    if not rows:
        raise MediaError(f"{path}: names no clip")
    if missing := [name for name in _ESC50_COLUMNS if name not in rows[0]]:
        raise MediaError(f"{path}: has no column {', '.join(missing)}; allowed: {','.join(_ESC50_COLUMNS)}, and others")
    categories: dict[int, str] = {}
    sounds = []
    for line, row in enumerate(rows, start=2):
        name, fold, target, category = ((row[column] or "").strip() for column in _ESC50_COLUMNS)
        if not name or Path(name).name != name:
            raise MediaError(f"{path}, row {line}: filename is {name!r}; allowed: the name of a file in audio/")
        if not fold.isdecimal() or not target.isdecimal() or not category or "," in category:
            raise MediaError(
                f"{path}, row {line}: fold is {fold!r}, target {target!r}, category {category!r}; allowed: two numbers and "
                "a name without comma"
            )
        if categories.setdefault(int(target), category) != category:
            raise MediaError(
                f"{path}, row {line}: target {target} is {category!r}, in a row before {categories[int(target)]!r}; "
                "allowed: one category for each target"
            )
        sounds.append(Sound(Path(name).stem, category, str(folder / "audio" / name), str(int(fold))))
    names = tuple(categories[target] for target in sorted(categories))
    if sorted(categories) != list(range(len(names))) or len(set(names)) != len(names):
        raise MediaError(f"{path}: its targets are {sorted(categories)}; allowed: 0 to K - 1, each with a name of its own")
    folds = sorted({sound.split for sound in sounds}, key=int)
    return AudioSet(sounds, LabelSet(names, names), tuple(folds))


def _speech_commands(folder: Path) -> AudioSet:
    split_of: dict[str, str] = {}
    for split, name in SPEECH_LISTS.items():
        try:
            lines = (folder / name).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise MediaError(f"{folder / name}: not a readable list ({error})") from error
        for line in lines:
            if split_of.setdefault(line, split) != split:
                raise MediaError(f"{folder / name}: {line} is in {SPEECH_LISTS[split_of[line]]}, too; allowed: one of them")
    words = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
    if not words:
        raise MediaError(f"{folder}: holds no folder of a word")
    sounds = []
    for word in words:
        for path in sorted((folder / word).glob("*.wav")):
            listed = f"{word}/{path.name}"
            sounds.append(Sound(f"{word}/{path.stem}", word, str(path), split_of.pop(listed, "training")))
    if split_of:
        listed, split = next(iter(split_of.items()))
        raise MediaError(f"{folder / SPEECH_LISTS[split]}: {listed} is not there; every clip of the list must be")
    return AudioSet(sounds, LabelSet(tuple(words), tuple(words)), ("training", *SPEECH_LISTS))
