"""Small video clips in which sight and sound belong together, made on the spot: something to learn without a download.

A clip shows one shape on a noisy background and plays one sound. What is seen decides what is heard:

| seen   | values                                | heard  | values                                       |
| ------ | ------------------------------------- | ------ | -------------------------------------------- |
| shape  | circle, square, triangle, cross, star | timbre | sine, square, saw, bell (FM), noise band     |
| color  | 16 hues                               | pitch  | 16 pitches, 220 to 2960 Hz                   |
| motion | still, right, left, up, down          | rhythm | held, 2, 4 or 8 notes per second, long-short |

Motion is visible in a single frame: a moving shape drags fading copies of itself behind it. Position, size, speed,
background, texture, loudness, phase, tempo, a slight detuning and noise differ from clip to clip and mean nothing.

Of the 400 combinations 64 are kept for the test clips and never occur in training, while every value, and every pair of
values, does: to match the test clips a model must have learned the three rules, not the combinations.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SHAPES = ("circle", "square", "triangle", "cross", "star")
TIMBRES = ("sine", "square", "saw", "bell", "noise")
HUES = tuple(22.5 * i for i in range(16))  # degrees
PITCHES = tuple(round(220 * 2 ** (i / 4), 1) for i in range(16))  # Hz, three semitones apart
MOTIONS = ("still", "right", "left", "up", "down")
RHYTHMS = ("held", "2/s", "4/s", "8/s", "long-short")
TEST_COMBINATIONS = 64

MANIFEST = "manifest.jsonl"
_FPS, _RATE = 8, 16000
_DIRECTIONS = {"still": (0, 0), "right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y is downward
_VERSION = 4  # of the drawing and the sound: part of the parameters, so that an older set is not taken for a new one

Combination = tuple[int, int, int]  # indices into (SHAPES, TIMBRES), (HUES, PITCHES) and (MOTIONS, RHYTHMS)


def combinations(seed: int = 0) -> tuple[list[Combination], list[Combination]]:
    """The training combinations (336) and the test combinations (64), both shuffled by `seed`.

    Of the five shapes that go with a (color, motion) at most two are held out, and likewise for the other pairs, so
    that every pair of values is left in training.
    """
    rng = np.random.default_rng([seed, 2])
    relabel = [rng.permutation(n) for n in (len(SHAPES), len(HUES), len(MOTIONS))]
    every = [tuple(int(x) for x in c) for c in product(range(len(SHAPES)), range(len(HUES)), range(len(MOTIONS)))]
    rng.shuffle(every)
    # A Latin square: each of its five classes holds exactly one shape for each (color, motion).
    every.sort(key=lambda c: sum(int(table[x]) for table, x in zip(relabel, c, strict=True)) % len(SHAPES))
    test, train = every[:TEST_COMBINATIONS], every[TEST_COMBINATIONS:]
    rng.shuffle(test)
    rng.shuffle(train)
    return train, test


def generate_clips(
    out_dir: str | Path,
    *,
    num_train: int = 672,
    num_test: int = 64,
    seconds: float = 2.0,
    size: int = 128,
    seed: int = 0,
    workers: int = 2,
) -> tuple[list[Path], list[Path]]:
    """Write a set of clips (H.264 and AAC in MP4, 8 frames per second) and its manifest; reuse a complete one.

    The same parameters give the same pictures and sounds. Files appear under their names only when whole, and
    `manifest.jsonl` last: its first line holds the parameters, each other line one clip's `file`, `split` and
    attributes.

    Args:
        out_dir: folder for `train/`, `test/` and `manifest.jsonl`; made when missing.
        num_train: training clips; they go through the training combinations again and again, no clip equals another.
        num_test: test clips, each of another combination, so 64 at most.
        seconds: length of a clip, 0.5 or more.
        size: height and width of the picture, even, 32 or more.
        seed: of everything that is random.
        workers: threads.

    Returns:
        The paths of the training clips and of the test clips.

    Raises:
        ValueError: a number is out of range, or `out_dir` holds another set.
    """
    if num_train < 0 or not 0 <= num_test <= TEST_COMBINATIONS or workers < 1:
        raise ValueError(
            f"num_train={num_train}, num_test={num_test}, workers={workers}; allowed: num_train >= 0, "
            f"num_test 0 to {TEST_COMBINATIONS}, workers >= 1"
        )
    if seconds < 0.5 or size < 32 or size % 2 or seed < 0:
        raise ValueError(
            f"seconds={seconds}, size={size}, seed={seed}; allowed: seconds >= 0.5, size even and >= 32, seed >= 0"
        )
    out_dir = Path(out_dir)
    train, test = combinations(seed)
    parameters = {
        "num_train": num_train,
        "num_test": num_test,
        "seconds": float(seconds),
        "size": size,
        "seed": seed,
        "version": _VERSION,
    }
    rows = [_row("train", i, train[i % len(train)]) for i in range(num_train)]
    rows += [_row("test", i, test[i]) for i in range(num_test)]
    if not _is_complete(out_dir, parameters, rows):
        for split in ("train", "test"):
            (out_dir / split).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(workers) as pool:  # the codecs and numpy let go of the interpreter's lock
            jobs = [pool.submit(_write_clip, out_dir / row["file"], row, seconds, size, seed) for row in rows]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        lines = [json.dumps({"parameters": parameters}), *map(json.dumps, rows)]
        _replace(out_dir / MANIFEST, lambda temporary: temporary.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    paths = {split: [out_dir / row["file"] for row in rows if row["split"] == split] for split in ("train", "test")}
    return paths["train"], paths["test"]


def _row(split: str, index: int, combination: Combination) -> dict[str, Any]:
    shape, color, motion = combination
    return {
        "file": f"{split}/{split}_{index:05d}.mp4",
        "split": split,
        "index": index,
        "shape": SHAPES[shape],
        "hue": HUES[color],
        "motion": MOTIONS[motion],
        "timbre": TIMBRES[shape],
        "pitch_hz": PITCHES[color],
        "rhythm": RHYTHMS[motion],
    }


def _is_complete(out_dir: Path, parameters: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """True when `out_dir` holds this very set; ValueError when it holds another one."""
    manifest = out_dir / MANIFEST
    if manifest.exists():
        try:
            found = json.loads(manifest.read_text(encoding="utf-8").partition("\n")[0])["parameters"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"out_dir {out_dir} holds a foreign {MANIFEST}; allowed: another folder") from error
        if found != parameters:
            raise ValueError(f"out_dir {out_dir} holds a set made with {found}, not {parameters}; allowed: another folder")
        return all((out_dir / row["file"]).exists() for row in rows)
    expected = {row["file"] for row in rows}
    for path in sorted(out_dir.glob("t*/*.mp4")):
        if path.relative_to(out_dir).as_posix() not in expected:
            raise ValueError(f"out_dir {out_dir} holds {path.name}, which is not of this set; allowed: another folder")
    return False


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a hidden file beside `path`, then put it in place at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_clip(path: Path, row: dict[str, Any], seconds: float, size: int, seed: int) -> None:
    def rng(stream: int) -> np.random.Generator:
        return np.random.default_rng([seed, stream, row["split"] == "test", row["index"]])

    # Sight and sound draw from two generators, so that what means nothing in one says nothing about the other.
    frames = _draw(row, round(seconds * _FPS), size, rng(0))
    waveform = _play(row, round(seconds * _RATE), rng(1))
    _replace(path, lambda temporary: _encode(temporary, frames, waveform))


def _draw(row: dict[str, Any], count: int, size: int, rng: np.random.Generator) -> list["Image"]:
    """`count` RGB pictures of the row's shape, `size` pixels wide and high."""
    from PIL import Image

    noise = rng.normal(0, 1, (size, size, 1)) * rng.uniform(2, 10)
    patches = rng.normal(0, 1, (4, 4, 1)).repeat(size // 4 + 1, 0).repeat(size // 4 + 1, 1)[:size, :size]
    gray = rng.uniform(30, 130) + rng.normal(0, 4, 3)  # nearly colorless: the hue belongs to the shape
    background = Image.fromarray(np.clip(gray + noise + 8 * patches, 0, 255).astype(np.uint8))

    radius = size * rng.uniform(0.19, 0.25)
    mask = _mask(row["shape"], radius, rng.uniform(-0.2, 0.2))
    hue = (row["hue"] + rng.uniform(-4, 4)) % 360
    color = tuple(int(x) for x in _rgb(hue, rng.uniform(0.8, 1.0), rng.uniform(0.75, 1.0)))

    direction = np.array(_DIRECTIONS[row["motion"]])
    path = size * rng.uniform(0.06, 0.12) * direction  # from the first to the last frame
    gap = 0.45 * radius * rng.uniform(0.85, 1.15) * direction  # between the copies behind it
    # Everything that is ever drawn, tail included, stays in the picture.
    corners = np.array([p - tail for p in (0 * path, path) for tail in (0 * gap, 3 * gap)])
    low, high = radius - corners.min(0), size - radius - corners.max(0)
    # Near the middle of where it may be, so that a few minutes of training are spent on what the shape is, not on where.
    start = (low + high) / 2 + np.clip(high - low, 0, 0.2 * size) * rng.uniform(-0.5, 0.5, 2)

    frames = []
    for i in range(count):
        frame = background.copy()
        center = start + path * (i / max(1, count - 1))
        for behind, strength in ((3, 0.25), (2, 0.4), (1, 0.6), (0, 1.0)):
            if behind == 0 or direction.any():
                left, top = np.round(center - behind * gap - mask.width / 2).astype(int).tolist()
                faded = mask.point(lambda value, strength=strength: value * strength)
                frame.paste(color, (left, top), faded)
        frames.append(frame)
    return frames


def _mask(shape: str, radius: float, tilt: float) -> "Image":
    """Antialiased mask of a shape that fits the circle of `radius` pixels."""
    from PIL import Image, ImageDraw

    finer = 4
    side = 2 * int(np.ceil(radius)) + 2
    image = Image.new("L", (finer * side, finer * side))
    draw = ImageDraw.Draw(image)
    middle, reach = finer * side / 2, finer * radius
    if shape == "circle":
        draw.ellipse([middle - reach, middle - reach, middle + reach, middle + reach], fill=255)
    else:
        if shape == "cross":
            arm = 0.32
            quarter = np.array([(arm, arm), (1.0, arm), (1.0, -arm), (arm, -arm)]) / np.hypot(1, arm)
            turn = np.array([[0, -1], [1, 0]])
            points = np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])
        else:
            corners = {"square": 4, "triangle": 3, "star": 10}[shape]
            lengths = np.where(np.arange(corners) % 2, 0.42, 1.0) if shape == "star" else np.ones(corners)
            angles = 2 * np.pi * np.arange(corners) / corners - np.pi / 2 + (np.pi / 4 if shape == "square" else 0)
            points = lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        rotation = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        draw.polygon([tuple(p) for p in middle + reach * points @ rotation], fill=255)
    return image.resize((side, side), Image.Resampling.BOX)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Hue in degrees, saturation and value in [0, 1] to three levels in [0, 255]."""
    k = (np.array([5, 3, 1]) + hue / 60) % 6
    return 255 * value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))


def _play(row: dict[str, Any], samples: int, rng: np.random.Generator) -> np.ndarray:
    """`[samples]` int16 at 16 kHz: the row's timbre at the row's pitch in the row's rhythm."""
    t = np.arange(samples) / _RATE
    hertz = row["pitch_hz"] * 2 ** (rng.uniform(-0.25, 0.25) / 12)
    tone = _tone(row["timbre"], hertz, t, rng)
    tone *= 1.0 / np.sqrt(np.mean(tone**2))
    sound = tone * _envelope(row["rhythm"], t, rng)
    sound = sound * 10 ** (rng.uniform(-12, 0) / 20) + rng.normal(0, 10 ** (rng.uniform(-50, -35) / 20), samples)
    return np.clip(0.2 * 32767 * sound, -32768, 32767).astype(np.int16)


