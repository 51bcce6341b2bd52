"""Damaged files by the hundred: no crash, no hang, no process over 2 GiB; every clip ends decoded or named."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_encoded import FLAC, JPEG, WAV, jpeg_claiming, patched, png_claiming, sound_bytes, streaminfo, tone
from test_media import tones, write_clip

from cavmae_fast.data.commands.prepare import EncodeClip
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.shards import ShardSet
from cavmae_fast.data.sets.sources import find_sources

REAL = sorted((Path(__file__).resolve().parents[2] / "shared" / "media").glob("*.mp4"))
CODECS = [
    ("mp4", "libx264", "yuv420p", "aac", 16000),
    ("mov", "mpeg4", "yuv420p", "pcm_s16le", 44100),
    ("webm", "libvpx", "yuv420p", "libopus", 48000),
    ("avi", "mjpeg", "yuvj420p", "mp2", 44100),
    ("avi", "rawvideo", "yuv420p", "pcm_u8", 8000),
    ("ts", "mpeg2video", "yuv420p", "mp2", 48000),
    ("mpg", "mpeg1video", "yuv420p", "mp2", 44100),
    ("flv", "flv1", "yuv420p", "libmp3lame", 44100),
    ("mkv", "ffv1", "yuv420p", "flac", 48000),
    ("mov", "qtrle", "rgb24", "pcm_s16le", 22050),
]
SCRIPT = """
import json, sys
from pathlib import Path
from cavmae_fast.data.commands import prepare as module
from test_fuzz import Timed
module.EncodeClip = Timed
config = module.PrepareConfig(src=(sys.argv[1],), out=Path(sys.argv[2]), size=64, shard_clips=50, workers=2)
print(json.dumps(module.prepare(config)))
"""
LONGEST, LARGEST = 30.0, 2 << 30


class Timed(EncodeClip):
    """Notes how long each clip took beside the sources."""

    def __call__(self, item):
        begin = time.monotonic()
        result = super().__call__(item)
        with open(os.environ["TIMES"], "a") as file:
            file.write(f"{item[0]} {time.monotonic() - begin:.3f}\n")
        return result


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Truncated, cut, lengthened, bits flipped, sizes made huge, at random."""
    kind = rng.choice(["truncate", "flip", "flip many", "header", "sizes", "cut", "insert", "repeat"])
    changed = bytearray(data)
    at = rng.randrange(len(changed))
    if kind == "truncate":
        del changed[at:]
    elif kind in ("flip", "flip many", "header"):
        within = min(len(changed), 1024) if kind == "header" else len(changed)
        for _ in range(rng.randint(1, 12) if kind != "flip many" else 1 + len(changed) // 300):
            changed[rng.randrange(within)] ^= 1 << rng.randrange(8)
    elif kind == "sizes":
        for _ in range(rng.randint(1, 4)):
            at, count = rng.randrange(min(len(changed), 4096)), rng.choice([1, 2, 4])
            changed[at : at + count] = rng.choice([b"\xff" * count, b"\x7f" + b"\xff" * (count - 1), bytes(count)])
    elif kind == "cut":
        del changed[at : at + rng.randint(1, 5000)]
    elif kind == "insert":
        changed[at:at] = rng.randbytes(rng.choice([1, 100, 5000]))
    else:
        changed[at:at] = changed[at : at + rng.randint(1, 20000)]
    return bytes(changed)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bases")
    made = []
    for suffix, video, pix, audio, rate in CODECS:
        fps = 25 if video.startswith("mpeg") and video != "mpeg4" else 10
        sound = {"sound": tones(0.8, rate), "rate": rate, "audio": audio}
        made.append(write_clip(folder / f"{video}.{suffix}", video=video, pix=pix, frames=8, fps=fps, **sound))
    made += generate_clips(folder / "synthetic", num_train=3, num_test=0, seconds=0.5, size=32)[0]
    return made + REAL


def specials(bases: list[Path]) -> dict[str, bytes]:
    """Files that are made to hurt."""
    mp4, avi = bases[0].read_bytes(), bases[4].read_bytes()
    files = {
        "zero.mp4": b"",
        "one.mkv": b"\0",
        "text.mp4": b"hello\n" * 99,
        "random.avi": random.Random(0).randbytes(50000),
        "zeros.ts": bytes(4 << 20),
        "sync.ts": (b"\x47" + bytes(187)) * 20000,
        "ones.mpg": b"\xff" * (4 << 20),
        "atom.mp4": struct.pack(">I4sQ", 1, b"moov", 1 << 62) + b"x" * 999,
        "wrong.avi": mp4,
        "wrong.mp4": avi,
        "self.mp4": b"ffconcat version 1.0\n" + b"file 'self.mp4'\n" * 9,
        "play.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "endless.ts": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nendless.ts\n",
        "y4m.mpg": b"YUV4MPEG2 W65535 H65535 F25:1 C420jpeg\nFRAME\n" + bytes(999),
        "whole.mp4": mp4,
    }
    for width, height in ((65535, 65535), (16384, 16384), (1, 65535), (65535, 1), (0, 0)):
        tkhd, avc1 = mp4.index(b"tkhd"), mp4.index(b"avc1", mp4.index(b"stsd"))
        big = patched(mp4, tkhd + 80, ">II", width << 16 & 0xFFFFFFFF, height << 16 & 0xFFFFFFFF)
        files[f"{width}x{height}.mp4"] = patched(big, avc1 + 28, ">HH", width, height)
        big = patched(avi, avi.index(b"avih") + 40, "<II", width, height)
        files[f"{width}x{height}.avi"] = patched(big, avi.index(b"strf") + 12, "<ii", width, height)
    return files


def run(source: Path, out: Path) -> tuple[dict, list[dict], dict[int, float], int]:
    """Prepares a source -> manifest, rejects, seconds of each clip, and the most memory any process had."""
    times = out.with_suffix(".times")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p), TIMES=str(times))
    command = [sys.executable, "-c", SCRIPT, str(source), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    most = 0
    while process.poll() is None:
        most = max(most, *map(high_water, [process.pid, *children(process.pid)]))
        time.sleep(0.02)
    said, complained = process.communicate()
    assert process.returncode == 0, complained.decode(errors="replace")[-2000:]
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    seconds: dict[int, float] = {}
    for line in times.read_text().splitlines():
        key, taken = line.split()
        seconds[int(key)] = max(seconds.get(int(key), 0.0), float(taken))
    return json.loads(said), rejects, seconds, most


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def high_water(pid: int) -> int:
    """The most bytes of memory a process ever had."""
    try:
        return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError):
        return 0


