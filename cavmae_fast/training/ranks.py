"""The processes of a run under torchrun: which one this is, what they tell each other, and how they end together.

Every function works alone, too, where it does what one process does. Numbers on a device travel by `torch.distributed`'s
default group (NCCL on GPUs); what the hosts tell each other (decisions, objects) by a gloo group of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cavmae_fast.errors import CavmaeError
from cavmae_fast.training.preemption import Preempted
from cavmae_fast.training.watchdog import LOST, SILENCE, Watchdog, record

T = TypeVar("T")
PATIENCE = timedelta(hours=1)
"How long a rank waits for another in a collective operation, as when one alone writes; failures are noticed in seconds."


class RanksError(CavmaeError):
    """A run of several ranks that ended because one of them failed. The message is empty where another process shows it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(eq=False)
class Ranks:
    """The processes of this run: `rank` is this one's number, `local_rank` the one on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    group: dist.ProcessGroup | None = None
    "gloo, for what the hosts tell each other; None alone."

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Shows a line; what all ranks say alike is said by the first."""
        if self.first:
            from tqdm import tqdm

            tqdm.write(text)

    def report(self, text: str) -> None:
        """Shows a line that concerns this rank."""
        from tqdm import tqdm

        tqdm.write(text if self.world_size == 1 else f"rank {self.rank}: {text}")

    def barrier(self) -> None:
        """Until all ranks are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value (what pickle takes; tensors on the CPU), in the order of the ranks, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, which alone runs it, on every rank. When it fails, the run ends."""
        if self.group is None:
            return make()
        box: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` returns here; rank after rank runs it."""
        for turn in range(self.world_size):
            if turn == self.rank:
                result = make()
            self.barrier()
        return result

    def share(self, batch_size: int) -> int:
        """Clips per step on each rank. ValueError when the ranks cannot share a step evenly."""
        if batch_size % self.world_size:
            raise ValueError(
                f"--batch-size is {batch_size} (with fewer clips than that, their number) on {self.world_size} processes, "
                f"which share each step; it must be a multiple of {self.world_size}"
            )
        return batch_size // self.world_size

    def mean(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of this rank's part of a step -> their means over the ranks. A gradient passes as if it were this rank's
        own value, because DDP and FSDP take the mean of gradients."""
        if self.world_size == 1:
            return losses
        values = _Mean.apply(torch.stack([value.float() for value in losses.values()]))
        return dict(zip(losses, values.unbind()))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Agreement:
    """Numbers that each step is to be decided by, the highest of any rank: every rank learns the same ones at the same step.

    Nobody waits: under several ranks the answer to a step's numbers is taken with the next step's. Alone it is at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._under_way: tuple[Tensor, dist.Work] | None = None

    def exchange(self, *numbers: int) -> list[int]:
        """Gives this rank's numbers, 0 or more -> the highest of all ranks' (of the step before; at first zeros)."""
        if self._ranks.group is None:
            return list(numbers)
        before, values = self._under_way, torch.tensor(numbers)
        self._under_way = values, dist.all_reduce(values, dist.ReduceOp.MAX, self._ranks.group, async_op=True)
        if before is None:
            return [0] * len(numbers)
        before[1].wait()
        return before[0].tolist()


_current = Ranks()


def current() -> Ranks:
    """The ranks that `joined` has joined; else this process alone."""
    return _current


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, for a block; without torchrun it does nothing.

    When a rank leaves the block by an error, all ranks leave within seconds: that rank with its error (named after the rank
    where it is one for users), the others with RanksError.

    Args:
        device: as in `RunConfig`; with CUDA each process takes the GPU of its local rank.
    """
    global _current
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with _recorded():
            yield _current
        return
    ranks, watchdog = _join(device)
    _current = ranks
    try:
        if (problem := _device_problem(device)) is not None:  # only now, so that the other ranks learn of it
            raise ValueError(problem)
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
    finally:
        _current = Ranks()


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
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=PATIENCE)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks = Ranks(rank, world_size, local_rank, local_world_size, group)
    attempt = ranks.from_first(lambda: uuid.uuid4().hex)  # the store may outlive an attempt, and its keys with it
    watchdog = Watchdog(dist.PrefixStore(f"cavmae_fast/{attempt}", store), rank, world_size, local_rank)
    ranks.barrier()
    watchdog.start()
    return ranks, watchdog


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
