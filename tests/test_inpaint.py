"""`inpaint`: what is removed, what is filled in, and that sound comes back out of a spectrogram."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from evaluating import QUICK, checkpoint, cli, copies, videos  # noqa: F401
from PIL import Image
from tiny import ENCODER, TINY, one_thread, randomize  # noqa: F401

from cavmae_fast.clip import ClipSpec
from cavmae_fast.evaluation import inpainting
from cavmae_fast.evaluation.commands.inpaint import write_inpainted
from cavmae_fast.evaluation.inpainting import InpaintError, inpaint
from cavmae_fast.evaluation.sound import SoundError, spectrogram_to_sound
from cavmae_fast.models import CAVMAE, CAVMAEFT
from cavmae_fast.reference.fbank import log_mel_fbank


def perfect(model: CAVMAE) -> CAVMAE:
    """Predicts the true patches, whatever was removed."""

    def forward_inpaint(audio, imgs, *arguments):
        output = CAVMAE.forward_inpaint(model, audio, imgs, *arguments)
        parts = []
        for name, x in (("a", model.spectrogram(audio)), ("v", imgs)):
            parts.append(model.patchify(x, x.shape[1], *getattr(model, f"patch_embed_{name}").grid, model.patch_size))
        return output._replace(pred_a=parts[0], pred_v=parts[1])

    model.forward_inpaint = forward_inpaint
    return model


def test_the_views(checkpoint, videos):  # noqa: F811
    result = inpaint(checkpoint, videos, clips=3, mask_ratio=0.5, running=QUICK)
    assert [clip.id for clip in result.clips] == [f"train_0000{i}" for i in range(3)] and not result.statistics_given
    for clip in result.clips:
        picture, sound = clip.picture, clip.spectrogram
        assert picture.original.shape == (32, 32, 3) and picture.original.dtype == np.uint8
        assert sound.original.shape[1] == 128 and sound.original.shape == sound.filled.shape
        for views in (picture, sound):
            removed, changed = views.masked != views.original, views.filled != views.original
            assert 0.3 < removed.mean() < 0.7 and changed.mean() > 0.2
            # What stayed is shown as it was. (What is removed is shown at the lowest value, and may have had it itself.)
            lowest = views.masked.min(axis=(0, 1)) if views is picture else views.masked.min()
            assert not (changed & ~removed & (views.original > lowest)).any()


def test_time_masks_whole_frames(checkpoint, videos):  # noqa: F811
    sound = inpaint(checkpoint, videos, clips=1, mask_mode="time", mask_ratio=0.5, running=QUICK).clips[0].spectrogram
    hidden = (sound.original != sound.masked).mean(axis=1)  # of each frame
    assert set((hidden > 0.5).tolist()) == {True, False} and hidden[hidden < 0.5].max(initial=0) == 0


def test_the_errors(videos):  # noqa: F811
    model = randomize(CAVMAE(**TINY))
    errors = inpaint(perfect(model), videos, clips=1, running=QUICK).clips[0].errors
    assert errors.audio_db < 1e-4 and errors.video_psnr_db > 100
    assert errors.audio_mean_db > 1 and 5 < errors.video_mean_psnr_db < 60


def test_the_seed_decides_and_nobody_else_notices(checkpoint, videos):  # noqa: F811
    model = CAVMAE.from_pretrained(checkpoint)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    first, again = (inpaint(model, videos, clips=1, seed=1, running=QUICK).clips[0] for _ in range(2))
    assert torch.equal(torch.rand(3), want)
    other = inpaint(model, videos, clips=1, seed=2, running=QUICK).clips[0]
    np.testing.assert_array_equal(first.picture.masked, again.picture.masked)
    assert (first.picture.masked != other.picture.masked).any()


def test_files(videos, tmp_path, monkeypatch):  # noqa: F811
    from cavmae_fast.evaluation.commands import inpaint as command

    titles = []
    new_figure = command.new_figure

    def watched(*arguments):
        figure, axes = new_figure(*arguments)
        suptitle = figure.suptitle
        figure.suptitle = lambda text, **options: titles.append(text) or suptitle(text, **options)
        return figure, axes

    monkeypatch.setattr(command, "new_figure", watched)
    folder = copies(videos, tmp_path / "data", 2)
    (folder / "../data/a'<b>,\n.mp4").write_text("no film")
    result = inpaint(randomize(CAVMAE(**TINY, norm_pix_loss=True)), folder, clips=3, running=QUICK)
    write_inpainted(result, tmp_path / "out", sound=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000", "0001", "clips.csv", "clips.json"]
    for name in ("original", "masked", "filled"):
        assert Image.open(tmp_path / "out" / "0000" / f"picture-{name}.png").size == (32, 32)
        width, height = Image.open(tmp_path / "out" / "0000" / f"spectrogram-{name}.png").size
        assert height == 128 and width == result.clips[0].spectrogram.original.shape[0]
    assert titles == ["75% of the patches removed, filled in by the model; mean and spread of each patch were given"] * 2
    record = json.loads((tmp_path / "out" / "clips.json").read_text())
    assert record["statistics_given"] is True and len(record["clips"]) == 2 and len(record["rejects"]) == 1
    rows = list(csv.DictReader((tmp_path / "out" / "clips.csv").open(newline="")))
    assert [row["id"] for row in rows] == [clip.id for clip in result.clips]
    assert float(rows[0]["audio_db"]) == pytest.approx(result.clips[0].errors.audio_db)


def test_bad_inputs(checkpoint, videos, tmp_path):  # noqa: F811
    for options, words in (
        ({"mask_ratio": 0.0}, r"mask_ratio_a is 0.0, which removes none"),
        ({"mask_ratio": 1.5}, r"mask_ratio_[av] is 1.5"),
        ({"mask_mode": "stripes"}, r"mask_mode is 'stripes'; allowed: unstructured, time, freq or tf"),
        ({"clips": 0}, r"clips is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            inpaint(checkpoint, videos, **{"running": QUICK} | options)
    with pytest.raises(InpaintError, match=r"is a CAVMAEFT, which has no decoder; allowed: a pretrained CAVMAE"):
        inpaint(CAVMAEFT(3, **ENCODER), videos, running=QUICK)
    (tmp_path / "a.mp4").write_text("no film")
    with pytest.raises(InpaintError, match=r"none of 1 clips can be used; the first: .*a.mp4"):
        inpaint(checkpoint, tmp_path, running=QUICK)


def test_the_command(checkpoint, videos, tmp_path):  # noqa: F811
    command = ("inpaint", checkpoint, "--data", videos, "--clips", 1, "--no-sound", "--device", "cpu", "--dtype", "float32")
    done = cli(*command, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 clips, 75% of the patches removed" in done.stdout and "dB PSNR" in done.stdout
    again = cli(*command, "--out", tmp_path / "out")
    assert again.returncode == 2 and "which is not empty; allowed: another folder, or --overwrite" in again.stderr


# ------------------------------------------------------------------------------------------------------------- sound


def normalized(waveform: np.ndarray, clip: ClipSpec) -> np.ndarray:
    features = log_mel_fbank(torch.from_numpy(waveform - waveform.mean()), clip.sample_rate, clip.mel_bins)[0]
    return ((features - clip.audio_mean) / clip.audio_std).numpy()


@pytest.mark.parametrize("mean_std", [(-5.081, 4.4849), (-4.2, 4.57)])
def test_sound_comes_back(mean_std):
    """Pitch, loudness and time of two notes, and the spectrogram itself."""
    pytest.importorskip("librosa")
    clip = ClipSpec(audio_mean=mean_std[0], audio_std=mean_std[1])
    time = np.arange(16000) / 16000
    waveform = 0.3 * np.sin(2 * np.pi * np.where(time < 0.5, 440, 1320) * time) * (np.abs(time - 0.5) > 0.1)
    sound = spectrogram_to_sound(normalized(waveform, clip), clip) / 32768
    assert len(sound) == (98 - 1) * 160 + 400
    for start, hertz in ((1600, 440), (11200, 1320)):
        part = sound[start : start + 3200]
        found = np.abs(np.fft.rfft(part * np.hanning(3200))).argmax() * 16000 / 3200
        assert abs(found - hertz) < 0.03 * hertz
        assert part.std() == pytest.approx(waveform[start : start + 3200].std(), rel=0.2)
    assert sound[7000:9000].std() < 0.05 * sound[1600:4800].std()  # the pause is where it was
    back, want = normalized(sound, clip), normalized(waveform[: len(sound)], clip)
    loud = want * clip.audio_std > want.max() * clip.audio_std - 5
    assert 100 < loud.sum() < 5000
    assert np.abs(back - want)[loud].mean() * clip.audio_std < 0.5  # half a neper where there is something to hear


def test_silence_stays_silent():
    pytest.importorskip("librosa")
    clip = ClipSpec()
    assert np.abs(spectrogram_to_sound(normalized(np.zeros(8000), clip), clip)).max() <= 1


def test_the_sound_is_the_same_again():
    pytest.importorskip("librosa")
    clip = ClipSpec()
    x = normalized(np.random.default_rng(0).standard_normal(4000) * 0.1, clip)
    np.testing.assert_array_equal(spectrogram_to_sound(x, clip), spectrogram_to_sound(x, clip))


def test_sounds_are_written(checkpoint, videos, tmp_path):  # noqa: F811
    pytest.importorskip("librosa")
    result = inpaint(checkpoint, videos, clips=1, running=QUICK)
    write_inpainted(result, tmp_path / "out")
    lengths = []
    for name in ("original", "resynthesized", "filled"):
        sound, rate = soundfile.read(tmp_path / "out" / "0000" / f"sound-{name}.wav")
        assert rate == 16000 and sound.std() > 0
        lengths.append(len(sound))
    frames = len(result.clips[0].spectrogram.original)
    assert lengths[1] == lengths[2] == (frames - 1) * 160 + 400 <= lengths[0] + 160


def test_without_librosa(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(SoundError, match=r"needs librosa: pip install 'cavmae_fast\[sound\]'"):
        spectrogram_to_sound(np.zeros((10, 128)), inpainting.ClipSpec())
