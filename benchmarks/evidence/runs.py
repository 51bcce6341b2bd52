"""One run of `benchmarks/learning.py`: a system is pretrained, judged as it is, fine-tuned and judged again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.clips import ATTRIBUTES, SMALL, Budget, Data
from cavmae_fast.data.features import image_features
from cavmae_fast.evaluation import Running, classify
from cavmae_fast.evaluation.predicting import Predictions
from cavmae_fast.evaluation.reconstruction import fill_in
from cavmae_fast.evaluation.retrieval import embed, retrieval_metrics
from cavmae_fast.models import CAVMAE, PRESETS
from cavmae_fast.models.abilities import Embeds
from cavmae_fast.models.presets import Preset
from cavmae_fast.models.weights import Pretrained
from cavmae_fast.training.finetune import finetune
from cavmae_fast.training.finetune_config import FinetuneConfig
from cavmae_fast.training.fit import fit
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.recipes import PRETRAINING, Recipe
from cavmae_fast.training.schedules import StepDecay
from cavmae_fast.training.state import RunState

SYSTEMS = {"untrained": "cav-mae-base", "cav": "cav", "vanilla-av-mae": "vanilla-av-mae", "av-mae": "av-mae"} | {
    "cav-mae": "cav-mae-base"
}
"The systems that are compared, and the preset that each is a small form of. `untrained` is not pretrained."
Features = dict[str, np.ndarray]
"By stream, the frozen model's features of all clips of a split, `[N, D]`."
MODES = ("multimodal", "audioonly", "videoonly", "missingaudioonly", "missingvideoonly")


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


def retrieval(model: Embeds, data: Data) -> dict[str, float]:
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
def features(model: CAVMAE, data: Data, split: str) -> Features:
    """Mean tokens of the frozen model: of the sound alone, the picture alone, and of both together (the joint stream)."""
    model.eval()
    parts: dict[str, list[np.ndarray]] = {"joint": [], "audio": [], "video": []}
    for audio, image in data.pairs(split):
        tokens = model.encode({"a": audio, "v": image}, None, single=True, joint=True)
        for name, key in (("joint", None), ("audio", "a"), ("video", "v")):
            parts[name].append(tokens[key].float().mean(dim=1).cpu().numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


def probe(seen: Features, held_out: Features, data: Data) -> dict[str, dict[str, float]]:
    """Accuracy of linear classifiers on frozen features, by stream and attribute, and the mean over attributes. They are
    made from the features of the training clips, `seen`, and judged on those of the held-out ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

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


def fine_tuned(
    model: Pretrained,
    seed: int,
    budget: Budget,
    data: Data,
    folder: Path,
    modes: Sequence[str] = MODES,
    changes: dict[str, Any] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Figures of the classifier that `finetune` makes of the model, in each of these input modes. `changes`: of the options
    of `finetune`; without any it is trained with both modalities.

    A clip has one shape, one hue and one motion: `accuracy` is the mean over the three of how often the highest score among
    the classes of that kind is the right one.
    """
    lists, start = data.lists, model.save_pretrained(folder / "start")
    options = {"recipe": "small", "epochs": budget.epochs, "batch_size": budget.batch_size, "seed": seed}
    places = {"data": (lists.train,), "eval_data": (lists.test,), "labels": lists.labels, "init": start}
    machine = {"device": budget.device, "dtype": budget.dtype, "workers": 0, "loader": "torch"}
    finetune(FinetuneConfig(out=folder / "finetune", overwrite=True, **places, **options, **machine, **(changes or {})))
    running = Running(**machine)
    found = classify(folder / "finetune" / "model", lists.test, lists.labels, modes=modes, running=running)
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
            "probe": probe(features(model, data, "train"), features(model, data, "test"), data),
        }
    judged = time.perf_counter()
    figures["finetuned"] = fine_tuned(model, seed, budget, data, folder)
    times = {"pretraining": trained - begin, "judging": judged - trained, "fine-tuning": time.perf_counter() - judged}
    return {"system": system, "seed": seed, "losses": losses, **figures, "seconds": times}
