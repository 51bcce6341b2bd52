"""Training on several ranks: the same numbers for any number of them, DDP or shards, also resumed on another number."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from ranks_run import started
from safetensors.torch import load_file

from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.models import CAVMAE
from cavmae_fast.models.opening import open_model
from cavmae_fast.training.checkpoint import SaveError, read, read_newest

STEPS, BATCH = 6, 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    generate_clips(folder, num_train=20, num_test=7, seconds=0.7, size=32)
    return folder


def arguments(clips: Path, out: Path, *options: object) -> list[object]:
    data = ["--data", clips / "train", "--eval-data", clips / "test", "--batch-size", BATCH, "--steps", STEPS]
    common = ["--device", "cpu", "--dtype", "float32", "--save-every", 3, "--out", out]
    return ["pretrain", *data, *common, *options]


def train(clips: Path, out: Path, count: int, *options: object, before: str = "") -> str:
    with started(count, out.with_name(f"{out.name}.logs"), arguments(clips, out, *options), before) as run:
        run.finish()
    assert run.codes == [0] * count, "\n".join(run.texts)
    assert not any("Traceback" in text for text in run.texts)
    return run.texts[0]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def unfinished(out: Path, copy: Path) -> Path:
    """A copy of a finished run as it was after its first checkpoint."""
    shutil.copytree(out, copy)
    (copy / "summary.json").unlink()
    (last,) = (copy / "checkpoints").glob(f"step-{STEPS:08d}*")
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    return copy


def assert_same_training(out: Path, want: Path) -> None:
    """Losses and weights of two runs that differ in the order in which float32 sums are taken, and in nothing else.

    Losses: sums of up to some thousand terms, each rounded by 6e-8, through some ten layers: 1e-5, relative.
    Weights: Adam moves an element by up to its learning rate (6e-4) per step, whatever its gradient's size, and what two
    orders of summation make of a gradient differs by 1e-6 of the larger gradients around it: 1 % of the way an element can
    go. The bias of the keys is an exception: softmax does not see it, so its true gradient is 0, what is computed for it is
    nothing but rounding, and Adam makes whole steps of that.
    """
    got_rows, want_rows = rows(out), rows(want)
    assert [row["step"] for row in got_rows] == [row["step"] for row in want_rows]
    for got, row in zip(got_rows, want_rows, strict=True):
        for name in ("loss", "loss_mae_a", "loss_mae_v", "loss_c"):
            assert got[name] == pytest.approx(row[name], rel=1e-5), name
    retrieval = [name for name in want_rows[-1] if "->" in name or name == "held_out_clips"]
    assert len(retrieval) >= 9 and all(got_rows[-1][name] == want_rows[-1][name] for name in retrieval)
    got, want = weights(out), weights(want)
    assert got.keys() == want.keys()
    farthest = STEPS * 6e-4
    for name, weight in want.items():
        difference = (got[name] - weight).abs()
        if name.endswith("qkv.bias"):
            q, k, v = difference.chunk(3)
            assert k.max() <= 2 * farthest
            difference = torch.cat([q, v])
        assert difference.max() <= 0.01 * farthest, name


@pytest.fixture(scope="module")
def runs(clips, tmp_path_factory):
    """(ranks, options) -> the folder of a finished run, which is made once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(count: int, *options: object) -> Path:
        key = (count, *options)
        if key not in made:
            made[key] = root / "-".join(map(str, key))
            train(clips, made[key], count, *options)
        return made[key]

    return run


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["ddp", "shards"])
@pytest.mark.parametrize("count", [2, 4])
def test_as_many_ranks_as_one_likes(runs, count, options):
    assert_same_training(runs(count, *options), runs(1))


@pytest.mark.parametrize("count, options", [(1, ()), (4, ()), (4, ("--shard",))], ids=["1", "4", "4-shards"])
@pytest.mark.parametrize("before", [(), ("--shard",)], ids=["from-2", "from-2-shards"])
def test_resumed_on_another_number_of_ranks(clips, runs, tmp_path, before, count, options):
    out = unfinished(runs(2, *before), tmp_path / "run")
    text = train(clips, out, count, *options)
    assert "going on after step 3" in text
    assert_same_training(out, runs(1))


def test_shards_are_on_the_disk_only(runs):
    """A checkpoint of shards is a folder with a part from each rank; what is exported is whole."""
    folder = runs(2, "--shard") / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000006"]
    names = {path.name for path in (folder / "step-00000006").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"}
    state, whole = read(folder / "step-00000006"), weights(runs(2, "--shard"))
    assert all(torch.equal(state["model"][name], weight) for name, weight in whole.items())
    assert len(state["optimizer"]["state"]) == len(state["optimizer"]["param_groups"][0]["params"])
    assert type(open_model(runs(2, "--shard") / "model")) is CAVMAE


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_a_checkpoint_of_shards_cannot_run_code(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "step-00000006"
    shutil.copytree(runs(2, "--shard") / "checkpoints" / "step-00000006", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SaveError, match=r"none of the 1 checkpoints can be read.*which no checkpoint needs"):
        read_newest(tmp_path)
    assert not Path("touched").exists()


@pytest.mark.parametrize("missing", [".metadata", "__1_0.distcp", "state.pt"])
def test_a_damaged_checkpoint_of_shards_is_passed_over(runs, tmp_path, missing):
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs(2, "--shard") / "checkpoints", folder)
    (folder / "step-00000006" / missing).unlink()
    assert read_newest(folder)["step"] == 3
    shutil.copytree(folder / "step-00000003", folder / ".step-00000009.part")
    assert read_newest(folder)["step"] == 3


NO_ROOM = """
import errno, os
from torch.distributed.checkpoint import FileSystemWriter
write, times = FileSystemWriter.write_data, []
def full(self, *args):
    times.append(1)
    if os.environ["RANK"] == "1" and len(times) == {when}:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(self, *args)
FileSystemWriter.write_data = full
"""


def test_a_rank_without_room_for_its_shards(clips, runs, tmp_path):
    """The run says so and goes on; a later checkpoint makes up for it, and without one the run ends with an error."""
    text = train(clips, tmp_path / "first", 2, "--shard", before=NO_ROOM.format(when=1))
    assert "step-00000003 could not be written: rank 1: " in text and "No space left on device" in text
    assert [path.name for path in (tmp_path / "first" / "checkpoints").iterdir()] == ["step-00000006"]
    with started(2, tmp_path / "logs", arguments(clips, tmp_path / "last", "--shard"), NO_ROOM.format(when=2)) as run:
        run.finish()
    assert run.codes == [1, 1] and "No space left on device" in run.texts[0] + run.texts[1]
    assert [path.name for path in (tmp_path / "last" / "checkpoints").iterdir()] == ["step-00000003"]
