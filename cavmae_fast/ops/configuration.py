"""What was chosen for each device: which implementation an operator runs, and how kernels are launched.

A *target* is a device in words: 'sm_90 nvidia-h200', its architecture and its name ('cpu-avx512 amd-epyc' for a CPU). Two
files speak for it, the first one first:

1. the user's own, which `cavmae-fast tune` writes into the cache (`user_file`); it counts only for the device and for the
   releases of torch, Triton and this package with which it was measured;
2. the one of its architecture that is checked in, `configs/sm_90.json`.

Both hold

    "implementations": operator -> case -> 'triton', 'cuda' or another form of it, which was right and fastest. What is
                       not listed takes PyTorch.
    "launches":        kernel -> case -> block sizes, num_warps, num_stages.

A case is a dtype and what else the choice depends on, "bfloat16 long 64"; "16-bit" stands for both 16-bit dtypes, "8-bit"
for those of fp8, "any" for all cases. An architecture without a file takes the launches of the nearest older
one, and PyTorch for every operator: a kernel that never ran on a kind of GPU is not the default on it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from cavmae_fast.errors import CavmaeError

FOLDER = Path(__file__).with_name("configs")
VARIABLE = "CAVMAE_TUNED"
"Environment variable: the folder of the user's own files."
SECTIONS = ("implementations", "launches")
DTYPES = ("bfloat16", "float16", "float32")
INTERPRETED = "sm_90"
"Triton's interpreter takes this architecture's launches, so that the CPU tests run what runs on a Hopper GPU."
Launch = Mapping[str, Any]
Content = Mapping[str, Mapping[str, Mapping[str, Any]]]
"What a file holds: section -> operator or kernel -> case -> value."

SEARCH = FOLDER / "search.json"
"""Kernel -> words of a case -> changes of its launch that are worth a try: the tuner's search space. "sm_80|sm_86" is one of
these architectures: there alone the compiler was seen to need no more registers or shared memory than there are."""

_trial: Content | None = None
_recorded: list[tuple[str, torch.dtype, str]] | None = None


class ConfigurationError(CavmaeError):
    """A configuration file is damaged, or holds nothing for what is asked."""


def name_of(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------ devices


def slug(text: str) -> str:
    """Small letters, digits and hyphens: a name that can be that of a file. 'NVIDIA H200' -> 'nvidia-h200'."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-") or "unknown"


@functools.cache
def processor_name() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


@functools.cache
def gpu_architecture(index: int) -> str:
    """'sm_90' for a Hopper GPU: the name of its configuration file."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def device_name(device: torch.device) -> str:
    """'NVIDIA H200', or the CPU's name."""
    return _gpu_name(device.index or 0) if device.type == "cuda" else processor_name()


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> str:
    """The target that `device` is."""
    if device.type == "cuda":
        return f"{gpu_architecture(device.index or 0)} {slug(device_name(device))}"
    return f"cpu-{slug(torch.backends.cpu.get_cpu_capability())} {slug(processor_name())}"


@functools.cache
def versions() -> Mapping[str, str]:
    """The releases that measurements depend on."""
    from cavmae_fast import __version__

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return MappingProxyType({"torch": torch.__version__, "triton": triton, "cavmae_fast": __version__})


# -------------------------------------------------------------------------------------------------------------- files


