"""Fine-tuning end to end on tiny runs: equal to the published loop, in every mode, from every kind of checkpoint."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import finetuning
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from media_sets import write_shards
from safetensors.torch import load_file
from sklearn import metrics
from tiny import one_thread  # noqa: F401

from cavmae_fast import CAVMAEFT, Augmentation, CAVMAEFTAudio, Loader
from cavmae_fast.data.sets.labels import LabelSet, balance_weights
from cavmae_fast.data.sets.opening import labels_of, open_clips
from cavmae_fast.evaluation import Running, classify
from cavmae_fast.models.opening import open_model
from cavmae_fast.reference.cavmae_parameters import MODES
from cavmae_fast.training.finetune import finetune
from cavmae_fast.training.finetune_config import FinetuneConfig, resolve
from cavmae_fast.training.finetune_recipes import FINE_TUNING
from cavmae_fast.training.finetune_setup import start_classifier


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> finetuning.Job:
    return finetuning.make_job(tmp_path_factory.mktemp("job"))


def rows(out: Path, key: str) -> list[dict]:
    return [row for line in (out / "metrics.jsonl").read_text().splitlines() if key in (row := json.loads(line))]


# --------------------------------------------------------------------------------------------------- the published loop


def published_loop(config: FinetuneConfig) -> tuple[list[float], list[float], dict[int, float]]:
    """The published fine-tuning, written plainly: losses, the metric after each epoch, and that of the average with one and
    ten frames. Its data loader is replaced by ours, and so is its seed."""
    config = resolve(config)
    recipe = FINE_TUNING[config.recipe]
    labels = LabelSet.from_csv(config.labels)
    train = open_clips(config.data)
    torch.manual_seed(config.seed)
    model = start_classifier(config, len(labels)).model
    clip = {"image_size": model.clip_spec.image_size, "audio_length": model.clip_spec.audio_length}
    augmentation = Augmentation(
        mixup=config.mixup, freq_mask=config.freq_mask, time_mask=config.time_mask, noise=True, label_smoothing=0.1
    )
    weights = balance_weights(labels_of(train), labels) if recipe.balanced else None
    train_loader = Loader(
        train, 4, training=True, labels=labels, weights=weights, augmentation=augmentation, workers=0, keep=True, **clip
    )

    def validate(frame: int) -> tuple[np.ndarray, np.ndarray]:
        loader = Loader(config.eval_data, 4, labels=labels, frame=frame, workers=0, **clip)
        model.eval()
        with torch.no_grad():
            found = [(model(batch.audio, batch.image, config.mode), batch.labels) for batch in loader]
        model.train()
        output, target = (torch.cat(part) for part in zip(*found))
        return output, target.numpy()

    def score(output: np.ndarray, target: np.ndarray) -> float:
        if config.metric == "accuracy":
            return metrics.accuracy_score(target.argmax(1), output.argmax(1))
        used = [k for k in range(target.shape[1]) if target[:, k].any()]
        return float(np.mean([metrics.average_precision_score(target[:, k], output[:, k]) for k in used]))

    head = [p for name, p in model.named_parameters() if name.startswith("mlp_head")]
    base = [p for name, p in model.named_parameters() if not name.startswith("mlp_head") and p.requires_grad]
    optimizer = torch.optim.Adam(
        [{"params": base, "lr": 1e-3}, {"params": head, "lr": 1e-3 * 10}], weight_decay=5e-7, betas=(0.95, 0.999)
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(range(1, 1000)), gamma=0.5)
    loss_fn = torch.nn.BCEWithLogitsLoss() if config.loss == "bce" else torch.nn.CrossEntropyLoss()
    losses, results, states = [], [], []
    for _ in range(config.epochs):
        for batch in train_loader:
            loss = loss_fn(model(batch.audio, batch.image, config.mode), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        output, target = validate(5)
        results.append(score(output.numpy(), target))
        scheduler.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    average = states[1]
    for name in average:
        average[name] = (average[name] + states[2][name]) / float(2)
    model.load_state_dict(average)
    activation = torch.sigmoid if config.loss == "bce" else lambda x: F.softmax(x, dim=-1)
    frames = [validate(frame) for frame in range(10)]
    ensemble = np.mean([activation(output).numpy() for output, _ in frames], axis=0)
    output, target = frames[5]
    return losses, results, {1: score(activation(output).numpy(), target), 10: score(ensemble, target)}


@pytest.mark.parametrize(("kind", "mode"), [("config", "multimodal"), ("single", "multimodal"), ("config", "videoonly")])
def test_the_published_loop_gives_the_same_metrics(job, tmp_path, kind, mode):
    config = getattr(job, kind)(tmp_path / "out", mode=mode)
    summary = finetune(config)
    losses, results, average = published_loop(config)
    assert [row["loss"] for row in rows(config.out, "learning_rate")] == pytest.approx(losses, abs=1e-5)
    metric = summary["metric"]
    assert metric == ("mAP" if kind == "config" else "accuracy")
    assert [row["evaluation"][metric] for row in rows(config.out, "evaluation")] == pytest.approx(results, abs=1e-6)
    figures = {int(frames): found[metric] for frames, found in summary["modes"][mode].items()}
    assert figures == pytest.approx(average, abs=1e-6)
    assert summary[metric] == figures[10] and summary["averaged_epochs"] == [2, 3]
    best = max(results)
    assert summary["best_epoch"] == {"epoch": results.index(best) + 1, metric: pytest.approx(best, abs=1e-6)}


# -------------------------------------------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves(job, tmp_path):
    summary = finetune(job.config(tmp_path))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary["modes"]) == set(MODES) and all(set(found) == {"1", "10"} for found in summary["modes"].values())
    assert summary["modes"]["audioonly"]["1"] == summary["modes"]["audioonly"]["10"]
    assert summary["clips"] == 9 and summary["steps"] == 9 and summary["rejected_clips"] == 0
    with (tmp_path / "classes.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert len(classes) == 26 and [row["mid"] for row in classes if not row["AP"]] == summary["classes_without_positives"]
    for figure in ("curves.png", "classes.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    kept = sorted(path.name for path in (tmp_path / "epochs").iterdir())
    assert kept == ["epoch-002.safetensors", "epoch-003.safetensors"]
    model = open_model(tmp_path / "model")
    assert isinstance(model, CAVMAEFT) and model.config["label_dim"] == 26
    two, three = (load_file(tmp_path / "epochs" / name) for name in kept)
    for name, value in model.state_dict().items():
        assert torch.equal(value, ((two[name].double() + three[name].double()) / 2).float())
    assert isinstance(open_model(tmp_path / "best"), CAVMAEFT)
    with pytest.raises(ValueError, match="holds a finished run"):
        finetune(job.config(tmp_path))
    again = finetune(job.config(tmp_path, overwrite=True, steps=4, average_epochs=(3, 3)))
    assert again["averaged_epochs"] == [] and not (tmp_path / "epochs").exists()
    assert again["best_epoch"]["epoch"] == 1


def test_other_losses_metrics_and_sampling(job, tmp_path):
    options = {"loss": "ce", "metric": "mAP", "mixup": 0.0, "noise": "off", "label_smoothing": 0.0, "steps": 3}
    summary = finetune(job.single(tmp_path, balanced="off", **options))
    assert summary["metric"] == "mAP" and 0 < summary["mAP"] <= 1 and 0 <= summary["accuracy"] <= 1
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["loss"] == "ce" and written["balanced"] == "off" and written["mixup"] == 0.0


def test_shards_bring_their_classes_along(job, tmp_path):
    places = [
        write_shards(tmp_path / name, source, labels=job.shapes)
        for name, source in (("train", job.train_shapes), ("test", job.test_shapes))
    ]
    options = {"data": (places[0],), "eval_data": (places[1],), "labels": None, "steps": 3}
    summary = finetune(job.single(tmp_path / "out", **options))
    assert summary["clips"] == 9 and summary["rejected_clips"] == 0 and summary["frames"] == 10
    again = classify(tmp_path / "out" / "model", places[1], running=Running(device="cpu", dtype="float32", batch_size=4))
    assert again.activation == "softmax"
    assert again.results["multimodal"].accuracy == summary["modes"]["multimodal"]["1"]["accuracy"]


def test_weights_from_a_file_are_the_computed_ones(job, tmp_path):
    labels = LabelSet.from_csv(job.shapes)
    np.savetxt(tmp_path / "weights.csv", balance_weights(labels_of(open_clips([job.train_shapes])), labels))
    given = finetune(job.single(tmp_path / "a", steps=3, weights=tmp_path / "weights.csv"))
    computed = finetune(job.single(tmp_path / "b", steps=3))
    assert given["loss"] == computed["loss"]


def test_the_audio_branch_alone_is_the_whole_model_with_sound_only(job, tmp_path):
    """The same weights, whether or not there is a video branch beside them that nothing reaches. (Heads are drawn after
    other numbers of random values, so both go on from one fine-tuned checkpoint.)"""
    start = finetune(job.config(tmp_path / "start", steps=3, mode="audioonly"))
    assert start["mode"] == "audioonly"
    options = {"mode": "audioonly", "init": tmp_path / "start" / "model"}
    whole = finetune(job.config(tmp_path / "whole", **options))
    alone = finetune(job.config(tmp_path / "alone", model="audio", **options))
    assert set(alone["modes"]) == {"audioonly"}
    assert alone["modes"]["audioonly"]["1"] == pytest.approx(whole["modes"]["audioonly"]["1"], abs=1e-6)
    assert isinstance(open_model(tmp_path / "alone" / "model"), CAVMAEFTAudio)
    before, after = (open_model(tmp_path / name / "model").state_dict() for name in ("start", "whole"))
    assert torch.equal(before["blocks_v.0.attn.qkv.weight"], after["blocks_v.0.attn.qkv.weight"])
    assert not torch.equal(before["blocks_a.0.attn.qkv.weight"], after["blocks_a.0.attn.qkv.weight"])


def test_a_linear_probe_trains_the_head_alone(job, tmp_path):
    finetune(job.config(tmp_path, recipe="linear-probe"))
    before, after = open_model(job.init).state_dict(), open_model(tmp_path / "model").state_dict()
    assert {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])} == {
        "mlp_head.0.weight",
        "mlp_head.0.bias",
        "mlp_head.1.weight",
        "mlp_head.1.bias",
    }


def test_shorter_sound_end_to_end(job, tmp_path):
    """Half as long as the checkpoint's, as when a model of ten seconds is fine-tuned on clips of five."""
    options = {"audio_length": 32, "image_size": 48, "steps": 3}
    with pytest.raises(ValueError, match=r"pos_embed_a has shape \[1, 32, 48\], the model's has .*--adapt-positions"):
        finetune(job.config(tmp_path, **options))
    assert not (tmp_path / "config.json").exists()
    finetune(job.config(tmp_path, adapt_positions=True, **options))
    model = open_model(tmp_path / "model")
    assert model.clip_spec.audio_length == 32 and model.clip_spec.image_size == (48, 48)


