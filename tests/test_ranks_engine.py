"""The engine's options under several ranks, with DDP and in shards: the same numbers as one process."""

# ruff: noqa: F811 (fixtures of another file)

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks_run import started
from test_ranks import arguments, assert_same_training, clips, rows, runs, train, unfinished  # noqa: F401

CLIP = 0.05
EVERYTHING = ("--clip-grad", CLIP, "--ema", 0.5, "--drop-path", 0.4, "--optimizer", "adamw", "--weight-decay", 0.05)
IN_PARTS = ("--accumulate", 2, "--clip-grad", CLIP, "--ema", 0.5)
CONTRAST_ALONE = ("--mae-loss-weight", 0, "--mask-ratio", 0)
"Without reconstruction nothing has to be masked, so that no masks are drawn that would depend on the parts."
kinds = pytest.mark.parametrize("kind", [(), ("--shard",)], ids=["ddp", "shards"])


def assert_same(out: Path, want: Path) -> None:
    """Also the norm of all gradients, which was in every step large enough to be clipped."""
    assert_same_training(out, want)
    norms = [[row["grad_norm"] for row in rows(folder) if "grad_norm" in row] for folder in (out, want)]
    assert min(norms[1]) > CLIP and norms[0] == pytest.approx(norms[1], rel=1e-4)


@kinds
def test_clipping_averages_dropped_paths_and_decay(runs, kind):
    """Paths are dropped as masks are drawn: for the clips of all ranks at once."""
    assert_same(runs(2, *EVERYTHING, *kind), runs(1, *EVERYTHING))


def test_averages_in_shards_are_gone_on_with_on_one_rank(clips, runs, tmp_path):
    out = unfinished(runs(2, *EVERYTHING, "--shard"), tmp_path / "run")
    assert "going on after step 3" in train(clips, out, 1, *EVERYTHING)
    assert_same(out, runs(1, *EVERYTHING))


@kinds
def test_a_contrastive_loss_in_parts(runs, kind):
    """Each rank computes its half of the clips in two parts, one process all of them in two: the same whole."""
    assert_same(runs(2, *IN_PARTS, *CONTRAST_ALONE, *kind), runs(1, *IN_PARTS, *CONTRAST_ALONE))


def test_masks_in_parts(runs):
    """Masks are drawn part by part, and which clips are in a part depends on the number of ranks. On as many ranks, shards
    and whole models have the same masks and give the same numbers."""
    assert_same(runs(2, *IN_PARTS, "--shard"), runs(2, *IN_PARTS))


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@kinds
def test_recomputation(runs, kind, recompute):
    """In the backward pass, where shards that were dropped after the forward pass are needed again."""
    assert_same_training(runs(2, *kind, "--recompute", recompute), runs(1))


OVERFLOW = """
import os
from cavmae_fast.training.state import RunState
update = RunState.update
def overflow(self, loss):
    if self.step == 2 and os.environ["RANK"] == "1":
        self.model.decoder_embed.weight.grad.to_local().fill_(float("inf"))
    measured = update(self, loss)
    print("SCALE", self.scaler.get_scale(), flush=True)
    return measured
RunState.update = overflow
"""


def test_float16_in_shards(clips, runs, tmp_path):
    """As with whole models, overflow in the first step included; and overflow in one shard lowers every scale."""
    assert_same_training(runs(2, "--dtype", "float16", "--shard"), runs(2, "--dtype", "float16"))
    words = arguments(clips, tmp_path / "run", "--dtype", "float16", "--shard")
    with started(2, tmp_path / "logs", words, OVERFLOW) as run:
        run.finish()
    assert run.codes == [0, 0], "\n".join(run.texts)
    one, two = ([float(line.split()[1]) for line in text.splitlines() if line.startswith("SCALE")] for text in run.texts)
    assert one == two and one[2] == one[1] / 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 0
