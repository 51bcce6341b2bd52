"""The report of `cavmae-fast check` as text for people."""

from __future__ import annotations

import textwrap
from typing import Any

from cavmae_fast.data.commands.findings import ERRORS, WARNINGS


def render(report: dict[str, Any]) -> str:
    """The report as text for people: what was found, with up to three examples each, statistics, classes, files."""
    counts, statistics, classes, weights = (report[key] for key in ("counts", "statistics", "classes", "weights"))
    lines = [
        f"{'ok' if report['ok'] else 'NOT OK'}: {report['usable']} of {report['clips']} clips can be used, "
        f"{report['hours']:.2f} hours of sound; checked in {report['took']:.1f} s"
    ]
    for kind in (kind for kind in (*ERRORS, *WARNINGS) if kind in counts):
        level = "error" if kind in ERRORS else "warning"
        lines.append(f"{level:7}  {kind:10} {counts[kind]:>7}  {report['meaning'][kind]}")
        lines += [f"{'':18} {entry['reason']}" for entry in report["findings"][kind][:3]]
        if counts[kind] > 3:
            lines.append(f"{'':18} ... and {counts[kind] - 3} more in {report['files']['findings']}")
    if statistics:
        pairs = ((statistics, "own frames"), (statistics["published"], "as published"))
        lines += [f"log-mel  mean {pair['mean']:8.4f}  std {pair['std']:7.4f}  ({name})" for pair, name in pairs]
        lines += textwrap.wrap(statistics["advice"], 110, initial_indent=" " * 9, subsequent_indent=" " * 9)
    if classes:
        used = sorted((row for row in classes["counts"] if row["clips"]), key=lambda row: row["clips"])
        lines.append(f"classes  {len(used)} of {len(classes['counts'])} have clips")
        named = [(f"{row['clips']} clips", row) for row in (used[:1] + used[1:][-1:])]
        named += [("no clip", row) for row in classes["empty"][:5]]
        lines += [f"         {what}: {row['index']}, {row['mid']}, {row['name']}" for what, row in named]
        if len(classes["empty"]) > 5:
            lines.append(f"         ... and {len(classes['empty']) - 5} more without a clip")
        unknown = sorted(classes["unknown"].items(), key=lambda pair: -pair[1])
        lines += [f"         not in the CSV: {mid!r}, in {clips} clips" for mid, clips in unknown[:5]]
    lines.append(f"weights  {weights['path']}" if weights["written"] else f"weights  not written: {weights['reason']}")
    lines.append(f"report   {report['files']['report']}")
    # Names come with the data: none may steer the terminal or break its encoding.
    return "\n".join(line if line.isprintable() else repr(line)[1:-1] for line in lines)
