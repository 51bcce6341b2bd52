"""Augmentation: draws that depend on the position alone and follow the published distributions; batched arithmetic equal to
plain per-clip code."""

import math
import random
import time
from dataclasses import fields

import numpy as np
import pytest
import torch

from cavmae_fast.data import draws as draws_module
from cavmae_fast.data.augment import mask_spectrogram, mix_images, mix_waveforms, noise_and_roll
from cavmae_fast.data.draws import Augmentation, Draws, draw, generator_for
from cavmae_fast.data.features import AUDIO_MEAN, AUDIO_STD, audio_features
from cavmae_fast.ops.parity import error

RECIPE = Augmentation.FINE_TUNE
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
EPS = torch.finfo(torch.float32).eps
# Half a unit in the last place for each of three roundings, of normally distributed numbers and their sums: below 6.
ROUNDINGS = 3 * EPS / 2 * 6


def draws_of(augmentation: Augmentation = RECIPE, **arguments) -> Draws:
    return draw(augmentation, **{"seed": 7, "epoch": 3, "position": 0, "rows": 8, "num_clips": 20000, **arguments})


def equal(a: Draws, b: Draws) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Draws))


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    """How many standard deviations Pearson's statistic lies from its mean."""
    freedom = counts.size - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


def same_distribution(a: np.ndarray, b: np.ndarray) -> bool:
    """Two-sample Kolmogorov-Smirnov test that a true null passes but once in a million."""
    both = np.sort(np.concatenate([a, b]))
    gap = np.abs(
        np.searchsorted(np.sort(a), both, side="right") / len(a) - np.searchsorted(np.sort(b), both, side="right") / len(b)
    )
    return bool(gap.max() < math.sqrt(-math.log(0.5e-6) * (len(a) + len(b)) / (2 * len(a) * len(b))))


def is_beta_10_10(values: np.ndarray) -> bool:
    """Kolmogorov-Smirnov test against the exact distribution: 10 or more of 19 uniform numbers are smaller."""
    values = np.sort(values)
    below = sum(math.comb(19, k) * values**k * (1 - values) ** (19 - k) for k in range(10, 20))
    gap = np.abs(below - (np.arange(len(values)) + 0.5) / len(values)).max()
    return bool(gap < math.sqrt(-math.log(0.5e-6) / (2 * len(values))))


# Recipes


def test_published_recipes():
    assert Augmentation() == Augmentation(True, 0.0, 0, 0, False, 0.0)
    assert Augmentation(noise=True) == Augmentation.PRETRAIN
    fine_tune = Augmentation(mixup=0.5, freq_mask=48, time_mask=192, noise=True, label_smoothing=0.1)
    assert fine_tune == Augmentation.FINE_TUNE
    assert Augmentation(random_frame=False) == Augmentation.EVALUATE


