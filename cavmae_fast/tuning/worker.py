"""The process in which candidates run: `python -m cavmae_fast.tuning.worker --journal FILE`.

It takes the units of the journal's settings that are not done yet, one after the other, and appends what it finds. A
candidate that takes this process down, or hangs, costs itself alone: before each attempt a row says what is tried, so
that whoever watches (`processes`) knows the culprit, notes it as dead and starts the next process, which leaves it out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cavmae_fast.ops import configuration, dispatch, parity
from cavmae_fast.tuning import search
from cavmae_fast.tuning.clock import Flush, captured, cold, spin
from cavmae_fast.tuning.journal import Journal
from cavmae_fast.tuning.plan import Call, Settings, Unit, units
from cavmae_fast.tuning.processes import end_with_parent
from cavmae_fast.tuning.proof import Verdict, failure, prove, release
from cavmae_fast.tuning.search import Candidate

MARGIN = 0.02
"Share of PyTorch's time by which another must be faster to take its place; less is within what a repetition differs by."
HOPELESS = 1.5
"A candidate that takes this many times as long as the fastest, in its first call, is not timed further."
COMPILED_BATCH = 16
"Clips for which candidates are compiled ahead: sizes that specialize kernels as those of a larger batch do."


class Work:
    """One process's work on the units of a journal."""

    def __init__(self, journal: Journal, settings: Settings, deadline: float) -> None:
        self.journal, self.settings, self.deadline = journal, settings, deadline
        self.device = torch.device(settings.device)
        self.flush = Flush(self.device)
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def run(self) -> None:
        """All units that are not done, until the deadline (seconds since the epoch)."""
        spin(self.device)
        for unit in units(self.settings):
            if unit.name not in self.journal.finished() and time.time() < self.deadline:
                self.journal.add(self.tune(unit))
                release(self.device)

    def tune(self, unit: Unit) -> dict[str, Any]:
        """Proves and times a unit's candidates -> its row."""
        started, dead = time.monotonic(), self.journal.dead(unit.name)
        candidates = [c for c in self.candidates(unit) if c.name not in dead]
        if len(candidates) == 1:  # PyTorch has no rival here
            return self.row(unit, candidates, {candidates[0].name: Verdict()}, {}, dead) | {"seconds": 0.0}
        verdicts = prove(unit, candidates, self.settings, self.device, self.begin(unit))
        right = [c for c in candidates if verdicts[c.name].status == "right"]
        if search.PYTORCH not in [c.name for c in right]:  # it runs wherever nothing is chosen, right or not
            right = [c for c in candidates if c.name == search.PYTORCH] + right
        times = self.time(unit, right)
        for best in [search.combined(right, times, name) for name in {c.implementation: None for c in right}]:
            if best is None or best.name in dead:
                continue
            found = prove(unit, [best], self.settings, self.device, self.begin(unit))
            verdicts |= found
            candidates.append(best)
            if found[best.name].status == "right":
                again = [c for c in right if c.name in (search.PYTORCH, min(times, key=times.get))]
                times |= self.time(unit, [*again, best])
        return self.row(unit, candidates, verdicts, times, dead) | {"seconds": round(time.monotonic() - started, 1)}

    def begin(self, unit: Unit):
        """A function that notes what is about to be tried."""

        def note(candidate: str, what: str) -> None:
            self.journal.add({"row": "begin", "unit": unit.name, "candidate": candidate, "what": what})

        return note

    def candidates(self, unit: Unit) -> list[Candidate]:
        """All candidates of a unit; Triton's launches are found by running its calls once."""
        found = search.plain(unit, self.device)
        for triton in search.in_triton(found):
            if triton.name not in self.journal.dead(unit.name):
                self.begin(unit)(triton.name, "a first run")
                found = found + search.launches(unit, triton, self.recorded(unit, triton), self.device)
        return found

    def recorded(self, unit: Unit, triton: Candidate) -> list:
        """The launches that the unit's calls ask for; none where they fail, which their proof will show."""
        with configuration.recorded_launches() as recorded:
            for call in unit.calls:
                try:
                    self.closure(call, triton, unit)()
                except Exception:
                    return []
        return recorded

    # ------------------------------------------------------------------------------------------------------- time

    def closure(self, call: Call, candidate: Candidate, unit: Unit):
        """A function that makes the call once, forward and backward, computed by the candidate."""
        inputs = call.case.inputs(unit.dtype, self.device)
        differentiable = call.case.differentiable and bool(parity.leaves(inputs))
        cotangents: list = []

        def run() -> None:
            with dispatch.override("auto"), configuration.trial(candidate.content):
                outputs = call.case.ours(*inputs)
                outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
                if differentiable:
                    if not cotangents:
                        cotangents.extend(torch.randn_like(o) for o in outputs)
                    torch.autograd.grad(outputs, parity.leaves(inputs), cotangents)

        return run

    def time(self, unit: Unit, candidates: list[Candidate]) -> dict[str, float]:
        """Name -> milliseconds that the unit's calls take in a training step, the candidates timed in turn."""
        totals = {candidate.name: 0.0 for candidate in candidates}
        for call in unit.calls:
            if call.weight == 0:
                continue
            runs, first = {}, {}
            for candidate in candidates:
                self.begin(unit)(candidate.name, f"timing {call.case}")
                run = self.closure(call, candidate, unit)
                run()
                if call.case.capture:
                    run, _ = captured(run, self.device, self.pool)
                first[candidate.name] = cold(run, self.flush, self.device)
                runs[candidate.name] = run
            samples = {name: [ms] for name, ms in first.items()}
            racing = [name for name, ms in first.items() if ms <= HOPELESS * min(first.values())]
            for name in racing:
                samples[name].clear()  # a first call may still pay for what later ones find done
            for _ in range(self.settings.rounds):
                for name in racing:
                    samples[name].append(cold(runs[name], self.flush, self.device))
            for name, values in samples.items():
                totals[name] += call.weight * sorted(values)[len(values) // 2]
            runs.clear()
            release(self.device)
        return totals

    # -------------------------------------------------------------------------------------------------------- row

    def row(
        self,
        unit: Unit,
        candidates: list[Candidate],
        verdicts: dict[str, Verdict],
        times: dict[str, float],
        dead: dict[str, dict],
    ) -> dict[str, Any]:
        """What goes into the journal: every candidate with its verdict and time, and the one that is chosen."""
        rows = []
        for c in candidates:
            verdict = verdicts[c.name]
            rows.append(
                {"name": c.name, "status": verdict.status, "reason": verdict.reason, "share": round(verdict.share, 4)}
            )
            rows[-1]["ms"] = times.get(c.name)
        rows += [{"name": name, "status": row["status"], "reason": row["reason"], "ms": None} for name, row in dead.items()]
        able = [c for c in candidates if c.name in times and verdicts[c.name].status == "right"]
        before = times.get(search.PYTORCH)
        chosen = min(able, key=lambda c: times[c.name], default=candidates[0])
        if before is None or times[chosen.name] > (1 - MARGIN) * before:
            chosen = candidates[0]
        return {
            "row": "unit",
            "unit": unit.name,
            "chosen": chosen.name,
            "content": chosen.content,
            "pytorch_ms": before,
            "ms": times.get(chosen.name),
            "candidates": rows,
        }


def compile_ahead(settings: Settings, name: str, part: int, parts: int) -> None:
    """Runs every `parts`-th Triton candidate of a unit once, at a small batch: the kernels are then in Triton's cache."""
    small = replace(settings, batch=min(settings.batch, COMPILED_BATCH))
    unit = next(u for u in units(small) if u.name == name)
    work = Work(Journal(Path("/dev/null"), small, ""), small, 0.0)
    others = []
    for triton in search.in_triton(search.plain(unit, work.device)):
        others += search.launches(unit, triton, work.recorded(unit, triton), work.device)
    for candidate in others[part::parts]:
        for call in unit.calls:
            try:
                work.closure(call, candidate, unit)()
            except Exception as error:  # it will fail again where it counts, and be noted there
                print(f"{candidate.name}: {failure(error)}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal", type=Path, required=True, help="file of JSON lines; its first says what is asked")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="no unit is begun after it (Unix time)")
    parser.add_argument("--compile", nargs=3, metavar=("UNIT", "PART", "PARTS"), help="only compile")
    args = parser.parse_args(arguments)
    end_with_parent()
    with args.journal.open() as file:
        header = json.loads(file.readline())
    settings = Settings.from_json(header["settings"])
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as the reference computes
    if args.compile:
        name, part, parts = args.compile
        compile_ahead(settings, name, int(part), int(parts))
    else:
        Work(Journal(args.journal, settings, header["made_for"]["target"]), settings, args.deadline).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
