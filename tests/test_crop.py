"""Crops in time: which frames a model sees and from where it hears, as a rule and through the loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media_sets import write_published, write_shards

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.choosing import choose_backend
from cavmae_fast.data.draws import Augmentation
from cavmae_fast.data.features import audio_features, image_features
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.crop import crop_at
from cavmae_fast.data.media.encoded import decode_image, decode_sound
from cavmae_fast.data.media.files import read_clip
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.opening import open_clips
from cavmae_fast.data.sets.shards import ShardSet

EIGHT = ClipSpec(image_size=(64, 64), frames=8, frame_rate=2.0, audio_length=112)
"Eight pictures in four seconds, of which the first 1.1 are heard."
MOMENTS = st.floats(0, 1, exclude_max=True)


# ---------------------------------------------------------------------------------------------------------- the rule


@given(moment=MOMENTS, num_frames=st.integers(1, 1000), duration=st.floats(0.025, 100))
def test_without_a_frame_rate_one_frame_of_all_is_taken(moment, num_frames, duration):
    crop = crop_at(ClipSpec(), moment, num_frames, duration)
    assert crop == (0.0, (int(moment * num_frames),)) and 0 <= crop.frames[0] < num_frames


@given(
    moment=MOMENTS,
    num_frames=st.integers(1, 200),
    duration=st.floats(0.025, 20),
    frames=st.integers(1, 20),
    rate=st.floats(0.5, 60),
)
def test_a_crop_lies_in_the_clip_and_takes_the_nearest_frames(moment, num_frames, duration, frames, rate):
    clip = ClipSpec(frames=frames, frame_rate=rate)
    crop, span = crop_at(clip, moment, num_frames, duration), min(duration, 10)
    seconds = max(clip.crop_seconds, 0.025)
    assert crop.start == 0 if span <= seconds else 0 <= crop.start <= span - seconds + 1e-9
    assert len(crop.frames) == frames and list(crop.frames) == sorted(crop.frames)
    for number, frame in enumerate(crop.frames):
        time = crop.start + number / rate
        own, step = frame * span / num_frames, span / num_frames
        assert abs(own - time) <= step / 2 + 1e-9 or (frame == num_frames - 1 and time > own)


def test_crops_of_ten_seconds():
    assert crop_at(EIGHT, 0.5, 20, 10.24) == (3.0, tuple(range(6, 14)))
    assert crop_at(EIGHT, 0.0, 20, 10.0) == (0.0, tuple(range(8)))
    assert crop_at(EIGHT, 1 - 2**-53, 40, 60.0).frames == tuple(range(24, 40, 2))
    assert crop_at(EIGHT, 0.5, 20, 10.24).sound(16000, EIGHT.samples) == slice(48000, 48000 + EIGHT.samples)


def test_a_clip_shorter_than_the_crop_begins_at_0_and_repeats_its_last_frame():
    for moment in (0.0, 0.7):
        assert crop_at(EIGHT, moment, 20, 2.0) == (0.0, (0, 5, 10, 15, 19, 19, 19, 19))


# -------------------------------------------------------------------------------------------------- through the loader


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Nine clips of five seconds: videos, shards of 20 frames each, and the published layout of ten."""
    folder = tmp_path_factory.mktemp("crops")
    videos, _ = generate_clips(folder / "clips", num_train=9, num_test=1, seconds=5.0, size=64, seed=3)
    published = write_published(folder / "published", videos)
    return {
        "videos": videos[0].parent,
        "shards": write_shards(folder / "shards", videos[0].parent, frames=20),
        "published": published,
    }


def same(a, b) -> bool:
    return torch.equal(a.audio, b.audio) and torch.equal(a.image, b.image) and a.ids == b.ids


