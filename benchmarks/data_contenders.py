"""What `data.py` times besides our loaders: the published loader's way and a plain `DataLoader` over shards, written as
anybody would write them, and decoding alone."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Semaphore

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.decoder import Decoded, Substitute
from cavmae_fast.data.decode.reading import ClipInfo, Reader
from cavmae_fast.data.features import AUDIO_MEAN, AUDIO_STD, IMAGE_MEAN, IMAGE_STD
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.files import MediaError, read_clip
from cavmae_fast.data.plan import Step, Want
from cavmae_fast.data.sets.shards import ShardSet
from cavmae_fast.data.sets.sources import Source
from cavmae_fast.reference.fbank import log_mel_fbank

TARGET_LENGTH = 1024
SAMPLES = ClipSpec(audio_length=TARGET_LENGTH).samples


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

    def crop(self, path: Path) -> Image.Image:
        image = Image.open(path).convert("RGB")
        scale = 224 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        return image.crop((left, top, left + 224, top + 224))

    def image(self, path: Path) -> Tensor:
        pixels = np.array(self.crop(path))
        return (torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255) - self.mean) / self.std

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        features = (self.fbank(self.base / row["wav"]) - AUDIO_MEAN) / AUDIO_STD
        features = features + torch.rand(features.shape) * random.random() / 10
        features = torch.roll(features, random.randrange(-TARGET_LENGTH, TARGET_LENGTH), 0)
        frame = self.base / row["video_path"] / f"frame_{random.randrange(10)}" / f"{row['video_id']}.jpg"
        return features, self.image(frame)


class PublishedHostWork(PublishedDataset):
    """Of the published way only what is left to the host where a GPU computes the features: to read and decode a frame and
    the sound, and to bring them to one size."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        samples, _ = soundfile.read(self.base / row["wav"], dtype="int16", always_2d=True)
        waveform = np.zeros(SAMPLES, np.int16)
        waveform[: len(samples)] = samples[:SAMPLES, 0]
        frame = self.base / row["video_path"] / f"frame_{random.randrange(10)}" / f"{row['video_id']}.jpg"
        return torch.from_numpy(waveform), torch.from_numpy(np.array(self.crop(frame)))


def published_loader(dataset: PublishedDataset, batch: int, workers: int) -> DataLoader:
    """The published loader; its workers are kept from epoch to epoch, so that their start does not count."""
    return DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)


class ShardDataset(Dataset):
    """The clips of a folder of shards: what a step wants of one -> what is known of it, its pictures and its sound, as our
    own workers decode and check them."""

    def __init__(self, shards: ShardSet, reader: Reader):
        self.shards, self.reader = shards, reader

    def __getitem__(self, want: Want) -> tuple[ClipInfo, Tensor, Tensor]:
        info, images, sound = self.reader.read(self.shards[want.clip], want.moment)
        waveform = np.zeros(self.reader.clip.samples, np.int16)
        waveform[: len(sound)] = sound
        return info, torch.from_numpy(images), torch.from_numpy(waveform)


class DataLoaderDecoder:
    """In the place of a loader's decoder: a plain `DataLoader`, over the same steps. It does less: a clip that cannot be
    used, a worker that dies or hangs ends the loop."""

    closing = False

    def __init__(self, shards: ShardSet, reader: Reader, substitute: Substitute, workers: int):
        self.substitute = substitute
        self.steps: Iterator[Step] = iter(())
        self.begun: deque[Step] = deque()
        self.batches = DataLoader(
            ShardDataset(shards, reader),
            batch_sampler=self,
            num_workers=workers,
            collate_fn=self.collate,
            persistent_workers=True,
        )

    def __iter__(self) -> Iterator[Sequence[Want]]:
        for step in self.steps:
            self.begun.append(step)
            yield step.wants

    @staticmethod
    def collate(clips: list[tuple[ClipInfo, Tensor, Tensor]]) -> tuple[list[ClipInfo], Tensor, Tensor]:
        infos, images, waveforms = zip(*clips, strict=True)
        return list(infos), default_collate(images), default_collate(waveforms)

    def decode(self, steps: Iterator[Step], stopped: Event) -> Iterator[Decoded]:
        self.steps, self.begun = steps, deque()
        ahead, batches = Semaphore(3), iter(self.batches)
        while not stopped.is_set():
            if not ahead.acquire(timeout=0.2):
                continue
            batch = next(batches, None)
            if batch is None:
                return
            infos, image, waveform = batch
            decoded = Decoded(self.begun.popleft(), self.substitute)
            decoded.infos = infos
            yield decoded.finish(image, waveform, ahead.release)

    def close(self) -> None:
        """The processes end when their `DataLoader` is collected."""
        del self.batches


def with_data_loader(loader: Loader, workers: int) -> None:
    """Puts a `DataLoader` in the place of the decoder of a loader over shards."""
    loader._decoder.close()
    decoder = DataLoaderDecoder(loader.clips, loader._exact.reader, loader.plan.substitute, workers)
    loader._decoder = loader._open["decoder"] = decoder


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
