"""The log-mel features: against Kaldi, the published values and an oracle; and the normalized model inputs."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from cavmae_fast.data.features import audio_features, image_features
from cavmae_fast.ops.log_mel_fbank import log_mel_fbank
from cavmae_fast.ops.parity import assert_parity, error
from cavmae_fast.reference import fbank as reference

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
BOTH = pytest.mark.parametrize("function", [reference.log_mel_fbank, log_mel_fbank], ids=["reference", "op"])


def noise(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.1 + offset).to(dtype)


@BOTH
@pytest.mark.parametrize("name", ["00W1lcxW-WU_40.000", "nasa_13013"])
def test_golden(name, function):
    """Parity with torchaudio's float32 values, judged against the exact (float64) evaluation.

    A float32 FFT rounds relative to a frame's loudest bin, so bins near the energy floor are uncertain: the golden
    values are themselves up to 1.5e-3 from exact there. Allowed: twice the golden values' own error.
    """
    path = GOLDEN / f"fbank_{name}.safetensors"
    if not path.exists():
        pytest.skip(f"golden values are absent: {path}")
    from safetensors.torch import load_file

    golden = load_file(path)
    waveform = golden["waveform_s16"].float() / 32768
    waveform = waveform - waveform.mean()
    exact = reference.log_mel_fbank(waveform.double())[0]
    features = function(waveform)[0].double()
    assert features.shape == golden["fbank"].shape
    for loud in (-16.0, -14.0, -8.0):
        chosen = golden["fbank"] > loud
        own = (golden["fbank"].double() - exact).abs()[chosen]
        ours = (features - exact).abs()[chosen]
        assert ours.max() <= 2 * own.max() and ours.mean() <= 2 * own.mean()
    assert (golden["fbank"] - exact).abs().mean() < 2e-5  # of which no number depends on this machine


@BOTH
@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050])
def test_kaldi_native_fbank(sample_rate, function):
    knf = pytest.importorskip("kaldi_native_fbank")
    waveform = noise(sample_rate)
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = sample_rate
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = 64
    options.htk_compat = True
    options.use_energy = False
    computer = knf.OnlineFbank(options)
    computer.accept_waveform(sample_rate, waveform.tolist())
    computer.input_finished()
    expected = torch.stack([torch.as_tensor(computer.get_frame(i)) for i in range(computer.num_frames_ready)])
    exact = reference.log_mel_fbank(waveform.double(), sample_rate, 64)[0]
    assert (expected - exact).abs().max() < 1e-3  # Kaldi's own error, in float32 and near the floor
    assert error(function(waveform, sample_rate, 64)[0], exact) <= 2 * error(expected, exact)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("samples", [400, 559, 560, 16001])
def test_op_equals_oracle(samples, offset):
    waveform = noise(3, samples, dtype=torch.float64, offset=offset)
    expected = reference.log_mel_fbank(waveform)
    torch.testing.assert_close(log_mel_fbank(waveform), expected, atol=1e-9, rtol=0)
    assert_parity(log_mel_fbank, reference.log_mel_fbank, [waveform.float()])


def test_blocks_and_batches_change_nothing(monkeypatch):
    waveform = noise(5, 8000, dtype=torch.float64)
    whole = log_mel_fbank(waveform)
    singles = torch.cat([log_mel_fbank(row) for row in waveform])
    monkeypatch.setitem(importlib.import_module("cavmae_fast.ops.log_mel_fbank")._BLOCK_FRAMES, "cpu", 17)
    for other in (singles, log_mel_fbank(waveform), reference.log_mel_fbank(waveform)):
        torch.testing.assert_close(other, whole, atol=1e-9, rtol=0)


def test_low_precision_switches_do_not_reach_it():
    waveform = noise(2, 4000)
    expected = log_mel_fbank(waveform)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(log_mel_fbank(waveform), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@BOTH
def test_silence_sits_on_the_floor(function):
    features = function(torch.zeros(1, 1600))
    assert features.shape == (1, 8, 128) and features.dtype == torch.float32
    expected = torch.full_like(features, math.log(reference.ENERGY_FLOOR))
    torch.testing.assert_close(features, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@BOTH
def test_inputs(function):
    strided = noise(2, 2000, 2, dtype=torch.float64)[..., 0]
    torch.testing.assert_close(function(strided), function(strided.contiguous()), atol=1e-9, rtol=0)
    assert function(noise(800, dtype=torch.bfloat16)).dtype == torch.float32
    assert log_mel_fbank(noise(0, 800)).shape == (0, 3, 128)
    assert not log_mel_fbank(noise(800).requires_grad_()).requires_grad


@BOTH
def test_errors(function):
    with pytest.raises(ValueError, match=r"waveform has 399 samples.*400 samples at 16000 Hz"):
        function(noise(399))
    with pytest.raises(ValueError, match=r"waveform has shape \[1, 1, 800\]"):
        function(noise(1, 1, 800))
    with pytest.raises(TypeError, match=r"waveform is torch.int16"):
        function(torch.zeros(800, dtype=torch.int16))
    with pytest.raises(ValueError, match="num_mel_bins is 0"):
        function(noise(800), 16000, 0)
    with pytest.raises(ValueError, match="sample_rate is 50"):
        function(noise(800), 50)


def published_features(samples: torch.Tensor, audio_length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """One clip as the published loader does it: center, log-mel, pad or cut, normalize."""
    waveform = samples.to(dtype) / 32768
    features = reference.log_mel_fbank(waveform - waveform.mean())[0][:audio_length]
    padded = torch.nn.functional.pad(features, (0, 0, 0, audio_length - len(features)))
    return (padded + 5.081) / 4.4849


@pytest.mark.parametrize("audio_length", [1, 64, 100])
def test_audio_features_are_those_of_each_clip_alone(audio_length):
    lengths = [400, 559, 560, 9000, 12000]
    generator = torch.Generator().manual_seed(3)
    # Past its own end each row holds rubbish, which must not be heard.
    waveform = torch.randint(-9000, 12000, (len(lengths), 12000), generator=generator, dtype=torch.int16)
    features = audio_features(waveform, torch.tensor(lengths), audio_length)
    assert features.shape == (len(lengths), audio_length, 128) and features.dtype == torch.float32

    def alone(waveform, dtype=torch.float64):
        rows = zip(waveform, lengths, strict=True)
        return torch.stack([published_features(row[:n], audio_length, dtype) for row, n in rows])

    assert_parity(
        lambda waveform: audio_features(waveform, torch.tensor(lengths), audio_length),
        alone,
        [waveform],
        baseline=lambda waveform: alone(waveform, torch.float32),
    )
    floats = waveform.float() / 32768
    floats[0, 400:] = torch.nan
    assert torch.equal(audio_features(floats, torch.tensor(lengths), audio_length), features)


def test_audio_features_of_ten_seconds():
    features = audio_features(torch.ones(1, 163840, dtype=torch.int16), torch.tensor([160000]))
    assert features.shape == (1, 1024, 128)
    torch.testing.assert_close(features[0, 998:], torch.full((26, 128), 5.081 / 4.4849))
    torch.testing.assert_close(features[0, :998], torch.full((998, 128), (-15.942385 + 5.081) / 4.4849))


def test_feature_errors():
    waveform, count = torch.zeros(2, 800, dtype=torch.int16), torch.tensor([800, 800])
    with pytest.raises(ValueError, match=r"num_samples lies in \[399, 800\]; allowed: 400 to 800"):
        audio_features(waveform, torch.tensor([399, 800]))
    with pytest.raises(ValueError, match=r"num_samples lies in \[800, 801\]"):
        audio_features(waveform, torch.tensor([801, 800]))
    with pytest.raises(ValueError, match=r"integers of shape \[2\]"):
        audio_features(waveform, torch.tensor([800]))
    with pytest.raises(TypeError, match=r"waveform is torch\.int32"):
        audio_features(waveform.int(), count)
    with pytest.raises(ValueError, match="waveform has shape"):
        audio_features(waveform[0], count)
    with pytest.raises(ValueError, match="audio_length is 0"):
        audio_features(waveform, count, 0)
    with pytest.raises(ValueError, match=r"image is torch\.float32"):
        image_features(torch.zeros(1, 3, 8, 8))


def test_image_features():
    image = torch.arange(2 * 3 * 16, dtype=torch.uint8).reshape(2, 3, 4, 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (image.double() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(image_features(image), expected.float())