@pytest.mark.parametrize(
    "arguments, cause",
    [
        ({"mixup": -0.1}, "mixup is -0.1; allowed: 0 to 1"),
        ({"mixup": 1.5}, "mixup is 1.5"),
        ({"mixup": math.nan}, "mixup is nan"),
        ({"freq_mask": -1}, "freq_mask is -1"),
        ({"time_mask": 1.5}, "time_mask is 1.5"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
    ],
)
def test_bad_recipes(arguments, cause):
    with pytest.raises(ValueError, match=cause):
        Augmentation(**arguments)


# Draws


def test_draws_do_not_depend_on_batching():
    whole = draws_of(rows=300)
    for start, stop in [(0, 1), (0, 48), (48, 96), (299, 300), (17, 208), (300, 300)]:
        assert equal(draws_of(position=start, rows=stop - start), whole[start:stop])
    shuffled = np.random.default_rng(0).permutation(300)
    assert equal(whole[shuffled][np.argsort(shuffled)], whole)
    assert len(whole) == 300 and len(whole[10:20]) == 10


def test_draws_are_repeatable_and_differ_by_seed_epoch_and_position():
    assert equal(draws_of(), draws_of())
    assert equal(draws_of(seed=np.int64(7), epoch=np.int64(3), position=np.int64(0)), draws_of())
    for other in ({"seed": 8}, {"epoch": 4}, {"position": 8}, {"seed": 3, "epoch": 7}):
        assert not np.isin(draws_of(**other).level, draws_of().level).any()


def test_draws_never_change():
    """Golden values: a run that is rebuilt from its seed must meet the same clips."""
    draws = draws_of(position=1000, rows=4)
    assert (draws.moment * 10).astype(int).tolist() == [0, 1, 3, 6]  # the frame, of ten
    assert draws.mixed.tolist() == [True, False, True, False]
    assert draws.lam.tolist() == [0.469475947756108, 1.0, 0.4115964462134385, 1.0]
    assert draws.partner.tolist() == [1579, -1, 10260, -1]
    assert np.floor(draws.partner_moment * 10).astype(int).tolist() == [0, -10, 9, -10]
    assert draws.freq.tolist() == [[22, 22], [56, 12], [3, 46], [70, 46]]
    assert draws.time.tolist() == [[500, 7], [449, 133], [201, 78], [311, 74]]
    assert draws.level.tolist() == [0.0789907590491318, 0.046197336961676855, 0.031136713086564072, 0.06056363787095584]
    assert draws.shift.tolist() == [27, 42, 945, 72]
    assert generator_for("cpu", 7, 3, 1000).initial_seed() == 10983075419280070355
    far = draws_of(seed=2**63 - 1, epoch=2**63 - 1, position=2**62, rows=2)
    assert (far.moment * 10).astype(int).tolist() == [7, 6] and far.shift.tolist() == [-950, 957]


def test_kinds_of_draws():
    draws = draws_of(rows=5)
    kinds = {field.name: (getattr(draws, field.name).dtype, getattr(draws, field.name).shape) for field in fields(Draws)}
    whole, real = np.dtype(np.int64), np.dtype(np.float64)
    assert kinds == {
        "moment": (real, (5,)),
        "mixed": (np.dtype(bool), (5,)),
        "lam": (real, (5,)),
        "partner": (whole, (5,)),
        "partner_moment": (real, (5,)),
        "freq": (whole, (5, 2)),
        "time": (whole, (5, 2)),
        "level": (real, (5,)),
        "shift": (whole, (5,)),
    }


def test_what_is_switched_off_is_not_done_and_leaves_the_rest():
    on, off = draws_of(rows=100), draws_of(Augmentation(random_frame=False), rows=100)
    assert (off.moment == 0.5).all() and not off.mixed.any()
    assert (off.lam == 1).all() and (off.partner == -1).all() and (off.partner_moment == -1).all()
    assert not off.freq[:, 1].any() and not off.time[:, 1].any() and not off.level.any() and not off.shift.any()

    pretrain = draws_of(Augmentation.PRETRAIN, rows=100)
    for name in ("moment", "level", "shift"):
        np.testing.assert_array_equal(getattr(pretrain, name), getattr(on, name))
    fixed = draws_of(Augmentation(random_frame=False, mixup=1.0), rows=100)
    assert fixed.mixed.all() and (fixed.partner_moment == 0.5).all()
    np.testing.assert_array_equal(fixed.partner[on.mixed], on.partner[on.mixed])


def test_rows_that_are_not_mixed_are_marked():
    draws = draws_of(rows=1000)
    assert ((draws.lam == 1) == ~draws.mixed).all()
    assert ((draws.partner == -1) == ~draws.mixed).all() and ((draws.partner_moment == -1) == ~draws.mixed).all()


@pytest.mark.parametrize(
    "arguments, cause",
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808; allowed: 0 to"),
        ({"epoch": -1}, "epoch is -1"),
        ({"position": -1}, "position is -1"),
        ({"rows": -1}, "rows is -1"),
        ({"num_clips": 0}, "num_clips is 0; allowed: 1 or more"),
        ({"audio_length": 0}, "audio_length is 0"),
        ({"audio_length": 191}, "time_mask is 192; allowed: 0 to 191"),
        ({"num_mel_bins": 47}, "freq_mask is 48; allowed: 0 to 47"),
    ],
)
def test_bad_draws(arguments, cause):
    with pytest.raises(ValueError, match=cause):
        draws_of(**arguments)


