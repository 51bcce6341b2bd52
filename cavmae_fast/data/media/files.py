"""Media files to arrays: ten frames and sixteen-kilohertz sound, decoding no more of a file than is needed."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cavmae_fast.clip import SAMPLE_RATE, WINDOW_SECONDS
from cavmae_fast.data.media.crop import FRAME_SECONDS, Crop
from cavmae_fast.errors import CavmaeError

if TYPE_CHECKING:
    import av

VIDEO_SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
_MAX_FPS = 1000  # a rate above this is a broken header (often the time base), not a camera
MAX_PIXELS = 1 << 25
"The largest picture that is decoded: a little above 8K video; what claims more is a broken header."


class MediaError(CavmaeError, ValueError):
    """A media file cannot be used; the message is one sentence that names the file and the cause."""


@dataclass(frozen=True)
class Clip:
    """One decoded clip.

    Attributes:
        path: the file.
        frames: `[num_frames, size, size, 3]` uint8, RGB.
        waveform: `[samples]` int16, mono, at the sample rate that was asked for.
        duration: seconds of sound in `waveform`.
        picture_seconds: those over which the frames are spread: the file's first ten, or all where it shows fewer.
    """

    path: Path
    frames: np.ndarray
    waveform: np.ndarray
    duration: float
    picture_seconds: float


def find_media(sources: Sequence[str | Path]) -> list[Path]:
    """Files named by `sources`: folders are searched recursively (sorted, known suffixes), files taken as they are.

    A file met twice is listed once; hidden files and folders inside a folder are passed over.

    Raises:
        MediaError: a source does not exist, or no file was found.
    """
    if isinstance(sources, str | Path):
        raise TypeError("sources is a single path; allowed: a sequence of paths")
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if source.is_dir():
            found.update(dict.fromkeys(_walk(source)))
        elif source.exists():
            found[source] = None
        else:
            raise MediaError(f"{source}: no such file or folder")
    if not found:
        places = ", ".join(map(str, sources)) or "an empty list"
        raise MediaError(f"{places}: no media file found; looked for names ending in {' '.join(VIDEO_SUFFIXES)}")
    return list(found)


def _walk(folder: Path) -> Iterator[Path]:
    seen = set()  # real paths, so that a link to a parent ends
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        if real in seen:
            continue
        seen.add(real)
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(VIDEO_SUFFIXES):
                yield Path(root) / name


def read_clip(
    path: str | Path,
    *,
    num_frames: int = 10,
    size: int = 224,
    sample_rate: int = SAMPLE_RATE,
    seconds: float = 10.24,
    frame: int | None = None,
) -> Clip:
    """Frames and sound of one media file, from its first video and its first audio stream.

    Frame `i` of `num_frames` is the file's frame `int(i * T / num_frames)` with `T = min(frame count, int(10 * fps))`,
    upright (rotation metadata is honored), its shorter side scaled to `size` (bilinear, pixels taken as square, as
    published), its center cut out. A video with fewer frames repeats them. The sound is the stream's first channel,
    not a mixture, resampled to `sample_rate`, at most `seconds` of it.

    Decoding stops as soon as both are complete, so a long file costs as much as a short one. What a damaged or
    truncated file still holds is used, and `duration` says how much sound that was.

    Args:
        path: the file.
        num_frames: frames to choose, 10 as published.
        size: height and width of the frames.
        sample_rate: of the returned waveform, in Hz.
        seconds: the most sound to keep.
        frame: return only this one of the `num_frames` frames (`frames` is then `[1, size, size, 3]`).

    Raises:
        MediaError: the file is missing, no media file, lacks sound or picture, or holds no whole frame or less than
            25 ms of sound.
        ValueError: a number is out of range.
    """
    if num_frames < 1 or size < 1 or sample_rate < 1000 or seconds < WINDOW_SECONDS:
        raise ValueError(
            f"num_frames={num_frames}, size={size}, sample_rate={sample_rate}, seconds={seconds}; "
            f"allowed: num_frames and size >= 1, sample_rate >= 1000, seconds >= {WINDOW_SECONDS}"
        )
    if frame is not None and not 0 <= frame < num_frames:
        raise ValueError(f"frame is {frame}; allowed: 0 to {num_frames - 1}, or None for all {num_frames}")
    path = Path(path)
    _check_file(path)
    chosen = range(num_frames) if frame is None else [frame]
    sound = _Sound(sample_rate, int(seconds * sample_rate))
    picture = _Picture(num_frames, chosen, size)
    _decode(path, picture, sound)
    if picture.ended_early:
        # The header promised more frames than the file holds: choose again among those that there are.
        picture = _Picture(num_frames, chosen, size, total=picture.count)
        _decode(path, picture, None)
    waveform = _long_enough(path, sound)
    return Clip(path, picture.frames(path), waveform, len(waveform) / sample_rate, picture.seconds)


def read_crop(
    path: str | Path,
    choose: Callable[[float, float], Crop],
    *,
    num_frames: int,
    size: int,
    sample_rate: int,
    seconds: float,
) -> tuple[Crop, np.ndarray, np.ndarray]:
    """A crop of a media file, of whose pictures no more are decoded than lie before its end.

    Args:
        path: the file.
        choose: (seconds of sound, seconds of pictures) -> the crop.
        num_frames, size, sample_rate, seconds: as in `read_clip`.

    Returns:
        The crop; its frames `[len(crop.frames), size, size, 3]` uint8, chosen and scaled as `read_clip` does; and the whole
        sound `[samples]` int16.

    Raises:
        MediaError: as `read_clip` does.
    """
    path = Path(path)
    _check_file(path)
    sound, picture = _Sound(sample_rate, int(seconds * sample_rate)), _Picture(num_frames, [0], size)
    _decode(path, picture, sound, sound_alone=True)
    waveform = _long_enough(path, sound)
    crop = choose(len(waveform) / sample_rate, picture.seconds)
    picture = _Picture(num_frames, crop.frames, size)
    _decode(path, picture, None)
    if picture.ended_early:  # as in `read_clip`: there are fewer seconds of pictures than the header promised
        count = picture.count
        crop = choose(len(waveform) / sample_rate, count / picture.rate)
        picture = _Picture(num_frames, crop.frames, size, total=count)
        _decode(path, picture, None)
    return crop, picture.frames(path), waveform


def read_sound(
    path: str | Path, *, num_frames: int = 10, frame: int = 5, sample_rate: int = SAMPLE_RATE, seconds: float = 10.24
) -> tuple[np.ndarray, int]:
    """The sound of a media file, as `read_clip` returns it, and the number in the file of frame `frame` of `num_frames`,
    from 0, as its header promises it; no picture is decoded. Raises MediaError as `read_clip` does."""
    path = Path(path)
    _check_file(path)
    sound, picture = _Sound(sample_rate, int(seconds * sample_rate)), _Picture(num_frames, [frame], size=1)
    _decode(path, picture, sound, sound_alone=True)
    return _long_enough(path, sound), picture.numbers[0]


def read_sound_file(path: str | Path, *, sample_rate: int = SAMPLE_RATE, seconds: float = 10.24) -> np.ndarray:
    """The sound of a file that need not hold a picture (WAV, FLAC, MP3, a video, ...): its first channel `[samples]` int16.
    Raises MediaError as `read_clip` does."""
    import av

    path = Path(path)
    _check_file(path)
    sound = _Sound(sample_rate, int(seconds * sample_rate))
    with _open(path) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            raise MediaError(f"{path}: has no audio stream")
        if stream.codec_context is None:
            raise MediaError(f"{path}: no decoder for its audio stream")
        try:
            for frame in container.decode(stream):
                sound.add(frame)
                if sound.done:
                    break
        except (av.error.FFmpegError, OSError, IndexError):
            pass  # what was decoded before the damage is used, where it is long enough
        sound.finish()
    return _long_enough(path, sound)


def _open(path: Path) -> "av.container.InputContainer":
    import av

    try:
        # "file:" keeps FFmpeg from reading a colon in a name as a protocol; the white list keeps play lists at home.
        return av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: not a readable media file ({_cause(error)})") from error


def _long_enough(path: Path, sound: "_Sound") -> np.ndarray:
    waveform = sound.waveform()
    if len(waveform) < sound.sample_rate * WINDOW_SECONDS:
        milliseconds = 1000 * len(waveform) / sound.sample_rate
        raise MediaError(f"{path}: {milliseconds:.1f} ms of sound could be decoded; at least 25 ms are needed")
    return waveform


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise MediaError(f"{path}: is a folder, not a media file")
    if not path.exists():
        raise MediaError(f"{path}: no such file")
    if not path.is_file():
        raise MediaError(f"{path}: is not a regular file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes)")


def _decode(path: Path, picture: "_Picture", sound: "_Sound | None", sound_alone: bool = False) -> None:
    """Feed `picture` and `sound` (None: not wanted) from the file until both have what they need or the file ends.

    `sound_alone`: `picture` learns which frames are wanted, and gets none.
    """
    import av

    with _open(path) as container:
        video, audio = _streams(path, container)
        picture.start(video)
        picture.done |= sound_alone
        wanted = [video] if sound is None else [audio] if sound_alone else [video, audio]
        packets = container.demux(wanted)
        while not (picture.done and (sound is None or sound.done)):
            try:
                packet = next(packets, None)
            except (av.error.FFmpegError, OSError, IndexError):
                break  # a damaged file, or a stream that PyAV did not see at its beginning: what was decoded so far is used
            if packet is None:
                break
            sink = picture if packet.stream.index == video.index else sound
            if sink.done:
                continue
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                continue  # one damaged packet; the next may be whole
            for item in decoded:
                sink.add(item)
                if sink.done:
                    break
        picture.finish()
        if sound is not None:
            sound.finish()


def _streams(path: Path, container: "av.container.InputContainer") -> tuple[Any, Any]:
    """First video stream that is no cover picture and first audio stream."""
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    video = next((s for s in container.streams.video if not s.disposition & pictures), None)
    audio = next(iter(container.streams.audio), None)
    missing = [name for name, stream in (("video", video), ("audio", audio)) if stream is None]
    if missing:
        raise MediaError(f"{path}: has no {' and no '.join(missing)} stream")
    for stream in (video, audio):
        if stream.codec_context is None:
            raise MediaError(f"{path}: no decoder for its {stream.type} stream")
        # Clips are decoded side by side in worker processes; threads inside one decoder only cost set-up time.
        stream.codec_context.thread_count = 1
    if video.codec_context.width * video.codec_context.height > MAX_PIXELS:
        size = f"{video.codec_context.width} x {video.codec_context.height}"
        raise MediaError(f"{path}: its header claims pictures of {size} pixels; allowed: {MAX_PIXELS} in all")
    return video, audio


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Picture:
    """Collects the chosen frames of a video stream as they are decoded."""

    def __init__(self, num_frames: int, chosen: Sequence[int], size: int, total: int | None = None):
        self.num_frames, self.chosen, self.size, self.total = num_frames, chosen, size, total
        self.count = 0  # frames decoded
        self.images: dict[int, np.ndarray] = {}  # by frame number in the file
        self.done = False
        self.ended_early = False

    def start(self, stream: "av.VideoStream") -> None:
        """Decide which frame numbers are wanted, and how far decoding must go to be sure of them."""
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        fps = next((rate for rate in rates if rate and 0 < rate <= _MAX_FPS), 25)
        self.rate = float(fps)
        limit = max(1, int(FRAME_SECONDS * fps))
        known = self.total or stream.frames
        total = min(known, limit) if known > 0 else limit
        self.seconds = float(total / fps)
        self.numbers = [int(i * total / self.num_frames) for i in self.chosen]
        # Without a frame count, only reaching the limit proves that the limit, and not the count, decides.
        self.stop = max(self.numbers) + 1 if known > 0 else total

    def add(self, frame: "av.VideoFrame") -> None:
        if self.count in self.numbers:
            self.images[self.count] = _square(frame, self.size)
        self.count += 1
        self.done = self.count >= self.stop

    def finish(self) -> None:
        self.ended_early = not self.done and self.count > 0

    def frames(self, path: Path) -> np.ndarray:
        """Those that were chosen. MediaError, naming `path`, when they could not be decoded."""
        if any(number not in self.images for number in self.numbers):
            raise MediaError(f"{path}: no video frame could be decoded")
        return np.stack([self.images[number] for number in self.numbers])


class _Sound:
    """Collects the first channel of an audio stream, resampled, up to a number of samples."""

    def __init__(self, sample_rate: int, samples: int):
        self.sample_rate, self.samples = sample_rate, samples
        self.parts: list[np.ndarray] = []
        self.length = 0
        self.done = False
        self.resampler: Any = None
        self.kind: tuple | None = None

    def add(self, frame: "av.AudioFrame") -> None:
        import av

        kind = (frame.format.name, frame.sample_rate, frame.layout.name, frame.layout.nb_channels)
        if kind != self.kind:  # some streams change their format on the way
            self._flush()
            # All channels are resampled and one is kept: the layout stays, so nothing is mixed.
            self.resampler = av.AudioResampler(format="s16p", rate=self.sample_rate)
            self.kind = kind
        frame.pts = None  # gaps in the time stamps are not filled, as in the published extraction
        self._keep(self.resampler.resample(frame))

    def _flush(self) -> None:
        if self.resampler is not None:
            self._keep(self.resampler.resample(None))
            self.resampler = None

    def _keep(self, frames: list) -> None:
        for frame in frames:
            self.parts.append(frame.to_ndarray()[0])
            self.length += len(self.parts[-1])
        self.done = self.length >= self.samples

    def finish(self) -> None:
        if not self.done:
            self._flush()

    def waveform(self) -> np.ndarray:
        return np.concatenate([*self.parts, np.zeros(0, np.int16)])[: self.samples]


def _square(frame: "av.VideoFrame", size: int) -> np.ndarray:
    """`[size, size, 3]` uint8: the frame upright, shorter side scaled to `size`, center kept."""
    from PIL import Image

    image = Image.fromarray(frame.reformat(format="rgb24", threads=1).to_ndarray())
    turn = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    if (angle := round(frame.rotation) % 360) in turn:
        image = image.transpose(turn[angle])
    # Scaling only the part that stays is the same arithmetic as scaling all and cropping, without the waste.
    short = min(image.size)
    scaled = [size if side == short else int(size * side / short) for side in image.size]
    starts = [round((side - size) / 2) for side in scaled]
    scale = [side / new for side, new in zip(image.size, scaled, strict=True)]
    box = [start * s for start, s in zip(starts, scale, strict=True)]
    box += [min((start + size) * s, side) for start, s, side in zip(starts, scale, image.size, strict=True)]
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=tuple(box)))
