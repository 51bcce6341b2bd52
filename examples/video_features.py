"""Features for a folder of videos: one vector of its sound and one of its picture for each clip, in one .npz file.

    python examples/video_features.py                                     # 16 generated clips, an untrained model
    python examples/video_features.py videos --model runs/pretrain/model  # your clips, a trained model

The file holds `ids [N]`, `audio [N, D]` and `video [N, D]`: the means over the tokens of each stream, in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import cavmae_fast
from cavmae_fast.data.media.synthetic import generate_clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="?", help="a folder of videos, shards or a list; default: clips generated now")
    parser.add_argument("--model", type=Path, help="folder that save_pretrained wrote; default: a small untrained model")
    parser.add_argument("--out", type=Path, default=Path("runs/features/features.npz"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    videos = args.videos or generate_clips(args.out.parent / "clips", num_train=0, num_test=16)[1]
    torch.manual_seed(0)
    model = cavmae_fast.CAVMAE.from_pretrained(args.model) if args.model else cavmae_fast.create_model("small")
    model.to(args.device).eval()

    loader = cavmae_fast.Loader(  # without training=True: every clip once, in order, its middle frame, no augmentation
        videos,
        args.batch_size,
        device=args.device,
        clip=model.clip_spec,
    )
    ids, audio, video = [], [], []
    for batch in loader:
        with torch.inference_mode():
            tokens = model.forward_feat(batch.audio, batch.image)  # audio [B, La, D], video [B, Lv, D]
        ids += batch.ids
        audio.append(tokens.audio.mean(dim=1).float().cpu().numpy())
        video.append(tokens.video.mean(dim=1).float().cpu().numpy())

    # A clip that cannot be decoded is left out and named, so match by id, not by position in your own list.
    for reject in loader.rejects.values():
        print(f"not used: {reject.path}: {reject.reason}")
    np.savez(args.out, ids=np.array(ids), audio=np.concatenate(audio), video=np.concatenate(video))
    print(f"{len(ids)} clips, {audio[0].shape[1]} numbers for the sound and as many for the picture of each: {args.out}")


if __name__ == "__main__":
    main()