def test_every_kind_of_checkpoint(job, tmp_path):
    torch.manual_seed(1)
    published = tiny.randomize(CAVMAEFT(26, **tiny.ENCODER | {"embed_dim": 64, "num_heads": 1}))
    torch.save({f"module.{name}": value for name, value in published.state_dict().items()}, tmp_path / "audio_model.pth")
    options = {"init": tmp_path / "audio_model.pth", "steps": 1, "learning_rate": 1e-30}
    finetune(job.config(tmp_path / "a", **options))
    same = open_model(tmp_path / "a" / "model").state_dict()
    assert all(torch.allclose(value, published.state_dict()[name], atol=1e-12) for name, value in same.items())
    with pytest.raises(ValueError, match=r"has a head for 26 classes, and the labels CSV 5; .*--new-head"):
        finetune(job.single(tmp_path / "b", **options))
    finetune(job.single(tmp_path / "b", new_head=True, **options))
    assert len(open_model(tmp_path / "b" / "model").mlp_head[1].bias) == 5


# ------------------------------------------------------------------------------------------------------- killed, resumed

DIE = """
import os, signal
from pathlib import Path
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
"""
DEATHS = {
    "in a step": """
from cavmae_fast.training.state import RunState
update = RunState.update
RunState.update = lambda self, *a, **k: die() if self.step == 5 else update(self, *a, **k)""",
    "while an epoch is judged": """
import cavmae_fast.training.finetune as job
judge, calls = job.predict, []
job.predict = lambda *a, **k: die() if calls else (calls.append(1), judge(*a, **k))[1]""",
    "when an epoch's weights are written": """
import cavmae_fast.training.finetune as job
job.put_whole = die""",
    "while the best model is written": "from cavmae_fast.models import CAVMAEFT\nCAVMAEFT.save_pretrained = die",
    "in the end": "import cavmae_fast.training.finetune_results as job\njob.write_classes = die",
}


