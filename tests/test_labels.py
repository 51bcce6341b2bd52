"""Labels: the CSV strictly read, targets and sampling weights as the published per-clip loops compute them."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from cavmae_fast.data.sets.labels import (
    LabelError,
    LabelSet,
    balance_weights,
    class_counts,
    read_weights,
    split_labels,
    write_weights,
)

HEADER = "index,mid,display_name\n"
SMALL = LabelSet(tuple("abcde"), ("A", "B", "C", "D", "E"))


def csv_file(tmp_path, content: str | bytes):
    path = tmp_path / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def random_labels(count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Clips with none to five labels, some of them repeated."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.choice(SMALL.mids, rng.integers(0, 6)).tolist()) for _ in range(count)]


def published_target(first, second, lam, smoothing, label_set=SMALL) -> np.ndarray:
    """One clip's target by the rules of the published data loader; `second` is None for a clip that is not mixed."""
    target = np.zeros(len(label_set)) + smoothing / len(label_set)
    if second is None:
        for mid in first:
            target[label_set.mids.index(mid)] = 1.0 - smoothing
    else:
        for mid in first:
            target[label_set.mids.index(mid)] += lam * (1.0 - smoothing)
        for mid in second:
            target[label_set.mids.index(mid)] += (1.0 - lam) * (1.0 - smoothing)
    return target.astype(np.float32)


# The CSV


def test_reads_a_labels_csv(tmp_path):
    labels = LabelSet.from_csv(csv_file(tmp_path, HEADER + '0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'))
    assert labels.mids == ("/m/09x0r", "/m/05zppz")
    assert labels.names == ("Speech", "Male speech, man speaking")
    assert labels.index == {"/m/09x0r": 0, "/m/05zppz": 1}
    assert len(labels) == 2
    assert labels == LabelSet(labels.mids, labels.names)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfindex,mid,display_name\r\n0,a,A\r\n1,b,B\r\n",  # byte order mark, CRLF
        "index,mid,display_name\n0,a,A\n1,b,B",  # no last line end
        "index,mid,display_name\n1,b,B\n\n0,a,A\n",  # other order, an empty line
        "display_name,extra,index,mid\nA,x,0,a\nB,,1,b\n",  # other columns
        " index , mid , display_name\n 0 , a , A \n1,b,B\n",
    ],
)
def test_reads_the_same_set_from_any_dialect(tmp_path, content):
    assert LabelSet.from_csv(csv_file(tmp_path, content)) == LabelSet(("a", "b"), ("A", "B"))


def test_reads_quotes_and_other_alphabets(tmp_path):
    labels = LabelSet.from_csv(csv_file(tmp_path, HEADER + '0,a,"say ""ah"", twice"\n1,b,Löwe 狮\n2,c,\n'))
    assert labels.names == ('say "ah", twice', "Löwe 狮", "")


