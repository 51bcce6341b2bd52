"""MAViL on two processes under plain DistributedDataParallel against one process: gloo on the CPU, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from tiny import gradients, one_thread, randomize  # noqa: F401
from tiny_mavil import MAVIL, clips
from torch.nn.parallel import DistributedDataParallel

from cavmae_fast.models import MAViL

RANKS, PER_RANK = 2, 2
STAGES = {"stage 1": (1.0, 0.0), "stage 2": (0.0, 1.0)}
"The weights of reconstruction and of regression."


def step(stage: str, ranks: slice, wrap=lambda model: model):
    """Forward and backward of some rows of the batch. From one seed, a clip has the same masks in one process and in two."""
    raw, regression = STAGES[stage]
    model = randomize(MAViL(**MAVIL)).double()
    model.train_losses(raw=raw != 0, inter=True, intra=True, regression=regression != 0)
    audio, imgs = (x[ranks] for x in clips(batch=RANKS * PER_RANK))
    targets = randomize(MAViL(**MAVIL), seed=1).double().targets(audio, imgs)
    weights = {"raw_loss_weight": raw, "inter_loss_weight": 0.5, "intra_loss_weight": 0.3}
    wrapped = wrap(model)  # DDP works for as long as somebody holds it
    torch.manual_seed(11)  # all ranks draw the masks of the whole batch, and each takes its rows
    output = wrapped(audio, imgs, targets, regression_loss_weight=regression, **weights)
    output.loss.backward()
    return [x.detach() for x in output], {name: gradient.clone() for name, gradient in gradients(model).items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    try:
        part = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        # Without find_unused_parameters: it raises where a trained parameter gets no gradient.
        results = {stage: step(stage, part, DistributedDataParallel) for stage in STAGES}
        torch.save(results, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_give_the_gradient_of_the_whole_batch(ranks, stage):
    """Both contrasts are with the clips of all ranks, the other losses are means."""
    output, want = step(stage, slice(0, RANKS * PER_RANK))
    for result in ranks:
        got_output, got = result[stage]
        assert got.keys() == want.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        for place in (4, 5, 9):  # the contrasts and their accuracy: of all rows, on every rank
            torch.testing.assert_close(got_output[place], output[place])
    torch.testing.assert_close(sum(result[stage][0][0] for result in ranks) / RANKS, output[0])
