"""`search`: the nearest clips of an index, exactly, and what is said when a search makes no sense."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import QUICK, checkpoint, cli, videos, write_picture, write_sound  # noqa: F401
from safetensors.numpy import load_file, save_file
from tiny import ENCODER, TINY, one_thread, randomize  # noqa: F401

from cavmae_fast.data.media.files import MediaError, read_sound_file
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.evaluation import faiss_search, searching
from cavmae_fast.evaluation.embedding import embed
from cavmae_fast.evaluation.index import Index, IndexFolderError, part_name
from cavmae_fast.evaluation.searching import choose_pairs, choose_search, nearest, search
from cavmae_fast.models import CAVMAE, CAVMAEFTAudio, create_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, whose benchmarks are not installed

from benchmarks import real_clips
from benchmarks.real_clips import halves, ranks

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"


@pytest.fixture(scope="module")
def folder(checkpoint, videos, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("index") / "index"
    embed(checkpoint, videos, path, running=QUICK)
    return path


def clip(videos, number: int):  # noqa: F811
    return sorted(videos.glob("*.mp4"))[number]


def test_a_clip_is_found_by_its_own_file(folder, videos, tmp_path):  # noqa: F811
    """By sound among sounds, by sight among pictures, by both: always itself, at a cosine of 1."""
    path = clip(videos, 6)
    for given in (
        {"audio": write_sound(tmp_path / "x.wav", path)},
        {"audio": path},
        {"image": write_picture(tmp_path / "y.png", path)},
        {"video": path},
    ):
        answer = search(folder, top=3, match="same", running=QUICK, **given)
        assert answer.hits[0].id == path.stem and answer.hits[0].score > 0.999, given
        assert answer.hits[0].path == str(path) and answer.hits[0].number == 6 and answer.searched == 10
        assert [hit.rank for hit in answer.hits] == [1, 2, 3]
        assert answer.hits[0].score >= answer.hits[1].score >= answer.hits[2].score


def test_the_scores_are_cosines(folder, videos):  # noqa: F811
    index = Index(folder)
    audio, video = (np.concatenate(list(index.arrays(name))) for name in ("audio", "video"))
    for match, want in (
        ("other", (video @ audio[2] + audio @ video[2]) / 2),
        ("auto", (audio @ audio[2] + video @ video[2]) / 2),
        ("same", (audio @ audio[2] + video @ video[2]) / 2),
        ("all", (audio + video) @ (audio[2] + video[2]) / 4),
    ):
        answer = search(index, video=clip(videos, 2), top=10, match=match, running=QUICK)
        assert [hit.number for hit in answer.hits] == np.argsort(-want, kind="stable").tolist()
        np.testing.assert_allclose([hit.score for hit in answer.hits], np.sort(want)[::-1], atol=1e-5)


def test_blocks_do_not_matter(folder, monkeypatch):
    index = Index(folder)
    query = np.asarray(next(iter(index.arrays("audio")))[3])
    wanted = [(query, "video")]
    whole = nearest(index, wanted, 4)
    for block in (1, 3, 7):
        monkeypatch.setattr(searching, "BLOCK", block)
        found = nearest(index, wanted, 4)
        assert [row for row, _ in found] == [row for row, _ in whole]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in whole], atol=1e-6)


@pytest.mark.parametrize(
    ("query", "index", "match", "want"),
    [
        (["audio"], ["audio", "video"], "auto", [("audio", "audio")]),
        (["audio"], ["video"], "auto", [("audio", "video")]),
        (["video"], ["audio", "video"], "same", [("video", "video")]),
        (["audio", "video"], ["audio", "video"], "other", [("audio", "video"), ("video", "audio")]),
    ],
)
def test_what_is_compared(query, index, match, want):
    assert choose_pairs(query, index, match) == want


def test_faiss_finds_what_the_exact_search_finds(folder, videos):  # noqa: F811
    pytest.importorskip("faiss")
    for match in ("same", "all"):
        exact, other = (
            search(folder, video=clip(videos, 1), top=4, match=match, backend=backend, running=QUICK)
            for backend in ("exact", "faiss")
        )
        assert other.backend == "faiss" and [hit.number for hit in other.hits] == [hit.number for hit in exact.hits]
        np.testing.assert_allclose([h.score for h in other.hits], [h.score for h in exact.hits], atol=1e-6)


def test_faiss_with_cells(folder, tmp_path, monkeypatch):
    """As for many rows: inverted lists, an index of its own that is written once, read again, and seen to be damaged."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(faiss_search, "FLAT_ROWS", 100)
    own = tmp_path / "index"
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("faiss*"))
    rng = np.random.default_rng(0)
    tensors = load_file(own / part_name(0))
    grown = {name: rng.standard_normal((2000, 48), dtype=np.float32) for name in ("audio", "video")}
    grown = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in grown.items()}
    names = np.frombuffer(str([[f"c{i}", f"c{i}.mp4"] for i in range(2000)]).replace("'", '"').encode(), np.uint8)
    save_file({**tensors, **grown, "numbers": np.arange(2000), "names": names}, own / part_name(0))
    (own / "index.json").write_text((own / "index.json").read_text().replace("10\n ]", "2000\n ]"))
    index = Index(own)
    query = grown["audio"][77]
    assert 77 in faiss_search.candidates(index, [(query, "audio")], 5)
    written = (own / "faiss-audio.index").stat().st_mtime_ns
    assert hasattr(faiss_search.faiss_index(index, "audio"), "nprobe")
    assert (own / "faiss-audio.index").stat().st_mtime_ns == written
    (own / "faiss-audio.index").write_bytes(b"no index")
    with pytest.raises(IndexFolderError, match=r"faiss-audio.index: cannot be read by faiss; remove it"):
        faiss_search.faiss_index(index, "audio")


