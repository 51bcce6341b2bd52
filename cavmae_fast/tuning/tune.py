"""`cavmae-fast tune`: what each operator is computed with on this machine, proven, timed, and kept for every later run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cavmae_fast.models.precision import Precision, choose_dtype, find_device
from cavmae_fast.ops import configuration, dispatch
from cavmae_fast.ops.configuration import Content
from cavmae_fast.tuning.config import TuneConfig
from cavmae_fast.tuning.journal import Journal, Row
from cavmae_fast.tuning.plan import Settings, TuneError, Unit, fitting_batch, units
from cavmae_fast.tuning.processes import WORKER, compile_ahead, watch, work_off
from cavmae_fast.tuning.search import PYTORCH

WINS = 0.995
"Share of the all-PyTorch step's time below which a tuned step is kept."
COMPILE_SHARE = 0.25
"Of the time that there is, at most, goes into compiling ahead."
MEMORY_OF_PROCESS = 2 << 30
"Bytes of a GPU that a process takes which compiles: its context, and a small batch."
STEP = (sys.executable, "-m", "cavmae_fast.tuning.step")


class Progress(Protocol):
    """Whoever shows how far tuning is."""

    def trying(self, what: str) -> None: ...

    def done(self, line: str) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A progress bar on the terminal: what is being tried, and a line for each unit with what was gained."""

    def __init__(self, total: int, already: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, initial=already, unit="unit", dynamic_ncols=True)

    def trying(self, what: str) -> None:
        self.bar.set_description(what[:70])

    def done(self, line: str) -> None:
        self.bar.write(line, file=sys.stderr)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


