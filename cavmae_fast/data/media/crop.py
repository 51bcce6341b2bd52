"""Which of a clip's frames a model sees, and from where its sound is heard."""

from __future__ import annotations

from typing import NamedTuple

from cavmae_fast.clip import WINDOW_SECONDS, ClipSpec

FRAME_SECONDS = 10
"Frames are chosen from a clip's first ten seconds, as published."
CLIP_SECONDS = 10.24
"Sound of a clip from which crops are cut, and that `prepare` keeps unless it is told otherwise."


class Crop(NamedTuple):
    """What is cut out of a clip. `start`: where it begins, in seconds; `frames`: the numbers of its pictures."""

    start: float
    frames: tuple[int, ...]

    def sound(self, sample_rate: int, samples: int) -> slice:
        """The part of the clip's sound that is heard: at most `samples`, from where the crop begins."""
        first = int(self.start * sample_rate)
        return slice(first, first + samples)


def crop_at(clip: ClipSpec, moment: float, num_frames: int, duration: float, picture_seconds: float | None = None) -> Crop:
    """The crop of a clip at a `moment` in [0, 1): 0 is as early as possible, 0.5 the middle.

    A clip has `num_frames` frames, which lie evenly over its first ten seconds, or over those in which it shows pictures,
    where these are fewer. Without a frame rate, the picture, where one is wanted, is the frame `int(moment * num_frames)`,
    and the sound begins at 0.

    With a frame rate, the crop begins with one of the frames, so that pictures and sound begin together, and lies within
    the seconds that are both seen and heard; its pictures are the frames nearest to its moments. A clip that is seen or
    heard for less than the crop is taken from 0 on; where its pictures end, the last one is repeated.

    Args:
        clip: frames and frame rate of the crop.
        moment: 0 or more, less than 1.
        num_frames: of the whole clip.
        duration: of the clip's sound, in seconds; looked at only where there is a frame rate, as what follows is.
        picture_seconds: of its pictures; None: as long as its sound.
    """
    if clip.frame_rate is None:
        return Crop(0.0, (int(moment * num_frames),) * clip.frames)
    seen = min(duration if picture_seconds is None else picture_seconds, FRAME_SECONDS)
    step = seen / num_frames  # from one frame to the next
    spare = max(0.0, min(duration, seen) - max(clip.crop_seconds, WINDOW_SECONDS))
    # As many beginnings as fit, each as likely. What is added keeps a whole number of steps whole.
    first = int(moment * (int(spare / step + 1e-9) + 1))
    frames = (first + int(number / clip.frame_rate / step + 0.5) for number in range(clip.frames))
    return Crop(first * step, tuple(min(frame, num_frames - 1) for frame in frames))
