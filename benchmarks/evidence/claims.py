"""What the CAV-MAE paper (Gong et al., ICLR 2023) says of the systems, as claims with a rule for each, written down before
`benchmarks/learning.py` was run for the first time.

The rule. A system has one value per seed. *x above y* means that the difference of the means is more than twice its
standard error, `sqrt(var(x) / n + var(y) / n)`, with the seeds' sample variances. *x at least y* means that y is not above
x: weaker, as it also holds where the seeds differ too much to tell. *Near chance* is a mean of at most twice chance. One
seed has no variance: then nothing is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, Literal, NamedTuple

Record = dict[str, Any]
Outcome = Literal["reproduces", "does not reproduce", "not judged"]
NEAR = 2.0
"Times chance that still counts as near it."
ERRORS = 2.0
"Standard errors by which one value must exceed another to be above it."


class Finding(NamedTuple):
    """Whether a rule holds, and the numbers in words."""

    holds: bool
    why: str


class Verdict(NamedTuple):
    """A claim, what came of it, and why."""

    claim: str
    outcome: Outcome
    why: str


@dataclass(frozen=True)
class Figures:
    """The values of a record by system, one per seed."""

    record: Record

    def values(self, system: str, *place: str) -> list[float]:
        """The numbers at `place` of the system's runs, in the order of the seeds."""
        rows = sorted((row for row in self.record["runs"] if row["system"] == system), key=lambda row: row["seed"])
        found = []
        for row in rows:
            value: Any = row
            for key in place:
                value = value[key]
            found.append(value)
        return found

    def recall(self, system: str) -> list[float]:
        """R@1 in per cent, the mean of both directions."""
        ways = (self.values(system, "retrieval", f"{way} R@1") for way in ("A->V", "V->A"))
        return [fmean(both) for both in zip(*ways)]

    def recall_chance(self) -> float:
        return self.record["runs"][0]["retrieval"]["chance R@1"]

    def accuracy(self, system: str, mode: str = "multimodal") -> list[float]:
        """Of the fine-tuned classifier, in per cent."""
        return [100 * value for value in self.values(system, "finetuned", mode, "accuracy")]

    def accuracy_chance(self) -> float:
        return 100 * self.record["chance"]["accuracy"]


def above(x: Sequence[float], y: Sequence[float]) -> Finding:
    """Whether x is above y by the rule; a constant is a sequence of one value, which has no variance."""
    difference = fmean(x) - fmean(y)
    error = math.sqrt(sum(variance(z) / len(z) for z in (x, y) if len(z) > 1))
    why = f"{fmean(x):.3g} against {fmean(y):.3g}: difference {difference:+.2g}, twice its standard error {2 * error:.2g}"
    return Finding(difference > ERRORS * error, why)


def at_least(x: Sequence[float], y: Sequence[float]) -> Finding:
    """Whether y is not above x."""
    return Finding(not above(y, x).holds, above(x, y).why)


def near(x: Sequence[float], chance: float) -> Finding:
    return Finding(fmean(x) <= NEAR * chance, f"{fmean(x):.3g}, chance {chance:.3g}, allowed {NEAR * chance:.3g}")


@dataclass(frozen=True)
class Claim:
    """What is said, whose runs it takes, and the rule."""

    text: str
    systems: tuple[str, ...]
    rule: Callable[[Any], Finding]
    "Of the record's figures: `Figures`, or a kind of it that a campaign has of its own."


def _reconstructs(stream: str) -> Callable[[Figures], Finding]:
    """The model's error on removed patches is below that of the mean of the rest."""

    def rule(figures: Figures) -> Finding:
        own, mean = (figures.values("cav-mae", "reconstruction", name) for name in (f"{stream}_mean", stream))
        found = above(own, mean)
        return Finding(found.holds, f"squared error of the mean {found.why.replace(' against ', ' against the model ', 1)}")

    return rule


def _missing(mode: str) -> Callable[[Figures], Finding]:
    return lambda figures: above(figures.accuracy("cav-mae", mode), [figures.accuracy_chance()])


def _fine_tuned(than: str, rule: Callable[..., Finding]) -> Callable[[Figures], Finding]:
    return lambda figures: rule(figures.accuracy("cav-mae"), figures.accuracy(than))


CLAIMS = (
    Claim(
        "AV-MAE, which has no contrastive loss, retrieves near chance (R@1, %)",
        ("av-mae",),
        lambda figures: near(figures.recall("av-mae"), figures.recall_chance()),
    ),
    Claim(
        "Vanilla AV-MAE, which has none either, retrieves near chance (R@1, %)",
        ("vanilla-av-mae",),
        lambda figures: near(figures.recall("vanilla-av-mae"), figures.recall_chance()),
    ),
    Claim(
        "CAV-MAE retrieves: its R@1 (%) is above chance",
        ("cav-mae",),
        lambda figures: above(figures.recall("cav-mae"), [figures.recall_chance()]),
    ),
    Claim(
        "CAV-MAE retrieves: its R@1 (%) is above AV-MAE's",
        ("cav-mae", "av-mae"),
        lambda figures: above(figures.recall("cav-mae"), figures.recall("av-mae")),
    ),
    Claim("CAV-MAE reconstructs sound better than the mean of the rest does", ("cav-mae",), _reconstructs("audio")),
    Claim("CAV-MAE reconstructs pictures better than the mean of the rest does", ("cav-mae",), _reconstructs("video")),
    Claim("Fine-tuned, CAV-MAE's accuracy (%) is at least CAV's", ("cav-mae", "cav"), _fine_tuned("cav", at_least)),
    Claim("Fine-tuned, CAV-MAE's accuracy (%) is at least AV-MAE's", ("cav-mae", "av-mae"), _fine_tuned("av-mae", at_least)),
    Claim("Fine-tuned, CAV-MAE's accuracy (%) is above CAV's", ("cav-mae", "cav"), _fine_tuned("cav", above)),
    Claim("Fine-tuned, CAV-MAE's accuracy (%) is above AV-MAE's", ("cav-mae", "av-mae"), _fine_tuned("av-mae", above)),
    Claim(
        "Pretraining helps: fine-tuned, CAV-MAE's accuracy (%) is above that of a model that was not pretrained",
        ("cav-mae", "untrained"),
        _fine_tuned("untrained", above),
    ),
    Claim(
        "Without the picture at test time, CAV-MAE's classifier stays above chance (accuracy, %)",
        ("cav-mae",),
        _missing("missingaudioonly"),
    ),
    Claim(
        "Without the sound at test time, CAV-MAE's classifier stays above chance (accuracy, %)",
        ("cav-mae",),
        _missing("missingvideoonly"),
    ),
)


def judge(record: Record, claims: Sequence[Claim] = CLAIMS, kind: type[Figures] = Figures) -> list[Verdict]:
    """Each claim judged by its rule, given the record's figures of this `kind`; not judged where a system has fewer than two
    seeds."""
    figures, verdicts = kind(record), []
    for claim in claims:
        seeds = {system: sum(row["system"] == system for row in record["runs"]) for system in claim.systems}
        if few := [f"{system} has {count}" for system, count in seeds.items() if count < 2]:
            verdicts.append(Verdict(claim.text, "not judged", f"two seeds are needed; {', '.join(few)}"))
            continue
        found = claim.rule(figures)
        verdicts.append(Verdict(claim.text, "reproduces" if found.holds else "does not reproduce", found.why))
    return verdicts