@pytest.mark.parametrize(
    "content, cause",
    [
        ("", "row 1: has no column index, mid, display_name"),
        ("index,mid\n0,a\n", "row 1: has no column display_name"),
        ("index,mid,mid,display_name\n0,a,a,A\n", "row 1: has no column mid or has it twice"),
        (HEADER, "holds no class"),
        (HEADER + "0,a,A\n1,b,B, too\n", "row 3: has 4 fields; allowed: 3"),
        (HEADER + "0,a,A\n1,b\n", "row 3: has 2 fields"),
        (HEADER + "zero,a,A\n", "row 2: index is 'zero'; allowed: 0 to 0"),
        (HEADER + "0.0,a,A\n", "row 2: index is '0.0'"),
        (HEADER + "-1,a,A\n", "row 2: index is '-1'"),
        (HEADER + "1,a,A\n2,b,B\n", "row 3: index is '2'; allowed: 0 to 1, each once"),
        (HEADER + "0,a,A\n0,b,B\n", "row 3: index is '0'"),
        (HEADER + "0,a,A\n1,a,B\n", "row 3: mid is 'a'"),
        (HEADER + '0,"a,b",A\n', "row 2: mid is 'a,b'"),
        (HEADER + "0, ,A\n", "row 2: mid is ''"),
        (HEADER + '0,a,"A\n', "not a CSV file in UTF-8"),
        (HEADER.encode() + b"0,a,\xff\xfe\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_bad_csv_is_named_with_its_row(tmp_path, content, cause):
    path = csv_file(tmp_path, content)
    with pytest.raises(LabelError) as caught:
        LabelSet.from_csv(path)
    assert str(caught.value).startswith(str(path)) and cause in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name, cause", [("absent.csv", "No such file"), (".", "Is a directory")])
def test_an_unreadable_csv(tmp_path, name, cause):
    with pytest.raises(LabelError, match=cause):
        LabelSet.from_csv(tmp_path / name)


def test_reading_needs_no_torch():
    code = "import sys, cavmae_fast.data.sets.labels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Ids


@pytest.mark.parametrize(
    "text, labels",
    [("", ()), (" ", ()), ("/m/a", ("/m/a",)), (" /m/a , /m/b\n", ("/m/a", "/m/b")), ("a,,b,", ("a", "b"))],
)
def test_split_labels(text, labels):
    assert split_labels(text) == labels


def test_unknown_lists_each_foreign_id_once():
    assert SMALL.unknown(("a", "x", "b", "y", "x")) == ("x", "y")
    assert SMALL.unknown(()) == ()


def test_encode():
    encoded = SMALL.encode([("c",), (), ("a", "e", "a")])
    assert encoded.dtype == np.int64
    assert encoded.tolist() == [[2, -1, -1], [-1, -1, -1], [0, 4, 0]]
    assert SMALL.encode([]).shape == (0, 0)
    assert SMALL.encode([(), ()]).shape == (2, 0)


def test_encode_names_the_clip_with_a_foreign_id():
    with pytest.raises(LabelError, match=r"labels\[1\] holds 'x', which is no label id; allowed: the 5 ids"):
        SMALL.encode([("a",), ("b", "x")])


# Targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_of_clips_that_are_not_mixed(smoothing):
    labels = random_labels(200)
    targets = SMALL.multi_hot(SMALL.encode(labels), smoothing)
    assert targets.dtype == torch.float32 and targets.shape == (200, 5)
    expected = np.stack([published_target(ids, None, 1.0, smoothing) for ids in labels])
    np.testing.assert_array_equal(targets.numpy(), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_of_mixed_batches(smoothing):
    first, second = random_labels(200, 1), random_labels(200, 2)
    rng = np.random.default_rng(3)
    lam = np.where(rng.random(200) < 0.5, rng.beta(10, 10, 200), 1.0)
    partner = SMALL.encode([ids if share < 1 else () for ids, share in zip(second, lam)])
    targets = SMALL.multi_hot(SMALL.encode(first), smoothing, partner=partner, lam=lam)
    expected = np.stack(
        [
            published_target(ids, other if share < 1 else None, share, smoothing)
            for ids, other, share in zip(first, second, lam)
        ]
    )
    np.testing.assert_array_equal(targets.numpy(), expected)


def test_target_values_by_hand():
    one = SMALL.encode([("a",)])
    assert SMALL.multi_hot(one, 0.1)[0].tolist() == pytest.approx([0.9, 0.02, 0.02, 0.02, 0.02])
    mixed = SMALL.multi_hot(one, 0.1, partner=SMALL.encode([("a", "b")]), lam=np.array([0.25]))
    assert mixed[0].tolist() == pytest.approx([0.92, 0.02 + 0.75 * 0.9, 0.02, 0.02, 0.02])
    assert SMALL.multi_hot(SMALL.encode([()]), 0.1)[0].tolist() == pytest.approx([0.02] * 5)


def test_the_partner_of_a_clip_that_is_not_mixed_is_ignored():
    targets = SMALL.multi_hot(SMALL.encode([("a",)]), partner=SMALL.encode([("b",)]), lam=np.array([1.0]))
    assert targets[0].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "arguments, cause",
    [
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"smoothing": -0.1}, "smoothing is -0.1"),
        ({"indices": np.zeros(2, np.int64)}, r"indices is int64 \[2\]"),
        ({"indices": np.zeros((2, 1))}, "indices is float64"),
        ({"indices": np.array([[5], [0]])}, r"indices lies in \[0, 5\]; allowed: -1 to 4"),
        ({"indices": np.array([[-2], [0]])}, r"indices lies in \[-2, 0\]"),
        ({"partner": np.zeros((2, 1), np.int64)}, "only one of partner and lam"),
        ({"lam": np.ones(2)}, "only one of partner and lam"),
        ({"partner": np.zeros((3, 1), np.int64), "lam": np.ones(2)}, "partner has 3 rows; allowed: 2"),
        ({"partner": np.full((2, 1), 9), "lam": np.ones(2)}, "partner lies in"),
        ({"partner": np.zeros((2, 1), np.int64), "lam": np.ones(3)}, r"lam has shape \[3\]"),
        ({"partner": np.zeros((2, 1), np.int64), "lam": np.array([0.5, 1.5])}, "lam .* leaves its range"),
        ({"partner": np.zeros((2, 1), np.int64), "lam": np.array([0.5, np.nan])}, "lam .* leaves its range"),
    ],
)
def test_bad_targets(arguments, cause):
    with pytest.raises(ValueError, match=cause):
        SMALL.multi_hot(**{"indices": np.zeros((2, 1), np.int64), **arguments})


# Sampling weights


def test_class_counts_count_every_occurrence():
    counts = class_counts([("a", "c"), (), ("c", "c")], SMALL)
    assert counts.dtype == np.int64 and counts.tolist() == [1, 0, 3, 0, 0]
    assert class_counts([], SMALL).tolist() == [0] * 5


def test_balance_weights_are_those_of_the_published_loops():
    labels = random_labels(300)
    counts = np.zeros(5)
    for ids in labels:
        for mid in ids:
            counts[SMALL.mids.index(mid)] += 1
    expected = [sum(1000.0 / (counts[SMALL.mids.index(mid)] + 0.01) for mid in ids) for ids in labels]
    weights = balance_weights(labels, SMALL)
    assert weights.dtype == np.float64
    np.testing.assert_array_equal(weights, expected)
    assert weights[labels.index(())] == 0


def test_weights_of_foreign_labels():
    for function in (class_counts, balance_weights):
        with pytest.raises(LabelError, match=r"labels\[0\] holds 'x'"):
            function([("x",)], SMALL)


def test_weights_file_is_the_published_one(tmp_path):
    weights = np.array([0.1 + 0.2, 0.0, 99000.99, 1e-9])
    path = tmp_path / "list_weight.csv"
    path.write_text("old")
    write_weights(path, weights)
    np.savetxt(tmp_path / "published.csv", weights, delimiter=",")
    assert path.read_bytes() == (tmp_path / "published.csv").read_bytes()
    np.testing.assert_array_equal(read_weights(path, 4), weights)
    np.testing.assert_array_equal(np.loadtxt(path, delimiter=","), weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list_weight.csv", "published.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.csv"
    path.write_text("1\n")

    def fail(file, weights):
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savetxt", fail)
    with pytest.raises(OSError, match="disk full"):
        write_weights(path, np.ones(3))
    assert path.read_text() == "1\n" and [p.name for p in tmp_path.iterdir()] == ["weights.csv"]


def test_one_weight_is_still_an_array(tmp_path):
    write_weights(tmp_path / "w.csv", np.ones(1))
    assert read_weights(tmp_path / "w.csv", 1).tolist() == [1.0]


@pytest.mark.parametrize(
    "content, cause",
    [
        ("1\n2\n", "holds 2 rows and 2 numbers; allowed: 3 rows"),
        ("1,2,3\n", "holds 1 rows and 3 numbers"),
        ("1,2\n3,4\n5,6\n", "holds 3 rows and 6 numbers"),
        ("", "holds 0 rows and 0 numbers"),
        ("1\ntwo\n3\n", "not one number a row"),
        ("1\n2,3\n4\n", "not one number a row"),
        ("1\nnan\n3\n", "row 2: weight is nan"),
        ("1\n2\ninf\n", "row 3: weight is inf"),
        ("-1\n2\n3\n", "row 1: weight is -1.0"),
        ("0\n0\n0\n", "no weight is above 0"),
        (b"\xff\xfe\n", "not one number a row"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_bad_weights_file_is_named(tmp_path, content, cause):
    path = csv_file(tmp_path, content)
    with pytest.raises(LabelError) as caught:
        read_weights(path, 3)
    assert str(caught.value).startswith(str(path)) and cause in str(caught.value)


def test_a_missing_weights_file(tmp_path):
    with pytest.raises(LabelError, match="cannot be read"):
        read_weights(tmp_path / "absent.csv", 3)


@pytest.mark.parametrize("weights", [[1.0, np.nan], [1.0, -1.0], [0.0], [], [[1.0]]])
def test_bad_weights_are_not_written(tmp_path, weights):
    with pytest.raises(LabelError):
        write_weights(tmp_path / "w.csv", np.array(weights))
    assert not any(tmp_path.iterdir())
