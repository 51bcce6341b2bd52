"""The loaders of a run, and the list of the clips that it could not use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.batches import Batch
from cavmae_fast.data.decode.choosing import choose_backend
from cavmae_fast.data.decode.decoder import Reject, UnusableDataError
from cavmae_fast.data.decode.workers import default_count
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.sets.opening import Clips
from cavmae_fast.training.metrics import JsonLines, read_rows
from cavmae_fast.training.ranks import Ranks, current

CACHED_CLIPS = 2000
"Up to this many training clips stay decoded in memory when this process decodes them itself."


class RejectList:
    """`rejects.jsonl`: each clip that cannot be used, once, with the reason. What the file holds already counts. Use as a
    context manager.

    Under several ranks the first writes what it meets; what others meet is written at the end of an epoch (`share`), and by
    themselves when it ends the run.
    """

    def __init__(self, path: Path, ranks: Ranks | None = None) -> None:
        self._path, self._ranks = path, ranks or Ranks()
        self._named = {row["path"] for row in read_rows(path)}
        self._waiting: dict[str, Reject] = {}
        self._lines = JsonLines(path, writes=self._ranks.first)

    @property
    def count(self) -> int:
        return len(self._named)

    def add(self, rejects: Iterable[Reject]) -> None:
        """Writes those that are not yet named."""
        for reject in rejects:
            if reject.path not in self._named:
                self._named.add(reject.path)
                self._waiting[reject.path] = reject
                self._lines.write({"path": reject.path, "reason": reject.reason})

    def share(self) -> None:
        """Writes what other ranks met; every rank has to call it."""
        for waiting in self._ranks.gather(self._waiting):
            self.add(waiting.values())
        self._waiting = {}

    def watch(self, loader: Loader) -> Iterator[Batch]:
        """One epoch of `loader`, whose rejects are written before the batch that met them is given out."""
        try:
            for batch in loader:
                self.add(loader.rejects.values())
                yield batch
        except UnusableDataError as error:
            if not self._ranks.first:
                self._lines = JsonLines(self._path)
                for reject in self._waiting.values():
                    self._lines.write({"path": reject.path, "reason": reject.reason})
            self.add(error.rejects)
            raise
        finally:
            self.add(loader.rejects.values())

    def __enter__(self) -> RejectList:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.__exit__()


def make_loader(
    clips: Clips,
    batch_size: int,
    spec: ClipSpec,
    *,
    training: bool,
    backend: str,
    device: torch.device,
    workers: int | None,
    seed: int,
    **options: Any,
) -> Loader:
    """A loader of `clips` for a model that takes `spec`; `options` are further arguments of `Loader`.

    `batch_size` is that of all ranks together; in training it must be a multiple of their number, else ValueError.

    A few clips are decoded once, by this process, and kept; more of them by one worker process per core (shared by the
    processes of the machine), or as many as `workers` says.
    """
    ranks = current()
    batch_size = min(batch_size, len(clips))
    rows = ranks.share(batch_size) if training else max(1, batch_size // ranks.world_size)
    few = choose_backend(backend, clips, device, spec)[0] == "torch" and len(clips) <= CACHED_CLIPS
    if workers is None:
        workers = 0 if few else max(1, default_count() // ranks.local_world_size)
    return Loader(
        clips,
        rows,
        spec,
        training=training,
        backend=backend,
        device=device,
        workers=workers,
        seed=seed,
        keep=training and few and not workers,
        report=ranks.report,
        **options,
    )
