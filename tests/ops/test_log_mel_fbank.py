"""The log-mel operator's two implementations against the definition in float64. Kaldi and published values: test_fbank."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from cavmae_fast.ops import dispatch
from cavmae_fast.ops.log_mel_fbank import log_mel_fbank, log_mel_features
from cavmae_fast.ops.parity import assert_parity, error
from cavmae_fast.reference import fbank as reference

operator = importlib.import_module("cavmae_fast.ops.log_mel_fbank")
both = pytest.mark.parametrize("mode", ["torch", "triton"])
MEAN, STD = -5.081, 4.4849


def sound(name: str, samples: int = 4000, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(batch, samples, generator=generator, dtype=torch.float64)
    time = torch.arange(samples, dtype=torch.float64) / 16000
    values = {
        "noise": 0.1 * noise,
        "quiet beside a loud tone": 1e-4 * noise + 0.8 * torch.sin(2 * math.pi * 440 * time),
        "quiet beside a loud bass": 1e-5 * noise + 0.8 * torch.sin(2 * math.pi * 60 * time),
        "far from zero": 0.01 * noise + 0.5,
        "integers": 8000 * noise,
        "at the floor": 1e-5 * noise,
    }
    return values[name].float()


SOUNDS = (
    "noise",
    "quiet beside a loud tone",
    "quiet beside a loud bass",
    "far from zero",
    "integers",
    "at the floor",
)


@both
@pytest.mark.parametrize("name", SOUNDS)
def test_parity(mode, name):
    with dispatch.override(mode):
        assert_parity(log_mel_fbank, reference.log_mel_fbank, [sound(name)])


@both
@pytest.mark.parametrize(
    ("rate", "samples", "bins", "batch"),
    [
        (16000, 400, 128, 3),
        (16000, 559, 128, 1),
        (22050, 3000, 64, 2),
        (8000, 1201, 40, 1),
        (100, 7, 1, 2),
        (44100, 3000, 97, 1),
    ],
)
def test_parity_of_awkward_sizes(mode, rate, samples, bins, batch):
    with dispatch.override(mode):
        assert_parity(
            lambda x: log_mel_fbank(x, rate, bins),
            lambda x: reference.log_mel_fbank(x, rate, bins),
            [sound("noise", samples, batch)],
        )


def clips(dtype: torch.dtype) -> list[torch.Tensor]:
    """Three clips of different lengths; past its own end each row holds rubbish."""
    generator = torch.Generator().manual_seed(3)
    waveform = torch.randint(-9000, 12000, (3, 6000), generator=generator, dtype=torch.int16)
    count = torch.tensor([400, 3119, 6000])
    return [waveform if dtype == torch.int16 else (waveform / 32768).to(dtype), count]


@both
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
@pytest.mark.parametrize("length", [1, 36, 70])
def test_parity_of_features(mode, dtype, length):
    def exact(waveform, count):
        waveform = waveform.double() / 32768 if waveform.dtype == torch.int16 else waveform
        return reference.log_mel_features(waveform, count, length, MEAN, STD)

    with dispatch.override(mode):
        assert_parity(
            lambda waveform, count: log_mel_features(waveform, count, length, MEAN, STD),
            exact,
            clips(dtype),
            baseline=lambda waveform, count: reference.log_mel_features(waveform, count, length, MEAN, STD),
        )


@both
def test_what_lies_past_the_end_is_not_heard(mode):
    waveform, count = clips(torch.float32)
    with dispatch.override(mode):
        expected = log_mel_features(waveform, count, 40, MEAN, STD)
        for row, n in zip(waveform, count.tolist()):
            row[n:] = torch.nan
        assert torch.equal(log_mel_features(waveform, count, 40, MEAN, STD), expected)


@both
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_their_frames_alone(mode, bad):
    waveform = sound("noise", 4000).repeat(2, 1)
    waveform[0, 1000] = bad
    with dispatch.override(mode):
        broken = log_mel_features(waveform, torch.tensor([4000, 4000]), 23, MEAN, STD).isnan().any(dim=-1)
    assert broken[0, 4:7].all() and not broken[1].any()
    if mode == "triton":  # in PyTorch the whole clip loses its average first
        assert not broken[0, :4].any() and not broken[0, 7:].any()


@both
def test_strides_and_repeats(mode):
    waveform = sound("noise", 1500, 2)
    with dispatch.override(mode):
        expected = log_mel_fbank(waveform)
        wide = torch.full((2, 1700), torch.nan)
        wide[:, 100:1600] = waveform
        assert torch.equal(log_mel_fbank(wide[:, 100:1600]), expected)
        assert torch.equal(log_mel_fbank(waveform.T.contiguous().T), expected)
        assert torch.equal(log_mel_fbank(waveform[:1].expand(3, -1)), expected[:1].expand(3, -1, -1))


def test_many_mel_bins_go_to_pytorch():
    waveform = sound("noise", 800)
    with dispatch.override("triton"):
        got = log_mel_fbank(waveform, 16000, 200)
    with dispatch.override("torch"):
        assert torch.equal(got, log_mel_fbank(waveform, 16000, 200))


def test_errors():
    waveform, count = torch.zeros(2, 800), torch.tensor([800, 800])
    with pytest.raises(ValueError, match="length is 0; allowed: 1 or more frames"):
        log_mel_features(waveform, count, 0, MEAN, STD)
    with pytest.raises(ValueError, match=r"num_samples lies in \[800, 801\]; allowed: 400 to 800"):
        log_mel_features(waveform, count + torch.tensor([0, 1]), 4, MEAN, STD)
    with pytest.raises(ValueError, match="waveform has 399 samples"):
        log_mel_features(waveform[:, :399], count, 4, MEAN, STD)
    with pytest.raises(TypeError, match=r"waveform is torch\.int32; allowed: int16 or floating point"):
        log_mel_features(waveform.int(), count, 4, MEAN, STD)


# ------------------------------------------------------------------------------- what the interpreter does not round


def truncated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """float64 values cut to `bits` bits, towards zero."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**bits).trunc(), exponent - bits)