def check(source: Path, out: Path) -> tuple[ShardSet, list[dict]]:
    manifest, rejects, seconds, most = run(source, out)
    listed = find_sources([source])
    data = ShardSet(out)
    keys = [*data.index["key"].tolist(), *(reject["key"] for reject in rejects)]
    assert sorted(keys) == list(range(len(listed))) and manifest["listed"] == len(listed)
    for reject in rejects:
        assert reject["source"] == str(listed[reject["key"]])
        assert any(name and name in reject["reason"] for name in (reject["source"], listed[reject["key"]].frames))
        assert "Traceback" not in reject["reason"] and " at 0x" not in reject["reason"]
    assert max(seconds.values()) < LONGEST and most < LARGEST, (max(seconds.values()), most >> 20)
    for number in range(len(data)):
        meta, encoded = data[number].read(number % 10)
        assert meta["samples"] >= 400 and encoded.image and encoded.sound
    return data, rejects


def write_mutants(folder: Path, bases: list[Path], count: int, seed: int) -> Path:
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(count):
        base = rng.choice(bases)
        suffix = base.suffix if rng.random() < 0.93 else rng.choice([".mp4", ".ts", ".ogv"])
        (folder / f"m{number:04d}{suffix}").write_bytes(mutated(base.read_bytes(), rng))
    return folder


def test_mutated_media(bases, tmp_path):
    folder = write_mutants(tmp_path / "media", bases, 150, seed=0)
    data, rejects = check(folder, tmp_path / "out")
    assert len(data) > 40 and len(rejects) > 20  # else it tries too little


