"""What the MAViL paper (Huang et al., NeurIPS 2023) says of its parts, as claims, written down before
`benchmarks/mavil_learning.py` was run for the first time. The rule is that of `claims.py`.

The paper's ablation, mAP on AudioSet-20K of the encoder of sound and of that of video, fine-tuned: A-MAE and V-MAE alone
36.4 and 17.4; joint AV-MAE 36.8 and 17.7; with the contrast between modalities 38.4 and 21.0; with that between two views
39.0 and 22.2; student and teacher 41.8 and 24.8. So each part adds something to each encoder. Here the figure is accuracy.
The paper used no linear probe; the same is asked of it, because pretraining is what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.evidence.claims import Claim, Figures, Finding, above, at_least, near

NAMES = {
    "untrained": "not pretrained",
    "a-mae": "A-MAE",
    "v-mae": "V-MAE",
    "av-mae": "joint AV-MAE",
    "inter": "+ inter",
    "intra": "+ inter + intra",
    "round-1": "student of round 1",
    "round-2": "student of round 2",
}
ENCODERS = {"audio": "sound", "video": "video"}


@dataclass(frozen=True)
class MAViLFigures(Figures):
    """The values of a record by system, one per seed, in per cent."""

    def finetuned(self, system: str, encoder: str) -> list[float]:
        """Accuracy of the fine-tuned classifier of 'audio', 'video' or 'av'."""
        return [100 * value for value in self.values(system, "finetuned", encoder, "accuracy")]

    def probed(self, system: str, stream: str) -> list[float]:
        """Accuracy of the linear probe of 'audio', 'video' or 'joint'."""
        return [100 * value for value in self.values(system, "probe", stream, "accuracy")]

    def recall_chance(self) -> float:
        return next(row["retrieval"]["chance R@1"] for row in self.record["runs"] if row["retrieval"] is not None)


MEASURES: dict[str, Callable[[MAViLFigures, str, str], list[float]]] = {
    "fine-tuned": MAViLFigures.finetuned,
    "probed": MAViLFigures.probed,
}
LADDER = (("intra", "inter"), ("inter", "av-mae"), ("round-1", "intra"))
"What the paper has above what, of both encoders."


def _compared(rule: Callable[..., Finding], measure: str, encoder: str, x: str, y: str) -> Claim:
    """That x is above y, or at least y, by a measure of one encoder."""
    words = {above: "above", at_least: "at least"}[rule]
    text = f"The encoder of {ENCODERS[encoder]} of {NAMES[x]}, {measure}: its accuracy (%) is {words} that of {NAMES[y]}"
    value = MEASURES[measure]
    return Claim(text, (x, y), lambda figures: rule(value(figures, x, encoder), value(figures, y, encoder)))


def _claims() -> tuple[Claim, ...]:
    claims = [
        Claim(
            "Joint AV-MAE, which has no contrast, retrieves near chance (R@1, %)",
            ("av-mae",),
            lambda figures: near(figures.recall("av-mae"), figures.recall_chance()),
        ),
        Claim(
            "With the contrast between modalities MAViL retrieves: its R@1 (%) is above chance",
            ("inter",),
            lambda figures: above(figures.recall("inter"), [figures.recall_chance()]),
        ),
        Claim(
            "With the contrast between modalities R@1 (%) is above joint AV-MAE's",
            ("inter", "av-mae"),
            lambda figures: above(figures.recall("inter"), figures.recall("av-mae")),
        ),
        Claim(
            "The student of round 1 retrieves at least as well as its teacher (R@1, %)",
            ("round-1", "intra"),
            lambda figures: at_least(figures.recall("round-1"), figures.recall("intra")),
        ),
    ]
    for measure in MEASURES:
        for encoder, alone in (("audio", "a-mae"), ("video", "v-mae")):
            claims.append(_compared(at_least, measure, encoder, "av-mae", alone))
            for more, less in LADDER:
                claims += [_compared(rule, measure, encoder, more, less) for rule in (at_least, above)]
            claims.append(_compared(at_least, measure, encoder, "round-2", "round-1"))
            claims.append(_compared(above, measure, encoder, "round-2", "untrained"))
    return tuple(claims)


CLAIMS = _claims()