def test_a_batch_is_its_crops(sets):
    loader = Loader(sets["shards"], 4, EIGHT, training=True, augmentation=Augmentation(), workers=0, seed=2)
    batches = list(loader)
    shards, starts = ShardSet(sets["shards"]), set()
    for batch in batches:
        step = loader.plan.step(0, batch.position, loader.order.sequence(0))
        assert batch.image.shape == (4, 8, 3, 64, 64) and batch.image.dtype == torch.uint8
        assert batch.image[0, 0].permute(1, 2, 0).is_contiguous()  # channels last in memory
        for row, want in enumerate(step.wants):
            _, _, data = shards[want.clip].head()
            sound = decode_sound(data, "")
            start = int(want.moment * 5) / 4  # with one of the frames, of which four come in a second
            starts.add(start)
            for number in range(8):
                expected = decode_image(shards[want.clip].image(round((start + number / 2) * 4)), 64, "")
                assert np.array_equal(batch.image[row, number].permute(1, 2, 0), expected)
            heard = torch.from_numpy(sound[int(start * 16000) :][: EIGHT.samples].copy())[None]
            assert torch.equal(batch.audio[row], audio_features(heard, torch.tensor([heard.shape[1]]), 112)[0])
    assert starts <= {0.0, 0.25, 0.5, 0.75, 1.0} and len(starts) > 3


RECIPES = [Augmentation(), Augmentation(mixup=0.5, noise=True, freq_mask=20, time_mask=20), None]


