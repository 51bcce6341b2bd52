"""What a page shows of a clip: a few small frames as JPEG, and its sound as MP3, which every browser plays."""

from __future__ import annotations

import io

import numpy as np

from cavmae_fast.clip import SAMPLE_RATE
from cavmae_fast.data.media.encoded import decode_image, decode_sound, encode_image
from cavmae_fast.data.media.files import read_clip
from cavmae_fast.data.sets.opening import NUM_FRAMES, Clips
from cavmae_fast.data.sets.shards import ShardSet
from cavmae_fast.evaluation.report.page import Exhibit

FRAMES = 3
"Shown of each clip, spread over its length."
SIZE = 160
QUALITY = 82


def mp3(waveform: np.ndarray, sample_rate: int = SAMPLE_RATE) -> bytes:
    """`[samples]` int16 as an MP3 file: an eighth of the bytes of WAV."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, sample_rate, format="MP3", subtype="MPEG_LAYER_III")
    return buffer.getvalue()


def exhibit_clip(clips: Clips, number: int, name: str, note: str = "", right: bool | None = None) -> Exhibit:
    """A clip of a data set, by its number. Raises MediaError when it cannot be read any more."""
    record = clips[number]
    if getattr(record, "video", None):
        clip = read_clip(record.video, num_frames=NUM_FRAMES, size=SIZE)
        chosen = [int((i + 0.5) * NUM_FRAMES / FRAMES) for i in range(FRAMES)]
        sound, frames = clip.waveform, [clip.frames[k] for k in chosen]
    else:
        sound = decode_sound(record.head()[2], str(record))
        there = clips.num_frames if isinstance(clips, ShardSet) else NUM_FRAMES
        chosen = sorted({int((i + 0.5) * there / FRAMES) for i in range(FRAMES)})
        frames = [decode_image(record.image(k), SIZE, str(record)) for k in chosen]
    return exhibit(name, sound, frames, note, right)


def exhibit(
    name: str,
    sound: np.ndarray | None,
    frames: list[np.ndarray] | np.ndarray | None,
    note: str = "",
    right: bool | None = None,
    sample_rate: int = SAMPLE_RATE,
) -> Exhibit:
    """An exhibit of decoded sound `[samples]` int16 and frames `[S, S, 3]` uint8."""
    pictures = () if frames is None else tuple(encode_image(np.ascontiguousarray(frame), QUALITY) for frame in frames)
    return Exhibit(name, None if sound is None else mp3(sound, sample_rate), pictures, note, right)
