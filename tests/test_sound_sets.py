"""Data sets of sound alone: read as they are published, prepared, checked and loaded; and models of sound alone."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from media_sets import write_shards
from sound_sets import CATEGORIES, WORDS, write_esc50, write_speech_commands
from tiny_mavil import TINY

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.commands.check import CheckConfig, check
from cavmae_fast.data.commands.closing import prepared
from cavmae_fast.data.commands.prepare import PrepareConfig, prepare
from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.choosing import choose_backend
from cavmae_fast.data.draws import Augmentation
from cavmae_fast.data.features import audio_features
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.encoded import decode_sound
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.audio_sets import read_audio_set
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.data.sets.opening import clip_labels, labels_of, open_clips
from cavmae_fast.data.sets.sources import find_sources
from cavmae_fast.models import MAE

SOUND = ClipSpec(frames=0, audio_length=64)


@pytest.fixture(scope="module")
def esc50(tmp_path_factory) -> Path:
    return write_esc50(tmp_path_factory.mktemp("sets") / "ESC-50-master")


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    return write_speech_commands(tmp_path_factory.mktemp("sets") / "speech_commands_v0.02")


# ------------------------------------------------------------------------------------------------------------ the layouts


def test_esc50(esc50):
    found = find_sources([esc50])
    with (esc50 / "meta" / "esc50.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(f"{one.id}.wav", one.labels) for one in found] == [(row["filename"], (row["category"],)) for row in rows]
    assert all(Path(one.sound).is_file() and not one.has_pictures and one.video is None for one in found)
    assert found.label_set.mids == CATEGORIES and read_audio_set(esc50).folds == ("1", "2", "3", "4", "5")
    others = find_sources([f"{esc50}@1,2,3,5"])
    assert {one.id[0] for one in others} == set("1235") and len(others) == 24
    assert others.label_set.mids == CATEGORIES  # whatever classes are in the split
    assert [*find_sources([f"{esc50}@5", f"{esc50}@4"])] == [*find_sources([f"{esc50}@5"]), *find_sources([f"{esc50}@4"])]


def test_speech_commands(speech):
    found = find_sources([speech])
    assert len(found) == 15 and found.label_set.mids == WORDS and not any("noise" in one.id for one in found)
    assert {one.labels[0] for one in found} == set(WORDS) and found[0].id == "backward/00000000_nohash_0"
    splits = {name: find_sources([f"{speech}@{name}"]) for name in ("training", "validation", "testing")}
    assert {name: len(part) for name, part in splits.items()} == {"training": 9, "validation": 3, "testing": 3}
    listed = (speech / "testing_list.txt").read_text().split()
    assert [f"{one.id}.wav" for one in splits["testing"]] == listed
    assert not read_audio_set(speech).folds and len({one.id for part in splits.values() for one in part}) == 15


def test_places_beside_them(esc50, tmp_path, monkeypatch):
    """Other places have no classes, a folder whose name has an @ is itself, and what is not there is no split of here."""
    monkeypatch.chdir(esc50)
    with pytest.raises(MediaError, match="nowhere: no such file or folder"):
        find_sources(["nowhere"])
    videos, _ = generate_clips(tmp_path / "clips@home", num_train=1, num_test=1, seconds=0.5, size=32)
    mixed = find_sources([tmp_path / "clips@home", f"{esc50}@1"])
    assert len(mixed) == 2 + 6 and mixed.label_set is None
    assert find_sources([videos[0].parent]).label_set is None


HEADER = "filename,fold,target,category\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no clip"),
        (HEADER, "names no clip"),
        ("filename,fold\na.wav,1\n", "has no column target, category; allowed: filename,fold,target,category"),
        (HEADER + "../a.wav,1,0,dog\n", "row 2: filename is '../a.wav'; allowed: the name of a file in audio/"),
        (HEADER + "a.wav,1,0,dog\nb.wav,x,1,cat\n", "row 3: fold is 'x', target '1', category 'cat'"),
        (HEADER + "a.wav,1,0,dog\nb.wav,1\n", "row 3: fold is '1', target '', category ''"),
        (HEADER + "a.wav,1,0,dog\nb.wav,1,0,cat\n", "row 3: target 0 is 'cat', in a row before 'dog'"),
        (HEADER + "a.wav,1,0,dog\nb.wav,1,2,cat\n", r"its targets are \[0, 2\]; allowed: 0 to K - 1"),
        (HEADER + "a.wav,1,0,dog\nb.wav,1,1,dog\n", r"its targets are \[0, 1\]; allowed: 0 to K - 1, each with a name"),
    ],
)
def test_bad_esc50(tmp_path, text, words):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text(text)
    with pytest.raises(MediaError, match=f"esc50.csv.*{words}"):
        find_sources([tmp_path])


def test_bad_speech_commands_and_splits(esc50, tmp_path):
    speech = write_speech_commands(tmp_path / "set")
    for place, words in (
        (f"{esc50}@6", "@6: has no split '6'; allowed: 1, 2, 3, 4, 5"),
        (f"{speech}@training,test", "has no split 'test'; allowed: training, validation, testing"),
        (f"{tmp_path}@1", "@1: no such file or folder"),
    ):
        with pytest.raises(MediaError, match=words):
            find_sources([place])
    both = (speech / "testing_list.txt").read_text() + (speech / "validation_list.txt").read_text().split()[0]
    (speech / "testing_list.txt").write_text(both)
    with pytest.raises(MediaError, match=r"testing_list.txt: backward/.* is in validation_list.txt, too"):
        find_sources([speech])
    (speech / "testing_list.txt").write_text("zero/none.wav\n")
    with pytest.raises(MediaError, match=r"testing_list.txt: zero/none.wav is not there"):
        find_sources([speech])
    for word in WORDS:
        (speech / word).rename(speech / f"_{word}")
    with pytest.raises(MediaError, match="holds no folder of a word"):
        find_sources([speech])


# --------------------------------------------------------------------------------------------------- through the data path


def same(a, b) -> bool:
    return (
        torch.equal(a.audio, b.audio)
        and torch.equal(a.image, b.image)
        and a.ids == b.ids
        and torch.equal(a.labels, b.labels)
    )


@pytest.mark.parametrize("recipe", [None, Augmentation(mixup=0.5, noise=True, freq_mask=20, time_mask=20)])
def test_batches_of_sound_alone(esc50, tmp_path, recipe):
    """The same from files and shards, in this process and in workers; each is its file's features."""
    shards = write_shards(tmp_path / "shards", f"{esc50}@1,2")
    options = {"training": recipe is not None, "augmentation": recipe, "seed": 3}
    places = (f"{esc50}@1,2", shards)
    runs = [
        [batch for _ in range(2) for batch in Loader(place, 5, SOUND, **options, **others)]
        for place in places
        for others in ({"workers": 0}, {"workers": 2}, {"workers": 0, "keep": True})
    ]
    assert all(len(run) == (4 if recipe else 6) and all(map(same, run, runs[0])) for run in runs)
    batch = runs[0][0]
    assert batch.image.shape == (5, 0, 3, 224, 224) and batch.labels.shape == (5, 3)
    if recipe is None:
        sources = find_sources([places[0]])
        for row, source in enumerate(sources[:5]):
            sound = torch.from_numpy(decode_sound(Path(source.sound).read_bytes(), "").copy())[None]
            assert sound.shape[1] == 9600
            torch.testing.assert_close(batch.audio[row], audio_features(sound, torch.tensor([9600]), 64)[0])
            assert batch.labels[row].argmax() == CATEGORIES.index(source.labels[0])


