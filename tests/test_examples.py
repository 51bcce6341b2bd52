"""Every script in examples/ runs as a user would run it, and does what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cavmae_fast

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(script: str, *options: str | Path, cwd: Path) -> str:
    """What the script prints, run in a process of its own in the folder `cwd`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, str(EXAMPLES / script), "--device", "cpu", *map(str, options)]
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_example_is_tested():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts and scripts == set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[Path, str]:
    """The folder in which the training loop ran, and what it printed."""
    folder = tmp_path_factory.mktemp("loop")
    return folder, run("pretrain_loop.py", "--epochs", "4", cwd=folder)


def test_the_loss_falls(pretrained):
    folder, printed = pretrained
    losses = {
        name: [float(value) for value in re.findall(rf"{name} (\d+\.\d+)", printed)]
        for name in ("loss", "audio", "video", "contrast")
    }
    assert [len(values) for values in losses.values()] == [4] * 4
    # It falls from 2.3 to 1.5 in four epochs; a loop that forgets to step, or to zero the gradients, stays above.
    for name in ("loss", "audio", "video"):
        assert losses[name][-1] < 0.8 * losses[name][0], printed
    model = cavmae_fast.CAVMAE.from_pretrained(folder / "runs" / "pretrain_loop" / "model")
    assert model.config["embed_dim"] == 192


def test_features_of_a_folder_of_videos(pretrained, tmp_path):
    folder, _ = pretrained
    clips = sorted((folder / "runs" / "pretrain_loop" / "clips" / "train").glob("*.mp4"))[:5]
    (tmp_path / "videos").mkdir()
    for clip in clips:
        shutil.copy(clip, tmp_path / "videos")
    (tmp_path / "videos" / "broken.mp4").write_bytes(clips[0].read_bytes()[:500])
    model = folder / "runs" / "pretrain_loop" / "model"
    printed = run("video_features.py", "videos", "--model", model, "--out", "out/f.npz", "--batch-size", "2", cwd=tmp_path)
    assert "5 clips" in printed and "not used" in printed and "broken.mp4" in printed
    features = np.load(tmp_path / "out" / "f.npz")
    assert list(features["ids"]) == [clip.stem for clip in clips]
    for stream in ("audio", "video"):
        assert features[stream].shape == (5, 192) and features[stream].dtype == np.float32
        assert np.isfinite(features[stream]).all() and features[stream].std(axis=0).max() > 0.01


def test_features_of_generated_clips(tmp_path):
    assert "16 clips" in run("video_features.py", cwd=tmp_path)
    assert np.load(tmp_path / "runs" / "features" / "features.npz")["video"].shape == (16, 192)


def test_a_linear_probe_tells_hues_apart(tmp_path):
    """Well above chance already without training (72 % by sound, 41 % by sight), on combinations that it never saw."""
    printed = run("linear_probe.py", cwd=tmp_path)
    chance, audio, video = (float(value) / 100 for value in re.findall(r"(\d+\.\d)%", printed))
    assert chance < 0.1
    assert audio > 0.4 and video > 0.2, printed


def test_search_of_generated_clips(tmp_path):
    printed = run("search_videos.py", cwd=tmp_path)
    assert "16 clips, 192 numbers for the sound of each; the first is test_00000" in printed
    assert "1. test_00003, cosine 1.000" in printed and "dB PSNR" in printed
    assert "R@5" in printed and (tmp_path / "runs" / "search_videos" / "index" / "index.json").exists()
