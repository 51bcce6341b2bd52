"""The generated clips with labels: their attributes as classes, in the published files (two lists and a labels CSV)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from cavmae_fast.data.media.synthetic import HUES, MANIFEST, MOTIONS, PITCHES, RHYTHMS, SHAPES, TIMBRES
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.data.sets.shards import write_whole


class LabeledLists(NamedTuple):
    """The lists of training and test clips, and the CSV of their classes."""

    train: Path
    test: Path
    labels: Path


def write_lists(clips: Path, folder: Path) -> LabeledLists:
    """Writes `train.json`, `test.json` and `labels.csv` of the clips that `generate_clips` put into `clips` into `folder`,
    which is made if absent.

    A clip has three labels of 26: its shape (and timbre), its color (and pitch) and its motion (and rhythm). Each is seen
    and heard, so that either modality alone suffices. No combination of the test clips occurs in training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    to_clips = Path(os.path.relpath(clips.resolve(), folder.resolve()))  # paths in a list start at the list
    lines = (clips / MANIFEST).read_text(encoding="utf-8").splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    lists = LabeledLists(*(folder / name for name in ("train.json", "test.json", "labels.csv")))
    for path in (lists.train, lists.test):
        listed = [
            {
                "video_id": Path(row["file"]).stem,
                "video": (to_clips / row["file"]).as_posix(),
                "labels": f"shape/{row['shape']},hue/{row['hue']:g},motion/{row['motion']}",
            }
            for row in rows
            if row["split"] == path.stem
        ]
        write_whole(path, json.dumps({"data": listed}, indent=1) + "\n")
    classes = [(f"shape/{seen}", f"{seen}, {heard}") for seen, heard in zip(SHAPES, TIMBRES)]
    classes += [(f"hue/{seen:g}", f"hue {seen:g} degrees, {heard:g} Hz") for seen, heard in zip(HUES, PITCHES)]
    classes += [(f"motion/{seen}", f"{seen}, {heard}") for seen, heard in zip(MOTIONS, RHYTHMS)]
    write_whole(lists.labels, LabelSet(*map(tuple, zip(*classes))).to_csv())
    return lists