class Lines:
    """A line for each unit, for a log."""

    def __init__(self, total: int, already: int) -> None:
        self.total, self.count = total, already

    def trying(self, what: str) -> None:
        """Says nothing: a log is read afterwards."""

    def done(self, line: str) -> None:
        self.count += 1
        print(f"[{self.count}/{self.total}] {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""


# ------------------------------------------------------------------------------------------------------------- asking


def settings_of(config: TuneConfig) -> Settings:
    """What is asked, with nothing left open. ValueError for what does not exist."""
    device = find_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    if config.batch != "auto" and not (config.batch.isdecimal() and int(config.batch) > 0):
        raise ValueError(f"batch is {config.batch!r}; it must be auto or a number of clips, at least 1")
    for option in ("minutes", "limit", "rounds"):
        if not getattr(config, option) > 0:
            raise ValueError(f"{option} is {getattr(config, option)}; it must be more than 0")
    for operator in config.operators:
        if operator not in dispatch.operators:
            raise ValueError(f"operators has {operator!r}; allowed: {', '.join(sorted(dispatch.operators))}")
    batch = fitting_batch(config.model, device) if config.batch == "auto" else int(config.batch)
    dtype = choose_dtype(device)[0] if config.dtype == "auto" else config.dtype
    Precision.named(device, dtype)  # refuses a GPU without fp8 units
    return Settings(config.model, batch, dtype, str(device), config.operators, config.rounds)


def check_folder(path: Path) -> None:
    """Raises TuneError, before any work is done, where `path` could not be written."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise TuneError(
            f"{folder} cannot be written ({error.strerror}), and what is found is kept there; name another folder by"
            f" {configuration.VARIABLE}"
        ) from error


# ------------------------------------------------------------------------------------------------------------- tuning


def tune(
    config: TuneConfig,
    *,
    worker: Sequence[str] = WORKER,
    progress: type[Bar] | type[Lines] | None = None,
) -> dict[str, Any]:
    """Tunes, and writes the user's file -> what was found: 'file', 'units' (rows), 'step' (row), 'kept', 'reason', 'left'.

    Args:
        worker: the command of the process in which candidates run; for tests.
        progress: shows how far it is (None: a bar on a terminal, lines in a log).

    Raises ValueError for options that do not exist, TuneError when nothing can be tuned or kept.
    """
    settings = settings_of(config)
    device = torch.device(settings.device)
    target = configuration.target_of(device)
    path = configuration.user_file(target)
    check_folder(path)
    if config.export is not None:
        check_folder(config.export)
    journal = Journal(path.with_suffix(f".{settings.model}-{settings.batch}-{settings.dtype}.jsonl"), settings, target)
    if config.fresh:
        journal.path.unlink(missing_ok=True)
    resumed = journal.begin()
    deadline = time.time() + 60 * config.minutes
    wanted = units(settings)
    if not wanted:
        raise TuneError(f"{', '.join(config.operators)} is not called in a training step, so there is nothing to time")
    finished = journal.finished()
    show = (progress or (Bar if sys.stderr.isatty() else Lines))(len(wanted), len(finished))
    try:
        if resumed and finished:
            show.trying(f"going on after {len(finished)} of {len(wanted)} units")
        if device.type == "cuda":
            show.trying("compiling")
            names = [
                unit.name for unit in wanted if unit.name not in finished and "triton" in dispatch.operators[unit.operator]
            ]
            if names:
                most = max(1, torch.cuda.get_device_properties(device).total_memory // MEMORY_OF_PROCESS)
                compile_ahead(journal, names, COMPILE_SHARE * 60 * config.minutes, most, worker)
        work_off(journal, config.limit, deadline, lambda row: report(row, show), worker)
        finished = journal.finished()
        content = choices(wanted, finished)
        step = whole_step(journal, content, settings, config.limit, show)
    finally:
        show.close()
    kept, reason = verdict(step)
    if not kept:
        content = {"implementations": {}, "launches": {}}
        for unit in wanted:
            configuration.merge(content, {"implementations": {unit.operator: {unit.case: "torch"}}})
    left = [unit.name for unit in wanted if unit.name not in finished]
    keep(path, target, content, settings, finished, step, reason)
    if config.export is not None:
        export(config.export, target)
    if not left:
        journal.path.unlink(missing_ok=True)
    rows = [finished[unit.name] for unit in wanted if unit.name in finished]
    return {"file": path, "units": rows, "step": step, "kept": kept, "reason": reason, "left": left, "settings": settings}


def report(row: Row, show: Progress) -> None:
    """Shows a row of the journal."""
    if row["row"] == "begin":
        show.trying(f"{row['unit']}: {row['candidate'] or 'reference'}")
    elif row["row"] == "unit":
        show.done(line_of(row))


def line_of(row: Row) -> str:
    """What was gained in a unit, in one line."""
    if row["pytorch_ms"] is None:
        return f"{row['unit']}: PyTorch, which has no rival here"
    if row["chosen"] == PYTORCH:
        bad = [c for c in row["candidates"] if c["status"] not in ("right",)]
        others = f"; {', '.join(c['name'] + ' ' + c['status'] for c in bad)}" if bad else ""
        return f"{row['unit']}: PyTorch stays, {row['pytorch_ms']:.3g} ms per step{others}"
    gain = row["pytorch_ms"] / row["ms"]
    return f"{row['unit']}: {row['chosen']}, {row['ms']:.3g} ms per step instead of {row['pytorch_ms']:.3g} ({gain:.2f}x)"


def choices(wanted: Sequence[Unit], finished: dict[str, Row]) -> Content:
    """The configuration of all units that are done; the others take PyTorch."""
    content: dict[str, Any] = {"implementations": {}, "launches": {}}
    for unit in wanted:
        row = finished.get(unit.name)
        configuration.merge(content, row["content"] if row else {"implementations": {unit.operator: {unit.case: "torch"}}})
    return content


def whole_step(journal: Journal, content: Content, settings: Settings, limit: float, show: Progress) -> Row:
    """The row of the whole step with these choices: right or not, and both times. Without a choice there is none to try."""
    if all(value == "torch" for entries in content["implementations"].values() for value in entries.values()):
        return {"row": "step", "content": content, "right": True, "reason": "PyTorch is fastest everywhere"}
    for row in journal.of_kind("step"):
        if row["content"] == content:
            return row
    command = [*STEP, "--journal", str(journal.path), "--content", json.dumps(content)]
    status, reason = watch(command, journal, 5 * limit, time.time() + 10 * limit, lambda row: report(row, show))
    found = [row for row in journal.of_kind("step") if row["content"] == content]
    if found:
        return found[-1]
    return {"row": "step", "content": content, "right": False, "reason": f"the whole step {status}: {reason}"}


def verdict(step: Row) -> tuple[bool, str]:
    """Whether the choices are kept, and why."""
    if "reason" in step:
        return step["right"], step["reason"]
    if not step["right"]:
        wrong = [what for what in ("loss", "gradient") if not step[what]["error"] <= step[what]["allowed"]]
        words = ", ".join(f"{w} is off by {step[w]['error']:.1e}, {step[w]['allowed']:.1e} is allowed" for w in wrong)
        return False, f"the whole step is wrong: {words}"
    tuned, pytorch = step["tuned"]["median_ms"], step["pytorch"]["median_ms"]
    words = f"the whole step takes {tuned:,.1f} ms, with PyTorch alone {pytorch:,.1f} ms ({pytorch / tuned:.2f}x)"
    return tuned <= WINS * pytorch, words


def keep(
    path: Path, target: str, content: Content, settings: Settings, finished: dict[str, Row], step: Row, reason: str
) -> None:
    """Writes the user's file: what it holds for other dtypes and keys stays."""
    before: dict[str, Any] = {}
    with contextlib.suppress(configuration.ConfigurationError):  # one that is damaged, or not there, has nothing to keep
        before = configuration.read(path)
    if before.get("made_for") != configuration.made_for(target):
        before = {}
    merged: dict[str, Any] = {"made_for": configuration.made_for(target), "measured": dict(before.get("measured", {}))}
    merged |= {section: {k: dict(v) for k, v in before.get(section, {}).items()} for section in configuration.SECTIONS}
    configuration.merge(merged, content)
    name = f"{settings.model}, batch {settings.batch}, {settings.dtype}"
    merged["measured"][name] = {
        "step": {k: v for k, v in step.items() if k not in ("row", "content")},
        "result": reason,
        "units": {unit: [row["chosen"], row["ms"], row["pytorch_ms"]] for unit, row in finished.items()},
    }
    try:
        configuration.write(path, merged)
    except OSError as error:
        raise TuneError(
            f"{path} cannot be written ({error.strerror}); name another folder by {configuration.VARIABLE}"
        ) from error


def export(path: Path, target: str) -> None:
    """Writes all that now speaks for `target`, without the machine's own measurements."""
    found = configuration.table(target)
    chosen = {
        operator: {case: name for case, name in sorted(entries.items()) if name != "torch"}
        for operator, entries in sorted(found["implementations"].items())
    }
    content = {"implementations": {k: v for k, v in chosen.items() if v}, "launches": found["launches"]}
    configuration.write(path, content)


def closing(config: TuneConfig, found: dict[str, Any]) -> str:
    """What `tune` found, for the terminal."""
    settings: Settings = found["settings"]
    lines = [f"tuned for {settings.model}, batch {settings.batch}, {settings.dtype} on {settings.device}:"]
    lines += [f"  {line_of(row)}" for row in found["units"]]
    lines.append(found["reason"] if found["kept"] else f"not kept, PyTorch runs everywhere: {found['reason']}")
    if found["left"]:
        lines.append(f"not tried for lack of time: {', '.join(found['left'])}; the same command goes on with them")
    fingerprint = configuration.fingerprint(settings.device)
    return "\n".join([*lines, f"written to {found['file']} (choices in force: {fingerprint})"])