def test_files_made_to_hurt(bases, tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    for name, content in specials(bases).items():
        (folder / name).write_bytes(content)
    write_clip(folder / "no_picture.mkv", frames=0, sound=tones(0.5, 16000))
    write_clip(folder / "no_sound.mkv", frames=5)
    write_clip(folder / "one_frame.mkv", frames=1, fps=1, sound=tones(0.5, 16000))
    os.mkfifo(folder / "pipe.mp4")
    for name, target in (("zero_device.mp4", "/dev/zero"), ("loop.mp4", "loop.mp4"), ("nowhere.mp4", "gone")):
        os.symlink(target, folder / name)
    with open(folder / "sparse.mp4", "wb") as file:
        file.truncate(4 << 30)
    with open(os.fsencode(folder) + b"/no text \xff.mp4", "wb") as file:
        file.write(bases[0].read_bytes())
    (folder / "line\nfeed %d 'quoted':x|y.mp4").write_bytes(bases[0].read_bytes())
    data, rejects = check(folder, tmp_path / "out")
    used = {meta["id"] for meta in data.clips()}
    assert used >= {"whole", "wrong", "one_frame", "no text \udcff", "line\nfeed %d 'quoted':x|y"}
    assert {r["id"] for r in rejects} >= {
        "zero",
        "one",
        "text",
        "random",
        "zeros",
        "ones",
        "atom",
        "self",
        "play",
        "pipe",
        "zero_device",
        "loop",
        "nowhere",
        "sparse",
        "no_picture",
        "no_sound",
        "y4m",
    }


def published(folder: Path, count: int, seed: int) -> Path:
    """The published layout with damaged pictures and sounds."""
    rng = random.Random(seed)
    (folder / "frame_0").mkdir(parents=True)
    noise = np.random.default_rng(seed).integers(-9999, 9999, (8000, 2)).astype(np.int16)
    sounds = [WAV, FLAC, sound_bytes(noise, 44100, "FLAC", "PCM_24"), sound_bytes(tone(8000), 8000, "WAV", "FLOAT")]
    pairs = [
        (JPEG, WAV),
        (JPEG, FLAC),
        (b"", WAV),
        (JPEG, b""),
        (png_claiming(65500, 65500), WAV),
        (jpeg_claiming(65500, 65500), WAV),
        (jpeg_claiming(5000, 5000), WAV),
        (JPEG, streaminfo(FLAC, samples=(1 << 36) - 1)),
        (JPEG, streaminfo(FLAC, rate=0)),
        (JPEG, patched(WAV, 24, "<I", 1)),
        (JPEG, patched(WAV, 24, "<I", 1 << 31)),
        (JPEG, patched(WAV, 40, "<I", 2**32 - 1)),
        (JPEG + bytes(9 << 20), WAV),
    ]
    for number in range(count):
        damaged = (mutated(JPEG, rng), rng.choice(sounds)) if number % 2 else (JPEG, mutated(rng.choice(sounds), rng))
        pairs.append(damaged)
    rows = []
    for number, (image, sound) in enumerate(pairs):
        name = f"{number}.{'flac' if sound[:1] == b'f' else 'wav'}"
        (folder / "frame_0" / f"{number}.jpg").write_bytes(image)
        (folder / name).write_bytes(sound)
        rows.append({"video_id": str(number), "wav": name, "video_path": "."})
    rows += [{"video_id": "0", "wav": ".", "video_path": "."}] * 50  # a folder for a sound leaves nothing open
    names = ("../0", "x\0y", "\ud800", "n" * 5000, "gone")
    rows += [{"video_id": name, "wav": "0.wav", "video_path": "."} for name in names]
    rows.append({"video_id": "0", "wav": "0.wav", "video_path": "."})
    (folder / "list.json").write_text(json.dumps({"data": rows}))
    return folder / "list.json"


def test_mutated_published_layout(tmp_path):
    source = published(tmp_path / "p", 150, seed=0)
    data, rejects = check(source, tmp_path / "out")
    keys = set(data.index["key"].tolist())
    assert {0, 1, 11} <= keys and not {2, 3, 4, 5, 7, 8, 9, 10, 12} & keys and data.manifest["listed"] - 1 in keys
    assert len(data) > 30 and len(rejects) > 80


def test_the_same_outcome_again(bases, tmp_path):
    folder = write_mutants(tmp_path / "media", bases[:10], 40, seed=1)
    outcomes = []
    for name in ("a", "b"):
        run(folder, tmp_path / name)
        files = ("rejects.jsonl", "index.npy", "shard-000000.tar", "shard-000000.json")
        outcomes.append([(tmp_path / name / file).read_bytes() for file in files])
    assert outcomes[0] == outcomes[1]


def test_read_clip_raises_nothing_else(bases, tmp_path):
    folder = write_mutants(tmp_path / "media", bases[:13], 60, seed=2)
    for path in sorted(folder.iterdir()):
        try:
            clip = read_clip(path, size=32)
            assert clip.frames.shape == (10, 32, 32, 3) and len(clip.waveform) >= 400
        except MediaError as error:
            assert str(path) in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_many_mutated_files(bases, tmp_path, seed):
    """Seeds beyond those of the fast tests: 4 x 250 media files and 4 x 250 published clips."""
    check(write_mutants(tmp_path / "media", bases, 250, seed), tmp_path / "a")
    check(published(tmp_path / "p", 250, seed), tmp_path / "b")


def test_this_test_sees_what_goes_wrong(tmp_path, monkeypatch):
    """A clip that is neither decoded nor named must not pass `check`."""
    source = published(tmp_path / "p", 2, seed=0)
    real = run(source, tmp_path / "out")

    def lossy(*_: object):
        return real[0], real[1][1:], real[2], real[3]

    monkeypatch.setattr(sys.modules[__name__], "run", lossy)
    with pytest.raises(AssertionError):
        check(source, tmp_path / "out")
