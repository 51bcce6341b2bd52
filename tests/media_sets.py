"""Small data sets for the tests of the data engine: generated clips, the same in the published layout, and as shards."""

from __future__ import annotations

import json
from pathlib import Path

from cavmae_fast.data.commands.prepare import PrepareConfig, prepare
from cavmae_fast.data.media.encoded import encode_image, encode_sound
from cavmae_fast.data.media.files import read_clip

CLASSES = ("/m/a", "/m/b", "/m/c", "/m/d")


def write_labels(path: Path) -> Path:
    """The CSV of four classes."""
    rows = "".join(f'{index},{mid},"class {index}, so called"\n' for index, mid in enumerate(CLASSES))
    path.write_text("index,mid,display_name\n" + rows)
    return path


def write_published(folder: Path, videos: list[Path], size: int = 64, num_frames: int = 10) -> Path:
    """The published layout of these videos: `frame_k/id.jpg`, `sound/id.flac` and a JSON list; clip i has the labels
    i % 4 and, every third, also 3."""
    (folder / "sound").mkdir(parents=True)
    rows = []
    for number, path in enumerate(videos):
        clip = read_clip(path, size=size, num_frames=num_frames)
        for k, frame in enumerate(clip.frames):
            (folder / f"frame_{k}").mkdir(exist_ok=True)
            (folder / f"frame_{k}" / f"{path.stem}.jpg").write_bytes(encode_image(frame, 95))
        (folder / "sound" / f"{path.stem}.flac").write_bytes(encode_sound(clip.waveform))
        labels = [CLASSES[number % 4], *([CLASSES[3]] if number % 3 == 0 and number % 4 != 3 else [])]
        rows.append(
            {
                "video_id": path.stem,
                "wav": f"sound/{path.stem}.flac",
                "video_path": ".",
                "labels": ",".join(labels),
            }
        )
    (folder / "list.json").write_text(json.dumps({"data": rows}))
    return folder / "list.json"


def write_shards(folder: Path, source: Path, **options) -> Path:
    """Shards of a list, a folder or a file."""
    prepare(PrepareConfig(src=(str(source),), out=folder, **{"size": 64, "workers": 1, "shard_clips": 7} | options))
    return folder
