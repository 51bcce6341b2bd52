"""The loader: which clips come when, what is made of them, and what happens to those that cannot be used."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_sets import CLASSES, write_labels, write_published, write_shards

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.choosing import choose_backend
from cavmae_fast.data.decode.decoder import UnusableDataError
from cavmae_fast.data.draws import Augmentation
from cavmae_fast.data.features import AUDIO_MEAN, AUDIO_STD, audio_features, image_features
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.encoded import decode_image, decode_sound
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.plan import Order, Step, Want
from cavmae_fast.data.sets.labels import LabelError, LabelSet, balance_weights, write_weights
from cavmae_fast.data.sets.opening import open_clips
from cavmae_fast.data.sets.shards import ShardSet
from cavmae_fast.ops.parity import error
from cavmae_fast.reference.fbank import log_mel_features

EPS = torch.finfo(torch.float32).eps
SHARED = Path(__file__).resolve().parents[2] / "shared"
SMALL = {"image_size": 64, "audio_length": 112}
SAMPLES = ClipSpec(audio_length=112).samples
PLAIN = Augmentation()  # a random frame, nothing else


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """25 clips as videos, in the published layout, and as shards with labels."""
    folder = tmp_path_factory.mktemp("sets")
    videos, _ = generate_clips(folder / "clips", num_train=25, num_test=8, seconds=1.0, size=64, seed=5)
    labels = write_labels(folder / "labels.csv")
    published = write_published(folder / "published", videos)
    shards = write_shards(folder / "shards", published, labels=labels)
    return {"videos": videos[0].parent, "published": published, "shards": shards, "labels": labels}


def run(loader: Loader, epochs: int = 1) -> list:
    return [batch for _ in range(epochs) for batch in loader]


def same(a, b) -> bool:
    labels = (a.labels is None and b.labels is None) or torch.equal(a.labels, b.labels)
    arrays = torch.equal(a.audio, b.audio) and torch.equal(a.image, b.image) and np.array_equal(a.clips, b.clips)
    return labels and arrays and (a.ids, a.epoch, a.position) == (b.ids, b.epoch, b.position)


# ------------------------------------------------------------------------------------------------------------- order


@settings(max_examples=150, deadline=None)
@given(
    clips=st.integers(1, 60),
    batch=st.integers(1, 9),
    world=st.integers(1, 7),
    start=st.integers(0, 70),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_ranks_share_an_epoch_without_overlap_or_gap(clips, batch, world, start, drop_last, shuffle):
    orders = [
        Order(clips, batch, 3, shuffle=shuffle, rank=rank, world_size=world, drop_last=drop_last) for rank in range(world)
    ]
    sequence = orders[0].sequence(4)
    assert sorted(sequence) == list(range(clips))
    taken, position = [], start
    for _ in range(orders[0].steps(start)):
        spans = [order.span(position) for order in orders]
        assert not drop_last or all(len(span) == batch for span in spans)
        assert max(map(len, spans)) - min(map(len, spans)) <= 1
        taken += [p for span in spans for p in span]
        position += orders[0].stride
    left = max(0, clips - start)
    assert taken == list(range(start, start + (left // (world * batch) * world * batch if drop_last else left)))


def test_epochs_and_seeds_differ_and_repeat():
    order = Order(1000, 10, 1, shuffle=True)
    assert np.array_equal(order.sequence(2), order.sequence(2))
    assert not np.array_equal(order.sequence(2), order.sequence(3))
    assert not np.array_equal(order.sequence(2), Order(1000, 10, 2, shuffle=True).sequence(2))


def test_weights_decide_how_often_a_clip_comes():
    weights = np.array([0.0, 1.0, 2.0, 5.0, 0.0])
    drawn = np.concatenate([Order(5, 1, weights=weights).sequence(epoch) for epoch in range(4000)])
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    assert shares == pytest.approx(weights / 8, abs=0.01) and shares[0] == shares[4] == 0
    assert all(Order(5, 1, weights=weights).substitute(p, False, 1, 1) in (1, 2, 3) for p in range(50))
    for bad in (np.ones(4), np.array([1, 1, np.nan, 1, 1]), np.array([1, 1, -1, 1, 1.0]), np.zeros(5)):
        with pytest.raises(ValueError, match=r"weights has shape \[[45]\]; allowed: \[5\] finite numbers"):
            Order(5, 1, weights=bad)


# --------------------------------------------------------------------------------------------------- what batches hold


@pytest.mark.parametrize("kind", ["shards", "published", "videos"])
def test_batches_are_the_clips_and_their_features(sets, kind):
    loader = Loader(sets[kind], 4, workers=0, labels=sets["labels"] if kind == "published" else None, **SMALL)
    batches = run(loader)
    assert [len(batch.ids) for batch in batches] == [4] * 6 + [1] and loader.backend == "torch"
    listed = json.loads(sets["published"].read_text())["data"]
    assert [i for batch in batches for i in batch.ids] == [row["video_id"] for row in listed]
    folder = sets["published"].parent
    for number, batch in enumerate(batches):
        here = listed[4 * number : 4 * number + 4]
        sounds = torch.zeros(len(here), SAMPLES, dtype=torch.int16)
        for row, name in enumerate(entry["video_id"] for entry in here):
            if kind == "videos":
                clip = read_clip(sets["videos"] / f"{name}.mp4", size=64, seconds=SAMPLES / 16000)
                frame, waveform = clip.frames[5], clip.waveform
            else:
                frame = decode_image((folder / "frame_5" / f"{name}.jpg").read_bytes(), 64, "")
                waveform = decode_sound((folder / "sound" / f"{name}.flac").read_bytes(), "")
            assert torch.equal(batch.image[row].permute(1, 2, 0), torch.from_numpy(frame.copy()))
            sounds[row, : len(waveform)] = torch.from_numpy(waveform[:SAMPLES].copy())
        counts = torch.tensor([min(len(waveform), SAMPLES)] * len(here))  # all are a second long
        assert torch.equal(batch.audio, audio_features(sounds, counts, 112))
        if kind == "videos":
            assert batch.labels is None
        else:
            wanted = [[float(mid in entry["labels"].split(",")) for mid in CLASSES] for entry in here]
            assert batch.labels.tolist() == wanted
    assert batches[0].image.dtype == torch.uint8 and batches[0].audio.dtype == torch.float32


def test_other_sizes_are_scaled_as_pillow_does(sets):
    batch = next(iter(Loader(sets["shards"], 3, workers=0, image_size=96, audio_length=112, normalize_images=True)))
    folder = sets["published"].parent
    images = [decode_image((folder / "frame_5" / f"{name}.jpg").read_bytes(), 96, "") for name in batch.ids]
    expected = image_features(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert batch.image.shape == (3, 3, 96, 96) and torch.equal(batch.image, expected)


def test_frame_of_an_evaluation(sets):
    first, last = (next(iter(Loader(sets["shards"], 4, workers=0, frame=frame, **SMALL))) for frame in (0, 9))
    name = sets["published"].parent / "frame_9" / f"{last.ids[2]}.jpg"
    assert torch.equal(last.image[2].permute(1, 2, 0), torch.from_numpy(decode_image(name.read_bytes(), 64, "").copy()))
    assert not torch.equal(first.image, last.image) and torch.equal(first.audio, last.audio)


def test_mixup_as_published(sets):
    recipe = Augmentation(mixup=0.6, label_smoothing=0.1)
    loader = Loader(sets["shards"], 12, training=True, augmentation=recipe, workers=0, seed=4, **SMALL)
    batch = next(iter(loader))
    step = loader.plan.step(0, 0, loader.order.sequence(0))
    mixed = np.flatnonzero(step.draws.mixed)
    assert 2 < len(mixed) < 11 and batch.image.dtype == torch.float32 and len(step.wants) == 12 + len(mixed)
    label_set = LabelSet.from_csv(sets["labels"])

    def plain(want):
        meta, encoded = loader.clips[want.clip].read(int(10 * want.moment))
        sound = decode_sound(encoded.sound, "")[:SAMPLES].astype(np.float64) / 32768
        image = torch.from_numpy(decode_image(encoded.image, 64, "").copy()).permute(2, 0, 1)
        return meta["labels"], sound - sound.mean(), image_features(image[None])[0]

    for row in range(12):
        labels, sound, image = plain(step.wants[row])
        target = np.full(4, 0.1 / 4)
        if row in mixed:
            lam = step.draws.lam[row]
            labels2, sound2, image2 = plain(step.wants[12 + list(mixed).index(row)])
            other = np.zeros_like(sound)
            other[: len(sound2)] = sound2[: len(sound)]
            sound = lam * sound + (1 - lam) * other
            image = lam * image + (1 - lam) * image2
            for share, names in ((lam, labels), (1 - lam, labels2)):
                for name in names:
                    target[label_set.index[name]] += share * 0.9
        else:
            target[[label_set.index[name] for name in labels]] = 0.9
        # Pixels are normalized to numbers below 4, in six roundings with the mixture's; labels are sums of a few products.
        torch.testing.assert_close(batch.image[row], image, atol=6 * 4 * EPS / 2, rtol=0)
        np.testing.assert_allclose(batch.labels[row], target, atol=4 * EPS)
        mixture, count = torch.from_numpy(sound - sound.mean())[None], torch.tensor([len(sound)])
        exact, baseline = (log_mel_features(m, count, 112, AUDIO_MEAN, AUDIO_STD) for m in (mixture, mixture.float()))
        assert error(batch.audio[row], exact[0]) <= 2 * error(baseline[0], exact[0]) + 2 * EPS


# ------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("recipe", [Augmentation.PRETRAIN, Augmentation.FINE_TUNE], ids=["pretrain", "fine-tune"])
def test_batches_depend_on_seed_and_position_alone(sets, recipe):
    recipe = Augmentation(**{**vars(recipe), "time_mask": 20 if recipe.time_mask else 0})
    options = {"training": True, "augmentation": recipe, "seed": 7, **SMALL}
    reference = run(Loader(sets["shards"], 8, workers=0, **options), 2)
    assert len(reference) == 6 and len({tuple(batch.ids) for batch in reference}) == 6
    for others in ({"workers": 1}, {"workers": 2, "prefetch": 1}, {"workers": 0, "keep": True}):
        loader = Loader(sets["shards"], 8, **others, **options)
        assert all(map(same, run(loader, 2), reference)), others
        assert same(loader.batch_at(1, 8), reference[4])
        loader.close()
    other = run(Loader(sets["shards"], 8, workers=0, **{**options, "seed": 8}), 1)
    assert [batch.ids for batch in other] != [batch.ids for batch in reference[:3]]


def test_the_same_from_shards_and_extracted_files(sets):
    options = {"training": True, "augmentation": PLAIN, "workers": 0, **SMALL}
    a, b = run(Loader(sets["shards"], 8, **options)), run(Loader(sets["published"], 8, labels=sets["labels"], **options))
    assert all(map(same, a, b))


@pytest.mark.parametrize("workers", [0, 2])
def test_state_goes_on_with_exactly_what_is_left(sets, workers):
    options = {"training": True, "augmentation": PLAIN, "workers": workers, **SMALL}
    whole = run(Loader(sets["shards"], 4, **options), 3)
    loader = Loader(sets["shards"], 4, **options)
    run(loader)
    for batch in loader:
        if batch.position == 4:
            state = json.loads(json.dumps(loader.state_dict()))
            break
    resumed = Loader(sets["shards"], 4, **options)
    resumed.load_state_dict(state)
    assert len(resumed) == 4
    assert all(map(same, run(resumed, 2), whole[8:]))
    assert all(map(same, loader, whole[8:12])), "the loader that was left goes on, too"
    end = Loader(sets["shards"], 4, **options)
    for _ in end:
        if not end.order.steps(end.position):
            state = end.state_dict()
            break  # after the last batch of the epoch
    end.load_state_dict(state)
    assert all(map(same, run(end), whole[6:12]))


def test_state_goes_on_with_other_ranks(sets):
    def loader(rank, world):
        return Loader(sets["shards"], 2, training=True, augmentation=PLAIN, workers=0, rank=rank, world_size=world, **SMALL)

    ranks = [loader(0, 2), loader(1, 2)]
    iterators = [iter(one) for one in ranks]
    before = [int(clip) for _ in range(2) for iterator in iterators for clip in next(iterator).clips]
    states = [one.state_dict() for one in ranks]
    assert states[0] == states[1] and states[0]["position"] == 8
    after = []
    for rank in range(3):
        one = loader(rank, 3)
        one.load_state_dict(states[0])
        after += [int(clip) for batch in one for clip in batch.clips]
    assert len(after) == 12 and len(set(before + after)) == 20


def test_all_clips_are_evaluated_once_whatever_the_ranks(sets):
    for world in (1, 2, 3, 30):
        ids = []
        for rank in range(world):
            ids += [i for b in Loader(sets["shards"], 4, workers=0, rank=rank, world_size=world, **SMALL) for i in b.ids]
        assert len(ids) == 25 == len(set(ids))


def test_ranks_are_those_of_torch_distributed(sets, monkeypatch):
    distributed = torch.distributed
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 3)):
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    order = Loader(sets["shards"], 4, workers=0, **SMALL).order
    assert (order.rank, order.world_size) == (1, 3)
    order = Loader(sets["shards"], 4, workers=0, rank=0, world_size=2, **SMALL).order
    assert (order.rank, order.world_size) == (0, 2)


def test_a_state_of_other_data_is_refused(sets):
    loader = Loader(sets["shards"], 4, training=True, seed=1, workers=0, **SMALL)
    for name, value in (
        ("clips", 24),
        ("seed", 2),
        ("shuffle", False),
        ("weighted", True),
        ("data", 5),
    ):
        with pytest.raises(ValueError, match=f"the state's {name} is {value}; this loader's is"):
            loader.load_state_dict({**loader.state_dict(), name: value})
    for change in ({"position": -4}, {"position": 26}, {"epoch": -1}, {"epoch": None}):
        with pytest.raises(ValueError, match=r"the state's epoch is .* and its position"):
            loader.load_state_dict({**loader.state_dict(), **change})


# -------------------------------------------------------------------------------------------------------- bad clips


@pytest.fixture
def damaged(sets, tmp_path) -> tuple[Path, list[str]]:
    """The published layout with four clips that cannot be used, and their ids."""
    folder = tmp_path / "published"
    videos = sorted(sets["videos"].iterdir())[:14]
    listed = write_published(folder, videos)
    names = [videos[k].stem for k in (0, 3, 9, 13)]
    (folder / "sound" / f"{names[0]}.flac").unlink()
    (folder / "sound" / f"{names[1]}.flac").write_bytes(b"no sound")
    for k in range(10):
        (folder / f"frame_{k}" / f"{names[2]}.jpg").unlink()
        (folder / f"frame_{k}" / f"{names[3]}.jpg").write_bytes(b"\xff\xd8\xff no image")
    return listed, names


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_bad_clips_and_names_them(damaged, workers):
    listed, names = damaged
    loader = Loader(listed, 4, workers=workers, **SMALL)
    batches = run(loader)
    ids = [row["video_id"] for row in json.loads(listed.read_text())["data"]]
    assert [i for batch in batches for i in batch.ids] == [i for i in ids if i not in names]
    assert all(len(b.ids) == len(b.audio) == len(b.image) == len(b.clips) for b in batches)
    assert len(loader.rejects) == 4 and sum(len(batch.rejects) for batch in batches) + 1 >= 4
    reasons = " ".join(reject.reason for reject in loader.rejects.values())
    for words in ("No such file", "not a readable FLAC or WAV", "no frame 5 or earlier", "not a JPEG or PNG"):
        assert words in reasons
    assert all(any(name in reject.reason for reject in loader.rejects.values()) for name in names)


@pytest.mark.parametrize("recipe", [PLAIN, Augmentation(mixup=1.0)], ids=["plain", "mixup"])
def test_training_replaces_bad_clips_and_names_them(damaged, recipe):
    listed, names = damaged
    options = {"training": True, "augmentation": recipe, **SMALL}
    loader = Loader(listed, 4, workers=0, **options)
    batches = run(loader, 2)
    assert [len(batch.ids) for batch in batches] == [4] * 6
    assert not {i for batch in batches for i in batch.ids} & set(names)
    assert {name for name in names for r in loader.rejects.values() if name in r.reason} == set(names)
    with_workers = Loader(listed, 4, workers=2, **options)
    assert all(map(same, run(with_workers, 2), batches))
    assert all(batch.image.float().std() > 0.1 for batch in batches)


def test_missing_frames_walk_down(sets, tmp_path):
    videos = sorted(sets["videos"].iterdir())[:2]
    listed = write_published(tmp_path / "p", videos)
    for k in (4, 5):
        (tmp_path / "p" / f"frame_{k}" / f"{videos[0].stem}.jpg").unlink()
    batch = next(iter(Loader(listed, 2, workers=0, **SMALL)))
    third = tmp_path / "p" / "frame_3" / f"{videos[0].stem}.jpg"
    assert torch.equal(batch.image[0].permute(1, 2, 0), torch.from_numpy(decode_image(third.read_bytes(), 64, "").copy()))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_usable_is_an_error(tmp_path, training, workers):
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(b"no film")
    loader = Loader(tmp_path, 2, training=training, workers=workers, **SMALL)
    with pytest.raises(UnusableDataError, match=r"in a row cannot be used; the first: .*\.mp4: not a readable") as caught:
        run(loader)
    assert {Path(reject.path).name for reject in caught.value.rejects} <= {"a.mp4", "b.mp4"}


def test_a_damaged_shard_costs_its_clip(sets, tmp_path):
    folder = write_shards(tmp_path / "shards", sets["published"])
    clip = ShardSet(folder)[3]
    with open(clip.path, "r+b") as file:
        file.seek(clip.offset + 512 + 40 + 1024)
        file.write(b"\xff" * 64)
    loader = Loader(folder, 5, workers=1, **SMALL)
    assert sum(len(batch.ids) for batch in loader) == 24
    (reject,) = loader.rejects.values()
    assert "000000003.flac is damaged" in reject.reason


def test_unknown_labels_are_named(sets, tmp_path):
    csv = tmp_path / "labels.csv"
    csv.write_text("index,mid,display_name\n0,/m/a,a\n1,/m/b,b\n2,/m/d,d\n")
    loader = Loader(sets["published"], 25, labels=csv, workers=0, **SMALL)
    (batch,) = loader
    assert len(batch.ids) == 19 and len(loader.rejects) == 6
    assert all("its labels /m/c are not in the CSV" in reject.reason for reject in loader.rejects.values())


# -------------------------------------------------------------------------------------------------------------- DALI


@pytest.mark.parametrize("kind", ["shards", "published"])
@pytest.mark.parametrize("recipe", [PLAIN, Augmentation(mixup=0.5, noise=True)], ids=["plain", "mixup"])
def test_dali_gives_the_same_batches(sets, kind, recipe):
    pytest.importorskip("nvidia.dali")
    options = {"training": True, "augmentation": recipe, "seed": 2, "labels": sets["labels"], **SMALL}
    reference = run(Loader(sets[kind], 8, workers=0, **options), 2)
    loader = Loader(sets[kind], 8, backend="dali", workers=2, **options)
    assert (loader.backend, loader.reason) == ("dali", "asked for")
    batches = run(loader, 2)
    assert len(batches) == 6 and all(map(same, batches, reference))
    loader.close()
    evaluation = [Loader(sets[kind], 8, workers=2, backend=b, labels=sets["labels"], **SMALL) for b in ("dali", "torch")]
    assert all(map(same, *map(run, evaluation))) and len(run(evaluation[0])) == 4


def test_dali_goes_on_from_a_state(sets):
    pytest.importorskip("nvidia.dali")
    options = {"training": True, "augmentation": PLAIN, "backend": "dali", "workers": 1, **SMALL}
    whole = run(Loader(sets["shards"], 4, **options), 2)
    loader = Loader(sets["shards"], 4, **options)
    next(iterator := iter(loader))
    next(iterator)
    resumed = Loader(sets["shards"], 4, **options)
    resumed.load_state_dict(loader.state_dict())
    assert all(map(same, run(resumed, 2), whole[2:]))


def test_dali_scales_within_its_bound(sets):
    pytest.importorskip("nvidia.dali")
    sizes = {"image_size": 48, "audio_length": 112}
    a, b = (next(iter(Loader(sets["shards"], 16, workers=2, backend=name, **sizes))) for name in ("dali", "torch"))
    difference = (a.image.float() - b.image.float()).abs()
    assert difference.max() <= 10 and difference.mean() <= 0.25 and torch.equal(a.audio, b.audio)


@pytest.mark.parametrize("training", [True, False])
def test_dali_names_bad_clips(damaged, training):
    pytest.importorskip("nvidia.dali")
    listed, _ = damaged
    options = {"training": training, "augmentation": PLAIN if training else None, **SMALL}
    reference = Loader(listed, 4, workers=0, **options)
    expected = run(reference, 2)
    loader = Loader(listed, 4, workers=2, backend="dali", **options)
    batches = run(loader, 2)
    assert len(batches) == len(expected) and all(map(same, batches, expected))
    assert loader.rejects == reference.rejects and len(loader.rejects) == 4


def test_dali_reads_sound_at_another_rate(sets, tmp_path):
    pytest.importorskip("nvidia.dali")
    import soundfile

    listed = write_published(tmp_path / "p", sorted(sets["videos"].iterdir())[:3])
    path = tmp_path / "p" / "sound" / f"{sorted(sets['videos'].iterdir())[1].stem}.flac"
    tone = np.sin(np.arange(44100) * 0.05)
    soundfile.write(path, np.stack([tone, 0 * tone], axis=1), 44100)
    a, b = (next(iter(Loader(listed, 3, workers=1, backend=name, **SMALL))) for name in ("dali", "torch"))
    assert same(a, b) and a.audio[1].std() > 0.5


def test_dali_decodes_all_that_the_torch_loader_does(sets, tmp_path):
    """Formats that DALI reads in another way, or refuses: PNG, 24 and 32 bits, floating point."""
    pytest.importorskip("nvidia.dali")
    import soundfile
    from PIL import Image

    videos = sorted(sets["videos"].iterdir())[:5]
    listed = write_published(tmp_path / "p", videos)
    tone = 0.4 * np.sin(np.arange(16000) * 0.05)
    for path, kind in zip(videos, ("FLOAT", "PCM_24", "DOUBLE", "PCM_32", "PCM_U8"), strict=True):
        sound = tmp_path / "p" / "sound" / f"{path.stem}.flac"  # the name says nothing
        soundfile.write(sound.with_suffix(".wav"), tone, 16000, subtype=kind)
        sound.with_suffix(".wav").rename(sound)
    frame = tmp_path / "p" / "frame_5" / f"{videos[0].stem}.jpg"
    Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)).save(frame, "PNG")
    Image.open(tmp_path / "p" / "frame_5" / f"{videos[1].stem}.jpg").save(frame.with_stem(videos[2].stem), "WEBP")
    a, b = (Loader(listed, 5, workers=1, backend=name, **SMALL) for name in ("dali", "torch"))
    (one,), (other,) = a, b
    assert same(one, other) and len(one.ids) == 4 and a.rejects == b.rejects and len(a.rejects) == 1


def test_dali_reads_no_videos_on_a_cpu(sets):
    pytest.importorskip("nvidia.dali")
    with pytest.raises(ValueError, match="decodes videos with NVDEC, on a CUDA device"):
        Loader(sets["videos"], 4, backend="dali", **SMALL)


@pytest.mark.parametrize("training", [True, False])
def test_dali_with_nothing_usable(sets, tmp_path, training):
    pytest.importorskip("nvidia.dali")
    listed = write_published(tmp_path / "p", sorted(sets["videos"].iterdir())[:3])
    for path in (tmp_path / "p" / "sound").iterdir():
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UnusableDataError, match="could be decoded"):
        run(Loader(listed, 1, training=training, backend="dali", workers=1, **SMALL))


# ----------------------------------------------------------------------------------------------- processes and threads


def test_a_killed_worker_is_reported_and_nothing_is_lost(sets):
    options = {"training": True, "augmentation": PLAIN, **SMALL}
    reference = run(Loader(sets["shards"], 5, workers=0, **options), 6)
    messages: list[str] = []
    loader = Loader(sets["shards"], 5, workers=2, report=messages.append, **options)
    batches = []
    for _ in range(6):
        for batch in loader:
            batches.append(batch)
            if len(batches) in (3, 11, 20):
                os.kill(loader._decoder.workers.pids[0], signal.SIGKILL)
                time.sleep(0.05)
    assert all(map(same, batches, reference)) and len(batches) == 30
    assert messages and all("killed by signal 9, SIGKILL" in message for message in messages)
    assert not loader.rejects


def test_nothing_is_left_behind(sets):
    before = set(threading.enumerate())
    loader = Loader(sets["shards"], 4, training=True, workers=2, **SMALL)
    pids = loader._decoder.workers.pids
    next(iter(loader))
    del loader
    gc.collect()
    assert set(threading.enumerate()) == before
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_evaluation_can_be_left_and_begun_again(sets):
    loader = Loader(sets["shards"], 4, workers=1, **SMALL)
    first = [batch.ids for batch in loader]
    next(iter(loader))
    loader.load_state_dict({**loader.state_dict(), "position": 0})
    assert [batch.ids for batch in loader] == first


def test_keep_decodes_once(sets, monkeypatch):
    from cavmae_fast.data.decode import reading

    reads = []
    monkeypatch.setattr(reading, "read_clip", lambda path, **kw: (reads.append(path), read_clip(path, **kw))[1])
    loader = Loader(sets["videos"], 5, training=True, workers=0, keep=True, **SMALL)
    run(loader, 3)
    assert len(reads) == len(set(reads)) == 25


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_an_interrupted_batch_is_not_lost(sets, monkeypatch, backend):
    """The features are the consumer's work: Ctrl-C may come there, again and again."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    options = {"training": True, "augmentation": PLAIN, **SMALL}
    reference = run(Loader(sets["shards"], 5, workers=0, **options))
    loader = Loader(sets["shards"], 5, workers=1, prefetch=1, backend=backend, **options)
    build, interrupted = loader.builder, []

    def sometimes(decoded):
        if len(interrupted) < 3:
            interrupted.append(decoded.step.position)
            raise KeyboardInterrupt
        return build(decoded)

    loader.builder = sometimes
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
    batches = run(loader)
    assert interrupted == [0, 0, 0] and all(map(same, batches, reference)) and len(batches) == 5


