"""A training loop of your own around `cavmae_fast.CAVMAE`: the published script's loop in plain form.

    python examples/pretrain_loop.py                  # generated clips and a small model: under a minute on a CPU
    python examples/pretrain_loop.py shards --full    # your clips and the published ViT-B, for which you want a GPU

`cavmae-fast pretrain` does the same and more (evaluation, figures, a record of every step). Begin here when the loop
itself is what you want to change.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import cavmae_fast
from cavmae_fast.data.media.synthetic import generate_clips

SMALL = {
    "img_size": 96,  # pixels
    "audio_length": 192,  # frames of 10 ms: the generated clips last two seconds
    "embed_dim": 192,
    "num_heads": 3,
    "depth": 4,
    "modality_specific_depth": 3,
    "decoder_embed_dim": 96,
    "decoder_num_heads": 3,
    "decoder_depth": 1,
}
FULL = {"img_size": 224, "audio_length": 1024, "norm_pix_loss": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="shards, a folder of videos or a list; default: clips generated now")
    parser.add_argument("--full", action="store_true", help="train the published ViT-B instead of a small model")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32, help="clips per step")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3; with --full 5e-5, as published for batch 48")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain_loop"), help="folder for clips and checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args()

    device = torch.device(args.device)
    # Only some CPUs multiply bfloat16 faster than float32; `cavmae-fast doctor` says whether yours does.
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    data = args.data or generate_clips(args.out / "clips", num_train=128, num_test=0)[0]

    torch.manual_seed(0)
    model = cavmae_fast.CAVMAE(**(FULL if args.full else SMALL)).to(device)
    loader = cavmae_fast.Loader(
        data,
        args.batch_size,
        training=True,  # shuffles, draws a frame of each clip, adds the published noise to the spectrogram
        device=device,
        clip=model.clip_spec,  # picture size, length of the spectrogram, statistics: what this model takes of a clip
        # A data set this small stays decoded in memory; a large one is decoded ahead by one worker process per core.
        workers=None if args.data else 0,
        keep=not args.data,
    )

    # The published optimizer and schedule: Adam with L2 regularization, the rate halved every fifth epoch from the tenth.
    trained = [p for p in model.parameters() if p.requires_grad]
    learning_rate = args.learning_rate or (5e-5 if args.full else 1e-3)
    optimizer = torch.optim.Adam(trained, learning_rate, betas=(0.95, 0.999), weight_decay=5e-7)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=range(10, args.epochs, 5), gamma=0.5)

    for epoch in range(args.epochs):
        total = torch.zeros(4, device=device)
        for batch in loader:  # one epoch; batch.audio is [B, T, 128], batch.image [B, 3, H, W] as uint8
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                output = model(  # unpacks as published, too: loss, loss_mae, loss_mae_a, ... = model(...)
                    batch.audio,
                    batch.image,
                    mask_ratio_a=0.75,
                    mask_ratio_v=0.75,
                    mae_loss_weight=1.0,
                    contrast_loss_weight=0.01,
                )
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            # Summed on the device: to read a loss at every step would make the host wait for the GPU at every step.
            total += torch.stack([output.loss, output.loss_mae_a, output.loss_mae_v, output.loss_c]).detach()
        scheduler.step()
        mean, audio, video, contrast = (total / len(loader)).tolist()
        print(f"epoch {epoch + 1:3d}  loss {mean:.4f}  audio {audio:.4f}  video {video:.4f}  contrast {contrast:.4f}")
    loader.close()

    folder = model.save_pretrained(args.out / "model")
    print(f"checkpoint: {folder}   (cavmae_fast.CAVMAE.from_pretrained reads it)")


if __name__ == "__main__":
    main()