def test_the_choice_of_search(monkeypatch):
    assert choose_search("auto", 10_000_000) == choose_search("exact", 10**9) == "exact"
    monkeypatch.setattr(searching.importlib.util, "find_spec", lambda name: object())
    assert choose_search("auto", 10_000_001) == choose_search("faiss", 1) == "faiss"
    monkeypatch.setattr(searching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"faiss is not installed: pip install 'cavmae_fast\[faiss\]'"):
        choose_search("auto", 10_000_001)


def test_an_index_of_another_model(folder, videos):  # noqa: F811
    with pytest.raises(IndexFolderError, match=r"is an index of another model than the model that was given"):
        search(folder, video=clip(videos, 0), model=randomize(CAVMAE(**TINY), seed=8), running=QUICK)


def test_an_index_of_a_model_in_memory(videos, tmp_path):  # noqa: F811
    model = randomize(CAVMAE(**TINY))
    index = embed(model, videos, tmp_path / "index", running=QUICK)
    with pytest.raises(IndexFolderError, match=r"names no checkpoint"):
        search(index, video=clip(videos, 0), running=QUICK)
    assert search(index, video=clip(videos, 0), top=1, match="same", model=model, running=QUICK).hits[0].number == 0


def test_audio_alone(videos, tmp_path):  # noqa: F811
    index = embed(model := CAVMAEFTAudio(5, **ENCODER), videos, tmp_path / "index", running=QUICK)
    answer = search(index, audio=clip(videos, 4), top=2, model=model, running=QUICK)
    assert answer.pairs == (("audio", "audio"),) and answer.hits[0].number == 4
    with pytest.raises(ValueError, match=r"streams is \['video'\]|CAVMAEFTAudio has no such stream"):
        search(index, image=write_picture(tmp_path / "y.png", clip(videos, 0)), model=model, running=QUICK)
    with pytest.raises(ValueError, match=r"match is 'other', but the query has audio and the index audio"):
        search(index, audio=clip(videos, 4), match="other", model=model, running=QUICK)


def test_bad_inputs(folder, checkpoint, videos, tmp_path):  # noqa: F811
    path = clip(videos, 0)
    for options, words in (
        ({"top": 0, "video": path}, r"top is 0; allowed: 1 to 10"),
        ({"top": 1000, "video": path}, r"top is 1000; allowed: 1 to 10, as many clips as the index holds"),
        ({}, r"none is given; allowed: exactly one"),
        ({"video": path, "audio": path}, r"audio and video is given"),
        ({"match": "nearly", "video": path}, r"match is 'nearly'"),
        ({"backend": "magic", "video": path}, r"backend is 'magic'"),
    ):
        with pytest.raises(ValueError, match=words):
            search(folder, **{"top": 2, "running": QUICK} | options)
    tokens = embed(checkpoint, videos, tmp_path / "tokens", pooling="tokens", running=QUICK)
    with pytest.raises(IndexFolderError, match=r"holds tokens; searching needs"):
        search(tokens, video=path, running=QUICK)


