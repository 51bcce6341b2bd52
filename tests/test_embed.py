"""`embed`: what is in an index, that it can be interrupted, and that it never mixes what does not belong together."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluating import QUICK, checkpoint, cli, copies, videos  # noqa: F401
from media_sets import write_shards
from safetensors.numpy import load_file
from tiny import ENCODER, TINY, one_thread, randomize  # noqa: F401

from cavmae_fast.data.loader import Loader
from cavmae_fast.evaluation import embedding, features
from cavmae_fast.evaluation.embedding import embed
from cavmae_fast.evaluation.index import Index, IndexFolderError, part_name
from cavmae_fast.models import CAVMAE, CAVMAEFT, CAVMAEFTAudio


@pytest.fixture
def parts_of_three(monkeypatch):
    monkeypatch.setattr(embedding, "MOST_PART_CLIPS", 3)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_embeddings_are_the_models(checkpoint, videos, tmp_path, parts_of_three):  # noqa: F811
    index = embed(checkpoint, videos, tmp_path / "index", running=QUICK)
    assert len(index) == 10 and len(index.parts) == 4 and index.streams == ["audio", "video"]
    model = CAVMAE.from_pretrained(checkpoint).eval()
    loader = Loader(videos, 10, model.clip_spec, workers=0)
    (batch,) = loader
    with torch.no_grad():
        tokens = model.forward_feat(batch.audio, batch.image)
    for name, want in zip(("audio", "video"), tokens):
        got = np.concatenate(list(index.arrays(name)))
        np.testing.assert_allclose(got, F.normalize(want.mean(dim=1), dim=-1).numpy(), atol=1e-6)
    assert index.ids == batch.ids
    assert index[4].id == batch.ids[4] and index[4].number == 4 and index[4].path.endswith(f"{batch.ids[4]}.mp4")


def test_ten_frames_are_the_mean_over_frames(checkpoint, videos, tmp_path):  # noqa: F811
    index = embed(checkpoint, videos, tmp_path / "index", frames=10, running=QUICK)
    model = CAVMAE.from_pretrained(checkpoint).eval()
    means = []
    for frame in range(10):
        (batch,) = Loader(videos, 10, model.clip_spec, workers=0, frame=frame)
        with torch.no_grad():
            means.append(model.forward_feat(batch.audio, batch.image).video.mean(dim=1))
    want = F.normalize(torch.stack(means).mean(dim=0), dim=-1).numpy()
    np.testing.assert_allclose(next(iter(index.arrays("video"))), want, atol=1e-6)
    assert index.manifest["frames"] == 10


@pytest.mark.parametrize(
    ("kind", "options", "shapes"),
    [
        (lambda: CAVMAE(**TINY), {"pooling": "tokens"}, {"audio": (32, 48), "video": (4, 48)}),
        (lambda: CAVMAEFT(5, **ENCODER), {}, {"audio": (48,), "video": (48,)}),
        (lambda: CAVMAEFT(5, **ENCODER), {"streams": ("video",), "store": "float16"}, {"video": (48,)}),
        (lambda: CAVMAEFTAudio(5, **ENCODER), {}, {"audio": (48,)}),
    ],
)
def test_models_and_streams(kind, options, shapes, videos, tmp_path):  # noqa: F811
    index = embed(randomize(kind()), copies(videos, tmp_path / "few", 3), tmp_path / "index", running=QUICK, **options)
    assert {name: next(iter(index.arrays(name))).shape[1:] for name in index.streams} == shapes
    assert next(iter(index.arrays(index.streams[0]))).dtype == np.dtype(options.get("store", "float32"))


def test_read_as_memory_maps(checkpoint, videos, tmp_path):  # noqa: F811
    index = embed(checkpoint, videos, tmp_path / "index", running=QUICK)
    (audio,) = index.arrays("audio")
    assert isinstance(audio, np.memmap) and not audio.flags.writeable
    np.testing.assert_array_equal(audio, load_file(tmp_path / "index" / part_name(0))["audio"])


def test_goes_on_where_it_was(checkpoint, videos, tmp_path, parts_of_three, monkeypatch):  # noqa: F811
    whole = tmp_path / "whole"
    embed(checkpoint, videos, whole, running=QUICK)
    broken, calls = tmp_path / "broken", []
    embed_clips = features.embed_clips

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed_clips(*args, **kwargs)

    monkeypatch.setattr(embedding, "embed_clips", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed(checkpoint, videos, broken, running=QUICK)
    assert sorted(files(broken)) == ["index.json", part_name(0), part_name(1)]
    with pytest.raises(IndexFolderError, match=r"the index is not finished"):
        Index(broken)
    embed(checkpoint, videos, broken, running=QUICK)
    assert len(calls) == 5  # two whole, one interrupted, two that were missing
    assert files(broken) == files(whole)


def test_clips_that_cannot_be_used_are_named(checkpoint, videos, tmp_path, parts_of_three):  # noqa: F811
    folder = copies(videos, tmp_path / "data", 5)
    (folder / "a text.mp4").write_text("no film")
    for name in ("x1.mp4", "x2.mp4", "x3.mp4", "x4.mp4"):  # a part of its own in which nothing can be used
        (folder / name).write_text("no film")
    for frames in (1, 10):
        index = embed(checkpoint, folder, tmp_path / f"index{frames}", frames=frames, running=QUICK)
        assert len(index) == 5 and len(index.rejects) == 5
        assert [index[row].number for row in range(5)] == [1, 2, 3, 4, 5]
        assert all("not a readable media file" in reject["reason"] for reject in index.rejects)


def test_shards(checkpoint, videos, tmp_path, parts_of_three):  # noqa: F811
    shards = write_shards(tmp_path / "shards", videos, frames=2)
    index = embed(checkpoint, shards, tmp_path / "index", running=QUICK)
    assert index.ids == sorted(path.stem for path in videos.glob("*.mp4"))
    assert "clip 000000003" in index[3].path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": lambda: randomize(CAVMAE(**TINY), seed=9)}, r"holds an index of another model"),
        ({"frames": 2}, r"with another frames \(1, now 2\)"),
        ({"pooling": "tokens"}, r"with another pooling"),
        ({"data": True}, r"holds an index of other clips"),
    ],
)
def test_never_mixes(change, words, checkpoint, videos, tmp_path):  # noqa: F811
    out = tmp_path / "index"
    embed(checkpoint, videos, out, running=QUICK)
    before = files(out)
    data = copies(videos, tmp_path / "few", 4) if change.pop("data", False) else videos
    model = change.pop("model", lambda: checkpoint)()
    with pytest.raises(IndexFolderError, match=words):
        embed(model, data, out, running=QUICK, **change)
    assert files(out) == before
    index = embed(model, data, out, running=QUICK, overwrite=True, **change)
    assert len(index) == (4 if "few" in str(data) else 10)


def test_bad_inputs(checkpoint, videos, tmp_path):  # noqa: F811
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(IndexFolderError, match=r"holds files, but no index.json"):
            embed(checkpoint, videos, tmp_path / "mine", running=QUICK, overwrite=overwrite)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(IndexFolderError, match=r"is a file"):
        embed(checkpoint, videos, tmp_path / "mine" / "letter.txt", running=QUICK)
    for name in ("one", "two"):
        copies(videos, tmp_path / name, 2)
    with pytest.raises(ValueError, match=r"names the id 'train_00000' twice: .*one/.*two/.*ids must be unique"):
        embed(checkpoint, [tmp_path / "one", tmp_path / "two"], tmp_path / "i", running=QUICK)
    for options, words in (
        ({"frames": 0}, r"frames is 0; allowed: 1 .* to 10"),
        ({"frames": 11}, r"frames is 11"),
        ({"streams": ("smell",)}, r"streams is \['smell'\]"),
        ({"pooling": "max"}, r"pooling is 'max'"),
        ({"running": QUICK.__class__(batch_size=0)}, r"--batch-size is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            embed(checkpoint, videos, tmp_path / "i", **{"running": QUICK} | options)
    with pytest.raises(ValueError, match=r"CAVMAEFTAudio has no such stream; allowed: audio"):
        embed(CAVMAEFTAudio(5, **ENCODER), videos, tmp_path / "i", streams=("video",), running=QUICK)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no film")
    with pytest.raises(IndexFolderError, match=r"none of the 1 clips can be embedded; the first: .*a.mp4"):
        embed(checkpoint, tmp_path / "bad", tmp_path / "empty", running=QUICK)
    with pytest.raises(IndexFolderError, match=r"not finished"):
        Index(tmp_path / "empty")


def test_nan_is_not_written(videos, tmp_path):  # noqa: F811
    model = CAVMAE(**TINY)
    model.norm_v.weight.data[0] = float("nan")
    with pytest.raises(features.EmbeddingError, match=r"the video embedding of clip 'train_00000' is not finite"):
        embed(model, videos, tmp_path / "index", running=QUICK)
    assert not (tmp_path / "index" / part_name(0)).exists()


def test_damaged_indexes(checkpoint, videos, tmp_path):  # noqa: F811
    good = tmp_path / "good"
    embed(checkpoint, videos, good, running=QUICK)
    part = (good / part_name(0)).read_bytes()

    def damaged(name: str, **files: bytes | None):
        folder = tmp_path / name
        shutil.copytree(good, folder)
        for path, content in files.items():
            path = folder / {"part": part_name(0), "manifest": "index.json"}[path]
            path.unlink() if content is None else path.write_bytes(content)
        return folder

    def changed(**values) -> bytes:
        return json.dumps(json.loads((good / "index.json").read_text()) | values).encode()

    for folder, words in (
        (tmp_path / "nowhere", r"index.json: no such file; `cavmae-fast embed` writes an index"),
        (damaged("cut", part=part[: len(part) // 2]), r"part-000000.safetensors: not a readable safetensors file"),
        (damaged("gone", part=None), r"part-000000.safetensors: not a readable"),
        (damaged("noise", part=b"\xff" * 100), r"its header is longer than the file"),
        (damaged("text", manifest=b"{"), r"not a readable manifest"),
        (
            damaged("later", manifest=changed(version=2)),
            r"version 2; this program reads version 1",
        ),
        (damaged("rows", manifest=changed(parts=[9])), r"has 10 rows; index.json says 9"),
    ):
        with pytest.raises(IndexFolderError, match=words):
            Index(folder)


def test_the_command(checkpoint, videos, tmp_path):  # noqa: F811
    folder = copies(videos, tmp_path / "data", 3)
    (folder / "\x1b[31mred\n.mp4").write_text("no film")
    command = ("embed", checkpoint, "--data", folder, "--out", tmp_path / "index", "--device", "cpu", "--dtype", "float32")
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert "3 clips, audio and video, 48 numbers each" in done.stdout and "1 clips could not be used" in done.stdout
    assert "\x1b[31m" not in done.stdout and "next:  cavmae-fast search" in done.stdout
    again = cli(*command, "--frames", "3")
    assert again.returncode != 0 and again.stderr.count("error:") == 1 and "Traceback" not in again.stderr
    without = cli("embed", checkpoint)
    assert without.returncode == 2 and "--data is missing" in without.stderr