def run(job: finetuning.Job, out: Path, before: str = "") -> tuple[int, str]:
    command = [sys.executable, "-c", f"{before}\nfrom cavmae_fast.cli import main; main()", "finetune"]
    command += ["--data", job.train, "--eval-data", job.test, "--labels", job.labels, "--init", job.init, "--out", out]
    command += ["--recipe", "as20k", "--epochs", 3, "--batch-size", 4, "--average-epochs", 2, 3, "--freq-mask", 16]
    command += ["--time-mask", 8, "--learning-rate", 1e-3, "--device", "cpu", "--dtype", "float32", "--save-every", 2]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_killed_again_and_again(job, tmp_path):
    """At every kind of moment, in one folder; what is left in the end is, bit for bit, the undisturbed run."""
    code, text = run(job, tmp_path / "undisturbed")
    assert code == 0, text
    assert "average of epochs 2 to 3" in text and "the best single epoch" in text
    out = tmp_path / "killed"
    for when, patch in DEATHS.items():
        code, text = run(job, out, DIE + patch)
        assert code == -signal.SIGKILL, f"{when}: {text}"
        assert not (out / "summary.json").exists()
    code, text = run(job, out)
    assert code == 0, text
    timed = ("seconds", "clips_per_s", "data_wait", "product_share", "memory")
    told = [
        [{name: value for name, value in row.items() if name not in timed} for row in rows(folder, "step")]
        for folder in (tmp_path / "undisturbed", out)
    ]
    assert told[0] == told[1]
    for place in ("model", "best"):
        ours, theirs = (load_file(folder / place / "model.safetensors") for folder in (out, tmp_path / "undisturbed"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (out / "classes.csv").read_text() == (tmp_path / "undisturbed" / "classes.csv").read_text()
