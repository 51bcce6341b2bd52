"""Small data sets of sound alone in the layouts of ESC-50 and Speech Commands: tones, whose pitch is the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

CATEGORIES = ("dog", "rooster", "sea_waves")
WORDS = ("backward", "go", "zero")


def write_tone(path: Path, pitch: float, seconds: float, rate: int, seed: int) -> None:
    """A tone in some noise, 16 bits, as both data sets have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    sound = 0.5 * np.sin(2 * np.pi * pitch * time + generator.uniform(0, 6)) + 0.02 * generator.standard_normal(len(time))
    soundfile.write(path, sound, rate, subtype="PCM_16")


def write_esc50(folder: Path, folds: int = 5, takes: int = 2, seconds: float = 0.6) -> Path:
    """`takes` clips of each of three categories in every fold, at 44.1 kHz."""
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, folds + 1):
        for take in range(takes):
            # Not in the order of the targets, nor are these alphabetical in the published list.
            for target in (2, 0, 1):
                source = 100000 + 100 * fold + 10 * take + target
                name = f"{fold}-{source}-{chr(65 + take)}-{target}.wav"
                write_tone(folder / "audio" / name, 300 * 2 ** (1.3 * target), seconds, 44100, source)
                lines.append(f"{name},{fold},{target},{CATEGORIES[target]},{target == 0},{source},{chr(65 + take)}")
    (folder / "meta").mkdir()
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    (folder / "README.md").write_text("ESC-50")
    return folder


def write_speech_commands(folder: Path, training: int = 3, seconds: float = 1.0) -> Path:
    """For each of three words `training` clips, one for validation and one for testing, at 16 kHz, and background noise."""
    lists: dict[str, list[str]] = {"validation_list.txt": [], "testing_list.txt": []}
    for number, word in enumerate(WORDS):
        for take in range(training + 2):
            name = f"{word}/{take:08x}_nohash_0.wav"
            write_tone(folder / name, 300 * 2 ** (1.3 * number), seconds, 16000, 10 * number + take)
            if take >= training:
                lists[("validation_list.txt", "testing_list.txt")[take - training]].append(name)
    write_tone(folder / "_background_noise_" / "white_noise.wav", 50, 3.0, 16000, 99)
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "LICENSE").write_text("a license")
    return folder