def test_draws_are_cheap():
    """0.1 ms for 256 rows on the machine this was written on; the margin is for busy ones."""
    times = []
    for _ in range(50):
        start = time.perf_counter()
        draws_of(rows=256)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


# Distributions


def uniforms(seed: int, epoch: int, position: int, rows: int) -> np.ndarray:
    return (draws_module._words(seed, epoch, position, rows) >> np.uint64(11)) * 2.0**-53


def test_every_column_is_uniform():
    values = uniforms(0, 0, 0, 50_000)
    assert values.min() >= 0 and values.max() < 1
    for column in values.T:
        assert abs(chi_square(np.histogram(column, 100, (0, 1))[0], len(column) / 100)) < 5
        low_bits = (column * 2**53).astype(np.int64) & 63
        assert abs(chi_square(np.bincount(low_bits, minlength=64), len(column) / 64)) < 5


@pytest.mark.parametrize("other", ["column", "position", "seed", "epoch", "swapped"])
def test_neighbors_are_independent(other):
    rows = 20_000
    base = uniforms(1, 2, 0, rows)
    compared = {
        "column": base,
        "position": uniforms(1, 2, 1, rows),
        "seed": uniforms(2, 2, 0, rows),
        "epoch": uniforms(1, 3, 0, rows),
        "swapped": uniforms(2, 1, 0, rows),
    }[other]
    correlations = np.corrcoef(base.T, compared.T)[:32, 32:]
    if other == "column":
        assert (np.diag(correlations) > 0.999).all()
        correlations = correlations - np.diag(np.diag(correlations))
    assert np.abs(correlations).max() < 5 / math.sqrt(rows)
    # Beyond correlation: the joint distribution of pairs on an 8 x 8 grid.
    for column in range(32):
        theirs = compared[:, (column + 1) % 32 if other == "column" else column]
        grid = np.histogram2d(base[:, column], theirs, 8, ((0, 1), (0, 1)))[0]
        assert abs(chi_square(grid, rows / 64)) < 5


def test_first_rows_of_many_seeds_are_uniform():
    first = np.concatenate([uniforms(seed, epoch, 0, 1) for seed in range(200) for epoch in range(20)])
    for column in first.T:
        assert abs(chi_square(np.histogram(column, 20, (0, 1))[0], len(first) / 20)) < 5


def test_the_statistics_here_can_fail():
    rng = np.random.default_rng(0)
    assert chi_square(np.histogram(rng.random(50_000) ** 1.05, 100, (0, 1))[0], 500) > 5
    assert not same_distribution(rng.beta(10, 10, 40_000), rng.beta(8, 8, 40_000))
    assert not is_beta_10_10(rng.beta(9, 9, 200_000)) and is_beta_10_10(rng.beta(10, 10, 200_000))
    assert same_distribution(rng.beta(10, 10, 40_000), rng.beta(10, 10, 40_000))


def test_lambda_is_beta_10_10():
    assert is_beta_10_10(draws_of(Augmentation(mixup=1.0), rows=200_000).lam)


def published_draw(rng: random.Random, beta: np.random.Generator) -> dict[str, float]:
    """One clip's decisions, one after the other, by the published data loader and torchaudio's masking."""
    mixed = rng.random() < 0.5
    freq_value = rng.random() * 48
    freq_start = int(rng.random() * (128 - freq_value))
    time_value = rng.random() * 192
    time_start = int(rng.random() * (1024 - time_value))
    return {
        "mixed": mixed,
        "partner": rng.randint(0, 999) if mixed else -1,
        "frame": rng.randint(0, 9),
        "partner_frame": rng.randint(0, 9) if mixed else -1,
        "lam": beta.beta(10, 10) if mixed else 1.0,
        "freq_start": freq_start,
        "freq_end": freq_start + int(freq_value),
        "freq_width": int(freq_value),
        "time_start": time_start,
        "time_end": time_start + int(time_value),
        "time_width": int(time_value),
        "level": rng.random() / 10,
        "shift": rng.randrange(-1024, 1024),
    }


