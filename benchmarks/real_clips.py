"""Is a real clip found among generated ones by the sound of its other half? Before and after some training on real clips.

    python benchmarks/real_clips.py runs/pretrain/model FOLDER --generated runs/pretrain/clips

Each video of the folder is cut into halves. The index holds the first half (sound and picture) among the generated test
clips; the sound of the second half is searched for, among sounds and among pictures. So nothing that is compared was
recorded at the same moment. Then the model is trained on, for a few steps, with generated clips and with *other parts* of
the real ones: their first two seconds, and what follows two seconds after the middle. The sound that is searched for (the
model hears the two seconds after the middle) is not among them, and neither is the picture that is to be found.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.common import add_arguments, device_name, find_device, provenance, table, write_json
from cavmae_fast.data.media.files import read_clip
from cavmae_fast.evaluation import Running, embed, search
from cavmae_fast.training.pretrain import pretrain
from cavmae_fast.training.pretrain_config import PretrainConfig

RATE = 16000
PART = 2.0
"Seconds of a part that is trained on, as long as a generated clip."
STEP = 0.1
"Seconds from the beginning of one part to that of the next."


def cut(source: Path, target: Path, begin: float, end: float) -> None:
    """Writes the pictures and the sound of a video from `begin` to `end` (seconds) as a video."""
    import av

    waveform = read_clip(source).waveform[int(begin * RATE) : int(end * RATE)]
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        stream = given.streams.video[0]
        picture = made.add_stream("libx264", rate=stream.average_rate)
        picture.width, picture.height, picture.pix_fmt = stream.codec_context.width, stream.codec_context.height, "yuv420p"
        sound = made.add_stream("aac", rate=RATE, layout="mono")
        for frame in given.decode(stream):
            if begin <= frame.time < end:
                kept = frame.reformat(format="yuv420p")
                kept.pts = None
                made.mux(picture.encode(kept))
        made.mux(picture.encode(None))
        for start in range(0, len(waveform), 1024):
            piece = np.ascontiguousarray(waveform[start : start + 1024])[None]
            frame = av.AudioFrame.from_ndarray(piece, format="s16p", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            made.mux(sound.encode(frame))
        made.mux(sound.encode(None))


def halves(videos: list[Path], folder: Path) -> dict[str, Path]:
    """Writes the first half of each video into `folder/first`; returns the sound of the second, by the video's name."""
    import soundfile

    (folder / "first").mkdir()
    sounds = {}
    for path in videos:
        waveform = read_clip(path).waveform
        middle = len(waveform) // 2
        cut(path, folder / "first" / f"{path.stem}.mp4", 0.0, middle / RATE)
        sounds[path.stem] = folder / f"{path.stem}.wav"
        soundfile.write(sounds[path.stem], waveform[middle:], RATE)
    return sounds


def other_parts(videos: list[Path], folder: Path) -> Path:
    """Writes what is trained on: the first two seconds of each video, and parts of two seconds from two seconds after the
    middle on."""
    folder.mkdir()
    for path in videos:
        seconds = len(read_clip(path).waveform) / RATE
        for number, begin in enumerate([0.0, *np.arange(seconds / 2 + PART, seconds - PART, STEP)]):
            cut(path, folder / f"{path.stem}-{number:03d}.mp4", float(begin), float(begin) + PART)
    return folder


def ranks(model: Path, generated: Path, sounds: dict[str, Path], folder: Path, running: Running) -> dict[str, Any]:
    """By video, the ranks of its first half when the sound of its second is searched for, and among how many."""
    index = embed(model, [generated / "test", folder / "first"], folder / "index", running=running, overwrite=True)
    found: dict[str, Any] = {"clips": len(index)}
    for name, sound in sounds.items():
        found[name] = {}
        for streams, match in (("sound", "same"), ("picture", "other")):
            answer = search(index, audio=sound, top=len(index), match=match, model=model, running=running)
            found[name][streams] = next(hit.rank for hit in answer.hits if hit.id == name)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("checkpoint", type=Path, help="what `cavmae-fast pretrain` left: RUN/model")
    parser.add_argument("videos", type=Path, help="folder of real clips (MP4), eight seconds or longer")
    parser.add_argument("--generated", type=Path, required=True, help="the generated clips of that run: RUN/clips")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-clips", type=int, default=96, help="generated clips among those that are trained on")
    options = parser.parse_args(arguments)
    videos = sorted(options.videos.glob("*.mp4"))
    if not videos or min(options.steps, options.seeds, options.train_clips) < 1:
        parser.error("the folder must hold MP4 files, and --steps, --seeds and --train-clips must be 1 or more")
    device = find_device(parser, options.device)
    running = Running(device=str(device), dtype="float32", workers=0)
    command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    settings = {"steps": options.steps, "train_clips": options.train_clips, "load": os.getloadavg()[0]}
    record: dict[str, Any] = {"kind": "real_clips", "provenance": provenance(device, command, options.commit)}
    record |= {"settings": settings, "after": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sounds = halves(videos, folder)
        record["before"] = ranks(options.checkpoint, options.generated, sounds, folder, running)
        parts = other_parts(videos, folder / "parts")
        train = sorted((options.generated / "train").glob("*.mp4"))[: options.train_clips]
        for seed in range(options.seeds):
            out = folder / f"run-{seed}"
            training = {"init": options.checkpoint, "steps": options.steps, "learning_rate": 3e-4, "seed": seed}
            pretrain(PretrainConfig(data=(*train, parts), out=out, device=str(device), workers=0, **training))
            record["after"].append(ranks(out / "model", options.generated, sounds, folder, running))
    write_json(options.out / device_name(device) / "real_clips.json", record)
    rows = [("before", record["before"]), *((f"after, seed {seed}", row) for seed, row in enumerate(record["after"]))]
    headings = ["", *(f"{name}, among {streams}s" for name in sounds for streams in ("sound", "picture"))]
    cells = [[label, *(str(row[name][s]) for name in sounds for s in ("sound", "picture"))] for label, row in rows]
    print(f"rank among {record['before']['clips']} clips", table(headings, cells), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
