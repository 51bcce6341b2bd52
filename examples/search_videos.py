"""Search videos by a sound, in Python: embed a folder, look into the index with NumPy, ask it, see what was filled in.

    python examples/search_videos.py                                     # 16 generated clips, an untrained model
    python examples/search_videos.py videos --model runs/pretrain/model  # your clips, a trained model

Each step below can be run alone, as in a notebook: the index on the disk is all that they share.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import cavmae_fast
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.evaluation import Index, Running, embed, inpaint, retrieve, search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="?", help="a folder of videos, shards or a list; default: clips generated now")
    parser.add_argument("--model", type=Path, help="checkpoint; default: a small untrained model")
    parser.add_argument("--out", type=Path, default=Path("runs/search_videos"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    running = Running(device=args.device)

    # 1. Clips and a model.
    videos = args.videos or [str(path) for path in generate_clips(args.out / "clips", num_train=0, num_test=16)[1]]
    checkpoint = args.model
    if checkpoint is None:
        torch.manual_seed(0)
        checkpoint = cavmae_fast.create_model("small").save_pretrained(args.out / "model")

    # 2. How well does the model know which sound belongs to which picture?
    scores = retrieve(checkpoint, videos, running=running).scores
    for name, way in (("sound -> picture", scores.audio_to_video), ("picture -> sound", scores.video_to_audio)):
        print(f"{name}: R@5 {way.recall[5]:.1f} % (chance {scores.chance[5]:.1f} %), median rank {way.median_rank:g}")

    # 3. An index: one embedding of the sound and one of the picture per clip. Running this again goes on where it was.
    embed(checkpoint, videos, args.out / "index", running=running)

    # 4. It is NumPy memory maps: nothing is read before it is looked at.
    index = Index(args.out / "index")
    audio = np.concatenate(list(index.arrays("audio")))  # [clips, width], of length 1
    print(f"{len(index)} clips, {audio.shape[1]} numbers for the sound of each; the first is {index[0].id}")

    # 5. Ask it. The query may be any sound file; here it is the sound of a clip, which must find itself among sounds.
    answer = search(index, audio=index[3].path, top=3, match="same", running=running)
    for hit in answer.hits:
        print(f"{hit.rank}. {hit.id}, cosine {hit.score:.3f}")

    # 6. What does the model fill in where three quarters of a clip are missing?
    errors = inpaint(checkpoint, videos, clips=2, running=running).clips[0].errors
    print(f"filled in: sound {errors.audio_db:.1f} dB off, picture {errors.video_psnr_db:.1f} dB PSNR")


if __name__ == "__main__":
    main()
