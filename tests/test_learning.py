"""`benchmarks/learning.py`: runs, a record that is gone on with, and claims that are judged either way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import one_thread  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, whose benchmarks are not installed

from benchmarks import learning
from benchmarks.common import RESULTS, read_json
from benchmarks.evidence import campaign, clips, report, runs
from benchmarks.evidence.claims import CLAIMS, above, at_least, judge

BUDGET = ("--steps", "2", "--epochs", "1", "--batch", "4", "--clips", "8", "--test-clips", "6", "--dtype", "float32")


def run(folder: Path, *options: str) -> int:
    places = ("--out", str(folder / "out"), "--work", str(folder / "work"))
    return learning.main(["--device", "cpu", "--seeds", "1", *BUDGET, *places, *options])


@pytest.fixture(scope="module")
def record_path(tmp_path_factory) -> Path:
    """The record of a tiny campaign: CAV-MAE alone, one seed."""
    folder = tmp_path_factory.mktemp("learning")
    assert run(folder, "--systems", "cav-mae") == 0
    (path,) = folder.glob("out/*/learning.json")
    return path


def test_a_run_has_all_figures(record_path):
    record = read_json(record_path)
    (row,) = record["runs"]
    assert (row["system"], row["seed"], record["settings"]["steps"]) == ("cav-mae", 0, 2)
    assert row["retrieval"]["chance R@1"] == pytest.approx(100 / 6)
    assert row["reconstruction"].keys() == {"audio", "audio_mean", "video", "video_mean"}
    assert min(row["reconstruction"].values()) > 0
    assert row["probe"].keys() == {"joint", "audio", "video"} and row["finetuned"].keys() == set(runs.MODES)
    for figures in (*row["probe"].values(), *row["finetuned"].values()):
        mean = sum(figures[name] for name in clips.ATTRIBUTES) / 3
        assert figures["accuracy"] == pytest.approx(mean) and 0 <= mean <= 1
    assert record_path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {verdict.outcome for verdict in judge(record)} == {"not judged"}
    assert "| CAV-MAE |" in report.figures_table(record)


def test_the_same_command_goes_on_with_what_is_missing(record_path, monkeypatch, capsys):
    folder, before = record_path.parents[2], read_json(record_path)
    made = []

    def stopped(system, seed, *arguments):
        if made:
            raise KeyboardInterrupt
        made.append((system, seed))
        (folder / "work" / "run").mkdir()
        return {**before["runs"][0], "system": system}

    monkeypatch.setattr(learning, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "--systems", "cav-mae", "cav", "untrained")
    rows = read_json(record_path)["runs"]
    assert made == [("cav", 0)] and [row["system"] for row in rows] == ["cav-mae", "cav"] and rows[0] == before["runs"][0]
    with pytest.raises(SystemExit) as refused:
        run(folder, "--systems", "cav", "--steps", "3")
    assert refused.value.code == 2
    assert "learning.json holds runs of another budget (steps differ)" in capsys.readouterr().err
    assert read_json(record_path)["runs"] == rows


def test_a_system_is_the_small_one_with_its_own_losses_and_structure():
    found = {name: runs.small(name) for name in learning.SYSTEMS}
    weights = {name: (preset.mae_loss_weight != 0, preset.contrast_loss_weight != 0) for name, preset in found.items()}
    assert weights["cav"] == (False, True) and weights["cav-mae"] == (True, True)
    assert weights["av-mae"] == weights["vanilla-av-mae"] == (True, False)
    depths = {name: preset.model["modality_specific_depth"] for name, preset in found.items()}
    assert depths == {name: 0 if name == "vanilla-av-mae" else 3 for name in found}
    assert {preset.model["embed_dim"] for preset in found.values()} == {192}


def made_up(system: str, seed: int, recall: float, error: float, accuracy: float, missing: float) -> dict:
    """A run with these figures, which differ a little from seed to seed."""
    ways = {f"{way} R@1": recall + 0.1 * seed for way in ("A->V", "V->A")}
    figures = {"multimodal": {"accuracy": accuracy + 0.001 * seed}}
    figures |= {f"missing{kind}only": {"accuracy": missing + 0.001 * seed} for kind in ("audio", "video")}
    means = {"audio": error + 0.001 * seed, "audio_mean": 1.0, "video": error + 0.001 * seed, "video_mean": 1.0}
    return {
        "system": system,
        "seed": seed,
        "retrieval": {"chance R@1": 1.5625, **ways},
        "reconstruction": means,
        "finetuned": figures,
    }


def test_claims_are_judged_either_way():
    """As the paper says, and the reverse of it; between the two, what the rule calls undecided does not reproduce."""
    good = {"untrained": 0.4, "cav": 0.6, "vanilla-av-mae": 0.5, "av-mae": 0.6, "cav-mae": 0.8}
    as_said = [
        made_up(name, seed, 20.0 if "cav" in name else 1.5, 0.3, accuracy, 0.5)
        for name, accuracy in good.items()
        for seed in range(3)
    ]
    record = {"runs": as_said, "chance": {"accuracy": 0.2}}
    assert [verdict.outcome for verdict in judge(record)] == ["reproduces"] * len(CLAIMS)
    reversed_ = [
        made_up(name, seed, 1.0 if "cav" in name else 20.0, 2.0, 1 - accuracy, 0.1)
        for name, accuracy in good.items()
        for seed in range(3)
    ]
    record = {"runs": reversed_, "chance": {"accuracy": 0.2}}
    verdicts = judge(record)
    assert [verdict.outcome for verdict in verdicts] == ["does not reproduce"] * len(CLAIMS)
    assert "20.1, chance 1.56, allowed 3.12" in verdicts[0].why


def test_the_rule_for_above_and_at_least():
    assert above([1.0, 1.1, 0.9], [0.5, 0.6, 0.4]).holds and not above([0.5, 0.6, 0.4], [1.0, 1.1, 0.9]).holds
    assert not above([1.0, 1.4, 0.6], [0.9, 1.3, 0.5]).holds  # the seeds differ by more than the systems
    assert at_least([0.9, 1.3, 0.5], [1.0, 1.4, 0.6]).holds and not at_least([0.5, 0.6, 0.4], [1.0, 1.1, 0.9]).holds
    assert above([2.0, 2.0], [1.0]).holds and not above([1.0, 1.0], [1.0]).holds


def test_the_page_holds_what_the_records_say():
    """docs/learning.md is as `benchmarks/render.py` writes it from the records that are checked in."""
    text = report.PAGE.read_text()
    records = {path.parent.name: read_json(path) for path in sorted(RESULTS.glob("*/learning.json"))}
    assert report.page_with(text, records) == text
    for claim in CLAIMS:
        assert not records or text.count(f"| {claim.text} |") == len(records)
    with pytest.raises(ValueError, match="the page lacks"):
        report.page_with("# Nothing here", {})


def test_bad_options(tmp_path, capsys):
    for options, words in ((("--steps", "0"), "--steps is 0; it must be 1 or more"), (("--systems", "mavil"), "mavil")):
        with pytest.raises(SystemExit) as refused:
            run(tmp_path, *options)
        assert refused.value.code == 2 and words in capsys.readouterr().err
    path = tmp_path / "learning.json"
    path.write_text(json.dumps({"settings": {"steps": 1}, "runs": [1]}))
    budget = clips.Budget(1, 1, 1, 1, 1, "cpu", "float32")
    assert campaign.open_record(path, budget, overwrite=True)["runs"] == []
