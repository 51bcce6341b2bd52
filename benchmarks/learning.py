"""Does it learn? The four systems of the CAV-MAE paper, small, on generated clips: one budget, several seeds, and what is
said of them judged claim by claim (`learning_claims.py`, which was written before the first run).

    python benchmarks/learning.py && python benchmarks/render.py

Every system has the size of the preset `small`, and the losses and the structure of its own preset. All are pretrained for
as many steps on the same batches and then fine-tuned by the recipe `small`. A fifth, not pretrained, is the control.
A run's numbers are written when it is done, and the same command, started again, goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.common import BenchmarkError, add_arguments, device_name, find_device, provenance, read_json, write_json
from benchmarks.learning_claims import judge
from benchmarks.learning_report import draw, figures_table, verdicts_table
from cavmae_fast.data.features import image_features
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.media.synthetic_lists import LabeledLists, write_lists
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.data.sets.opening import open_clips
from cavmae_fast.evaluation import Running, classify
from cavmae_fast.evaluation.predicting import Predictions
from cavmae_fast.evaluation.reconstruction import fill_in
from cavmae_fast.evaluation.retrieval import embed, retrieval_metrics
from cavmae_fast.models import CAVMAE, PRESETS
from cavmae_fast.models.precision import DTYPES, Precision, choose_dtype
from cavmae_fast.models.presets import Preset
from cavmae_fast.training.clips import make_loader
from cavmae_fast.training.finetune import finetune
from cavmae_fast.training.finetune_config import FinetuneConfig
from cavmae_fast.training.fit import fit
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.recipes import PRETRAINING, Recipe
from cavmae_fast.training.schedules import StepDecay
from cavmae_fast.training.state import RunState

SMALL = PRESETS["small"]
SYSTEMS = {"untrained": "cav-mae-base", "cav": "cav", "vanilla-av-mae": "vanilla-av-mae", "av-mae": "av-mae"} | {
    "cav-mae": "cav-mae-base"
}
"The systems that are compared, and the preset that each is a small form of. `untrained` is not pretrained."
ATTRIBUTES = ("shape", "hue", "motion")
"What the clips' labels are, one of each kind per clip."
MODES = ("multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly")


@dataclass(frozen=True)
class Budget:
    """What decides the numbers of a run, besides its system and seed."""

    steps: int
    "Of pretraining."
    epochs: int
    "Of fine-tuning."
    batch_size: int
    train_clips: int
    test_clips: int
    device: str
    dtype: str

    @property
    def precision(self) -> Precision:
        return Precision(torch.device(self.device), DTYPES[self.dtype])


def small(system: str) -> Preset:
    """The system in the size of `small`: its own structure, and `small`'s weight of each loss that it has."""
    own = PRESETS[SYSTEMS[system]]
    return replace(
        SMALL,
        summary=own.summary,
        model=SMALL.model | own.model,
        mae_loss_weight=SMALL.mae_loss_weight if own.mae_loss_weight else 0.0,
        contrast_loss_weight=SMALL.contrast_loss_weight if own.contrast_loss_weight else 0.0,
    )


