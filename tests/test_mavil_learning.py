"""`benchmarks/mavil_learning.py`: the chain of every system, teachers that are trained again where they are missing, and
claims that are judged either way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import one_thread  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, whose benchmarks are not installed

from benchmarks import mavil_learning
from benchmarks.common import RESULTS, read_json
from benchmarks.evidence import mavil_report, mavil_runs
from benchmarks.evidence.claims import judge
from benchmarks.evidence.clips import ATTRIBUTES, Budget, Data
from benchmarks.evidence.mavil_claims import CLAIMS, NAMES, MAViLFigures
from benchmarks.evidence.report import page_with
from cavmae_fast.models import MAE, MAViL

BUDGET = ("--steps", "2", "--epochs", "1", "--batch", "4", "--clips", "8", "--test-clips", "6", "--dtype", "float32")
LOSSES = {
    "av-mae": (True, False, False, False),
    "inter": (True, True, False, False),
    "intra": (True, True, True, False),
    "round-1": (False, True, True, True),
    "round-2": (False, True, True, True),
}
"Which of reconstruction, contrast between modalities, contrast between views and regression each system has."


@pytest.fixture(scope="module", autouse=True)
def tiny(one_thread):  # noqa: F811
    """The models of the campaign, tiny."""
    patch = pytest.MonkeyPatch()
    patch.setattr(mavil_runs, "SIZES", {"frames": 4, "embed_dim": 48, "num_heads": 3, "depth": 1, "decoder_embed_dim": 48})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """The record of a tiny campaign: a model of one modality, and a student, whose teacher has no run of its own."""
    folder = tmp_path_factory.mktemp("mavil-learning")
    places = ("--out", str(folder / "out"), "--work", str(folder / "work"))
    options = ["--device", "cpu", "--seeds", "1", *BUDGET, *places, "--systems", "v-mae", "round-1"]
    assert mavil_learning.main(options) == 0
    (path,) = folder.glob("out/*/mavil-learning.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return read_json(path)


def test_a_run_has_all_figures(record):
    alone, student = record["runs"]
    assert (alone["system"], student["system"]) == ("v-mae", "round-1")
    assert alone["retrieval"] is None and alone["probe"].keys() == {"video"} and alone["finetuned"].keys() == {"video"}
    assert student["retrieval"]["chance R@1"] == pytest.approx(100 / 6)
    assert student["probe"].keys() == {"audio", "video", "joint"}
    assert student["finetuned"].keys() == {"audio", "video", "av"}
    assert student["losses"]["loss_raw"] == 0 and student["losses"]["loss_regression"] > 0
    for figures in (*student["probe"].values(), *student["finetuned"].values()):
        assert figures["accuracy"] == pytest.approx(sum(figures[name] for name in ATTRIBUTES) / 3)
    assert {verdict.outcome for verdict in judge(record, CLAIMS, MAViLFigures)} == {"not judged"}
    table = mavil_report.rendered(record)
    assert "| student of round 1 |" in table and "| V-MAE | - | - |" in table


def test_a_teacher_that_is_missing_is_trained_again_to_the_same_weights(tmp_path):
    """And a student of round 2 is taught by that of round 1."""
    budget = Budget(1, 1, 4, 8, 6, "cpu", "float32")
    data = Data(tmp_path / "work", budget, mavil_runs.SPEC)
    first, _ = mavil_runs.pretrained("intra", 0, budget, data, tmp_path / "models")
    (kept,) = (tmp_path / "models").iterdir()
    assert kept.name == "intra-0"
    mavil_runs.pretrained("round-2", 0, budget, data, tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"intra-0", "round-1-0"}
    again = MAViL.from_pretrained(tmp_path / "again" / "intra-0")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_system_has_the_losses_of_its_preset_and_all_have_the_same_sizes():
    for system, wanted in LOSSES.items():
        stage = 2 if system in mavil_runs.TEACHERS else 1
        weights = mavil_runs.TOWER_PRESETS[mavil_runs.SYSTEMS[system]].weights(stage)
        assert tuple(weight != 0 for weight in weights) == wanted
    models = {system: mavil_runs.create(system) for system in mavil_runs.SYSTEMS}
    assert {type(model) for name, model in models.items() if name in ("a-mae", "v-mae")} == {MAE}
    assert {models[name].clip_spec for name in models if name != "a-mae"} == {mavil_runs.SPEC}
    assert {model.clip_spec.audio_length for model in models.values()} == {mavil_runs.SPEC.audio_length}
    assert {model.config["embed_dim"] for model in models.values()} == {48}
    assert list(models) == list(NAMES)


def made_up(system: str, seed: int, recall: float, accuracy: float) -> dict:
    """A run with these figures, which differ a little from seed to seed."""
    value = {"accuracy": accuracy + 0.001 * seed}
    alone = {"a-mae": "audio", "v-mae": "video"}.get(system)
    names = ("audio", "video", "joint") if alone is None else (alone,)
    ways = {f"{way} R@1": recall + 0.1 * seed for way in ("A->V", "V->A")}
    return {
        "system": system,
        "seed": seed,
        "retrieval": None if alone else {"chance R@1": 1.5625, **ways},
        "probe": dict.fromkeys(names, value),
        "finetuned": dict.fromkeys(names, value),
    }


def test_claims_are_judged_either_way():
    """As the paper says, and the reverse of it."""
    order = ("untrained", "a-mae", "v-mae", "av-mae", "inter", "intra", "round-1", "round-2")
    recall = dict.fromkeys(order, 1.5) | {"inter": 20.0, "intra": 21.0, "round-1": 22.0}
    runs = [made_up(name, seed, recall[name], 0.1 * place) for place, name in enumerate(order) for seed in range(3)]
    assert {verdict.outcome for verdict in judge({"runs": runs}, CLAIMS, MAViLFigures)} == {"reproduces"}
    recall = {"av-mae": 20.0, "inter": 1.0, "intra": 30.0}
    runs = [
        made_up(name, seed, recall.get(name, 1.0), 0.9 - 0.1 * place)
        for place, name in enumerate(order)
        for seed in range(3)
    ]
    assert {verdict.outcome for verdict in judge({"runs": runs}, CLAIMS, MAViLFigures)} == {"does not reproduce"}


def test_every_claim_is_said_once():
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)


def test_the_page_holds_what_the_records_say():
    """docs/mavil-learning.md is as `benchmarks/render.py` writes it from the records that are checked in."""
    text = mavil_report.PAGE.read_text()
    records = {path.parent.name: read_json(path) for path in sorted(RESULTS.glob("*/mavil-learning.json"))}
    assert page_with(text, records, mavil_report.rendered, mavil_report.PICTURE) == text
