"""Scores and figures of a classifier: equal to scikit-learn's and the published `calculate_stats`; None where undefined."""

from __future__ import annotations

import csv
import math
import warnings

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from sklearn import metrics
from tiny import one_thread  # noqa: F401

from cavmae_fast import CAVMAEFT, CAVMAEFTAudio
from cavmae_fast.data.batches import Batch
from cavmae_fast.data.sets.labels import LabelSet
from cavmae_fast.evaluation.classification import d_prime, evaluate_scores, write_classes
from cavmae_fast.evaluation.predicting import logits, predict
from cavmae_fast.reference.cavmae_parameters import MODES


def classes(count: int) -> LabelSet:
    return LabelSet(tuple(f"/m/{k}" for k in range(count)), tuple(f'class "{k}", so called' for k in range(count)))


def some(clips: int = 60, count: int = 7, labels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, some of them tied, and targets with up to `labels` labels per clip."""
    rng = np.random.default_rng(seed)
    targets = np.zeros((clips, count), bool)
    for row in targets:
        row[rng.choice(count, rng.integers(1, labels + 1), replace=False)] = True
    targets[:count] |= np.eye(count, dtype=bool)
    return np.round(rng.random((clips, count)) * 0.8 + 0.2 * targets, 2), targets


def published_stats(output: np.ndarray, target: np.ndarray) -> tuple[float, list[float], list[float]]:
    """The figures of the published evaluation, written plainly: accuracy, and AP and AUC class by class."""
    accuracy = metrics.accuracy_score(np.argmax(target, 1), np.argmax(output, 1))
    ap = [metrics.average_precision_score(target[:, k], output[:, k], average=None) for k in range(target.shape[-1])]
    auc = [metrics.roc_auc_score(target[:, k], output[:, k], average=None) for k in range(target.shape[-1])]
    return accuracy, ap, auc


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_scikit_learn_and_to_the_published_figures(seed):
    scores, targets = some(seed=seed)
    result = evaluate_scores(scores, targets, classes(7))
    accuracy, ap, auc = published_stats(scores, targets.astype(float))
    assert result.accuracy == accuracy
    assert [row.ap for row in result.classes] == ap and [row.auc for row in result.classes] == auc
    assert result.map == pytest.approx(np.mean(ap), abs=1e-12)
    assert result.map == pytest.approx(metrics.average_precision_score(targets, scores, average="macro"), abs=1e-12)
    assert result.auc == pytest.approx(metrics.roc_auc_score(targets, scores, average="macro"), abs=1e-12)
    assert result.d_prime == pytest.approx(math.sqrt(2) * stats.norm.ppf(np.mean(auc)), abs=1e-12)
    assert [row.clips for row in result.classes] == targets.sum(axis=0).tolist()


def test_chance_is_what_random_scores_reach():
    _, targets = some(clips=4000)
    targets[:, 2] = False
    result = evaluate_scores(np.random.default_rng(0).random(targets.shape), targets, classes(7))
    assert result.map == pytest.approx(result.chance, rel=0.05)
    assert result.chance == pytest.approx(targets.mean(axis=0)[[0, 1, 3, 4, 5, 6]].mean())


def test_a_class_without_positives_is_named_and_left_out():
    scores, targets = some()
    targets[:, 2] = False
    targets[:, 4] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate_scores(scores, targets, classes(7))
    assert result.without_positives == ("/m/2",)
    assert result.classes[2].ap is None and result.classes[2].auc is None and result.classes[2].clips == 0
    assert result.classes[4].auc is None and result.classes[4].ap == 1.0
    _, ap, _ = published_stats(scores[:, [0, 1, 3, 5, 6]], targets[:, [0, 1, 3, 5, 6]])
    assert result.map == pytest.approx(np.mean([*ap, 1.0]), abs=1e-12)
    assert result.summary()["classes_without_positives"] == ["/m/2"]


def test_nothing_is_defined_by_nothing():
    result = evaluate_scores(np.full((3, 2), 0.5), np.zeros((3, 2), bool), classes(2))
    assert (result.map, result.auc, result.d_prime, result.accuracy) == (None, None, None, None)
    perfect = evaluate_scores(np.eye(3), np.eye(3, dtype=bool), classes(3))
    assert (perfect.map, perfect.auc, perfect.accuracy) == (1, 1, 1) and perfect.d_prime is None  # infinite
    assert d_prime(0.5) == 0 and d_prime(None) is None
    one = evaluate_scores(np.array([[0.2], [0.9]]), np.array([[False], [True]]), classes(1))
    assert (one.map, one.auc, one.accuracy) == (1, 1, 1)


def test_clips_without_a_label_count_for_the_ranking_alone():
    scores, targets = some()
    with_empty = np.concatenate([targets, np.zeros((5, 7), bool)])
    result = evaluate_scores(np.concatenate([scores, np.ones((5, 7))]), with_empty, classes(7))
    plain = evaluate_scores(scores, targets, classes(7))
    assert result.clips == 65 and result.accuracy == plain.accuracy and result.map < plain.map


def test_ten_thousand_classes():
    scores = np.random.default_rng(0).random((4, 10_000))
    targets = np.zeros((4, 10_000), bool)
    targets[range(4), [5, 50, 500, 5000]] = True
    result = evaluate_scores(scores, targets, classes(10_000))
    assert len(result.without_positives) == 9_996 and 0 < result.map <= 1


@pytest.mark.parametrize(
    ("scores", "targets", "words"),
    [
        (np.zeros((0, 2)), np.zeros((0, 2)), "must both be"),
        (np.zeros((3, 2)), np.zeros((3, 3)), "must both be"),
        (np.zeros((3, 3)), np.zeros((3, 3)), r"must both be \[clips >= 1, 2\]"),
        (np.array([[0.1, np.nan]]), np.ones((1, 2)), "NaN"),
    ],
)
def test_bad_scores(scores, targets, words):
    with pytest.raises(ValueError, match=words):
        evaluate_scores(scores, targets, classes(2))


def test_classes_as_csv(tmp_path):
    scores, targets = some()
    targets[:, 2] = False
    result = evaluate_scores(scores, targets, classes(7))
    write_classes(tmp_path / "classes.csv", result)
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["display_name"] for row in rows] == list(classes(7).names)
    assert rows[2]["AP"] == "" and float(rows[3]["AP"]) == result.classes[3].ap


# ------------------------------------------------------------------------------------------------------------ predictions


def batches(frame: int, clips: int = 5, size: int = 2, left_out: int | None = None) -> list[Batch]:
    """Clips in batches; their sound is the same at every frame, their picture is not."""
    audio, _ = tiny.inputs(batch=clips)
    generator = torch.Generator().manual_seed(100 + frame)
    images = torch.randn(clips, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.eye(4)[torch.arange(clips) % 4]
    found = []
    for start in range(0, clips, size):
        rows = torch.tensor([k for k in range(start, min(start + size, clips)) if k != left_out])
        ids = [f"clip {k}" for k in rows.tolist()]
        found.append(Batch(ids, audio[rows], images[rows], labels[rows], rows.numpy(), 0, start, []))
    return found


@pytest.fixture(scope="module")
def model() -> CAVMAEFT:
    return tiny.randomize(CAVMAEFT(4, **tiny.ENCODER)).double().train()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_scores_are_the_mean_over_a_clips_frames(model, activation):
    found = predict(model, [batches(frame) for frame in range(3)], tuple(MODES), activation)
    assert model.training and set(found) == set(MODES)
    audio, labels = (torch.cat([getattr(batch, name) for batch in batches(0)]) for name in ("audio", "labels"))
    function = {"sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(dim=-1)}[activation]
    for mode, predictions in found.items():
        images = [torch.cat([batch.image for batch in batches(frame)]) for frame in range(3)]
        wanted = torch.stack([function(model(audio, image, mode)) for image in images]).mean(dim=0)
        np.testing.assert_allclose(predictions.scores, wanted.detach().numpy(), rtol=1e-12)
        assert predictions.ids == [f"clip {k}" for k in range(5)]
        assert np.array_equal(predictions.targets, labels.numpy() > 0)


def test_sound_is_heard_once(model, monkeypatch):
    calls = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, a, v, mode: calls.append(mode) or forward(self, a, v, mode))
    predict(model, [batches(frame) for frame in range(3)], tuple(MODES))
    assert {mode: calls.count(mode) for mode in MODES} == {
        "multimodal": 9,
        "audioonly": 3,
        "videoonly": 9,
        "missingaudioonly": 3,
        "missingvideoonly": 9,
    }


def test_a_clip_that_lacks_a_frame_is_judged_by_its_others(model):
    found = predict(model, [batches(0, left_out=3), batches(1)], ("multimodal", "audioonly"))
    for predictions in found.values():
        assert sorted(predictions.ids) == [f"clip {k}" for k in range(5)]
    alone = predict(model, [batches(1)])["multimodal"]
    assert np.array_equal(found["multimodal"].scores[3], alone.scores[3])


def test_the_audio_branch_alone(model):
    audio = CAVMAEFTAudio(4, **tiny.ENCODER).double()
    audio.load_state_dict({name: model.state_dict()[name] for name in audio.state_dict()})
    ours = predict(audio, [batches(0)], ("audioonly",))["audioonly"]
    theirs = predict(model, [batches(0)], ("audioonly",))["audioonly"]
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-12)
    with pytest.raises(ValueError, match=r"mode is 'multimodal'; for CAVMAEFTAudio it must be one of audioonly"):
        predict(audio, [batches(0)])


def test_what_cannot_be_predicted(model):
    with pytest.raises(ValueError, match="no clip to evaluate on"):
        predict(model, [[]])
    bare = [batch.__class__(**{**batch.__dict__, "labels": None}) for batch in batches(0)]
    with pytest.raises(ValueError, match="have no labels"):
        predict(model, [bare])
    assert model.training  # also after an error


# ---------------------------------------------------------------------------------------------------------------- ranks


def _predict_on_rank(rank: int, address: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = tiny.randomize(CAVMAEFT(4, **tiny.ENCODER)).double()
    everything = batches(0, clips=5, size=1)
    found = predict(model, [everything[rank::2]])["multimodal"]  # three clips here, two there
    for one, mode in ((model, "multimodal"), (CAVMAEFTAudio(4, **tiny.ENCODER).double(), "audioonly")):
        one.train_with(mode)
        parallel = torch.nn.parallel.DistributedDataParallel(one)
        torch.testing.assert_close(logits(parallel, everything[0], mode), logits(one, everything[0], mode))
        logits(parallel, everything[rank], mode).sum().backward()
        sums = [p.grad.sum() for p in one.parameters() if p.requires_grad]  # no gradient is missing
        both = [torch.zeros(len(sums)).double() for _ in range(2)]
        torch.distributed.all_gather(both, torch.stack(sums))
        torch.testing.assert_close(both[0], both[1])
    torch.save((found.ids, found.scores.tolist(), found.targets.tolist()), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_each_clip_counts_once_whatever_the_world_size(model, tmp_path):
    address = f"file://{tmp_path}/rendezvous"
    torch.multiprocessing.spawn(_predict_on_rank, (address, str(tmp_path)), nprocs=2)
    alone = predict(model, [batches(0)])["multimodal"]
    for rank in range(2):
        ids, scores, targets = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert ids == alone.ids and targets == alone.targets.tolist()
        np.testing.assert_allclose(scores, alone.scores, rtol=1e-12)
