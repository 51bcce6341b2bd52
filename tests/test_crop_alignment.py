"""Pictures and sound of a crop belong together: clips whose picture turns white and whose sound begins at one known time.

Nothing here knows the rule by which a crop is cut. What is seen and heard in a batch must fit together by itself.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from media_sets import write_shards
from test_media import write_clip

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.commands.check import CheckConfig, check
from cavmae_fast.data.commands.encoding import EncodeClip
from cavmae_fast.data.commands.prepare import PrepareConfig, prepare
from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.decoder import UnusableDataError
from cavmae_fast.data.draws import Augmentation
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.sets.opening import open_clips

SPEC = ClipSpec((32, 32), frames=8, frame_rate=2.0, audio_length=400)
"Four seconds, of which all is heard."
RATE = 16000


def changing(path: Path, fps: float, pictures: float, sound: float, change: float, suffix: str = ".mp4") -> Path:
    """A clip of so many seconds of pictures and of sound: black and silent, and from `change` on white and a tone."""
    heard = np.zeros((1, round(sound * RATE)), np.float32)
    first = round(change * RATE)
    heard[0, first:] = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(max(0, heard.shape[1] - first)) / RATE)
    frames = max(1, round(pictures * fps))
    white, black = (np.full((32, 32, 3), level, np.uint8) for level in (255, 0))
    return write_clip(
        path.with_suffix(suffix),
        frames=frames,
        fps=Fraction(str(fps)),
        width=32,
        height=32,
        picture=lambda i: white if (i + 1e-6) / fps >= change else black,
        sound=heard,
    )


def seen_and_heard(batch, row: int) -> tuple[int, float]:
    """How many pictures of a crop are black, and after how many seconds its sound begins (its length where never)."""
    levels = batch.image[row].float().mean(dim=(1, 2, 3))
    dark = int((levels < 128).sum())
    assert (levels[:dark] < 40).all() and (levels[dark:] > 215).all()
    return dark, heard_from(batch, row)


def heard_from(batch, row: int) -> float:
    """When the tone begins, by its mel bin; 4.0, the length of the crop, where it does not. (Past a clip's end is 1.1.)"""
    loud = (batch.audio[row].amax(dim=1) > 1.6).nonzero().flatten()
    return float(loud[0]) / 100 if len(loud) else 4.0


SHAPES = {
    "8-fps": (8, 10.0, 10.0, 4.5),
    "25-fps": (25, 10.0, 10.0, 6.0),
    "29.97-fps": (29.97, 10.0, 10.0, 5.0),
    "60-fps": (60, 10.0, 10.0, 3.5),
    "1-fps": (1, 10.0, 10.0, 5.0),
    "long": (10, 14.0, 14.0, 5.0),
    "five-seconds": (10, 5.0, 5.0, 2.0),
    "sound-shorter": (10, 10.0, 6.0, 3.0),
    "pictures-shorter": (10, 6.0, 10.0, 3.0),
}
"Frames per second, seconds of pictures and of sound, and the change."


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """For each shape of clip a folder of the video, and shards of it. (Matroska, so that pictures and sound stay exact; in
    one case it does not say how many frames there are.)"""
    folder = tmp_path_factory.mktemp("aligned")
    found = {}
    for name, shape in SHAPES.items():
        (folder / name).mkdir()
        changing(folder / name / "clip", *shape, suffix=".mkv" if name in ("five-seconds", "pictures-shorter") else ".mov")
        shards = write_shards(folder / f"{name}-shards", folder / name, frames=20, size=32)
        found[name] = folder / name, shards
    return found


def crops(data: Path, seeds: range, **options):
    """The crop of the one clip in `data`, for each seed."""
    for seed in seeds:
        options = {"training": True, "augmentation": Augmentation(), "workers": 0, **options}
        loader = Loader(data, 1, SPEC, seed=seed, **options)
        (batch,) = loader
        loader.close()
        yield batch


@pytest.mark.parametrize("name", SHAPES)
def test_pictures_turn_white_when_the_sound_begins(places, name):
    video, shards = places[name]
    fps, pictures, *_ = SHAPES[name]
    onsets = set()
    for one, other in zip(crops(video, range(8)), crops(shards, range(8))):
        dark, onset = seen_and_heard(one, 0)
        assert seen_and_heard(other, 0) == (dark, onset)  # the same crop from the file and from shards
        assert torch.equal(one.audio, other.audio)
        # A picture is shown every half second: those before the sound begins are black, the next one is white. One that is
        # shown is the nearest of 20 kept frames, and one of the file lasts 1 / fps; a frame of the spectrogram 25 ms.
        most = 0.03 + 1 / fps + (0.0 if pictures >= 10 else pictures / 40)
        assert (dark - 1) / 2 - most <= onset <= dark / 2 + most or (onset == 4.0 and dark == 8)
        if pictures >= 10 and fps == int(fps):  # the kept frames, and so all crops, begin at multiples of half a second
            assert abs(dark / 2 - onset) <= 0.03 + 1 / fps
        onsets.add(onset)
    assert len(onsets) > 2  # the crops lie in many places


def test_crops_follow_from_seed_epoch_and_position(places):
    video, shards = places["25-fps"]
    for data in (video, shards):
        loader = Loader(data, 1, SPEC, training=True, augmentation=Augmentation(), workers=0, seed=3)
        batches = [batch for _ in range(4) for batch in loader]
        assert len({seen_and_heard(batch, 0) for batch in batches}) > 1
        for batch in batches:
            again = loader.batch_at(batch.epoch, batch.position)
            assert torch.equal(again.audio, batch.audio) and torch.equal(again.image, batch.image)
        others = [{"keep": True, "workers": 0}, {"workers": 1}]
        if data == shards and dali.available() is None:
            others.append({"backend": "dali", "workers": 1})
        for options in others:
            for one, other in zip(crops(data, range(3), **options), crops(data, range(3))):
                assert torch.equal(one.audio, other.audio) and torch.equal(one.image, other.image), options


def test_evaluation_takes_the_middle(places):
    for data in places["25-fps"]:
        (batch,) = Loader(data, 1, SPEC, workers=0)
        dark, onset = seen_and_heard(batch, 0)  # from 3 to 7 seconds, and the change is at 6
        assert dark == 6 and onset == pytest.approx(3.0, abs=0.03)


def loaded(path: Path):
    """The middle crop of one clip: from the video, and from shards of it, which must agree."""
    shards = write_shards(path.with_name(f"{path.stem}-shards"), path, frames=20, size=32)
    (one,), (other,) = (list(Loader(data, 1, SPEC, workers=0)) for data in (path, shards))
    assert torch.equal(one.audio, other.audio)
    assert torch.allclose(one.image.float(), other.image.float(), atol=12)  # JPEG
    return one


def test_clips_that_are_shorter_than_the_crop(tmp_path):
    """They are taken from their beginning; the last picture is repeated, and silence follows the sound. `check` names them,
    where it is told how long they should be."""
    batch = loaded(changing(tmp_path / "short", 10, 2.0, 2.0, 1.0))
    assert seen_and_heard(batch, 0)[0] == 2 and torch.equal(batch.image[0, 4], batch.image[0, 7])
    silence = torch.tensor(5.081 / 4.4849)
    assert (batch.audio[0, 200:] == silence).all() and (batch.audio[0, 100:190] != silence).any()
    report = check(CheckConfig((str(tmp_path / "short.mp4"),), out=tmp_path / "check", workers=1, min_seconds=4.0))
    assert report["ok"] and report["counts"]["short"] == 1
    assert "2.000 s of sound" in report["findings"]["short"][0]["reason"]


def test_clips_of_one_frame(tmp_path):
    """Its picture is shown all the time, and its sound heard from the beginning."""
    batch = loaded(changing(tmp_path / "one", 10, 0.1, 8.0, 1.0))
    assert all(torch.equal(batch.image[0, 0], batch.image[0, k]) for k in range(8))
    dark, onset = seen_and_heard(batch, 0)
    assert dark == 8 and onset == pytest.approx(1.0, abs=0.03)


def test_sound_that_is_shorter_than_the_crop(tmp_path):
    """The crop lies at the clip's beginning, where both are; pictures go on, and silence follows the sound."""
    batch = loaded(changing(tmp_path / "quiet", 10, 10.0, 2.5, 1.5))
    assert seen_and_heard(batch, 0) == (3, pytest.approx(1.5, abs=0.03))
    assert (batch.audio[0, 250:] == torch.tensor(5.081 / 4.4849)).all()


def test_what_cannot_be_used_is_named_in_one_sentence(tmp_path):
    changing(tmp_path / "click", 10, 5.0, 0.01, 1.0)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "click.mp4").read_bytes()[:100])
    write_clip(tmp_path / "mute.mkv", frames=20, sound=None)
    for name, words in (
        ("click.mp4", "10.0 ms of sound could be decoded; at least 25 ms are needed"),
        ("cut.mp4", "not a readable media file"),
        ("mute.mkv", "has no audio stream"),
    ):
        with pytest.raises(MediaError, match=rf"^[^\n]*{name}: [^\n]*{words}"):
            read_clip(tmp_path / name, num_frames=20)
    loader = Loader(tmp_path, 4, SPEC, workers=0)
    with pytest.raises(UnusableDataError, match=r"3 clips in a row cannot be used; the first: .*click.mp4"):
        list(loader)
    assert len(loader.rejects) == 3 and all("\n" not in reject.reason for reject in loader.rejects.values())