def user_folder() -> Path:
    """Where the user's own files lie: `CAVMAE_TUNED`, else `cavmae_fast/tuned` in the user's cache."""
    if own := os.environ.get(VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cavmae_fast" / "tuned"


def user_file(target: str) -> Path:
    """The user's own file for `target` and the releases that are installed. It need not exist."""
    releases = "-".join(f"{package}{version}" for package, version in versions().items())
    releases = re.sub(r"[^A-Za-z0-9._-]", "-", releases)  # torch 2.13.0+cu130
    return user_folder() / f"{_stem(target)}-{releases}.json"


def _stem(target: str) -> str:
    architecture, _, name = target.partition(" ")
    return f"{name}-{architecture}"


def stale_files(target: str) -> list[Path]:
    """The user's own files for `target` that were measured with other releases, and are therefore not used."""
    found = sorted(user_folder().glob(f"{_stem(target)}-torch*.json"))
    return [path for path in found if path != user_file(target) or read(path).get("made_for") != made_for(target)]


def shipped_file(architecture: str) -> Path:
    """The checked-in file of an architecture. It need not exist."""
    return FOLDER / f"{architecture}.json"


def files(target: str) -> list[Path]:
    """The files that speak for `target`, the first to be asked first."""
    architecture, _, name = target.partition(" ")
    own = [user_file(target)] if name and _trial is None else []
    return [path for path in (*own, shipped_file(architecture)) if path.exists()]


def read(path: Path) -> dict[str, Any]:
    """The file's contents. Raises ConfigurationError, naming the entry, when something in it is not as described above."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from error
    sections = {s: content[s] for s in SECTIONS if s in content} if isinstance(content, dict) else {}
    others = set(content) - set(SECTIONS) - {"made_for", "measured"} if isinstance(content, dict) else set()
    if len(sections) < len(SECTIONS) or others or not all(isinstance(groups, dict) for groups in sections.values()):
        raise ConfigurationError(f"{path} must hold 'implementations' and 'launches'; besides, 'made_for' and 'measured'")
    for section, groups in sections.items():
        for group, entries in groups.items():
            if not isinstance(entries, dict):
                raise ConfigurationError(f"{path} has {entries!r} in {section} for {group}; it must be an object")
            for name, value in entries.items():
                if section == "implementations" and (name.split(" ")[0] not in DTYPES or not isinstance(value, str)):
                    raise ConfigurationError(
                        f"{path} gives {group} in {name} the implementation {value!r}; allowed are the dtypes"
                        f" {', '.join(DTYPES)} and the names of implementations"
                    )
                if section == "launches" and not _is_launch(value):
                    raise ConfigurationError(f"{path} launches {group}, {name!r}, with {value}; allowed are named integers")
    return content


def _is_launch(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(number, int) for number in value.values())


def write(path: Path, content: Mapping[str, Any]) -> None:
    """`content` as JSON with a line for each entry, so that a difference shows what changed. The old file is whole until
    the new one is."""
    lines = []
    for section, groups in content.items():
        if section not in SECTIONS:
            lines.append(f'  "{section}": {json.dumps(groups)}')
            continue
        entries = [
            f'    "{group}": {{\n' + ",\n".join(f'      "{k}": {json.dumps(v)}' for k, v in cases.items()) + "\n    }"
            for group, cases in groups.items()
        ]
        lines.append(f'  "{section}": {{' + ("\n" + ",\n".join(entries) + "\n  }" if entries else "}"))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(unfinished, path)
    forget()


# ------------------------------------------------------------------------------------------------------------ look-up


@contextlib.contextmanager
def trial(content: Content) -> Iterator[None]:
    """Within, `content` takes the place of the user's own file: this is how the tuner tries a candidate."""
    global _trial
    before, _trial = _trial, content
    forget()
    try:
        yield
    finally:
        _trial = before
        forget()


def forget() -> None:
    """Files are read once; this makes the next look-up read them anew."""
    for cached in (layers, table, nearest, implementation, origin, _launch):
        cached.cache_clear()


@functools.cache
def layers(target: str) -> tuple[tuple[str, Content], ...]:
    """(where it comes from, contents) of all that speaks for `target`, the first to be asked first."""
    architecture = target.partition(" ")[0]
    found: list[tuple[str, Content]] = [] if _trial is None else [("on trial", _trial)]
    for path in files(target):
        content = read(path)
        if path == shipped_file(architecture):
            found.append((f"proven on {architecture}", content))
        elif content.get("made_for") == made_for(target):
            found.append((f"tuned on this machine: {path}", content))
    if not shipped_file(architecture).exists() and (other := nearest(architecture)) is not None:
        found.append(("", {"implementations": {}, "launches": read(shipped_file(other))["launches"]}))
    return tuple(found)


def made_for(target: str) -> dict[str, str]:
    """What a user's own file must have been measured with to be used for `target`."""
    return {"target": target, **versions()}


@functools.cache
def table(target: str) -> dict[str, dict[str, dict[str, Any]]]:
    """All that speaks for `target`; entry by entry, what is asked first wins."""
    merged: dict[str, dict[str, dict[str, Any]]] = {section: {} for section in SECTIONS}
    for _, content in reversed(layers(target)):
        merge(merged, content)
    return merged


def merge(into: dict[str, dict[str, dict[str, Any]]], content: Content) -> None:
    """Writes the entries of `content` over those of `into`."""
    for section in SECTIONS:
        for group, entries in content.get(section, {}).items():
            into.setdefault(section, {}).setdefault(group, {}).update(entries)


@functools.cache
def nearest(architecture: str) -> str | None:
    """The GPU architecture whose launches `architecture` takes: itself, else the newest older one, else the oldest. None
    for a CPU."""
    if not architecture.startswith("sm_"):
        return None
    known = sorted((path.stem for path in FOLDER.glob("sm_*.json")), key=_number)
    older = [name for name in known if _number(name) <= _number(architecture)]
    return older[-1] if older else known[0]


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


@functools.lru_cache(maxsize=4096)
def implementation(target: str, operator: str, dtype: torch.dtype, key: str = "") -> str:
    """The default of `operator` in `dtype` on `target`: 'torch' unless another was found right and faster on that very
    one. `key` is what the choice depends on besides the dtype, for operators that say so."""
    entries = table(target)["implementations"].get(operator, {})
    return next((entries[case] for case in _cases(dtype, key) if case in entries), "torch")


def keys(target: str, operator: str, dtype: torch.dtype) -> list[str]:
    """The keys of which something is known for `operator` in `dtype`; '' is that of no key."""
    entries = table(target)["implementations"].get(operator, {})
    return sorted(case.removeprefix(name_of(dtype)).strip() for case in entries if case.split(" ")[0] == name_of(dtype))


def _cases(dtype: torch.dtype, key: str) -> list[str]:
    return list(dict.fromkeys((f"{name_of(dtype)} {key}".rstrip(), name_of(dtype))))


@functools.lru_cache(maxsize=4096)
def origin(target: str, operator: str, dtype: torch.dtype, key: str = "") -> str | None:
    """Where `implementation` has its answer from; None where nothing speaks for the operator."""
    for source, content in layers(target):
        entries = content["implementations"].get(operator, {})
        if any(case in entries for case in _cases(dtype, key)):
            return source
    return None


def launch(kernel: str, target: str, dtype: torch.dtype, key: str = "") -> Launch:
    """Block sizes and options with which `kernel` is launched. Raises ConfigurationError when there are none.

    `key` is what the choice depends on besides the dtype, as the kernel's launcher words it.
    """
    if _recorded is not None:
        _recorded.append((kernel, dtype, key))
    return _launch(kernel, target, dtype, key)


@functools.lru_cache(maxsize=4096)
def _launch(kernel: str, target: str, dtype: torch.dtype, key: str) -> Launch:
    cases = table(target)["launches"].get(kernel, {})
    case = launch_case(cases, dtype, key)
    if case is None:
        raise ConfigurationError(
            f"the configuration of {target} has no launch of {kernel} for {name_of(dtype)} {key}".rstrip()
        )
    return MappingProxyType(cases[case])


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[tuple[str, torch.dtype, str]]]:
    """Within, every `launch` that is asked for is appended to the list: (kernel, dtype, key)."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@functools.cache
def search_space() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The contents of `SEARCH`."""
    return json.loads(SEARCH.read_text())