def test_a_model_of_sound_alone_hears_videos_and_their_shards(tmp_path):
    """Without a look at their pictures, and what a model of both hears of the same clips."""
    videos, _ = generate_clips(tmp_path / "clips", num_train=3, num_test=1, seconds=0.7, size=32)
    both = ClipSpec((32, 32), audio_length=64)
    for data in (tmp_path / "clips", write_shards(tmp_path / "shards", tmp_path / "clips", size=32)):
        for options in ({"workers": 0}, {"workers": 0, "keep": True}, {"workers": 1}):
            (alone,), (whole,) = (list(Loader(data, 4, spec, **options)) for spec in (SOUND, both))
            assert torch.equal(alone.audio, whole.audio) and alone.ids == whole.ids and alone.image.shape[1] == 0
    prepare(PrepareConfig(src=(str(tmp_path / "clips"),), out=tmp_path / "sounds", frames=0, workers=1))
    (alone,) = Loader(tmp_path / "sounds", 4, SOUND, workers=0)
    assert torch.equal(alone.audio, whole.audio) and read_clip(videos[0]).frames.any()


def test_prepared_and_checked(speech, tmp_path):
    for name, place in (("training", f"{speech}@training"), ("all", str(speech))):
        config = PrepareConfig(src=(place,), out=tmp_path / name, workers=1)
        manifest = prepare(config)
        assert (manifest["frames"], manifest["clips"], manifest["labels"]) == (
            0,
            9 if name == "training" else 15,
            "labels.csv",
        )
        assert "next:  cavmae-fast check" in prepared(config, manifest) and "pretrain" not in prepared(config, manifest)
    assert prepare(config) == manifest  # again, with nothing to do
    clips = open_clips(tmp_path / "training")
    assert clip_labels(None, clips) == LabelSet(WORDS, WORDS) == LabelSet.from_csv(tmp_path / "training" / "labels.csv")
    assert labels_of(clips) == [one.labels for one in find_sources([f"{speech}@training"])]
    for data in (f"{speech}@training", tmp_path / "training"):
        report = check(CheckConfig((str(data),), out=tmp_path / "report", workers=1, min_seconds=0.9))
        assert report["ok"] and report["usable"] == 9 and report["counts"] == {}
        assert [row["clips"] for row in report["classes"]["counts"]] == [3, 3, 3]
    assert report["statistics"]["frames"] == 9 * 98


