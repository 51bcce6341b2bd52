"""One run of `benchmarks/mavil_learning.py`: a system of the MAViL paper's ablation is pretrained, judged as it is by a
linear probe and by retrieval, fine-tuned and judged again."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.clips import Budget, Data
from benchmarks.evidence.runs import Features, fine_tuned, probe, retrieval
from cavmae_fast.models import MAE, MAViL
from cavmae_fast.models.mavil_presets import TOWER_PRESETS
from cavmae_fast.models.opening import open_model
from cavmae_fast.training.fit import fit
from cavmae_fast.training.mae_task import MAETask
from cavmae_fast.training.mavil_task import MAViLTask
from cavmae_fast.training.recipes import TOWER_PRETRAINING, Recipe
from cavmae_fast.training.state import RunState
from cavmae_fast.training.teacher import Teacher

SYSTEMS = {
    "untrained": "mavil",
    "a-mae": "a-mae",
    "v-mae": "v-mae",
    "av-mae": "mavil-av-mae",
    "inter": "mavil-inter",
    "intra": "mavil",
    "round-1": "mavil",
    "round-2": "mavil",
}
"""The systems that are compared, in the order in which a seed runs them, and the preset that each is a small form of: its
losses are the preset's. `untrained` is not pretrained; `intra` is the whole of stage 1."""
TEACHERS = {"round-1": "intra", "round-2": "round-1"}
"Whose tokens a system of stage 2 regresses: those of the same seed's."
SIZES = {"frames": 4, "embed_dim": 128, "num_heads": 2, "depth": 3}
"In which the models differ from `mavil-small`: four pictures are all of a generated clip's two seconds."
CLASSIFIERS = {"a": {"audio": "audioonly"}, "v": {"video": "videoonly"}}
CLASSIFIERS["av"] = {**CLASSIFIERS["a"], **CLASSIFIERS["v"], "av": "multimodal"}
"By the modalities of a system: the encoders of each classifier that is made of it, and its input mode."


def sizes(system: str) -> dict[str, Any]:
    """Constructor arguments of a system's model."""
    small = TOWER_PRESETS["mavil-small"].model | SIZES
    if system in ("a-mae", "v-mae"):
        return {**{name: value for name, value in small.items() if name != "fusion_depth"}, "modality": system[0]}
    return small


def create(system: str) -> MAE | MAViL:
    """A system's model with new weights."""
    stage = {"stage": 2} if system in TEACHERS else {}
    return TOWER_PRESETS[SYSTEMS[system]].create(**stage, **sizes(system))


SPEC = create("intra").clip_spec
"What all of them take of a clip."


def recipe_for(budget: Budget) -> Recipe:
    """The recipe of `mavil-small`, its schedule in proportion to the steps."""
    epochs = max(1, budget.steps // max(1, budget.train_clips // budget.batch_size))
    return replace(TOWER_PRETRAINING["mavil-small"], epochs=epochs, batch_size=budget.batch_size)


def pretrained(system: str, seed: int, budget: Budget, data: Data, models: Path) -> tuple[MAE | MAViL, dict[str, float]]:
    """The model after its steps, and the losses of the last tenth of them. `models`: where teachers are kept for the rounds
    that follow; one that is not there, because its run was recorded earlier, is trained again, to the same weights."""
    preset = TOWER_PRESETS[SYSTEMS[system]]
    teacher = None
    if system in TEACHERS:
        place = models / f"{TEACHERS[system]}-{seed}"
        if not place.is_dir():
            pretrained(TEACHERS[system], seed, budget, data, models)
        teacher = Teacher(open_model(place).to(budget.device), f"the teacher {place.name}")
    torch.manual_seed(seed)
    model = create(system).to(budget.device).train()
    if system == "untrained":
        return model, {}
    if isinstance(model, MAE):
        task: MAETask | MAViLTask = MAETask(preset.mask_ratio, model.modality)
    else:
        task = MAViLTask(preset.mask_ratio, preset.weights(1 if teacher is None else 2), teacher)
    task.prepare(model)
    state = RunState.start(model, recipe_for(budget), data.training(seed), budget.precision)
    rows: list[dict[str, Any]] = []
    fit(task, state, budget.steps, rows.append)
    if system in TEACHERS.values():
        model.save_pretrained(models / f"{system}-{seed}")
    last = rows[-max(1, len(rows) // 10) :]
    return model, {name: float(np.mean([row[name] for row in last])) for name in task.recorded}


@torch.no_grad()
def features(model: MAE | MAViL, data: Data, split: str) -> Features:
    """What the frozen model makes of the sound alone, of the pictures alone, and of both: the mean tokens of the encoders,
    and those of the fusion encoder side by side."""
    model.eval()
    parts: dict[str, list[np.ndarray]] = {}
    for audio, image in data.pairs(split):
        given = {m: x for m, x in (("a", audio), ("v", image)) if m in model.modalities}
        found = {{"a": "audio", "v": "video"}[m]: x for m, x in model.embeddings(given).items()}
        if isinstance(model, MAViL):
            found["joint"] = torch.cat([tokens.float().mean(dim=1) for tokens in model.fused(audio, image)], dim=1)
        for stream, x in found.items():
            parts.setdefault(stream, []).append(x.float().cpu().numpy())
    return {stream: np.concatenate(part) for stream, part in parts.items()}


def run(system: str, seed: int, budget: Budget, data: Data, folder: Path) -> dict[str, Any]:
    """All figures of one system and seed."""
    begin = time.perf_counter()
    model, losses = pretrained(system, seed, budget, data, folder.parent / "models")
    trained = time.perf_counter()
    with budget.precision.autocast():
        figures: dict[str, Any] = {
            "retrieval": retrieval(model, data) if model.modalities == "av" else None,
            "probe": probe(features(model, data, "train"), features(model, data, "test"), data),
        }
    judged = time.perf_counter()
    figures["finetuned"] = {}
    for encoders, mode in CLASSIFIERS[model.modalities].items():
        own = fine_tuned(model, seed, budget, data, folder / encoders, (mode,), {"model": encoders, "mode": mode})
        figures["finetuned"][encoders] = own[mode]
    times = {"pretraining": trained - begin, "judging": judged - trained, "fine-tuning": time.perf_counter() - judged}
    return {"system": system, "seed": seed, "losses": losses, **figures, "seconds": times}
