"""What `cavmae-fast prepare` and `check` print when they are done."""

from __future__ import annotations

from typing import Any

from cavmae_fast.data.commands.check import CheckConfig
from cavmae_fast.data.commands.prepare import PrepareConfig, Unfinished
from cavmae_fast.data.commands.rendering import render


def prepared(config: PrepareConfig, result: dict[str, Any] | Unfinished) -> str:
    """The text after shards were written: all of them, or one part."""
    return _part_done(result) if isinstance(result, Unfinished) else _all_prepared(config, result)


def checked(config: CheckConfig, report: dict[str, Any]) -> str:
    """The report as text."""
    return render(report)


def _part_done(result: Unfinished) -> str:
    """What is there, what is missing, and what to run."""
    named = [f"--part {part}" for part in result.parts[:8]] + ["..."] * (len(result.parts) > 8)
    return (
        f"part {result.part} is done ({result.own} shards), but {len(result.missing)} of all {result.total} shards are "
        f"missing: {', '.join(named)}\n"
        "next:  let these parts end, and the last one writes the index; or run the same command without --part, when no "
        "part is running, to make what is missing"
    )


def _all_prepared(config: PrepareConfig, manifest: dict[str, Any]) -> str:
    megabytes = manifest["bytes"] / 1e6
    lines = [f"{manifest['clips']} clips in {len(manifest['shards'])} shards, {megabytes:,.1f} MB: {config.out}"]
    if manifest["rejects"]:
        lines.append(f"{manifest['rejects']} clips could not be used: see {config.out / 'rejects.jsonl'}")
    pretrain = f"   and   cavmae-fast pretrain --data {config.out}" if manifest["frames"] else ""
    lines.append(f"next:  cavmae-fast check {config.out}{pretrain}")
    return "\n".join(lines)