def test_draws_are_distributed_as_published():
    rows = 40_000
    draws = draws_of(rows=rows, num_clips=1000)
    ours = {field.name: getattr(draws, field.name) for field in fields(Draws)}
    ours["frame"] = (10 * ours.pop("moment")).astype(int)
    ours["partner_frame"] = np.where(draws.mixed, (10 * ours.pop("partner_moment")).astype(int), -1)
    for name in ("freq", "time"):
        start, width = ours.pop(name).T
        ours |= {f"{name}_start": start, f"{name}_width": width, f"{name}_end": start + width}
    rng, beta = random.Random(0), np.random.default_rng(0)
    published = [published_draw(rng, beta) for _ in range(rows)]
    assert ours.keys() == published[0].keys()
    for name, values in ours.items():
        assert same_distribution(values, np.array([row[name] for row in published])), name
    assert set(ours["frame"]) == set(range(10)) and set(ours["partner"]) == set(range(-1, 1000))
    assert ours["shift"].min() == -1024 and ours["shift"].max() == 1023
    assert ours["freq_width"].max() == 47 and ours["freq_end"].max() <= 128 and ours["freq_start"].min() == 0
    assert ours["time_width"].max() == 191 and ours["time_end"].max() <= 1024


# Sound


def sound(batch: int, samples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-20000, 20000, (batch, samples), generator=generator, dtype=torch.int32).to(torch.int16) // 2 + 3000


def published_mixture(first: np.ndarray, second: np.ndarray, lam: float) -> np.ndarray:
    """One clip's mixed sound in the arrays' dtype, by the published rule; they hold the clips' own samples."""
    first, second = first - first.mean(), second - second.mean()
    fitted = np.zeros_like(first)
    common = min(len(first), len(second))
    fitted[:common] = second[:common]
    mixed = lam * first + (1 - lam) * fitted
    return mixed - mixed.mean()


@DEVICES
@pytest.mark.parametrize("width", [1500, 2000, 2600])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
def test_mixed_sound_is_the_published_rule(device, width, dtype):
    lam = np.array([0.3, 0.5, 0.71, 0.999, 0.02])
    counts, other_counts = [2000, 500, 1400, 1999, 400], [width, width - 1, 400, 1, 1400]
    waveform, other = sound(5, 2000, 1), sound(5, width, 2)
    exact, baseline = torch.zeros(5, 2000, dtype=torch.float64), torch.zeros(5, 2000)
    for row, (n, m) in enumerate(zip(counts, other_counts)):
        for mixture, kind in ((exact, np.float64), (baseline, np.float32)):
            first, second = (t.numpy().astype(kind) / kind(32768) for t in (waveform[row, :n], other[row, :m]))
            mixture[row, :n] = torch.from_numpy(published_mixture(first, second, kind(lam[row])))
    if dtype != torch.int16:
        waveform, other = waveform.to(dtype) / 32768, other.to(dtype) / 32768
        for t, own in ((waveform, counts), (other, other_counts)):  # what lies past the end may be anything
            t.masked_fill_(torch.arange(t.shape[1]) >= torch.tensor(own)[:, None], torch.nan)
    num_samples = torch.tensor(counts)
    before = waveform.clone(), other.clone()
    mixed, length = mix_waveforms(waveform.to(device), num_samples, other.to(device), torch.tensor(other_counts), lam)
    assert mixed.dtype == torch.float32 and mixed.device.type == device and mixed.shape == (5, 2000)
    assert length is num_samples
    assert error(mixed.cpu(), exact) <= 2 * error(baseline, exact) + 2 * EPS
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(before, (waveform, other)))


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_a_clip_that_is_not_mixed_keeps_its_features_to_the_bit(dtype):
    waveform = sound(4, 16000, 1)
    waveform = waveform if dtype == torch.int16 else waveform / 32768
    num_samples = torch.tensor([16000, 9000, 400, 16000])
    other = torch.full((4, 800), torch.nan)
    mixed, length = mix_waveforms(waveform, num_samples, other, torch.tensor([800, 0, 3, 0]), torch.ones(4))
    features = audio_features(mixed, length, 100)
    assert torch.equal(features, audio_features(waveform, num_samples, 100)) and features.isfinite().all()