def test_shards_of_earlier_versions_are_as_long_as_their_sound(places, tmp_path, monkeypatch):
    """They do not say over which seconds their frames lie."""
    noted = EncodeClip._from_video
    monkeypatch.setattr(EncodeClip, "_from_video", lambda *arguments: (*noted(*arguments)[:2], {}))
    source = open_clips(places["25-fps"][0])[0]
    image, *_ = (EncodeClip(20, 32, 10.24, 90, None)((0, source)),)
    assert "picture_seconds" not in image.meta
    monkeypatch.undo()
    assert EncodeClip(20, 32, 10.24, 90, None)((0, source)).meta["picture_seconds"] == pytest.approx(10.0)


MEDIA = Path(__file__).resolve().parents[1].parent / "shared" / "media"
if not MEDIA.is_dir():
    MEDIA = Path(__file__).resolve().parents[2].parent / "shared" / "media"


@pytest.mark.skipif(not MEDIA.is_dir(), reason="no real clips here")
def test_real_clips_are_cut_alike_from_files_and_shards(tmp_path):
    spec = ClipSpec((224, 224), frames=8, frame_rate=2.0)
    prepare(PrepareConfig(src=(str(MEDIA),), out=tmp_path / "shards", frames=20, workers=1))
    count = len(open_clips(MEDIA))
    for options in ({}, {"training": True, "augmentation": Augmentation(), "seed": 4}):
        (one,), (other,) = (list(Loader(data, count, spec, workers=0, **options)) for data in (MEDIA, tmp_path / "shards"))
        assert one.ids == other.ids and one.image.shape == (count, 8, 3, 224, 224)
        assert torch.equal(one.audio, other.audio)
        assert (one.image.float() - other.image.float()).abs().mean() < 4
