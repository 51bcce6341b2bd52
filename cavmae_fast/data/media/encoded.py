"""A clip as bytes: JPEG or PNG images and one FLAC or WAV sound, to arrays and back."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np

from cavmae_fast.clip import SAMPLE_RATE, WINDOW_SECONDS
from cavmae_fast.data.media.files import MAX_PIXELS, MediaError

_MAX_SOUND_BYTES = 1 << 30


class Encoded(NamedTuple):
    """`images`: the bytes of JPEG or PNG files; `sound`: those of a FLAC or WAV file; `first`: the sample of the sound with
    which a crop begins."""

    images: tuple[bytes, ...]
    sound: bytes
    first: int = 0

    @property
    def image(self) -> bytes:
        """The first image."""
        return self.images[0]


def decode_image(data: bytes, size: int, name: str) -> np.ndarray:
    """The image `[size, size, 3]` uint8: as it is when it has that size, else its shorter side scaled to `size`
    (bicubic, by Pillow, as published) and its center cut out.

    Raises:
        MediaError: `data` cannot be decoded; the message begins with `name`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        if image.width * image.height > MAX_PIXELS:
            raise MediaError(f"{name}: an image of {image.width} x {image.height} pixels; allowed: {MAX_PIXELS} in all")
        image = image.convert("RGB")
    except (MediaError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own message holds the address of an object
        raise MediaError(f"{name}: not a JPEG or PNG image") from error
    except Exception as error:  # Pillow has no common error for what is damaged
        raise MediaError(f"{name}: not a readable JPEG or PNG image ({error})") from error
    if image.size != (size, size):
        short = min(image.size)
        width, height = (size if side == short else int(size * side / short) for side in image.size)
        if width * height > MAX_PIXELS:
            raise MediaError(f"{name}: an image of {image.width} x {image.height} pixels; it is too long for its width")
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image)


def decode_sound(data: bytes, name: str, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """The sound's first channel `[samples]` int16 at `sample_rate` Hz; another rate is resampled by FFmpeg.

    Raises:
        MediaError: `data` cannot be decoded, holds less than 25 ms, or is a FLAC stream that lacks samples; the message
            begins with `name`.
    """
    waveform, rate = _decode_flac(data, name) if data[:4] == b"fLaC" else _decode_wav(data, name)
    if rate != sample_rate:
        waveform = _resample(waveform, rate, sample_rate, name)
    if len(waveform) < int(sample_rate * WINDOW_SECONDS):
        raise MediaError(f"{name}: {1000 * len(waveform) / sample_rate:.1f} ms of sound; at least 25 ms are needed")
    return waveform


def _decode_flac(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """With miniaudio, which takes 0.55 times as long as libFLAC: a third of all that the host does for a clip in a shard."""
    import miniaudio

    try:
        header = miniaudio.flac_get_info(data)
        # The decoder allocates what the header promises: 36 bits of samples per channel.
        if 2 * header.num_frames * header.nchannels > _MAX_SOUND_BYTES:
            raise MediaError(f"{name}: a sound of {header.num_frames} x {header.nchannels} samples; allowed: 1 GiB in all")
        sound = miniaudio.flac_read_s16(data)
    except miniaudio.MiniaudioError as error:
        raise MediaError(f"{name}: not a readable FLAC sound ({error})") from error
    except ZeroDivisionError as error:  # miniaudio computes the duration from what the header says
        raise MediaError(f"{name}: not a readable FLAC sound (its header says 0 Hz)") from error
    waveform = np.frombuffer(sound.samples, np.int16).reshape(-1, sound.nchannels)[:, 0]
    if len(waveform) < header.num_frames:
        raise MediaError(f"{name}: {len(waveform)} of the FLAC stream's {header.num_frames} samples could be decoded")
    return waveform, sound.sample_rate


def _decode_wav(data: bytes, name: str) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames * file.channels * 4 > _MAX_SOUND_BYTES:
                raise MediaError(f"{name}: a sound of {file.frames} x {file.channels} samples; allowed: 1 GiB in all")
            # libsndfile scales integers among themselves, but not floating point to integers.
            exact = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
            waveform = file.read(dtype="int16" if exact else "float32", always_2d=True)[:, 0]
            rate = file.samplerate
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        cause = getattr(error, "error_string", error)  # without the address of an object
        raise MediaError(f"{name}: not a readable FLAC or WAV sound ({cause})") from error
    if not exact:
        if not np.isfinite(waveform).all():
            raise MediaError(f"{name}: the sound holds values that are not finite")
        waveform = np.clip(np.rint(waveform.clip(-1, 1) * 32768), -32768, 32767).astype(np.int16)
    return waveform, rate


def _resample(waveform: np.ndarray, rate: int, sample_rate: int, name: str) -> np.ndarray:
    import av

    if not 1000 <= rate <= 768000:
        raise MediaError(f"{name}: a sample rate of {rate} Hz; allowed: 1000 to 768000")
    if 2 * len(waveform) * sample_rate / rate > _MAX_SOUND_BYTES:
        raise MediaError(f"{name}: {len(waveform)} samples at {rate} Hz; allowed: 1 GiB in all at {sample_rate} Hz")
    resampler = av.AudioResampler(format="s16p", layout="mono", rate=sample_rate)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform)[None], format="s16p", layout="mono")
    frame.sample_rate = rate
    parts = [part.to_ndarray()[0] for given in (frame, None) for part in resampler.resample(given)]
    return np.concatenate([*parts, np.zeros(0, np.int16)])


def sound_seconds(data: bytes, name: str) -> float:
    """How long a sound is, by its header. MediaError when it has none that can be read; it begins with `name`."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return file.frames / file.samplerate
    except Exception as error:
        cause = getattr(error, "error_string", error)
        raise MediaError(f"{name}: not a readable FLAC or WAV sound ({cause})") from error


def encode_image(frame: np.ndarray, quality: int) -> bytes:
    """`[H, W, 3]` uint8 -> the bytes of a JPEG file (4:2:0)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_sound(waveform: np.ndarray, sample_rate: int = SAMPLE_RATE) -> bytes:
    """`[samples]` int16 at `sample_rate` Hz -> the bytes of a FLAC file."""
    import soundfile

    buffer = io.BytesIO()
    # The fastest level: to encode and to decode; the others save 3 to 28 % of the bytes.
    soundfile.write(buffer, waveform, sample_rate, format="FLAC", subtype="PCM_16", compression_level=0.0)
    return buffer.getvalue()


def is_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG file, by its first bytes."""
    return data[:3] == b"\xff\xd8\xff"


def is_plain_sound(data: bytes, sample_rate: int = SAMPLE_RATE) -> bool:
    """Whether this is a FLAC or WAV file of 16-bit samples at this rate, by its header where that is in its usual place."""
    if data[:4] == b"fLaC":
        field = int.from_bytes(data[18:22], "big")  # 20 bits of rate, 3 of channels, 5 of sample size
        return len(data) > 42 and (field >> 12, (field >> 4 & 31) + 1) == (sample_rate, 16)
    if data[:4] == b"RIFF" and data[8:16] == b"WAVEfmt " and len(data) > 36:
        kind, rate, bits = (int.from_bytes(data[i:j], "little") for i, j in ((20, 22), (24, 28), (34, 36)))
        return (kind, rate, bits) == (1, sample_rate, 16)
    return False