def test_the_mixture_keeps_its_mean_at_zero_and_the_features_see_it():
    waveform, other = sound(2, 16000, 1), sound(2, 16000, 2)
    count = torch.tensor([16000, 12000])
    mixed, _ = mix_waveforms(waveform, count, other, torch.tensor([10000, 16000]), np.array([0.4, 0.6]))
    # The mean is rounded, by up to a unit in the last place of the loudest sample.
    assert mixed.double().mean(1).abs().max() <= EPS * mixed.abs().max() and not mixed[1, 12000:].any()
    assert not torch.equal(audio_features(mixed, count, 100), audio_features(waveform, count, 100))


@pytest.mark.parametrize(
    "change, error, cause",
    [
        ({"waveform": torch.zeros(2, 9, dtype=torch.int32)}, TypeError, "waveform is torch.int32"),
        ({"other": torch.zeros(2, 9, dtype=torch.uint8)}, TypeError, "other is torch.uint8"),
        ({"waveform": torch.zeros(9)}, ValueError, r"waveform has shape \[9\]"),
        ({"other": torch.zeros(3, 9)}, ValueError, r"other has shape \[3, 9\]"),
        ({"num_samples": torch.tensor([9])}, ValueError, r"num_samples has shape \[1\]; allowed: \[2\]"),
        ({"other_num_samples": torch.tensor([[9], [9]])}, ValueError, r"other_num_samples has shape \[2, 1\]"),
        ({"num_samples": torch.tensor([10, 9])}, ValueError, r"of waveform lies in \[9, 10\]; allowed: 0 to 9"),
        ({"other_num_samples": torch.tensor([-1, 9])}, ValueError, r"of other lies in \[-1, 9\]"),
        ({"num_samples": torch.tensor([9.0, 9.0])}, TypeError, "num_samples is torch.float32"),
        ({"lam": np.ones(3)}, ValueError, r"lam has shape \[3\]; allowed: \[2\]"),
    ],
)
def test_bad_sound(change, error, cause):
    count = torch.tensor([9, 9])
    arguments = {
        "waveform": torch.zeros(2, 9),
        "num_samples": count,
        "other": torch.zeros(2, 9),
        "other_num_samples": count,
        "lam": np.ones(2),
    }
    with pytest.raises(error, match=cause):
        mix_waveforms(**(arguments | change))


# Pictures


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_images(device, dtype):
    generator = torch.Generator().manual_seed(0)
    image, other = torch.randn(2, 3, 3, 8, 6, generator=generator, dtype=dtype)
    lam = np.array([0.3, 1.0, 0.8])
    mixed = mix_images(image.to(device), other.to(device), lam)
    assert mixed.dtype == dtype and mixed.device.type == device
    for row in range(3):
        expected = lam[row] * image[row] + (1 - lam[row]) * other[row]
        torch.testing.assert_close(mixed[row].cpu(), expected, rtol=0, atol=ROUNDINGS)
    assert torch.equal(mixed[1].cpu(), image[1])


@pytest.mark.parametrize(
    "image, other, lam, error, cause",
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4), torch.ones(2), TypeError, "image is .*uint8"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).double(), torch.ones(2), TypeError, "other torch.float64"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5), torch.ones(2), ValueError, r"other \[2, 3, 4, 5\]"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.ones(3), ValueError, r"image is \[3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.ones(2, 1), ValueError, r"lam has shape \[2, 1\]"),
    ],
)
def test_bad_images(image, other, lam, error, cause):
    with pytest.raises(error, match=cause):
        mix_images(image, other, lam)


