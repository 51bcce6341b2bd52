"""A linear probe: how much of a class can be read from frozen features by a linear classifier (scikit-learn's).

    pip install scikit-learn
    python examples/linear_probe.py                              # an untrained model, for comparison
    python examples/linear_probe.py --model runs/pretrain/model  # what `cavmae-fast pretrain` has learned

The generated clips come with a manifest that says what each one shows and plays. What is seen decides what is heard: the
hue of the shape decides the pitch of the sound, so the 16 hues can be told from the sound as well as from the picture. The
test clips show combinations of shape, hue and motion that no training clip shows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cavmae_fast
from cavmae_fast.data.media.synthetic import generate_clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder that save_pretrained wrote; default: a small untrained model")
    parser.add_argument("--attribute", choices=("shape", "hue", "motion"), default="hue", help="what to tell apart")
    parser.add_argument("--clips", type=Path, default=Path("runs/linear_probe/clips"), help="folder for generated clips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    train, test = generate_clips(args.clips, num_train=160, num_test=64)
    rows = [json.loads(line) for line in (args.clips / "manifest.jsonl").read_text().splitlines()[1:]]
    classes = {Path(row["file"]).stem: str(row[args.attribute]) for row in rows}

    torch.manual_seed(0)
    model = cavmae_fast.CAVMAE.from_pretrained(args.model) if args.model else cavmae_fast.create_model("small")
    model.to(args.device).eval()

    train_features, train_classes = features(model, train, classes, args.device)
    test_features, test_classes = features(model, test, classes, args.device)
    most_frequent = max(np.mean(test_classes == name) for name in set(test_classes))
    print(f"{args.attribute}: {len(set(train_classes))} classes, {len(train)} training clips, {len(test)} test clips")
    print(f"always the most frequent class  {most_frequent:.1%}")
    for stream in ("audio", "video"):
        # Features are standardized, because the regularization treats all of them alike.
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        probe.fit(train_features[stream], train_classes)
        print(f"probe on {stream} features         {probe.score(test_features[stream], test_classes):.1%}")


def features(
    model: cavmae_fast.CAVMAE, clips: list[Path], classes: dict[str, str], device: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Mean tokens of both streams, `[N, D]` each, and the classes `[N]` of the same clips."""
    loader = cavmae_fast.Loader(clips, batch_size=32, clip=model.clip_spec, device=device, workers=0)
    parts, names = {"audio": [], "video": []}, []
    for batch in loader:
        with torch.inference_mode():
            tokens = model.forward_feat(batch.audio, batch.image)
        parts["audio"].append(tokens.audio.mean(dim=1).float().cpu().numpy())
        parts["video"].append(tokens.video.mean(dim=1).float().cpu().numpy())
        names += [classes[clip] for clip in batch.ids]
    return {stream: np.concatenate(part) for stream, part in parts.items()}, np.array(names)


if __name__ == "__main__":
    main()