def test_statistics_become_those_of_a_model(speech, tmp_path):
    """What `check` finds, given to a model as its clip, makes the model's inputs normal; MAViL's have half the deviation."""
    found = check(CheckConfig((str(speech),), out=tmp_path, workers=1, seconds=0.98))["statistics"]
    for factor in (1, 2):
        own = ClipSpec(frames=0, audio_length=96, audio_mean=found["mean"], audio_std=factor * found["std"])
        model = MAE("a", **TINY | {"audio_length": 96}, clip=replace(own, image_size=(32, 32)))
        (batch,) = Loader(speech, 15, model.clip_spec, workers=0)
        assert abs(float(batch.audio.mean())) < 0.02 and float(batch.audio.std()) * factor == pytest.approx(1, abs=0.02)
        masked = Augmentation(time_mask=90, freq_mask=100)
        (batch,) = Loader(speech, 15, model.clip_spec, training=True, augmentation=masked, workers=0)
        silence = -found["mean"] / (factor * found["std"])  # what SpecAugment fills in, as published: 0 before normalization
        assert float((batch.audio == torch.tensor(silence)).float().mean()) > 0.1


def test_clips_that_cannot_be_used_are_named(tmp_path):
    folder = write_esc50(tmp_path / "set", folds=2, takes=1)
    files = sorted((folder / "audio").iterdir())
    files[0].unlink()
    files[1].write_bytes(b"no sound")
    report = check(CheckConfig((str(folder),), out=tmp_path / "report", workers=1))
    assert not report["ok"] and report["counts"]["missing"] == 1 and report["counts"]["unreadable"] == 1
    loader = Loader(folder, 4, SOUND, workers=0)
    ids = [name for batch in loader for name in batch.ids]
    assert len(ids) == 4 and {Path(path) for path in loader.rejects} == set(files[:2])
    manifest = prepare(PrepareConfig(src=(str(folder),), out=tmp_path / "shards", workers=1))
    assert (manifest["clips"], manifest["rejects"]) == (4, 2)


def test_pictures_where_there_are_none_are_refused(esc50, tmp_path):
    shards = write_shards(tmp_path / "shards", f"{esc50}@1")
    for place in (f"{esc50}@1", shards):
        with pytest.raises(ValueError, match=r"holds sound alone, and the model takes pictures, too \(clip.frames is 1\)"):
            Loader(place, 2, ClipSpec())
    with pytest.raises(ValueError, match=r"--frames is 4, but .* is a sound alone; it must be 0"):
        prepare(PrepareConfig(src=(f"{esc50}@1",), out=tmp_path / "more", frames=4))
    for fields, words in (
        ({"frames": -1}, "frames is -1; it must be 0 or more"),
        ({"frames": 2}, "frames is 2 without a frame_rate; it must be 0 or 1"),
        ({"frames": 0, "frame_rate": 2.0}, "frame_rate is 2.0 with frames 0; it must be None"),
    ):
        with pytest.raises(ValueError, match=words):
            ClipSpec(**fields)
    if dali.available() is None:
        with pytest.raises(ValueError, match="backend is 'dali', which is for pictures"):
            choose_backend("dali", open_clips(shards), torch.device("cpu"), SOUND)


def test_the_list_of_classes_is_written_as_it_is_read(tmp_path):
    labels = LabelSet(("/m/a", "b"), ('name, with "quotes"', "other"))
    (tmp_path / "labels.csv").write_text(labels.to_csv())
    assert LabelSet.from_csv(tmp_path / "labels.csv") == labels


def test_nothing_of_a_set_is_read_twice_for_its_name(esc50):
    """A plan of the whole is the plan of its folds together."""
    whole = {one.id for one in find_sources([esc50])}
    assert whole == {one.id for fold in range(1, 6) for one in find_sources([f"{esc50}@{fold}"])}
    assert json.dumps(sorted(whole)) and np.unique([name[0] for name in whole]).size == 5