# Spectrograms


def normalize(log_mel: torch.Tensor) -> torch.Tensor:
    return (log_mel - AUDIO_MEAN) / AUDIO_STD


@DEVICES
@pytest.mark.parametrize("place", [torch.from_numpy, np.asarray], ids=["tensor", "array"])
def test_masks_equal_masking_with_zero_before_normalizing(device, place):
    log_mel = torch.randn(40, 200, 128, generator=torch.Generator().manual_seed(0)) * 4 - 5
    draws = draws_of(rows=40, audio_length=200)
    expected = log_mel.clone()
    for row in range(40):
        (bin0, bins), (frame0, frames) = draws.freq[row], draws.time[row]
        expected[row, :, bin0 : bin0 + bins] = 0
        expected[row, frame0 : frame0 + frames, :] = 0
    features = normalize(log_mel)
    before = features.clone()
    masked = mask_spectrogram(features.to(device), place(draws.freq), place(draws.time))
    assert torch.equal(masked.cpu(), normalize(expected)) and torch.equal(features, before)
    assert not torch.equal(masked.cpu(), before)


def test_masks_of_no_width_and_other_dtypes():
    features = torch.randn(3, 20, 16)
    none = np.array([[0, 0], [5, 0], [15, 0]])
    assert torch.equal(mask_spectrogram(features, none, none), features)
    everything = np.array([[0, 16]] * 3)
    masked = mask_spectrogram(features.bfloat16(), everything, none, fill=2.0)
    assert masked.dtype == torch.bfloat16 and (masked == 2).all()


@DEVICES
@pytest.mark.parametrize("shape", [(12, 30, 7), (1, 1, 1), (5, 97, 128)])
def test_noise_and_roll_clip_by_clip(device, shape):
    rng = np.random.default_rng(0)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    before = features.clone()
    level = rng.random(shape[0]) / 10
    shift = rng.integers(-shape[1], shape[1], shape[0])
    shift[0] = -shape[1]
    result = noise_and_roll(features, level, shift, generator_for(device, 1, 2, 3))
    generator = generator_for(device, 1, 2, 3)
    field = torch.stack([torch.rand(shape[1:], generator=generator, device=device) for _ in range(shape[0])])
    for row in range(shape[0]):
        expected = torch.roll(features[row] + field[row] * float(level[row]), int(shift[row]), 0)
        torch.testing.assert_close(result[row], expected, rtol=0, atol=ROUNDINGS)
    assert torch.equal(features, before) and result.dtype == torch.float32


@DEVICES
@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4, 5], [5], [1, 4]], ids=str)
def test_noise_depends_on_the_row_of_the_step(device, rows):
    """Whichever rank has it, and whatever other rows it has."""
    features = torch.randn(6, 20, 16, generator=torch.Generator().manual_seed(0)).to(device)
    level, shift = np.full(6, 0.1), np.arange(6)
    whole = noise_and_roll(features, level, shift, generator_for(device, 0, 0, 0))
    part = noise_and_roll(features[rows], level[rows], shift[rows], generator_for(device, 0, 0, 0), np.array(rows))
    assert torch.equal(part, whole[rows])


def test_no_noise_and_no_shift_change_nothing():
    features = torch.randn(3, 20, 16)
    zeros = np.zeros(3)
    assert torch.equal(noise_and_roll(features, zeros, zeros.astype(int), generator_for("cpu", 0, 0, 0)), features)


def test_generators_repeat_and_differ():
    def numbers(*key: int) -> torch.Tensor:
        return torch.rand(8, generator=generator_for("cpu", *key))

    assert torch.equal(numbers(1, 2, 3), numbers(1, 2, 3))
    keys = [(1, 2, 3), (2, 1, 3), (1, 3, 2), (1, 2, 4), (0, 2, 3), (1, 2, 2**40)]
    assert len({tuple(numbers(*key).tolist()) for key in keys}) == len(keys)
    with pytest.raises(ValueError, match="epoch is -1"):
        generator_for("cpu", 0, -1, 0)


