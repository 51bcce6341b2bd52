"""What the commands of evaluation share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields

from cavmae_fast.evaluation.running import Running


def running_of(config: Running) -> Running:
    """The options of `Running` alone, of a command's configuration."""
    return Running(**{field.name: getattr(config, field.name) for field in fields(Running)})


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, and the function that moves it: (done, total)."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", dynamic_ncols=True, leave=False) as bar:

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


def printable(text: str) -> str:
    """Text in which no name that came with the data can steer the terminal or break its encoding."""
    return "\n".join(line if line.isprintable() else repr(line)[1:-1] for line in text.split("\n"))
