"""Sounds and pictures as bytes: every common kind decodes to what Pillow and soundfile say; bombs and damage are named."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from cavmae_fast.data.media.encoded import decode_image, decode_sound, encode_image, encode_sound
from cavmae_fast.data.media.files import MediaError

SIZE = 64


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)).convert(mode)


def image_bytes(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def square(data: bytes, size: int = SIZE) -> np.ndarray:
    """What torchvision's Resize (bicubic) and CenterCrop make of it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short = min(image.size)
    image = image.resize([size if side == short else int(size * side / short) for side in image.size], Image.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def tone(rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    """`[samples, channels]` float64: 440 Hz in the first channel, 1100 Hz and more in the others."""
    t = np.arange(round(rate * seconds)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * (440 if c == 0 else 1100 * c) * t) for c in range(channels)], 1)


def sound_bytes(samples: np.ndarray, rate: int = 16000, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, *values)
    return bytes(changed)


def streaminfo(data: bytes, *, samples: int | None = None, rate: int | None = None) -> bytes:
    """A FLAC file whose header claims other numbers."""
    word = int.from_bytes(data[18:26], "big")
    if samples is not None:
        word = word >> 36 << 36 | samples
    if rate is not None:
        word = word & (1 << 44) - 1 | rate << 44
    return data[:18] + word.to_bytes(8, "big") + data[26:]


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = image_bytes(picture(SIZE, SIZE))
    return patched(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


WAV = sound_bytes(tone(16000))
FLAC = sound_bytes(tone(16000), kind="FLAC")
JPEG = image_bytes(picture(SIZE, SIZE))

IMAGES = {
    "rgb": image_bytes(picture(SIZE, SIZE)),
    "gray": image_bytes(picture(80, 90, "L")),
    "cmyk": image_bytes(picture(80, 90, "CMYK")),
    "progressive": image_bytes(picture(90, 80), progressive=True),
    "444": image_bytes(picture(90, 80), subsampling=0),
    "wide": image_bytes(picture(70, 333)),
    "tall": image_bytes(picture(333, 71)),
    "small": image_bytes(picture(9, 17)),
    "one pixel": image_bytes(picture(1, 1)),
    "png": image_bytes(picture(100, 64), "PNG"),
    "rgba": image_bytes(picture(64, 100, "RGBA"), "PNG"),
    "palette": image_bytes(picture(64, 64, "P"), "PNG"),
    "gray png": image_bytes(picture(65, 64, "L"), "PNG"),
    "1 bit": image_bytes(picture(64, 65, "1"), "PNG"),
    "with a tail": JPEG + b"garbage",
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_as_published(name):
    got = decode_image(IMAGES[name], SIZE, "a.jpg")
    assert got.shape == (SIZE, SIZE, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got, square(IMAGES[name]))


def test_an_image_of_the_right_size_is_not_touched():
    image = picture(SIZE, SIZE)
    np.testing.assert_array_equal(decode_image(image_bytes(image, "PNG"), SIZE, "a.png"), np.asarray(image))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a JPEG or PNG image"),
        (b"text", "not a JPEG or PNG image"),
        (WAV, "not a JPEG or PNG image"),
        (image_bytes(picture(8, 8, "P"), "GIF"), "not a JPEG or PNG image"),
        (image_bytes(picture(8, 8), "BMP"), "not a JPEG"),
        (JPEG[:-40], "not a readable JPEG or PNG image"),
        (JPEG[:300], "not a readable|not a JPEG"),
        (IMAGES["png"][:-40], "not a readable JPEG or PNG image"),
        (png_claiming(500, 500), "not a readable JPEG or PNG image"),
        (png_claiming(65500, 65500), "bomb"),
        (png_claiming(2**31 - 1, 2**31 - 1), "bomb"),
        (jpeg_claiming(65500, 65500), "bomb"),
        (png_claiming(9000, 9000), "9000 x 9000 pixels; allowed: 33554432 in all"),
        (jpeg_claiming(0, 0), "not a"),
        (image_bytes(Image.new("RGB", (65500, 1))), "too long for its width"),
        (image_bytes(Image.new("L", (1, 3000000)), "PNG"), "too long for its width"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named(data, message):
    with pytest.raises(MediaError, match=f"^a.jpg: .*({message})") as caught:
        decode_image(data, SIZE, "a.jpg")
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize(
    "kind, subtype, error",
    [
        ("WAV", "PCM_U8", 2.0**-7),
        ("WAV", "PCM_16", 2.0**-15),
        ("WAV", "PCM_24", 2.0**-15),
        ("WAV", "PCM_32", 2.0**-15),
        ("WAV", "FLOAT", 2.0**-15),
        ("WAV", "DOUBLE", 2.0**-15),
        ("WAV", "ULAW", 0.02),
        ("FLAC", "PCM_S8", 2.0**-7),
        ("FLAC", "PCM_16", 2.0**-15),
        ("FLAC", "PCM_24", 2.0**-15),
        ("AIFF", "PCM_16", 2.0**-15),
        ("W64", "PCM_16", 2.0**-15),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_sample_formats(kind, subtype, error, channels):
    expected = tone(16000, channels=channels)
    got = decode_sound(sound_bytes(expected, kind=kind, subtype=subtype), "a.wav")
    assert got.dtype == np.int16 and got.shape == (16000,)
    assert np.abs(got / 32768 - expected[:, 0]).max() <= error * 1.01


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_16_bits_are_exact(kind):
    noise = np.random.default_rng(0).integers(-32768, 32768, (5000, 2)).astype(np.int16)
    noise[:4, 0] = [-32768, 32767, -1, 0]
    np.testing.assert_array_equal(decode_sound(sound_bytes(noise, kind=kind), "a"), noise[:, 0])


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("kind, subtype", [("WAV", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "FLOAT")])
def test_resampled(rate, kind, subtype):
    got = decode_sound(sound_bytes(tone(rate, channels=2), rate, kind, subtype), "a")
    assert abs(len(got) - 16000) <= 2
    middle = slice(800, 15200)
    assert np.abs(got[middle] / 32768 - tone(16000)[middle, 0]).max() < 2e-3


def test_floats_beyond_one_are_clipped():
    samples = np.array([0.0, 5.0, -5.0, 3e38, -3e38, 1.0, -1.0] * 100, np.float32)
    got = decode_sound(sound_bytes(samples, subtype="FLOAT"), "a")
    np.testing.assert_array_equal(got[:7], [0, 32767, -32768, 32767, -32768, 32767, -32768])


def test_what_a_wav_still_holds_is_used():
    assert len(decode_sound(WAV[: 44 + 2 * 5000], "a")) == 5000
    assert len(decode_sound(patched(WAV, 40, "<I", 2**32 - 1), "a")) == 16000
    assert len(decode_sound(patched(WAV, 4, "<I", 0), "a")) == 16000


def test_flac_without_a_length_is_read():
    np.testing.assert_array_equal(decode_sound(streaminfo(FLAC, samples=0), "a"), decode_sound(FLAC, "a"))


BAD_SOUNDS = {
    "empty": (b"", "not a readable"),
    "text": (b"text" * 100, "not a readable"),
    "jpeg": (JPEG, "not a readable"),
    "only magic": (b"fLaC", "not a readable FLAC"),
    "flac header": (FLAC[:42], "not a readable FLAC"),
    "short flac": (FLAC[: len(FLAC) // 2], "of the FLAC stream's 16000 samples could be decoded"),
    "flac promises 2^36": (streaminfo(FLAC, samples=(1 << 36) - 1), "a sound of 68719476735 x 1 samples; allowed: 1 GiB"),
    "flac promises 2^28": (streaminfo(FLAC, samples=1 << 28), "16000 of the FLAC stream's 268435456 samples"),
    "flac of 0 Hz": (streaminfo(FLAC, rate=0), r"not a readable FLAC sound \(its header says 0 Hz\)"),
    "flac of 1 Hz": (streaminfo(FLAC, rate=1), "a sample rate of 1 Hz; allowed: 1000 to 768000"),
    "wav of 1 Hz": (patched(WAV, 24, "<I", 1), "a sample rate of 1 Hz"),
    "wav of 999999 Hz": (patched(WAV, 24, "<I", 999999), "a sample rate of 999999 Hz"),
    "wav of 2^31 Hz": (patched(WAV, 24, "<I", 1 << 31), "not a readable|a sample rate"),
    "no channels": (patched(WAV, 22, "<H", 0), "not a readable"),
    "65535 channels": (patched(WAV, 22, "<H", 65535), "not a readable"),
    "64 bits": (patched(WAV, 34, "<H", 64), "not a readable"),
    "only a header": (WAV[:44], "0.0 ms of sound"),
    "20 ms": (WAV[: 44 + 640], "20.0 ms of sound; at least 25 ms are needed"),
    "NaN": (sound_bytes(np.full(16000, np.nan, np.float32), subtype="FLOAT"), "not finite"),
    "infinite": (sound_bytes(np.full(16000, np.inf, np.float32), subtype="FLOAT"), "not finite"),
}


@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_bad_sounds_are_named(name):
    data, message = BAD_SOUNDS[name]
    begin = time.perf_counter()
    with pytest.raises(MediaError, match=f"^a.wav: .*({message})") as caught:
        decode_sound(data, "a.wav")
    assert " at 0x" not in str(caught.value) and time.perf_counter() - begin < 2


def test_25_ms_are_enough():
    assert len(decode_sound(WAV[: 44 + 800], "a")) == 400


def test_headers_that_promise_much_take_no_memory():
    script = (
        "from test_encoded import *\n"
        "bad = [png_claiming(65500, 65500), jpeg_claiming(65500, 65500)]\n"
        "bad.append(image_bytes(Image.new('L', (1, 30_000_000)), 'PNG'))\n"
        "for decode, data in [(lambda d: decode_image(d, 224, ''), b) for b in bad] + [\n"
        "    (lambda d: decode_sound(d, ''), data) for data, _ in BAD_SOUNDS.values()]:\n"
        "    try: decode(data); raise SystemExit('decoded')\n"
        "    except MediaError: pass\n"
        "print(next(int(row.split()[1]) >> 10 for row in open('/proc/self/status') if row.startswith('VmHWM')))"
    )
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=path)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 1000


def test_there_and_back():
    frame = np.asarray(picture(SIZE, SIZE))
    back = decode_image(encode_image(frame, 95), SIZE, "a").astype(int)
    assert np.abs(back - frame).mean() < 4
    assert encode_image(frame, 90) == encode_image(frame, 90) and len(encode_image(frame, 50)) < len(encode_image(frame, 95))
    noise = np.random.default_rng(1).integers(-32768, 32768, 12345).astype(np.int16)
    np.testing.assert_array_equal(decode_sound(encode_sound(noise), "a"), noise)
    assert encode_sound(noise) == encode_sound(noise)
