"""Retrieval and embeddings on two ranks: the clips are shared, and what comes out is what one process gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluating import copies, videos  # noqa: F401
from ranks_run import started
from tiny import randomize
from tiny_mavil import MAVIL

from cavmae_fast.evaluation import Index
from cavmae_fast.models.mavil import MAViL

SMALL_PARTS = """
from cavmae_fast.evaluation import embedding
embedding.MOST_PART_CLIPS = 4
"""
COUNT_CLIPS = """
from cavmae_fast.models.mavil import MAViL
features = MAViL.encoded
def counted(model, inputs):
    print("saw", len(next(iter(inputs.values()))), flush=True)
    return features(model, inputs)
MAViL.encoded = counted
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return randomize(MAViL(**MAVIL)).save_pretrained(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def data(videos, tmp_path_factory) -> Path:  # noqa: F811
    """Nine clips, and one that is none."""
    folder = copies(videos, tmp_path_factory.mktemp("data") / "clips", 9)
    (folder / "train_00004b.mp4").write_text("no film")
    return folder


def run(count: int, folder: Path, before: str, *words: object) -> list[str]:
    """What each of `count` ranks printed."""
    with started(count, folder / f"logs{count}", [*words, "--device", "cpu", "--dtype", "float32"], before) as ranks:
        ranks.finish()
    assert not any(ranks.codes), "\n".join(ranks.texts)
    return ranks.texts


def seen(text: str) -> int:
    """Clips that a rank's model was given."""
    return sum(map(int, re.findall(r"saw (\d+)", text)))


def test_two_ranks_retrieve_as_one(model, data, tmp_path):
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        words = ("retrieve", model, "--data", data, "--batch-size", 2, "--out", out)
        texts = run(count, tmp_path, COUNT_CLIPS, *words)
        assert "retrieval among 9 clips" in texts[0] and "1 clips could not be used" in texts[0]
        assert sum(map(seen, texts)) == 9 and all(map(seen, texts))
        assert not any("R@1" in text for text in texts[1:])
        found.append(json.loads((out / "retrieval.json").read_text()))
    assert found[0] == found[1]


def test_two_ranks_embed_as_one(model, data, tmp_path):
    """Part by part, the last of them of two clips; and nothing is embedded again by the same command."""
    words = ("embed", model, "--data", data, "--batch-size", 1, "--out")
    before = SMALL_PARTS + COUNT_CLIPS
    for count in (1, 2):
        texts = run(count, tmp_path, before, *words, tmp_path / str(count))
        assert sum(map(seen, texts)) == 9 and all(map(seen, texts))
        assert not any("numbers each" in text for text in texts[1:])
    one, two = (Index(tmp_path / str(count)) for count in (1, 2))
    assert [len(part) for part in two.parts] == [4, 3, 2] and one.ids == two.ids
    assert [reject["path"] for reject in two.rejects] == [reject["path"] for reject in one.rejects]
    for stream in one.streams:
        for mine, theirs in zip(one.arrays(stream), two.arrays(stream), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)
    assert not any(map(seen, run(2, tmp_path / "again", before, *words, tmp_path / "2")))


def test_what_one_rank_finds_wrong_ends_both(model, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    words = ["embed", model, "--data", data, "--out", tmp_path / "mine", "--device", "cpu", "--dtype", "float32"]
    with started(2, tmp_path / "logs", words) as ranks:
        ranks.finish()
    assert all(code != 0 for code in ranks.codes) and "Traceback" not in "".join(ranks.texts)
    assert sum("holds files, but no index.json" in text for text in ranks.texts) == 1