def tensor_core(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`total + a b`: exact products, the sum cut to float32's 24 bits."""
    return truncated(total + a @ b, 24)


def emulated(waveform: torch.Tensor) -> torch.Tensor:
    """The kernel's numbers as tensor cores give them: float32 and fp16 where it has them, sums that are truncated, and
    TF32 parts that are. The interpreter adds in float32 and takes no notice of TF32."""
    cosines, sines, filters = operator._tables(16000, 128, waveform.device)
    frames = waveform.unfold(-1, 400, 160)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    frames = torch.cat([frames[..., :1], frames[..., 1:] - 0.97 * frames[..., :-1]], dim=-1)
    right, left = frames[..., 200:], frames[..., :200].flip(-1)
    scale = 2.0 ** (11 - frames.abs().amax(-1, keepdim=True).log2().floor())
    power = torch.zeros(())
    for value, table in (((right + left) * scale, cosines), ((right - left) * scale, sines)):
        value = torch.nn.functional.pad(value, (0, table.shape[1] - 200))
        high = value.half()
        low = (value - high.float()).half()
        total = torch.zeros(*value.shape[:-1], table.shape[2])
        for k in range(0, table.shape[1], operator.BLOCK_K):
            here = slice(k, k + operator.BLOCK_K)
            table_high, table_low = table[:, here].double()
            part = tensor_core(low[..., here].double(), table_high, torch.zeros((), dtype=torch.float64))
            part = tensor_core(high[..., here].double(), table_low, part)
            total += tensor_core(high[..., here].double(), table_high, part).float()
        power = power + total * total
    energies = torch.zeros(*power.shape[:-1], 128, dtype=torch.float64)
    power, weights = power.double(), filters.double()
    power_high, weights_high = truncated(power, 11), truncated(weights, 11)
    power_low, weights_low = truncated(power - power_high, 11), truncated(weights - weights_high, 11)
    for k in range(0, 256, 8):
        here = slice(k, k + 8)
        for a, b in ((power_low, weights_high), (power_high, weights_low), (power_high, weights_high)):
            energies = tensor_core(a[..., here], b[here], energies)
    energies = energies / (scale.double() * 2**operator.TABLE_BITS) ** 2
    return energies.clamp(min=reference.ENERGY_FLOOR).log().float()


@pytest.mark.parametrize("name", SOUNDS)
def test_tensor_cores_are_as_exact_as_a_float32_fft(name):
    waveform = sound(name)
    exact = reference.log_mel_fbank(waveform.double())
    own = error(reference.log_mel_fbank(waveform), exact)
    assert error(emulated(waveform), exact) <= 2 * own + 2 * torch.finfo(torch.float32).eps