@pytest.mark.parametrize(
    "call, error, cause",
    [
        (lambda x, pair, one, g: mask_spectrogram(x.int(), pair, pair), TypeError, "features is torch.int32"),
        (lambda x, pair, one, g: mask_spectrogram(x[0], pair, pair), ValueError, r"features has shape \[20, 16\]"),
        (lambda x, pair, one, g: mask_spectrogram(x, one, pair), ValueError, r"freq has shape \[2\]; allowed: \[2, 2\]"),
        (lambda x, pair, one, g: mask_spectrogram(x, pair, pair * 1.0), TypeError, "time is .*64; allowed: integers"),
        (lambda x, pair, one, g: noise_and_roll(x, pair, one, g), ValueError, r"level has shape \[2, 2\]; allowed: \[2\]"),
        (lambda x, pair, one, g: noise_and_roll(x, one, one[:1], g), ValueError, r"shift has shape \[1\]"),
        (lambda x, pair, one, g: noise_and_roll(x, one, one * 1.0, g), TypeError, "shift is torch.float64"),
        (lambda x, pair, one, g: noise_and_roll(x.to("meta"), one, one, g), ValueError, "generator is on cpu; .* meta"),
    ],
)
def test_bad_spectrograms(call, error, cause):
    pair, one = np.zeros((2, 2), np.int64), np.zeros(2, np.int64)
    with pytest.raises(error, match=cause):
        call(torch.zeros(2, 20, 16), pair, one, torch.Generator())


def test_nothing_looks_at_values_on_the_device():
    """Tensors without values: whatever would wait for a device raises here."""
    draws = draws_of(rows=2, audio_length=200)
    waveform = torch.zeros(2, 3200, dtype=torch.int16, device="meta")
    count = torch.full((2,), 3200)
    assert mix_waveforms(waveform, count, waveform[:, :1600], count.to("meta"), draws.lam)[0].shape == (2, 3200)
    image = torch.zeros(2, 3, 8, 8, device="meta")
    assert mix_images(image, image, torch.from_numpy(draws.lam).to("meta")).shape == image.shape
    features = torch.zeros(2, 200, 128, device="meta")
    assert mask_spectrogram(features, torch.from_numpy(draws.freq).to("meta"), draws.time).shape == features.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_step_waits_for_the_gpu():
    draws = draws_of(rows=4)
    waveform = sound(4, 16000, 0).cuda()
    count = torch.full((4,), 16000)
    image, features = torch.zeros(4, 3, 32, 32, device="cuda"), torch.zeros(4, 1024, 128, device="cuda")
    generator = generator_for("cuda", 0, 0, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_waveforms(waveform, count, waveform, count, draws.lam)
        mix_images(image, image, draws.lam)
        features = mask_spectrogram(features, draws.freq, draws.time)
        noise_and_roll(features, draws.level, draws.shift, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_whole_chain_is_the_published_one():
    """Mask, normalize, add noise and roll, one clip at a time, from the same draws and the same noise."""
    draws = draws_of(rows=16, audio_length=250)
    log_mel = torch.randn(16, 250, 128, generator=torch.Generator().manual_seed(0)) * 4 - 5
    ours = mask_spectrogram(normalize(log_mel), draws.freq, draws.time)
    ours = noise_and_roll(ours, draws.level, draws.shift, generator_for("cpu", 7, 3, 0))
    noise = torch.rand(log_mel.shape, generator=generator_for("cpu", 7, 3, 0))
    for row in range(16):
        clip = log_mel[row].clone()
        (bin0, bins), (frame0, frames) = draws.freq[row], draws.time[row]
        clip[:, bin0 : bin0 + bins] = 0
        clip[frame0 : frame0 + frames] = 0
        clip = normalize(clip) + noise[row] * float(draws.level[row])
        clip = torch.cat([clip[-int(draws.shift[row]) % 250 :], clip[: -int(draws.shift[row]) % 250]])
        torch.testing.assert_close(ours[row], clip, rtol=0, atol=ROUNDINGS)
