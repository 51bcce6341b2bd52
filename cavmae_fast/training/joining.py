"""How the processes that torchrun started come together, and how they end together."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from cavmae_fast.errors import CavmaeError
from cavmae_fast.training.preemption import Preempted
from cavmae_fast.training.ranks import PATIENCE, Ranks, as_current, current
from cavmae_fast.training.watchdog import LOST, SILENCE, Watchdog, record

MEETING = timedelta(minutes=5)
"How long processes wait for each other at the start."


class RanksError(CavmaeError):
    """A run of several ranks that ended because one of them failed. The message is empty where another process shows it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, for a block; without torchrun it does nothing.

    When a rank leaves the block by an error, all ranks leave within seconds: that rank with its error (named after the rank
    where it is one for users), the others with RanksError.

    Args:
        device: as in `RunConfig`; with CUDA each process takes the GPU of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with _recorded():
            yield current()
        return
    ranks, watchdog = _join(device)
    try:
        if (problem := _device_problem(device)) is not None:  # only now, so that the other ranks learn of it
            raise ValueError(problem)
        with as_current(ranks):
            yield ranks
        ranks.barrier()
        watchdog.stop()
        dist.destroy_process_group()
    except KeyboardInterrupt:
        raise
    except Preempted as error:  # all ranks together
        watchdog.stop()
        record(str(error))
        if ranks.first:
            raise
        raise RanksError("", error.exit_code) from None
    except BaseException as error:
        ended = _ended(error, watchdog)
        if ended is error:
            raise
        raise ended from None


@contextlib.contextmanager
def _recorded() -> Iterator[None]:
    """Leaves the error of a single process for torchrun, where that has started it."""
    try:
        yield
    except Exception as error:
        record(_sentence(error))
        raise


def _device_problem(device: str) -> str | None:
    """Why the processes of this machine cannot have a GPU each; None when they can, or need none."""
    if device.startswith("cuda:"):
        return (
            f"--device is {device!r}, and torchrun has started several processes, each of which takes a GPU of its own; it "
            "must be auto, cpu or cuda"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _on_gpu(device) and processes > torch.cuda.device_count():
        return (
            f"torchrun has started {processes} processes on this machine, where PyTorch finds {torch.cuda.device_count()} "
            "CUDA devices; --nproc-per-node must be at most that, or --device be cpu"
        )
    return None


def _on_gpu(device: str) -> bool:
    return device in ("auto", "cuda") and torch.cuda.is_available()


def _join(device: str) -> tuple[Ranks, Watchdog]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    backend = "gloo"
    if _on_gpu(device) and _device_problem(device) is None:
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    store = _meet(rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks = Ranks(rank, world_size, local_rank, local_world_size, group)
    watchdog = Watchdog(dist.PrefixStore("watchdog", store.clone()), rank, world_size, local_rank)
    ranks.barrier()
    watchdog.start()
    return ranks, watchdog


def _meet(rank: int, world_size: int) -> dist.Store:
    """A store that these processes alone use: torchrun keeps one for all attempts of a run, and what killed processes left
    there (their addresses) would be taken for that of their successors.

    The first rank makes up a name for the attempt. The others ask for it under names of their own, which nobody can have
    answered before. RanksError when not all have come in time.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # else the first rank keeps the store
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.TCPStore(
        address, port, is_master=rank == 0 and not agents, wait_for_workers=False, timeout=MEETING, multi_tenant=True
    )
    own = uuid.uuid4().hex
    if rank != 0:
        shared.set(f"cavmae_fast/ask/{rank}", own)
        attempt = shared.get(f"cavmae_fast/answer/{own}").decode()
        store = dist.PrefixStore(f"cavmae_fast/{attempt}", shared)
        store.set(f"here/{rank}", "")
        return store
    store = dist.PrefixStore(f"cavmae_fast/{own}", shared)
    missing, end = set(range(1, world_size)), time.monotonic() + MEETING.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise RanksError(f"of {world_size} processes, {len(missing)} have not come in {MEETING}: {sorted(missing)}", 1)
        for other in sorted(missing):
            if store.check([f"here/{other}"]):
                missing.remove(other)
            elif shared.check([f"cavmae_fast/ask/{other}"]):
                shared.set(f"cavmae_fast/answer/{shared.get(f'cavmae_fast/ask/{other}').decode()}", own)
        time.sleep(0.02)
    return store


def _ended(error: BaseException, watchdog: Watchdog) -> BaseException:
    """What this process raises when `error` ended it: the error itself, or who else failed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once to those who are about to say why
    if _of_a_collective(error):  # the other end has failed, and says why or is missed
        watchdog.hurry()
        failure = watchdog.wait(SILENCE + 10) or watchdog.fail(_sentence(error), 1)
    else:
        failure = watchdog.fail(_sentence(error), _exit_code(error))
    known = isinstance(error, CavmaeError | ValueError | OSError | MemoryError) or failure.rank != watchdog.rank
    if not known:  # a fault of this program: with its traceback
        return error
    return RanksError(watchdog.sentence(), 1 if failure.exit_code == LOST else failure.exit_code)


def _of_a_collective(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))


def _sentence(error: BaseException) -> str:
    known = isinstance(error, CavmaeError | ValueError | OSError)
    return str(error) if known and str(error) else f"{type(error).__name__}: {error}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, CavmaeError):
        return error.exit_code
    return 2 if isinstance(error, ValueError) else 1
