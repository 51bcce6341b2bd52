"""The base of this package's errors. Each kind is defined where it is raised; the command line needs only the base."""

from __future__ import annotations

from typing import ClassVar


class CavmaeError(Exception):
    """What can go wrong for a user. The message is one sentence that names the argument or file, what is wrong with it and
    what is allowed; the command line prints it alone, without a traceback."""

    exit_code: ClassVar[int] = 1
    "Of the program when the error ends it: 1, the job failed; 2, wrong usage."


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a sentence that names its reason; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
