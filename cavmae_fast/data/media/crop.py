"""Which of a clip's frames a model sees, and from where its sound is heard."""

from __future__ import annotations

from typing import NamedTuple

from cavmae_fast.clip import WINDOW_SECONDS, ClipSpec

FRAME_SECONDS = 10
"Frames are chosen from a clip's first ten seconds, as published."


class Crop(NamedTuple):
    """What is cut out of a clip. `start`: where it begins, in seconds; `frames`: the numbers of its pictures."""

    start: float
    frames: tuple[int, ...]

    def sound(self, sample_rate: int, samples: int) -> slice:
        """The part of the clip's sound that is heard: at most `samples`, from where the crop begins."""
        first = int(self.start * sample_rate)
        return slice(first, first + samples)


def crop_at(clip: ClipSpec, moment: float, num_frames: int, duration: float) -> Crop:
    """The crop of a clip at a `moment` in [0, 1): 0 is as early as possible, 0.5 the middle.

    A clip has `num_frames` frames, which lie evenly over its first ten seconds, or over its `duration` where that is
    shorter. Without a frame rate, the picture, where one is wanted, is the frame `int(moment * num_frames)` and the sound
    begins at 0. With one,
    the crop lies within these seconds, and its pictures are the frames nearest to its moments. A clip that is shorter than
    the crop is taken from 0 on; after its end, its last frame is repeated.

    Args:
        clip: frames and frame rate of the crop.
        moment: 0 or more, less than 1.
        num_frames: of the whole clip.
        duration: of the clip, in seconds; looked at only where there is a frame rate.
    """
    if clip.frame_rate is None:
        return Crop(0.0, (int(moment * num_frames),) * clip.frames)
    span = min(duration, FRAME_SECONDS)
    start = moment * max(0.0, span - max(clip.crop_seconds, WINDOW_SECONDS))
    moments = (start + number / clip.frame_rate for number in range(clip.frames))
    return Crop(start, tuple(min(int(time * num_frames / span + 0.5), num_frames - 1) for time in moments))
