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

CACHED_CLIPS = 2000
"Up to this many training clips stay decoded in memory when this process decodes them itself."


class RejectList:
    """`rejects.jsonl`: each clip that cannot be used, once, with the reason. What the file holds already counts. Use as a
    context manager."""

    def __init__(self, path: Path) -> None:
        self._named = {row["path"] for row in read_rows(path)}
        self._lines = JsonLines(path)

    @property
    def count(self) -> int:
        return len(self._named)

    def add(self, rejects: Iterable[Reject]) -> None:
        """Writes those that are not yet named."""
        for reject in rejects:
            if reject.path not in self._named:
                self._named.add(reject.path)
                self._lines.write({"path": reject.path, "reason": reject.reason})

    def watch(self, loader: Loader) -> Iterator[Batch]:
        """One epoch of `loader`, whose rejects are written before the batch that met them is given out."""
        try:
            for batch in loader:
                self.add(loader.rejects.values())
                yield batch
        except UnusableDataError as error:
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

    A few clips are decoded once, by this process, and kept; more of them by one worker process per core, or as many as
    `workers` says.
    """
    from tqdm import tqdm

    few = choose_backend(backend, clips, device, spec)[0] == "torch" and len(clips) <= CACHED_CLIPS
    if workers is None:
        workers = 0 if few else default_count()
    return Loader(
        clips,
        min(batch_size, len(clips)),
        spec,
        training=training,
        backend=backend,
        device=device,
        workers=workers,
        seed=seed,
        keep=training and few and not workers,
        report=tqdm.write,
        **options,
    )
