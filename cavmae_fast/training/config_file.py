"""`--config FILE`: the options of an earlier run, as a run's `config.json` holds them, on the command line of a new one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

FLAG = "--config"


def expand(arguments: Sequence[str], config: type) -> list[str]:
    """`arguments` of a command, with `--config FILE` replaced by the options that the file holds.

    They stand before all other options, so that those, which were typed, count. Types and values are checked with the rest
    of the command line, later.

    Args:
        arguments: of the command, without its name.
        config: the dataclass of the command's options.

    Raises:
        ValueError: the file is missing or named twice, cannot be read, or holds an option that the command does not have.
    """
    rest, files = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == FLAG:
            files.append(next(remaining, None))
        elif argument.startswith(f"{FLAG}="):
            files.append(argument.removeprefix(f"{FLAG}="))
        else:
            rest.append(argument)
    if not files:
        return rest
    if len(files) > 1 or files[0] is None:
        raise ValueError(f"{FLAG} takes one file, once")
    return _options(Path(files[0]), config) + rest


def _options(file: Path, config: type) -> list[str]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{FLAG} {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{FLAG} {file} holds a {type(values).__name__}; it must hold an object of options")
    types = {field.name: field.type for field in fields(config)}
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ValueError(f"{FLAG} {file} holds {', '.join(unknown)}, which this command does not have as options")
    return [word for name, value in values.items() for word in _words(name, value, types[name])]


def _words(name: str, value: Any, kind: object) -> list[str]:
    """The option as it would be typed; nothing for null, which stands for 'not given'."""
    flag = name.replace("_", "-")
    if value is None:
        return []
    if kind in (bool, "bool"):  # annotations are text in modules that postpone them
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}", *map(str, values)] if values else []