@pytest.mark.parametrize("recipe", RECIPES, ids=["plain", "mixup", "evaluation"])
@pytest.mark.parametrize("kind", ["shards", "videos", "published"])
def test_every_way_of_decoding_gives_the_same(sets, kind, recipe):
    clip = EIGHT if kind != "published" else ClipSpec((64, 64), 3, 1.0, audio_length=112)
    options = {"training": recipe is not None, "augmentation": recipe, "seed": 5}

    def batches(**others):
        loader = Loader(sets[kind], 4, clip, **options, **others)
        found = [batch for _ in range(2) for batch in loader]
        assert same(loader.batch_at(1, 4), found[len(found) // 2 + 1])
        loader.close()
        return found

    reference = batches(workers=0)
    assert len(reference) == (4 if recipe else 6) and reference[0].image.shape[1] == clip.frames
    assert reference[0].image.dtype == (torch.float32 if recipe and recipe.mixup else torch.uint8)
    others = [{"workers": 2}, {"workers": 0, "keep": True}]
    if kind != "videos" and dali.available() is None:
        others.append({"workers": 1, "backend": "dali"})
    for one in others:
        assert all(map(same, batches(**one), reference)), one


def test_videos_are_cut_as_finely_as_shards_that_serve_the_rate(sets):
    """And so give the pictures that `prepare --frames 20` chooses."""
    (batch,) = Loader(sets["videos"], 9, EIGHT, workers=0)
    (prepared,) = Loader(sets["shards"], 9, EIGHT, workers=0)
    assert batch.ids == prepared.ids and torch.equal(batch.audio, prepared.audio)
    for row, name in enumerate(batch.ids):
        clip = read_clip(sets["videos"] / f"{name}.mp4", size=64, num_frames=20)
        frames = crop_at(EIGHT, 0.5, 20, clip.duration, clip.picture_seconds).frames
        assert np.array_equal(batch.image[row].permute(0, 2, 3, 1), clip.frames[list(frames)])


def test_one_picture_of_a_crop(sets):
    """It is where the sound begins; the shape is that of one picture."""
    clip = ClipSpec((64, 64), 1, 1.0, audio_length=112)
    (batch,) = Loader(sets["shards"], 9, clip, workers=0)
    picture = decode_image(ShardSet(sets["shards"])[0].image(8), 64, "")
    assert batch.image.shape == (9, 3, 64, 64) and np.array_equal(batch.image[0].permute(1, 2, 0), picture)


def test_short_clips_repeat_their_last_picture(sets, tmp_path):
    generate_clips(tmp_path, num_train=2, num_test=1, seconds=2.0, size=64)
    long = ClipSpec((64, 64), 8, 2.0, audio_length=1024)
    for data in (tmp_path, write_shards(tmp_path / "shards", tmp_path, frames=20)):
        batch = next(iter(Loader(data, 3, long, training=True, augmentation=Augmentation(), workers=0)))
        assert all(torch.equal(batch.image[:, 4], batch.image[:, k]) for k in (5, 6, 7))
        assert not torch.equal(batch.image[:, 3], batch.image[:, 4])
        silence = torch.tensor(5.081 / 4.4849)
        assert (batch.audio[:, 205:] == silence).all() and (batch.audio[:, 190] != silence).any()


def test_statistics_of_the_model_are_used(sets):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    clip = ClipSpec((64, 64), 2, 1.0, mean, std, audio_length=112, audio_mean=-4.0, audio_std=3.0, mel_bins=64)
    (plain,) = Loader(sets["shards"], 9, ClipSpec((64, 64), 2, 1.0, audio_length=112, mel_bins=64), workers=0)
    (batch,) = Loader(sets["shards"], 9, clip, normalize_images=True, workers=0)
    expected = (plain.image.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(batch.image.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(batch.image, image_features(plain.image, mean, std))
    assert batch.audio.shape == (9, 112, 64)
    torch.testing.assert_close(batch.audio * 3.0 - 4.0, plain.audio * 4.4849 - 5.081, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="freq_mask is 48; allowed: 0 to 32"):
        Loader(sets["shards"], 4, ClipSpec(mel_bins=32), training=True, augmentation=Augmentation.FINE_TUNE)


@pytest.mark.parametrize("kind", ["shards", "videos"])
def test_another_sample_rate(sets, kind):
    clip = ClipSpec((64, 64), audio_length=112, sample_rate=8000)
    (batch,) = Loader(sets[kind], 9, clip, workers=0)
    if kind == "shards":
        sound = decode_sound(ShardSet(sets[kind])[0].head()[2], "", 8000)
    else:
        sound = read_clip(sets[kind] / f"{batch.ids[0]}.mp4", sample_rate=8000).waveform
    sound = torch.from_numpy(sound[: clip.samples].copy())[None]
    assert clip.samples == 111 * 80 + 200 == sound.shape[1]
    assert torch.equal(batch.audio[0], audio_features(sound, torch.tensor([clip.samples]), 112, sample_rate=8000)[0])
    if kind == "shards" and dali.available() is None:
        (other,) = Loader(sets[kind], 9, clip, workers=1, backend="dali")
        assert same(other, batch)


def test_fields_of_the_clip_can_be_given_by_themselves(sets):
    (one,) = Loader(sets["shards"], 9, ClipSpec((64, 64), audio_length=90, audio_mean=-4.0, audio_std=3.0), workers=0)
    (other,) = Loader(sets["shards"], 9, image_size=64, audio_length=90, mean=-4.0, std=3.0, workers=0)
    (both,) = Loader(
        sets["shards"],
        9,
        ClipSpec((32, 32), audio_length=7, audio_std=3.0),
        image_size=(64, 64),
        audio_length=90,
        mean=-4.0,
        workers=0,
    )
    assert same(one, other) and same(one, both)


def test_data_that_is_too_coarse_is_refused(sets, tmp_path):
    with pytest.raises(ValueError, match=r"clip.frame_rate is 2.5, but the data set has 20 .*; allowed: 2 or .* 25"):
        Loader(sets["shards"], 4, ClipSpec(frames=2, frame_rate=2.5))
    with pytest.raises(ValueError, match=r"clip.frame_rate is 2, but the data set has 10 .*; allowed: 1 or less"):
        Loader(sets["published"], 4, EIGHT)
    short = write_shards(tmp_path / "shards", sets["videos"], frames=20, seconds=4.0)
    with pytest.raises(ValueError, match=r"clip.frame_rate is 2, but .* holds 4 s of sound .* --seconds 10 or more"):
        Loader(short, 4, EIGHT)
    pytest.importorskip("nvidia.dali")
    with pytest.raises(ValueError, match=r"backend is 'dali' with clip.frame_rate=2, and it cuts no crops"):
        choose_backend("dali", open_clips(sets["videos"]), torch.device("cuda"), EIGHT)