def test_queries_that_cannot_be_used(folder, videos, tmp_path):  # noqa: F811
    import av

    silent = tmp_path / "silent.mp4"
    with av.open(str(clip(videos, 0))) as source, av.open(str(silent), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.wav").touch()
    short = tmp_path / "short.wav"
    import soundfile

    soundfile.write(short, np.zeros(100), 16000)
    for given, words in (
        ({"audio": silent}, r"silent.mp4: has no audio stream"),
        ({"video": silent}, r"silent.mp4: has no audio stream"),
        ({"audio": tmp_path / "no.wav"}, r"no.wav: no such file"),
        ({"audio": tmp_path / "empty.wav"}, r"empty.wav: the file is empty"),
        ({"audio": short}, r"short.wav: 6.2 ms of sound could be decoded; at least 25 ms are needed"),
        ({"audio": tmp_path / "text.jpg"}, r"text.jpg: has no audio stream"),
        ({"image": tmp_path / "text.jpg"}, r"text.jpg: not a JPEG or PNG image"),
        ({"image": tmp_path / "no.png"}, r"no.png: cannot be read"),
    ):
        with pytest.raises(MediaError, match=words):
            search(folder, running=QUICK, top=2, **given)


def test_nan_in_an_index(folder, checkpoint, videos, tmp_path):  # noqa: F811
    own = tmp_path / "index"
    shutil.copytree(folder, own)
    tensors = load_file(own / part_name(0))
    tensors["audio"][3, 5] = np.nan
    save_file(tensors, own / part_name(0))
    with pytest.raises(IndexFolderError, match=r"part-000000.safetensors: holds embeddings that are not finite"):
        search(own, audio=clip(videos, 0), top=2, running=QUICK)


def test_sounds_of_any_kind(videos, tmp_path):  # noqa: F811
    import soundfile

    path = clip(videos, 0)
    want = read_sound_file(path).astype(float)
    for name, options in (
        ("x.flac", {}),
        ("x.wav", {"subtype": "FLOAT"}),
        ("x.ogg", {"format": "OGG", "subtype": "VORBIS"}),
    ):
        soundfile.write(tmp_path / name, want / 32768, 16000, **options)
        got = read_sound_file(tmp_path / name).astype(float)
        assert abs(len(got) - len(want)) < 200
        count = min(len(got), len(want))
        assert np.corrcoef(got[:count], want[:count])[0, 1] > 0.99


def test_a_real_clip_is_found_by_its_sound(tmp_path):
    """Cut into halves: the first half, sight and sound, is in the index among generated clips; the sound of the second half
    is what is searched for, so nothing in the index is the same recording. No training is needed for this."""
    if not MEDIA.is_dir():
        pytest.skip("no real clips on this machine")
    generate_clips(tmp_path / "generated", num_train=0, num_test=24)
    real = sorted(MEDIA.glob("*.mp4"))
    sounds = halves(real, tmp_path)
    torch.manual_seed(0)
    model = create_model("small").save_pretrained(tmp_path / "model")
    found = ranks(model, tmp_path / "generated", sounds, tmp_path, QUICK)
    assert found["clips"] == 26 and sorted(sounds) == [path.stem for path in real]
    assert all(found[name]["sound"] == 1 for name in sounds), found


def test_real_clips_are_measured_before_and_after_training_on_other_parts(tmp_path, monkeypatch, capsys):
    """The mechanics of `benchmarks/real_clips.py`, with one step."""
    if not MEDIA.is_dir():
        pytest.skip("no real clips on this machine")
    generate_clips(tmp_path / "generated", num_train=4, num_test=3)
    monkeypatch.setattr(real_clips, "STEP", 1.0)
    torch.manual_seed(0)
    model = create_model("small").save_pretrained(tmp_path / "model")
    options = ["--steps", "1", "--seeds", "1", "--train-clips", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert real_clips.main([str(model), str(MEDIA), "--generated", str(tmp_path / "generated"), *options]) == 0
    (path,) = (tmp_path / "out").glob("*/real_clips.json")
    record = json.loads(path.read_text())
    for row in (record["before"], *record["after"]):
        assert row["clips"] == 5 and all(1 <= rank <= 5 for name in row if name != "clips" for rank in row[name].values())
    assert len(record["after"]) == 1 and "rank among 5 clips" in capsys.readouterr().out


def test_the_command(folder, videos, tmp_path):  # noqa: F811
    page = tmp_path / "page.html"
    options = ("--device", "cpu", "--dtype", "float32")
    done = cli("search", folder, "--video", clip(videos, 3), "--match", "same", "--top", 4, "--report", page, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "the nearest of 10 clips" in lines[0] and clip(videos, 3).stem in lines[1] and len(lines) == 7
    assert lines[-1].startswith("next:  cavmae-fast inpaint ") and lines[-1].endswith(f"--data {clip(videos, 3)}")
    assert page.read_text().count("<audio") == 5
    for arguments, words in (
        (("--top", 0), "top is 0"),
        (("--report", tmp_path), "which is a folder"),
        (("--report", tmp_path / "no" / "page.html"), "is no folder; it must be there"),
    ):
        failed = cli("search", folder, "--video", clip(videos, 3), *options, *arguments)
        assert failed.returncode == 2 and words in failed.stderr and failed.stderr.count("\n") == 1