def test_a_forked_child_is_told(sets):
    loader = Loader(sets["shards"], 5, training=True, workers=1, **SMALL)
    next(iter(loader))
    if (child := os.fork()) == 0:
        try:
            next(iter(loader))
        except RuntimeError as error:
            os._exit(7 if "was made in process" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(next(iter(loader)).ids) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_closed_loader_says_so(sets, workers):
    loader = Loader(sets["shards"], 5, workers=workers, **SMALL)
    next(iter(loader))
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(iter(loader))


def test_one_rank_may_have_nothing_but_a_bad_clip(damaged):
    listed, _ = damaged
    lengths = [sum(len(b.ids) for b in Loader(listed, 1, workers=0, rank=r, world_size=14, **SMALL)) for r in range(14)]
    assert sorted(lengths) == [0] * 4 + [1] * 10


def test_another_loop_ends_the_first(sets):
    loader = Loader(sets["shards"], 5, workers=0, **SMALL)
    next(first := iter(loader))
    assert len(list(loader)) == 4
    with pytest.raises(RuntimeError, match="another loop over this loader has begun"):
        next(first)


def test_few_clips_ahead_are_shared_out(sets):
    loader = Loader(sets["shards"], 4, training=True, workers=4, prefetch=1, **SMALL)
    assert loader._decoder.chunk == 1
    run(loader, 2)
    assert all(worker.seen for worker in loader._decoder.workers._workers)


def test_a_loader_that_was_collected_in_its_own_thread(sets):
    """A reference cycle may be found there."""
    loader = Loader(sets["shards"], 4, training=True, workers=1, **SMALL)
    next(iter(loader))
    prefetcher, decoder, finalizer = loader._prefetcher, loader._decoder, loader._finalizer
    put = prefetcher._queue.put

    class Queue:
        def put(self, item):
            finalizer()
            put(item)

        get = prefetcher._queue.get

    prefetcher._queue = Queue()
    end = time.monotonic() + 20
    while finalizer.alive or prefetcher.thread.is_alive() or decoder.workers.pids:
        if time.monotonic() > end:
            raise AssertionError("not closed")
        if not finalizer.alive:
            time.sleep(0.05)
            continue
        prefetcher.finish(prefetcher.wait())


def test_an_error_comes_after_the_steps_before_it(sets, tmp_path):
    """Whole steps are handed out first, with workers as without."""
    folder = tmp_path / "p"
    listed = write_published(folder, sorted(sets["videos"].iterdir())[:2])
    rows = json.loads(listed.read_text())["data"]
    bad = [{**rows[0], "video_id": f"gone{k}"} for k in range(30)]
    listed.write_text(json.dumps({"data": rows + bad}))
    counts = []
    for workers in (0, 2):
        loader = Loader(listed, 2, training=True, augmentation=PLAIN, workers=workers, seed=4, **SMALL)
        batches = []
        with pytest.raises(UnusableDataError):
            for batch in loader:
                batches.append(batch.ids)
        counts.append(batches)
    assert counts[0] == counts[1] != []


def test_an_error_waits_for_slower_steps_before_it(sets, tmp_path):
    """Also when the step that fails is the first to be done."""
    listed = write_published(tmp_path / "p", sorted(sets["videos"].iterdir())[:2])
    rows = json.loads(listed.read_text())["data"]
    listed.write_text(json.dumps({"data": rows + [{**rows[0], "video_id": "gone"}] * 2}))
    loader = Loader(listed, 2, training=True, augmentation=PLAIN, workers=1, **SMALL)
    decoder = loader._decoder
    decoder.substitute = lambda want, attempt: 2  # which is gone
    draws = loader.plan.draw(0, range(2))
    steps = [Step(0, first, draws, [Want(clip, False, clip, 0) for clip in (first, first + 1)]) for first in (0, 2)]
    submit, held = decoder.workers.submit, []

    def late(job, first=False):
        if job.tag[0].decoded.step is steps[0]:
            held.append(job)
        else:
            submit(job, first)

    def wait(timeout, real=decoder.workers.wait):
        done = real(timeout)
        if not done and held:  # everything else was done before
            submit(held.pop())
        return done

    decoder.workers.submit, decoder.workers.wait = late, wait
    decoded = decoder.decode(iter(steps), threading.Event())
    assert [info.id for info in next(decoded).infos] == [row["video_id"] for row in rows]
    with pytest.raises(UnusableDataError):
        next(decoded)
    loader.close()


# ----------------------------------------------------------------------------------------------------------- options


def test_weights_of_the_list_fit_its_shards(sets, tmp_path):
    rows = json.loads(sets["published"].read_text())["data"]
    weights = balance_weights([row["labels"].split(",") for row in rows], LabelSet.from_csv(sets["labels"]))
    write_weights(tmp_path / "w.csv", weights)
    bad = tmp_path / "p"
    listed = write_published(bad, sorted(sets["videos"].iterdir()))
    (bad / "sound" / f"{rows[2]['video_id']}.flac").write_bytes(b"")
    folder = write_shards(tmp_path / "shards", listed)
    loader = Loader(folder, 4, training=True, weights=tmp_path / "w.csv", workers=0, **SMALL)
    assert len(loader.clips) == 24 and np.array_equal(loader.order.weights, np.delete(weights, 2))
    assert np.array_equal(Loader(listed, 4, training=True, weights=tmp_path / "w.csv", workers=0).order.weights, weights)
    write_weights(tmp_path / "w.csv", weights[:9])
    with pytest.raises(LabelError, match=r"w\.csv: holds 9 rows"):
        Loader(folder, 4, training=True, weights=tmp_path / "w.csv", workers=0)
    with pytest.raises(LabelError, match=r"gone\.csv: cannot be read"):
        Loader(folder, 4, training=True, weights=tmp_path / "gone.csv", workers=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": -1}, "workers is -1; allowed: 0 or more"),
        ({"keep": True, "workers": 2}, "keep=True with workers=2; allowed: workers=0"),
        ({"image_size": 0}, r"image_size is \(0, 0\); it must be 1 or more"),
        ({"image_size": (64, 48)}, r"image_size is \(64, 48\); allowed: height and width that are equal"),
        ({"clip": ClipSpec(image_size=(64, 48)), "image_size": None}, r"image_size is \(64, 48\); allowed: height"),
        ({"clip": ClipSpec(), "std": 0.0}, "audio_std is 0.0; it must be above 0"),
        ({"prefetch": 0}, "prefetch is 0; allowed: 1 or more"),
        ({"clip": ClipSpec(frames=2, frame_rate=1.0), "frame": 3}, "frame is 3; allowed: None"),
        ({"clip": ClipSpec(frames=2, frame_rate=2.0)}, "the data set has 10 frames of each clip's 10 s; allowed: 1 or less"),
        ({"frame": 10}, "frame is 10; allowed: 0 to 9"),
        ({"rank": 1}, "rank is 1 and world_size None; allowed: both, or neither"),
        ({"rank": 2, "world_size": 2}, "allowed: clips and batch_size >= 1, 0 <= rank < world_size"),
        ({"training": True, "world_size": 10, "rank": 0}, "batch_size=4 on 10 ranks; allowed: 25 clips"),
        ({"backend": "ffmpeg"}, "backend is 'ffmpeg'; allowed: auto, torch, dali"),
        ({"backend": "dali"}, "workers is 0; allowed with backend='dali': 1 or more threads"),
        ({"weights": np.ones(25)}, "weights and mixup are for training=True"),
        ({"augmentation": Augmentation(mixup=0.5)}, "weights and mixup are for training=True"),
        ({"seed": -1}, "seed is -1; allowed: integers of 0 or more"),
        ({"training": True, "augmentation": Augmentation.FINE_TUNE}, "time_mask is 192; allowed: 0 to 112"),
    ],
)
def test_bad_options(sets, options, words):
    with pytest.raises(ValueError, match=words):
        Loader(sets["shards"], 4, **{**SMALL, "workers": 0, **options})