def recipe_for(budget: Budget) -> Recipe:
    """The recipe of `small`, its schedule in proportion to the steps."""
    recipe = PRETRAINING["small"]
    epochs = max(1, budget.steps // max(1, budget.train_clips // budget.batch_size))
    share = epochs / recipe.epochs
    start, every = (max(1, round(share * value)) for value in (recipe.schedule.start, recipe.schedule.every))
    return replace(recipe, epochs=epochs, schedule=StepDecay(start, every, end=epochs))


# ------------------------------------------------------------------------------------------------------------- data


class Data:
    """The generated clips: training batches for each seed, held-out batches, labels. Each clip is decoded once and kept."""

    def __init__(self, folder: Path, budget: Budget) -> None:
        train, test = generate_clips(folder / "clips", num_train=budget.train_clips, num_test=budget.test_clips, seed=0)
        self.train, self.test = open_clips(train), open_clips(test)
        self.lists: LabeledLists = write_lists(folder / "clips", folder / "lists")
        self.label_set = LabelSet.from_csv(self.lists.labels)
        self.budget = budget
        self.groups = {
            name: np.array([number for number, mid in enumerate(self.label_set.mids) if mid.startswith(f"{name}/")])
            for name in ATTRIBUTES
        }
        self.batches = {"train": self._all(self.lists.train), "test": self._all(self.lists.test)}
        self._loader: Loader | None = None
        self._seed, self._begin = -1, {}

    def _all(self, listed: Path) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Every clip of a list, in order: sound, picture and labels of each batch."""
        spec, budget = SMALL.create().clip_spec, self.budget
        loader = Loader(listed, budget.batch_size, spec, device=budget.device, workers=0, labels=self.label_set)
        batches = [(batch.audio, batch.image, batch.labels) for batch in loader]
        loader.close()
        return batches

    def training(self, seed: int) -> Loader:
        """The training loader of a seed at its first step."""
        if self._loader is None or seed != self._seed:
            if self._loader is not None:
                self._loader.close()
            spec, budget = SMALL.create().clip_spec, self.budget
            options = {"backend": "torch", "device": torch.device(budget.device), "workers": 0, "seed": seed}
            self._loader = make_loader(self.train, budget.batch_size, spec, training=True, **options)
            self._seed, self._begin = seed, self._loader.state_dict()
        self._loader.load_state_dict(self._begin)
        return self._loader

    def pairs(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        return ((audio, image) for audio, image, _ in self.batches[split])

    def classes(self, split: str) -> dict[str, np.ndarray]:
        """By attribute, the class of each clip among those of the attribute."""
        labels = torch.cat([labels for *_, labels in self.batches[split]]).cpu().numpy()
        return {name: labels[:, group].argmax(axis=1) for name, group in self.groups.items()}


def chance(data: Data) -> dict[str, float]:
    """Accuracy of naming the most frequent class of each attribute, and its mean."""
    shares = {name: float(np.bincount(classes).max() / len(classes)) for name, classes in data.classes("test").items()}
    return shares | {"accuracy": float(np.mean(list(shares.values())))}


# -------------------------------------------------------------------------------------------------------- one run


def pretrained(system: str, seed: int, budget: Budget, data: Data) -> tuple[CAVMAE, dict[str, float]]:
    """The model after its steps, and the losses of the last tenth of them."""
    preset = small(system)
    torch.manual_seed(seed)
    model = preset.create().to(budget.device).train()
    if system == "untrained":
        return model, {}
    task = PretrainTask(preset.mask_ratio, "unstructured", preset.mae_loss_weight, preset.contrast_loss_weight)
    task.prepare(model)
    state = RunState.start(model, recipe_for(budget), data.training(seed), budget.precision)
    rows: list[dict[str, Any]] = []
    fit(task, state, budget.steps, rows.append)
    last = rows[-max(1, len(rows) // 10) :]
    return model, {name: float(np.mean([row[name] for row in last])) for name in ("loss_mae_a", "loss_mae_v", "loss_c")}


def retrieval(model: CAVMAE, data: Data) -> dict[str, float]:
    """Recall and ranks among the held-out clips."""
    return retrieval_metrics(*embed(model, data.pairs("test")))


def reconstruction(model: CAVMAE, data: Data) -> dict[str, float]:
    """Mean squared error on the removed patches of the held-out clips, in the model's normalized units: as the model fills
    them in, and as the mean of the rest of the clip (for pictures, of each color) does."""
    sums: dict[str, float] = dict.fromkeys(("audio", "audio_mean", "video", "video_mean", "a", "v"), 0.0)
    spec = model.clip_spec
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for audio, image in data.pairs("test"):
            images = image_features(image, spec.image_mean, spec.image_std)
            for (name, filled), stream in zip(fill_in(model, audio, images, SMALL.mask_ratio).items(), ("audio", "video")):
                left = 1 - filled.hidden
                mean = (filled.true * left).sum(dim=(2, 3), keepdim=True) / left.sum(dim=(2, 3), keepdim=True)
                for key, guess in ((stream, filled.filled), (f"{stream}_mean", mean)):
                    sums[key] += float(((guess - filled.true) * filled.hidden).square().sum())
                sums[name] += float(filled.hidden.sum()) * filled.true.shape[1]
    return {key: sums[key] / sums[key[0]] for key in ("audio", "audio_mean", "video", "video_mean")}


@torch.no_grad()
def features(model: CAVMAE, data: Data, split: str) -> dict[str, np.ndarray]:
    """Mean tokens of the frozen model: of the sound alone, the picture alone, and of both together (the joint stream)."""
    model.eval()
    parts: dict[str, list[np.ndarray]] = {"joint": [], "audio": [], "video": []}
    for audio, image in data.pairs(split):
        tokens = model.encode({"a": audio, "v": image}, None, single=True, joint=True)
        for name, key in (("joint", None), ("audio", "a"), ("video", "v")):
            parts[name].append(tokens[key].float().mean(dim=1).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


def probe(model: CAVMAE, data: Data) -> dict[str, dict[str, float]]:
    """Accuracy of linear classifiers on frozen features, by stream and attribute, and the mean over attributes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    seen, held_out = features(model, data, "train"), features(model, data, "test")
    known, wanted = data.classes("train"), data.classes("test")
    found: dict[str, dict[str, float]] = {}
    for stream in seen:
        for name in ATTRIBUTES:
            # Features are standardized, because the regularization treats all of them alike.
            classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            classifier.fit(seen[stream], known[name])
            found.setdefault(stream, {})[name] = float(classifier.score(held_out[stream], wanted[name]))
        found[stream]["accuracy"] = float(np.mean([found[stream][name] for name in ATTRIBUTES]))
    return found


def fine_tuned(model: CAVMAE, seed: int, budget: Budget, data: Data, folder: Path) -> dict[str, dict[str, float | None]]:
    """Figures of the classifier that `finetune` makes of the model, trained with both modalities, in each input mode.

    A clip has one shape, one hue and one motion: `accuracy` is the mean over the three of how often the highest score among
    the classes of that kind is the right one.
    """
    lists, start = data.lists, model.save_pretrained(folder / "start")
    options = {"recipe": "small", "epochs": budget.epochs, "batch_size": budget.batch_size, "seed": seed}
    places = {"data": (lists.train,), "eval_data": (lists.test,), "labels": lists.labels, "init": start}
    machine = {"device": budget.device, "dtype": budget.dtype, "workers": 0, "loader": "torch"}
    finetune(FinetuneConfig(out=folder / "finetune", overwrite=True, **places, **options, **machine))
    running = Running(**machine)
    found = classify(folder / "finetune" / "model", lists.test, lists.labels, modes=MODES, running=running)
    return {
        mode: {"mAP": found.results[mode].map, **attribute_accuracy(predictions, data)}
        for mode, predictions in found.predictions.items()
    }


def attribute_accuracy(predictions: Predictions, data: Data) -> dict[str, float]:
    """How often the highest score among the classes of an attribute is the right one, and the mean over attributes."""
    right = {
        name: float((predictions.scores[:, group].argmax(axis=1) == predictions.targets[:, group].argmax(axis=1)).mean())
        for name, group in data.groups.items()
    }
    return right | {"accuracy": float(np.mean(list(right.values())))}


def run(system: str, seed: int, budget: Budget, data: Data, folder: Path) -> dict[str, Any]:
    """All figures of one system and seed."""
    begin = time.perf_counter()
    model, losses = pretrained(system, seed, budget, data)
    trained = time.perf_counter()
    reconstructs = system != "untrained" and small(system).mae_loss_weight != 0
    with budget.precision.autocast():
        figures = {
            "retrieval": retrieval(model, data),
            "reconstruction": reconstruction(model, data) if reconstructs else None,
            "probe": probe(model, data),
        }
    judged = time.perf_counter()
    figures["finetuned"] = fine_tuned(model, seed, budget, data, folder)
    times = {"pretraining": trained - begin, "judging": judged - trained, "fine-tuning": time.perf_counter() - judged}
    return {"system": system, "seed": seed, "losses": losses, **figures, "seconds": times}


# ------------------------------------------------------------------------------------------------------------- all


def open_record(path: Path, budget: Budget, overwrite: bool) -> dict[str, Any]:
    """The record to go on with: that of `path`, or a new one. BenchmarkError when it is of another budget."""
    if overwrite or not path.exists():
        return {"kind": "learning", "settings": asdict(budget), "runs": []}
    record = read_json(path)
    changed = [name for name, value in asdict(budget).items() if record["settings"].get(name) != value]
    if changed:
        raise BenchmarkError(
            f"{path.name} holds runs of another budget ({', '.join(changed)} differ); name another --out, or add --overwrite"
        )
    return record


def campaign(systems: Sequence[str], seeds: int, budget: Budget, work: Path, path: Path, record: dict[str, Any]) -> None:
    """Computes the runs that `record` lacks and writes it to `path` after each. All systems of a seed come before the next
    seed, so that what is there at any time can be compared."""
    done = {(row["system"], row["seed"]) for row in record["runs"]}
    missing = [(system, seed) for seed in range(seeds) for system in systems if (system, seed) not in done]
    data = Data(work, budget)
    record["chance"] = chance(data)
    for number, (system, seed) in enumerate(missing, start=1):
        print(f"{system}, seed {seed} ({number} of {len(missing)})", file=sys.stderr, flush=True)
        folder = work / "run"
        row = run(system, seed, budget, data, folder)
        shutil.rmtree(folder)
        load = os.getloadavg()[0]
        record["runs"].append({**row, "load": load, "commit": record["provenance"]["commit"]})
        write_json(path, record)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=336, help="of pretraining (default: 16 epochs)")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--clips", type=int, default=672, help="of training")
    parser.add_argument("--test-clips", type=int, default=64)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="folder for clips and what is thrown away")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where the record is of another budget")
    options = parser.parse_args(arguments)
    for name in ("steps", "epochs", "batch", "seeds", "clips", "test_clips"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be 1 or more")
    device = find_device(parser, options.device)
    dtype = choose_dtype(device)[0] if options.dtype == "auto" else options.dtype
    sizes = options.batch, options.clips, options.test_clips
    budget = Budget(options.steps, options.epochs, *sizes, str(device), dtype)
    path = options.out / device_name(device) / "learning.json"
    try:
        record = open_record(path, budget, options.overwrite)
    except BenchmarkError as error:
        parser.error(str(error))
    command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    record["provenance"] = provenance(device, command, options.commit)
    campaign(options.systems, options.seeds, budget, options.work, path, record)
    draw(record, path.with_suffix(".png"))
    print(figures_table(record), verdicts_table(judge(record)), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
