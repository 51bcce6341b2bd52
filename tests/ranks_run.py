"""Runs of several ranks on this machine, as torchrun starts them, from a process that has imported everything already."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

from torch.distributed import TCPStore

TINY = {
    "img_size": 32,
    "audio_length": 64,
    "embed_dim": 48,
    "num_heads": 3,
    "depth": 3,
    "modality_specific_depth": 2,
    "decoder_embed_dim": 32,
    "decoder_num_heads": 4,
    "decoder_depth": 2,
    "bidirect_contrast": True,
    "norm_pix_loss": False,
}


@functools.cache
def processes() -> multiprocessing.context.ForkServerContext:
    """Starts processes in milliseconds: they are forked from one that has imported the package."""
    context = multiprocessing.get_context("forkserver")
    names = (
        "cavmae_fast.training.pretrain",
        "cavmae_fast.training.finetune",
        "torch.distributed.checkpoint",
        "tyro",
        "tqdm",
    )
    context.set_forkserver_preload([*names, "sklearn.metrics", "torch.distributed.fsdp", "torch._dynamo"])
    root, before = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root  # it imports this checkout, wherever it is started
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


def shrink() -> None:
    """Makes the small models tiny ones, and leaves out the figures, which take longer to draw than it takes to train."""
    from cavmae_fast.models import PRESETS
    from cavmae_fast.models.mavil_presets import TOWER_PRESETS
    from cavmae_fast.training import finetune_results, pretrain
    from tests.tiny_mavil import tiny_presets

    PRESETS["small"] = replace(PRESETS["small"], model=TINY)
    TOWER_PRESETS.update(tiny_presets())
    pretrain.loss_curve = pretrain.draw_reconstructions = lambda *_: None
    finetune_results.draw_classes = finetune_results.fine_tuning_curves = lambda *_: None


def _rank(environment: dict[str, str], arguments: list[str], before: str, log: Path) -> None:
    os.environ.update(environment)
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import torch

        from cavmae_fast.cli import main

        torch.set_num_threads(1)
        shrink()
        exec(before, {})
        sys.argv = ["cavmae-fast", *arguments]
        main()


class Run:
    """The ranks of a run; `codes` and `texts` are theirs once it has ended, after `seconds`."""

    def __init__(self, logs: list[Path], ranks: list[multiprocessing.Process]) -> None:
        self.logs, self.ranks = logs, ranks

    def finish(self, timeout: float = 120) -> Run:
        end = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0.1, end - time.monotonic()))
        late = [rank for rank in self.ranks if rank.exitcode is None]
        for rank in late:
            rank.kill()
            rank.join()
        assert not late, "\n".join(self.texts)
        return self

    @property
    def codes(self) -> list[int]:
        return [rank.exitcode for rank in self.ranks]

    @property
    def texts(self) -> list[str]:
        return [log.read_text() for log in self.logs]


@contextlib.contextmanager
def started(count: int, folder: Path, arguments: Sequence[object], before: str = "") -> Iterator[Run]:
    """`count` ranks of `cavmae-fast <arguments>`, each after the code `before`; this process keeps the store."""
    folder.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RESTART_COUNT": "0"}
    run = Run([], [])
    for rank in range(count):
        log = folder / f"rank{rank}.log"
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        words = [str(word) for word in arguments]
        process = processes().Process(target=_rank, args=(environment, words, before, log))
        process.start()
        run.logs.append(log)
        run.ranks.append(process)
    try:
        yield run
    finally:
        for process in run.ranks:
            if process.is_alive():
                process.kill()
            process.join()
        del store


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
