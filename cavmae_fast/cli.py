"""The command line: `cavmae-fast pretrain`, `prepare`, `check` and `doctor`. Nothing computes here.

Exit codes: 0 done, 1 the job failed, 2 wrong usage (an option, a file that is not there); 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from cavmae_fast.data.commands.check import CheckConfig
    from cavmae_fast.data.commands.prepare import PrepareConfig, Unfinished


@dataclass(frozen=True)
class Doctor:
    """Report device, versions, and which implementation each operator uses here, and why."""


def main() -> None:
    """Entry point of the `cavmae-fast` program."""
    import tyro

    from cavmae_fast.data.commands.check import CheckConfig
    from cavmae_fast.data.commands.prepare import PrepareConfig
    from cavmae_fast.training.pretrain_config import PretrainConfig

    commands = {"pretrain": PretrainConfig, "prepare": PrepareConfig, "check": CheckConfig, "doctor": Doctor}
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="cavmae-fast",
        config=(tyro.conf.PositionalRequiredArgs,),
        description="Audio-visual masked autoencoders: from video files to trained models.",
    )
    if isinstance(command, Doctor):
        from cavmae_fast.doctor import render

        print(render())
    elif isinstance(command, PrepareConfig):
        _prepare(command)
    elif isinstance(command, CheckConfig):
        _check(command)
    else:
        _pretrain(command)


def _pretrain(config) -> None:
    from cavmae_fast.training.pretrain import pretrain

    summary = _run(lambda: pretrain(config), "start the same command again to go on from the newest checkpoint")
    print(_closing(config, summary))


def _prepare(config: PrepareConfig) -> None:
    from cavmae_fast.data.commands.prepare import Unfinished, prepare

    result = _run(lambda: prepare(config), "finished shards are whole; start the same command again to go on")
    print(_part_done(result) if isinstance(result, Unfinished) else _all_prepared(config, result))


def _part_done(result: Unfinished) -> str:
    """What is there, what is missing, and what to run."""
    named = [f"--part {part}" for part in result.parts[:8]] + ["..."] * (len(result.parts) > 8)
    return (
        f"part {result.part} is done ({result.own} shards), but {len(result.missing)} of all {result.total} shards are "
        f"missing: {', '.join(named)}\n"
        "next:  let these parts end, and the last one writes the index; or run the same command without --part, when no "
        "part is running, to make what is missing"
    )


def _all_prepared(config: PrepareConfig, manifest: dict) -> str:
    megabytes = manifest["bytes"] / 1e6
    lines = [f"{manifest['clips']} clips in {len(manifest['shards'])} shards, {megabytes:,.1f} MB: {config.out}"]
    if manifest["rejects"]:
        lines.append(f"{manifest['rejects']} clips could not be used: see {config.out / 'rejects.jsonl'}")
    lines.append(f"next:  cavmae-fast check {config.out}   and   cavmae-fast pretrain --data {config.out}")
    return "\n".join(lines)


def _check(config: CheckConfig) -> None:
    from cavmae_fast.data.commands.check import check
    from cavmae_fast.data.commands.rendering import render

    report = _run(lambda: check(config), "nothing was written")
    print(render(report))
    sys.exit(0 if report["ok"] else 1)


def _run(job: Callable[[], Any], interrupted: str) -> Any:
    """What the job returns; its errors become one line and an exit code."""
    from cavmae_fast.errors import CavmaeError

    try:
        return job()
    except KeyboardInterrupt:
        _stop(130, f"interrupted; {interrupted}")
    except CavmaeError as error:
        _stop(error.exit_code, str(error))
    except (OSError, MemoryError) as error:
        _stop(1, str(error) or type(error).__name__)
    except ValueError as error:
        _stop(2, str(error))


def _stop(code: int, message: str) -> NoReturn:
    print(f"cavmae-fast: error: {message}", file=sys.stderr)
    sys.exit(code)


def _closing(config, summary: dict) -> str:
    """What was reached, where it lies, and what to run next."""
    out = config.out
    lines = [
        f"{summary['steps']} steps, loss {summary['loss']:.3f} (audio {summary['loss_mae_a']:.3f}, "
        f"video {summary['loss_mae_v']:.3f}, contrastive {summary['loss_c']:.3f}), {summary['clips_per_s']:.1f} clips/s"
    ]
    if summary["rejected_clips"]:
        lines.append(f"{summary['rejected_clips']} clips could not be used: see {out / 'rejects.jsonl'}")
    if "A->V R@1" in summary:
        count, chance = summary["held_out_clips"], summary["chance R@1"]
        lines.append(f"retrieval among {count} held-out clips (chance R@1 {chance:.1f} %):")
        for way in ("A->V", "V->A"):
            recalls = ", ".join(f"R@{k} {summary[f'{way} R@{k}']:.1f} %" for k in (1, 5, 10))
            lines.append(f"  {way}  {recalls}, median rank {summary[f'{way} median rank']:g}")
    else:
        lines.append("retrieval was not evaluated: name held-out clips with --eval-data")
    lines.append(f"checkpoint      {out / 'model'}   (cavmae_fast.CAVMAE.from_pretrained)")
    for name, what in (
        ("metrics.jsonl", "metrics"),
        ("loss.png", "losses"),
        ("reconstruction.png", "reconstruction"),
        ("summary.json", "summary"),
        ("rejects.jsonl", "rejected clips"),
    ):
        lines.append(f"{what:<16}{out / name}")
    if config.data:
        lines.append(f"next: train on, from this checkpoint, with --init {out / 'model'}")
    else:
        lines.append("next: your own clips, at full size:  cavmae-fast pretrain --data DIR --model base --steps 3")
    return "\n".join(lines)
