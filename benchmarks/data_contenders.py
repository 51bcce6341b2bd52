"""What `data.py` times besides our loaders: the published loader's way, written plainly, and decoding alone."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.decoder import Decoded
from cavmae_fast.data.features import AUDIO_MEAN, AUDIO_STD, IMAGE_MEAN, IMAGE_STD
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.sets.sources import Source
from cavmae_fast.reference.fbank import log_mel_fbank

TARGET_LENGTH = 1024


class PublishedDataset(Dataset):
    """One clip at a time, features in the workers, as in the published `src/dataloader.py` (pretraining: random frame,
    noise and roll; no mixup). The log-mel routine is our plain reference, which does torchaudio's arithmetic."""

    def __init__(self, listed: Path):
        self.base = listed.parent
        self.rows = json.loads(listed.read_text())["data"]
        self.mean, self.std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def fbank(self, path: Path) -> Tensor:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        waveform = torch.from_numpy(samples.T)
        features = log_mel_fbank((waveform - waveform.mean())[:1], rate)[0]
        missing = TARGET_LENGTH - len(features)
        return torch.nn.functional.pad(features, (0, 0, 0, missing)) if missing > 0 else features[:TARGET_LENGTH]

    def image(self, path: Path) -> Tensor:
        image = Image.open(path).convert("RGB")
        scale = 224 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = np.array(image.crop((left, top, left + 224, top + 224)))
        return (torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255) - self.mean) / self.std

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        features = (self.fbank(self.base / row["wav"]) - AUDIO_MEAN) / AUDIO_STD
        features = features + torch.rand(features.shape) * random.random() / 10
        features = torch.roll(features, random.randrange(-TARGET_LENGTH, TARGET_LENGTH), 0)
        frame = self.base / row["video_path"] / f"frame_{random.randrange(10)}" / f"{row['video_id']}.jpg"
        return features, self.image(frame)


def published_loader(listed: Path, batch: int, workers: int) -> DataLoader:
    """The published loader; its workers are kept from epoch to epoch, so that their start does not count."""
    return DataLoader(
        PublishedDataset(listed), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )


@dataclass(frozen=True)
class DecodeOnly:
    """Runs in worker processes: decodes what `prepare` decodes, and throws it away."""

    seconds: float = 10.24

    def __call__(self, item: tuple[int, Source]) -> bool:
        try:
            read_clip(item[1].video, seconds=self.seconds)
        except MediaError:
            return False
        return True


class HostWork:
    """In the place of a loader's builder: nothing. What is left is the work of the host, where features are a GPU's."""

    def __call__(self, decoded: Decoded) -> Batch:
        step, ids = decoded.step, [info.id for info in decoded.infos if info is not None]
        return Batch(ids, decoded.waveform, decoded.image, None, step.draws.partner, step.epoch, step.position, [])
