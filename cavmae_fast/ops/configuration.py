"""What is checked in for each GPU architecture: which implementation is an operator's default, and how kernels are launched.

`configs/sm_90.json`, of one architecture, holds

    "implementations": operator -> dtype -> "triton" or "cuda": the default there, because it passed the GPU suite there.
                       What is not listed takes PyTorch.
    "launches":        kernel -> case -> block sizes, num_warps, num_stages. A case is a dtype and what else the choice
                       depends on: "bfloat16 short 64"; "16-bit" stands for both 16-bit dtypes, "any" for all cases.

An architecture without a file takes the launches of the nearest older one, and PyTorch for every operator: a kernel that
never ran on a kind of GPU is not the default on it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from cavmae_fast.errors import CavmaeError

FOLDER = Path(__file__).with_name("configs")
IMPLEMENTATIONS = ("torch", "triton", "cuda")
DTYPES = ("bfloat16", "float16", "float32")
INTERPRETED = "sm_90"
"Triton's interpreter takes this architecture's launches, so that the CPU tests run what runs on a Hopper GPU."
Launch = Mapping[str, Any]


class ConfigurationError(CavmaeError):
    """A configuration file is damaged, or holds nothing for what is asked."""


def name_of(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def files(architecture: str) -> list[Path]:
    """The files that speak for `architecture`, the first to be asked first. Measurements of a user's own belong before
    the one that is checked in."""
    return [path for path in (FOLDER / f"{architecture}.json",) if path.exists()]


def read(path: Path) -> dict[str, Any]:
    """The file's contents. Raises ConfigurationError, naming the entry, when something in it is not as described above."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    sections = content if isinstance(content, dict) and set(content) == {"implementations", "launches"} else {}
    if not sections or not all(isinstance(groups, dict) for groups in sections.values()):
        raise ConfigurationError(f"{path} must hold 'implementations' and 'launches', and nothing else")
    for section, groups in sections.items():
        for group, entries in groups.items():
            if not isinstance(entries, dict):
                raise ConfigurationError(f"{path} has {entries!r} in {section} for {group}; it must be an object")
            for name, value in entries.items():
                if section == "implementations" and (name not in DTYPES or value not in IMPLEMENTATIONS):
                    raise ConfigurationError(
                        f"{path} gives {group} in {name} the implementation {value!r}; allowed are the dtypes"
                        f" {', '.join(DTYPES)} and the implementations {', '.join(IMPLEMENTATIONS)}"
                    )
                if section == "launches" and not _is_launch(value):
                    raise ConfigurationError(f"{path} launches {group}, {name!r}, with {value}; allowed are named integers")
    return content


def _is_launch(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(number, int) for number in value.values())


@functools.cache
def table(architecture: str) -> dict[str, dict[str, dict[str, Any]]]:
    """All that the files of `architecture` hold; entry by entry, an earlier file's wins."""
    merged: dict[str, dict[str, dict[str, Any]]] = {"implementations": {}, "launches": {}}
    for path in reversed(files(architecture)):
        for section, groups in read(path).items():
            for group, entries in groups.items():
                merged[section].setdefault(group, {}).update(entries)
    return merged


@functools.cache
def nearest(architecture: str) -> str:
    """The architecture whose launches `architecture` takes: itself, else the newest older one, else the oldest."""
    if files(architecture):
        return architecture
    known = sorted((path.stem for path in FOLDER.glob("sm_*.json")), key=_number)
    older = [name for name in known if _number(name) <= _number(architecture)]
    return older[-1] if older else known[0]


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


def implementation(architecture: str, operator: str, dtype: torch.dtype) -> str:
    """The default of `operator` in `dtype` on `architecture`: 'torch' unless another was proven on that very one."""
    return table(architecture)["implementations"].get(operator, {}).get(name_of(dtype), "torch")


@functools.lru_cache(maxsize=4096)
def launch(kernel: str, architecture: str, dtype: torch.dtype, key: str = "") -> Launch:
    """Block sizes and options with which `kernel` is launched. Raises ConfigurationError when there are none.

    `key` is what the choice depends on besides the dtype, as the kernel's launcher words it; `architecture` one that
    has a file (`nearest`).
    """
    cases = table(architecture)["launches"].get(kernel, {})
    names = [name_of(dtype), *(["16-bit"] if dtype.itemsize == 2 else [])]
    for case in (*(f"{name} {key}".rstrip() for name in names), key, "any"):
        if case in cases:
            return MappingProxyType(cases[case])
    raise ConfigurationError(f"the configuration of {architecture} has no launch of {kernel} for {names[0]} {key}".rstrip())


def mark_proven(
    architecture: str, operator: str, dtype: torch.dtype, implementation: str = "triton", folder: Path | None = None
) -> Path:
    """Makes `implementation` the default of one operator in one dtype on one architecture -> the file, written anew.

    'torch' takes a mark away. No other operator's and no other dtype's mark is touched. An architecture without a file
    gets one, with the launches that it took until now: those are what was proven. `folder`: of the files.
    """
    if implementation not in IMPLEMENTATIONS or name_of(dtype) not in DTYPES:
        raise ConfigurationError(
            f"{implementation!r} in {name_of(dtype)} cannot be marked; allowed are {', '.join(IMPLEMENTATIONS)} in"
            f" {', '.join(DTYPES)}"
        )
    folder = folder or FOLDER
    path = folder / f"{architecture}.json"
    content = read(path if path.exists() else FOLDER / f"{nearest(architecture)}.json")
    marks = dict(content["implementations"]) if path.exists() else {}
    of_operator = {k: v for k, v in marks.get(operator, {}).items() if k != name_of(dtype)}
    if implementation != "torch":
        of_operator[name_of(dtype)] = implementation
    marks[operator] = of_operator
    write(path, {"implementations": {k: marks[k] for k in sorted(marks) if marks[k]}, "launches": content["launches"]})
    for cached in (table, nearest, launch):
        cached.cache_clear()
    return path


def write(path: Path, content: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """`content` as JSON with a line for each entry, so that a difference shows what changed. The old file is whole until
    the new one is."""
    lines = []
    for section, groups in content.items():
        entries = [
            f'    "{group}": {{\n' + ",\n".join(f'      "{k}": {json.dumps(v)}' for k, v in cases.items()) + "\n    }"
            for group, cases in groups.items()
        ]
        lines.append(f'  "{section}": {{' + ("\n" + ",\n".join(entries) + "\n  }" if entries else "}"))
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(unfinished, path)
