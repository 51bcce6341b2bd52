"""Synthetic clips: reproducible, split by combination, sight and sound really related."""

import colorsys
import hashlib
import json
from itertools import combinations as choose
from itertools import product

import numpy as np
import pytest

from cavmae_fast.data.media import synthetic
from cavmae_fast.data.media.files import find_media, read_clip
from cavmae_fast.data.media.synthetic import HUES, MOTIONS, SHAPES, generate_clips


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return folder, *generate_clips(folder, num_train=40, num_test=24, seconds=1.0, size=64, seed=5)


def rows(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def digests(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.mark.parametrize("seed", range(5))
def test_split(seed):
    train, test = synthetic.combinations(seed)
    assert len(test) == len(set(test)) == 64 and len(train) == 336
    assert set(train) | set(test) == set(product(range(5), range(16), range(5)))
    sizes = (len(SHAPES), len(HUES), len(MOTIONS))
    for a, b in choose(range(3), 2):
        assert {(c[a], c[b]) for c in train} == set(product(range(sizes[a]), range(sizes[b])))
    for axis, size in enumerate(sizes):
        assert {c[axis] for c in test} == set(range(size))
    assert synthetic.combinations(seed) == (train, test) != synthetic.combinations(seed + 1)


def test_manifest(made):
    folder, train, test = made
    first, *entries = rows(folder)
    assert first["parameters"]["num_train"] == 40 and first["parameters"]["seed"] == 5
    assert [folder / entry["file"] for entry in entries] == train + test
    assert find_media([folder / "train"]) == train and find_media([folder / "test"]) == test
    key = ("shape", "hue", "motion")
    combos = {split: [tuple(e[k] for k in key) for e in entries if e["split"] == split] for split in ("train", "test")}
    assert len(set(combos["test"])) == 24 and not set(combos["test"]) & set(combos["train"])


def test_the_same_seed_makes_the_same_bytes(made, tmp_path):
    _, train, test = made
    again = generate_clips(tmp_path / "a", num_train=6, num_test=4, seconds=1.0, size=64, seed=5, workers=3)
    assert digests(again[0]) == digests(train[:6]) and digests(again[1]) == digests(test[:4])
    assert len(set(digests(train + test))) == 64
    other, _ = generate_clips(tmp_path / "b", num_train=2, num_test=0, seconds=1.0, size=64, seed=6)
    assert not set(digests(other)) & set(digests(train))


def test_a_complete_set_is_reused(tmp_path):
    options = {"num_train": 2, "num_test": 1, "seconds": 0.5, "size": 32}
    train, test = generate_clips(tmp_path, **options)
    before = [path.stat().st_mtime_ns for path in train + test]
    assert generate_clips(tmp_path, **options) == (train, test)
    assert [path.stat().st_mtime_ns for path in train + test] == before
    train[0].unlink()
    generate_clips(tmp_path, **options)
    assert train[0].exists() and not list(tmp_path.rglob("*.part"))
    with pytest.raises(ValueError, match="holds a set made with"):
        generate_clips(tmp_path, **{**options, "seed": 1})
    (tmp_path / "manifest.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds train_00001\.mp4, which is not of this set"):
        generate_clips(tmp_path, **{**options, "num_train": 1})


def test_parameters(tmp_path):
    for bad in ({"num_test": 65}, {"num_train": -1}, {"size": 33}, {"seconds": 0.1}, {"workers": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
            generate_clips(tmp_path / "x", **bad)
    assert not (tmp_path / "x").exists()


def seen_hue(frame: np.ndarray) -> float:
    pixels = frame.reshape(-1, 3).astype(float)
    spread = pixels.max(1) - pixels.min(1)
    red, green, blue = pixels[spread >= np.quantile(spread, 0.99)].mean(0) / 255
    return 360 * colorsys.rgb_to_hsv(red, green, blue)[0]


def heard_hz(waveform: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)))) ** 2
    return float(power.argmax() * 16000 / len(waveform))


def heard_depth(waveform: np.ndarray) -> float:
    """Loudness between the notes, relative to the notes."""
    loudness = np.abs(waveform[:16000].astype(float)).reshape(-1, 160).max(1)
    return float(np.quantile(loudness, 0.1) / np.quantile(loudness, 0.9))


def test_sight_and_sound_are_related(made):
    """Estimated from decoded files alone: the hue seen tells the pitch heard, a tail tells notes from a held tone."""
    folder, train, test = made
    _, *entries = rows(folder)
    hues, pitches, depths = [], [], {}
    for entry, path in zip(entries, train + test, strict=True):
        clip = read_clip(path)
        assert clip.frames.shape == (10, 224, 224, 3) and 1.0 <= clip.duration < 1.1
        difference = (seen_hue(clip.frames[5]) - entry["hue"] + 180) % 360 - 180
        hues.append(abs(difference))
        if entry["timbre"] != "bell":  # its strongest partial need not be its carrier
            pitches.append(abs(np.log2(heard_hz(clip.waveform) / entry["pitch_hz"])) * 12)
        if entry["timbre"] != "noise":  # whose loudness wavers by itself
            depths.setdefault(entry["motion"] == "still", []).append(heard_depth(clip.waveform))
    assert max(hues) < 22.5  # half of the distance between two hues
    assert max(pitches) < 2.5  # semitones: half of the distance between two pitches
    assert min(depths[True]) > max(depths[False])


def test_the_tail_shows_in_one_frame():
    """The brightest part of the mean over many pictures lies before the tail, on the side the shape moves to."""
    for motion, (x, y) in synthetic._DIRECTIONS.items():
        row = {"shape": "circle", "hue": 0, "motion": motion}
        offsets = []
        for seed in range(6):
            frame = np.asarray(synthetic._draw(row, 1, 128, np.random.default_rng(seed))[0]).astype(float)
            red = np.clip(frame[..., 0] - frame[..., 1:].max(-1) - 20, 0, None)
            full = red > 0.85 * red.max()
            grid = np.stack(np.meshgrid(np.arange(128), np.arange(128)))
            offsets.append(grid[:, full].mean(1) - (grid * (red > 0)).sum((1, 2)) / (red > 0).sum())
        mean = np.mean(offsets, 0)
        if motion == "still":
            assert np.abs(mean).max() < 1
        else:
            assert mean @ (x, y) > 4 and abs(mean @ (y, x)) < 1.5
