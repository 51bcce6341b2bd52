"""What the commands of evaluation share."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cavmae_fast.evaluation.sharing import is_first


def data_of(places: tuple[Path, ...]) -> tuple[Path, ...]:
    """--data as given. ValueError when it was not."""
    if not places:
        raise ValueError("--data is missing; allowed: a folder of shards, folders of videos, media files, lists")
    return places


@contextlib.contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, and the function that moves it: (done, total). Of several ranks the first one shows its own."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", dynamic_ncols=True, leave=False, disable=not is_first()) as bar:

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


def next_line(*arguments: object) -> str:
    """The line of a closing text that says what to run next. It runs as it stands when it is copied into a shell."""
    return f"next:  {shlex.join(['cavmae-fast', *map(str, arguments)])}"


def printable(lines: Iterable[str]) -> str:
    """Lines as one text in which no name that came with the data can steer the terminal or break its encoding."""
    return "\n".join(line if line.isprintable() else repr(line)[1:-1] for line in lines)
