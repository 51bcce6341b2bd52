"""Sound from a log-mel spectrogram: what the features threw away, the phase and the detail within a mel bin, is guessed.

The way back inverts `reference/fbank.py` step by step: statistics, logarithm, mel filters (non-negative least squares),
power, phase (Griffin-Lim), pre-emphasis.
"""

from __future__ import annotations

import numpy as np

from cavmae_fast.clip import ClipSpec
from cavmae_fast.errors import CavmaeError
from cavmae_fast.reference.fbank import ENERGY_FLOOR, PRE_EMPHASIS, frame_sizes, hann_window, mel_filters

ITERATIONS = 64
"Of Griffin-Lim; more change little that can be heard."


class SoundError(CavmaeError):
    """Sound cannot be made here."""

    exit_code = 2


def require_librosa() -> None:
    """SoundError where librosa is not installed."""
    try:
        import librosa  # noqa: F401
    except ImportError as error:
        raise SoundError(
            "sound from spectrograms needs librosa: pip install 'cavmae_fast[sound]'; or leave the sound out"
        ) from error


def spectrogram_to_sound(spectrogram: np.ndarray, clip: ClipSpec, seed: int = 0) -> np.ndarray:
    """A normalized log-mel spectrogram `[frames, mel_bins]`, without padding, as a sound `[samples]` int16.

    It has `(frames - 1) * shift + window` samples, as many as the frames cover. The same seed gives the same sound.

    Raises:
        SoundError: librosa is not installed.
    """
    require_librosa()
    import librosa

    window, shift, dft_length = frame_sizes(clip.sample_rate)
    energies = np.exp(spectrogram.astype(np.float64) * clip.audio_std + clip.audio_mean).T  # [bins, frames]
    energies = np.where(energies <= 1.01 * ENERGY_FLOOR, 0.0, energies)  # the floor stands for silence
    power = librosa.util.nnls(mel_filters(clip.sample_rate, clip.mel_bins).numpy(), energies)
    emphasized = librosa.griffinlim(
        np.sqrt(power),
        n_iter=ITERATIONS,
        hop_length=shift,
        win_length=window,
        n_fft=dft_length,
        window=hann_window(window).numpy(),
        random_state=seed,
    )
    # librosa's frames are centered at multiples of the shift, Kaldi's begin there: half a window lies before the first.
    samples = (energies.shape[1] - 1) * shift + window
    placed = np.zeros(samples)
    placed[window // 2 :][: len(emphasized)] = emphasized[: samples - window // 2]
    sound = librosa.effects.deemphasis(placed, coef=PRE_EMPHASIS, zi=np.zeros(1))
    return np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)
