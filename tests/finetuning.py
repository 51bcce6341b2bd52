"""A tiny fine-tuning job for tests: generated clips with labels, a pretrained checkpoint, and the options that fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch

from cavmae_fast import CAVMAE
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.media.synthetic_lists import write_lists
from cavmae_fast.training.finetune_config import FinetuneConfig


class Job(NamedTuple):
    """Lists of clips, with shape, color and motion as labels (26 classes) or the shape alone (5), and a checkpoint."""

    train: Path
    test: Path
    labels: Path
    train_shapes: Path
    test_shapes: Path
    shapes: Path
    init: Path

    def config(self, out: Path, **options: Any) -> FinetuneConfig:
        """A run of three epochs of three steps, the last two of which are averaged."""
        plain = {
            "data": (self.train,),
            "eval_data": (self.test,),
            "labels": self.labels,
            "init": self.init,
            "recipe": "as20k",
            "epochs": 3,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "head_lr_factor": 10.0,
            "decay_start": 1,
            "average_epochs": (2, 3),
            "freq_mask": 16,
            "time_mask": 8,
            "device": "cpu",
            "dtype": "float32",
            "out": out,
        }
        return FinetuneConfig(**plain | options)

    def single(self, out: Path, **options: Any) -> FinetuneConfig:
        """As `config`, with one label per clip."""
        lists = {"data": (self.train_shapes,), "eval_data": (self.test_shapes,), "labels": self.shapes}
        return self.config(out, **{"recipe": "vggsound", **lists, **options})


def make_job(folder: Path, **model: Any) -> Job:
    """14 training clips and 9 others, 0.7 s long, and a tiny model with random weights."""
    generate_clips(folder / "clips", num_train=14, num_test=9, seconds=0.7, size=64)
    lists = write_lists(folder / "clips", folder / "lists")
    shapes = folder / "lists" / "shapes.csv"
    shapes.write_text("".join(lists.labels.read_text().splitlines(keepends=True)[:6]))
    single = []
    for path in (lists.train, lists.test):
        rows = json.loads(path.read_text())["data"]
        single.append(path.with_name(f"{path.stem}-shapes.json"))
        single[-1].write_text(json.dumps({"data": [{**row, "labels": row["labels"].split(",")[0]} for row in rows]}))
    torch.manual_seed(0)
    CAVMAE(**tiny.TINY | model).save_pretrained(folder / "model")
    return Job(lists.train, lists.test, lists.labels, *single, shapes, folder / "model")