def alternatives(kernel: str, target: str, dtype: torch.dtype, key: str = "") -> list[dict[str, Any]]:
    """Launches of `kernel` to be tried beside the present one, which is not among them."""
    present = dict(_launch(kernel, target, dtype, key))
    architecture = target.partition(" ")[0]
    words = {*_names(dtype), "any", *key.split(), architecture}
    found: list[dict[str, Any]] = []
    for pattern, changes in search_space().get(kernel, {}).items():
        fits = all(words & set(word.split("|")) for word in pattern.split())
        for change in changes if fits else ():
            if (other := present | change) != present and other not in found:
                found.append(other)
    return found


def _names(dtype: torch.dtype) -> list[str]:
    """What a case of a launch may call a dtype."""
    return [name_of(dtype), *([f"{8 * dtype.itemsize}-bit"] if dtype.itemsize < 4 else [])]


def launch_case(cases: Mapping[str, Any], dtype: torch.dtype, key: str = "") -> str | None:
    """The entry of a kernel's `cases` that is taken for `dtype` and `key`."""
    names = _names(dtype)
    wanted = (*(f"{name} {key}".rstrip() for name in names), key, *names, "any")
    return next((case for case in wanted if case in cases), None)


def fingerprint(device: torch.device | str | None = None) -> str:
    """The choices in force in a few letters, to be compared with those of another run; 'torch' when there are none.

    Another implementation or launch rounds differently, so runs with different fingerprints differ in their last bits.
    `device`: default the current GPU, else the CPU. A change by `dispatch.override` is not seen.
    """
    mode = os.environ.get("CAVMAE_OPS", "auto")
    if mode == "torch":
        return "torch"
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found = table(target_of(torch.device(device)))
    chosen = {k: v for k, v in found["implementations"].items() if set(v.values()) != {"torch"}}
    if mode == "auto" and not chosen:
        return "torch"
    text = json.dumps([mode, chosen, found["launches"]], sort_keys=True)
    return f"{mode}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
