"""A tiny checkpoint and a few short clips for the tests of evaluation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY, randomize

from cavmae_fast.data.media.files import read_clip
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.evaluation.running import Running
from cavmae_fast.models import CAVMAE

QUICK = Running(device="cpu", dtype="float32", batch_size=4, workers=0)
"In float32, so that results do not depend on how fast this machine multiplies bfloat16."


def cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from cavmae_fast.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder of ten clips of a second."""
    folder = tmp_path_factory.mktemp("clips")
    generate_clips(folder, num_train=10, num_test=0, seconds=1.0, size=48)
    return folder / "train"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model with random weights, as a folder."""
    return randomize(CAVMAE(**TINY), seed=3).save_pretrained(tmp_path_factory.mktemp("model") / "model")


def write_sound(path: Path, source: Path) -> Path:
    """The sound of a clip as a WAV file."""
    import soundfile

    soundfile.write(path, read_clip(source).waveform, 16000)
    return path


def write_picture(path: Path, source: Path) -> Path:
    """The middle frame of a clip as a PNG file."""
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(read_clip(source, size=48).frames[5])).save(path)
    return path


def copies(videos: Path, folder: Path, count: int) -> Path:
    """A folder of the first `count` clips."""
    folder.mkdir()
    for path in sorted(videos.glob("*.mp4"))[:count]:
        shutil.copy(path, folder)
    return folder
