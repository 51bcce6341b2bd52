"""Whether candidates are right: outputs and gradients by the rule of `ops.parity`, and the same bits in a second run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from cavmae_fast.errors import first_line
from cavmae_fast.ops import configuration, dispatch, parity
from cavmae_fast.ops.catalogue import Case
from cavmae_fast.tuning.plan import Settings, Unit, units
from cavmae_fast.tuning.search import Candidate

LEAST_BATCH = 8
"Where the float64 reference does not fit, the batch of the proof is halved, down to this."


@dataclass
class Verdict:
    """What was found of one candidate."""

    status: str = "right"
    "'right', 'wrong' or 'failed' (it raised)."
    reason: str = ""
    share: float = 0.0
    "The largest error of any output or gradient, as a share of what is allowed."


def release(device: torch.device) -> None:
    """Gives back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prove(
    unit: Unit,
    candidates: Iterable[Candidate],
    settings: Settings,
    device: torch.device,
    begin: Callable[[str, str], None],
) -> dict[str, Verdict]:
    """Name -> verdict. `begin(candidate, what)` is called before each attempt: it may be the last thing heard of it.

    The reference of a case is computed once for all candidates; one that is wrong in a case is not tried in the next.
    """
    verdicts = {candidate.name: Verdict() for candidate in candidates}
    for case in unit.proofs:
        alive = [c for c in candidates if verdicts[c.name].status == "right"]
        if not alive:
            break
        begin("", f"reference of {case}")
        case, standard = _standard(unit, case, settings, device)
        for candidate in alive:
            begin(candidate.name, f"proof in {case}")
            verdicts[candidate.name] = _judge(verdicts[candidate.name], candidate, case, standard)
        del standard
        release(device)
    return verdicts


def _standard(unit: Unit, case: Case, settings: Settings, device: torch.device) -> tuple[Case, parity.Standard]:
    """What the case's results must be, at the largest batch at which the reference fits; and the case at that batch."""
    batch, index = settings.batch, unit.proofs.index(case)
    while True:
        try:
            return case, parity.Standard(case.reference, case.inputs(unit.dtype, device), baseline=case.baseline)
        except torch.OutOfMemoryError:
            batch //= 2
            if batch < LEAST_BATCH:
                raise
        release(device)
        smaller = next(u for u in units(replace(settings, batch=batch)) if u.name == unit.name)
        case = smaller.proofs[index]


def _judge(before: Verdict, candidate: Candidate, case: Case, standard: parity.Standard) -> Verdict:
    try:
        with dispatch.override("auto"), configuration.trial(candidate.content):
            results = standard.compare(case.ours)
            repeats = parity.repeats(case.ours, standard.inputs)
    except torch.OutOfMemoryError as error:
        return Verdict("failed", f"{case}: {failure(error)}", before.share)
    except Exception as error:  # a candidate that cannot run is a finding, not the end of the run
        return Verdict("failed", f"{case}: {failure(error)}", before.share)
    share = max([before.share, *(result.error / result.allowed for result in results)])
    wrong = [f"{r.what} is off by {r.error:.1e}, {r.allowed:.1e} is allowed" for r in results if not r.right]
    if not repeats:
        wrong.append("a second run gives other bits")
    return Verdict("wrong" if wrong else "right", f"{case}: {'; '.join(wrong)}" if wrong else "", share)


def failure(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {first_line(error)}"[:300]
