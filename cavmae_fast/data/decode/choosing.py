"""Which of the ways to decode a loader takes."""

from __future__ import annotations

import torch

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.decode import dali
from cavmae_fast.data.sets.opening import Clips
from cavmae_fast.data.sets.shards import ShardSet

BACKENDS = ("auto", "torch", "dali")


def choose_backend(backend: str, clips: Clips, device: torch.device, clip: ClipSpec | None = None) -> tuple[str, str]:
    """The back end that decodes these clips for this device, and in a few words why.

    Args:
        backend: 'auto', 'torch' or 'dali'.
        clips: the data set.
        device: where the batches lie.
        clip: what the model takes of a clip; None: one picture of the whole.

    Raises:
        ValueError: `backend` is none of these, or cannot decode these clips here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "torch":
        return "torch", "asked for"
    if backend == "dali":
        if missing := dali.available():
            raise ValueError(f"backend is 'dali', but {missing}")
        if clip is not None and not clip.frames:
            raise ValueError(
                "backend is 'dali', which is for pictures, and the model takes the sound alone; allowed: backend='torch'"
            )
        videos = not isinstance(clips, ShardSet) and any(clip.video for clip in clips)
        if videos and (device.type != "cuda" or not all(clip.video for clip in clips)):
            raise ValueError(
                "backend is 'dali', which decodes videos with NVDEC, on a CUDA device, and no mixture of videos and "
                "extracted frames; allowed: backend='torch', or shards (`cavmae-fast prepare`)"
            )
        if videos and clip is not None and clip.frame_rate is not None:
            raise ValueError(
                f"backend is 'dali' with clip.frame_rate={clip.frame_rate:g}, and it cuts no crops in time out of videos; "
                "allowed: backend='torch', or shards (`cavmae-fast prepare`)"
            )
        return "dali", "asked for"
    if device.type == "cpu":
        return "torch", "the device is a CPU"
    # As with kernels: what never ran on a GPU is not the default on one.
    return "torch", "DALI has not been proven on a GPU; backend='dali' asks for it"