def test_the_back_end_says_why(sets):
    shards, videos = open_clips(sets["shards"]), open_clips(sets["videos"])
    assert choose_backend("auto", shards, torch.device("cpu")) == ("torch", "the device is a CPU")
    backend, reason = choose_backend("auto", shards, torch.device("cuda"))
    assert backend == "torch" and "not been proven" in reason
    assert choose_backend("torch", videos, torch.device("cuda")) == ("torch", "asked for")
    assert open_clips(shards) is shards and open_clips(videos) is videos
    with pytest.raises(MediaError, match="is a folder of shards; allowed: one such folder, and nothing beside it"):
        open_clips([sets["shards"], sets["videos"]])


# ---------------------------------------------------------------------------------------------------------- real clips


@pytest.mark.skipif(not SHARED.exists(), reason="the folder of real clips is not beside this checkout")
def test_real_clips_through_shards_equal_the_golden_features(tmp_path):
    """From H.264 and AAC to the model's input, against the published routine's log-mel values and our own decoder."""
    from safetensors.torch import load_file

    folder = write_shards(tmp_path / "shards", SHARED / "media", size=224)
    (batch,) = Loader(folder, 2, workers=1)
    for row, name in enumerate(batch.ids):
        golden = load_file(SHARED / "golden" / f"fbank_{name}.safetensors")
        frames = min(len(golden["fbank"]), 1022)  # 10.24 s hold that many whole windows
        wanted = (golden["fbank"][:frames] + 5.081) / 4.4849
        error = (batch.audio[row, :frames] - wanted).abs()
        # The golden float32 values are themselves up to 1.5e-3 from exact near the floor (tests/test_fbank.py).
        assert error.mean() < 2e-5 and error.max() < 2 * 1.5e-3
        assert (batch.audio[row, 1022:] == torch.tensor(5.081 / 4.4849)).all() or frames == 1022
        clip = read_clip(SHARED / "media" / f"{name}.mp4", frame=5)
        difference = batch.image[row].permute(1, 2, 0).float() - torch.from_numpy(clip.frames[0]).float()
        assert difference.abs().mean() < 3 and batch.image.shape == (2, 3, 224, 224)  # JPEG, quality 90


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_as_on_the_cpu(sets):
    """Features beside the model's stream, pinned memory, both back ends that are there."""
    options = {"training": True, "augmentation": Augmentation(mixup=0.5), "labels": sets["labels"], **SMALL}
    reference = run(Loader(sets["shards"], 8, workers=0, **options), 3)
    backends = ["torch"] if dali.available() else ["torch", "dali"]
    for backend in backends:
        loader = Loader(sets["shards"], 8, workers=2, device="cuda", backend=backend, **options)
        for batch, wanted in zip(run(loader, 3), reference, strict=True):
            assert batch.audio.is_cuda and batch.image.is_cuda and batch.labels.is_cuda and batch.ids == wanted.ids
            torch.testing.assert_close(batch.audio.cpu(), wanted.audio, atol=1e-3, rtol=0)
            if backend == "torch":  # nvJPEG's pixels may differ by a little
                torch.testing.assert_close(batch.image.cpu(), wanted.image, atol=1e-5, rtol=0)
            assert (batch.image.cpu() - wanted.image).abs().mean() < 0.02
            assert torch.equal(batch.labels.cpu(), wanted.labels)
