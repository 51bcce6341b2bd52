"""`ClipSpec`: what a model takes of a clip. The model owns it, and the data path carries it from the file to the batch."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE_RATE = 16000
"Of the sound that models hear, in Hz."
MEL_BINS = 128
WINDOW_SECONDS, SHIFT_SECONDS = 0.025, 0.010
"A spectrogram's frame covers 25 ms of sound; the next one begins 10 ms later."
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"Of ImageNet's pixels, scaled to [0, 1]: red, green and blue."
AUDIO_MEAN, AUDIO_STD = -5.081, 4.4849
"Of the log-mel values over AudioSet, as published with CAV-MAE."


@dataclass(frozen=True)
class ClipSpec:
    """What a model takes of a clip; the defaults are CAV-MAE's.

    Attributes:
        image_size: height and width of a picture, in pixels.
        frames: pictures per clip.
        frame_rate: pictures per second of the crop that is cut out of the clip: `frames / frame_rate` seconds, and the
            sound from where the crop begins. None: no crop; the pictures are drawn from the whole clip, the sound is
            heard from its beginning.
        image_mean, image_std: by color, what pixels in [0, 1] are normalized with.
        audio_length: frames of the spectrogram, 10 ms each.
        audio_mean, audio_std: what log-mel values are normalized with.
        sample_rate: of the sound, in Hz.
        mel_bins: of the spectrogram.

    Raises:
        ValueError: a number is out of range.
    """

    image_size: tuple[int, int] = (224, 224)
    frames: int = 1
    frame_rate: float | None = None
    image_mean: tuple[float, float, float] = IMAGE_MEAN
    image_std: tuple[float, float, float] = IMAGE_STD
    audio_length: int = 1024
    audio_mean: float = AUDIO_MEAN
    audio_std: float = AUDIO_STD
    sample_rate: int = SAMPLE_RATE
    mel_bins: int = MEL_BINS

    def __post_init__(self) -> None:
        for name, value in (
            ("image_size", min(self.image_size)),
            ("frames", self.frames),
            ("audio_length", self.audio_length),
            ("mel_bins", self.mel_bins),
        ):
            if value < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name, value in (("audio_std", self.audio_std), ("image_std", min(self.image_std))):
            if not value > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.frame_rate is not None and not self.frame_rate > 0:
            raise ValueError(f"frame_rate is {self.frame_rate}; it must be above 0, or None")
        if self.frame_rate is None and self.frames != 1:
            raise ValueError(f"frames is {self.frames} without a frame_rate; it must be 1, or frame_rate be given")
        if self.sample_rate < 1000:
            raise ValueError(f"sample_rate is {self.sample_rate}; it must be 1000 or more")

    @property
    def samples(self) -> int:
        """Samples of sound that `audio_length` frames of the spectrogram cover."""
        shift, window = (int(self.sample_rate * seconds) for seconds in (SHIFT_SECONDS, WINDOW_SECONDS))
        return (self.audio_length - 1) * shift + window

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of one clip's spectrogram `(T, mel_bins)`, and of its pictures: `(3, H, W)`, or `(frames, 3, H, W)` of several."""
        frames = () if self.frames == 1 else (self.frames,)
        return (self.audio_length, self.mel_bins), (*frames, 3, *self.image_size)

    @property
    def crop_seconds(self) -> float | None:
        """Length of the crop in time; None where the whole clip is used."""
        return None if self.frame_rate is None else self.frames / self.frame_rate