def _tone(timbre: str, hertz: float, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    phase = 2 * np.pi * (hertz * t + rng.uniform())
    if timbre == "noise":  # a band of about two semitones to either side
        spectrum = np.fft.rfft(rng.normal(0, 1, len(t)))
        distance = np.abs(np.fft.rfftfreq(len(t), 1 / _RATE) - hertz)
        return np.fft.irfft(spectrum * np.exp(-((10 * distance / hertz) ** 2)), len(t))
    if timbre == "bell":  # the modulator is no multiple of the carrier: inharmonic partials
        return np.sin(phase + 1.2 * np.sin(2.76 * phase + rng.uniform(0, 2 * np.pi)))
    # Sums of harmonics below the Nyquist frequency, so nothing folds back.
    highest = {"sine": 1, "square": 24, "saw": 24}[timbre]
    harmonics = [n for n in range(1, highest + 1) if n * hertz < 0.45 * _RATE and (timbre != "square" or n % 2)]
    return sum(np.sin(n * phase) / n for n in harmonics)


def _envelope(rhythm: str, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Loudness in [0, 1] over the times `t`."""
    shift, tempo = rng.uniform(), rng.uniform(0.95, 1.05)
    if rhythm == "held":
        return 1 - 0.1 * np.sin(2 * np.pi * (0.5 * t + shift)) ** 2
    rate = {"2/s": 2, "4/s": 4, "8/s": 8, "long-short": 2}[rhythm] * tempo
    beat = (t * rate + shift) % 1
    starts = (0.0, 0.7) if rhythm == "long-short" else (0.0,)
    envelope = np.zeros_like(t)
    for start, stop in zip(starts, (*starts[1:], 1.0), strict=True):
        since = (beat - start) / rate  # seconds since the note began
        sounding = (beat >= start) & (beat < stop - 0.15 * (stop - start))
        envelope += sounding * np.clip(since / 0.008, 0, 1) * np.exp(-since * (1.5 if len(starts) > 1 else rate))
    return envelope


def _encode(path: Path, frames: list["Image"], waveform: np.ndarray) -> None:
    import av

    height, width = frames[0].height, frames[0].width
    # "bitexact" leaves dates and versions out, and one thread makes the same decisions every time.
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}) as out:
        options = {"preset": "ultrafast", "crf": "18", "threads": "1", "flags": "+bitexact"}
        video = out.add_stream("libx264", rate=_FPS, width=width, height=height, pix_fmt="yuv420p", options=options)
        audio = out.add_stream("aac", rate=_RATE, layout="mono", bit_rate=64000, options={"flags": "+bitexact"})
        video.codec_context.thread_count = audio.codec_context.thread_count = 1
        for image in frames:
            out.mux(video.encode(av.VideoFrame.from_image(image)))
        out.mux(video.encode(None))
        floats = waveform[None].astype(np.float32) / 32768
        for start in range(0, len(waveform), 1024):
            part = np.ascontiguousarray(floats[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = _RATE, start
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
