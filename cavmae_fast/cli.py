"""The command line: `cavmae-fast pretrain` and `cavmae-fast doctor`. Nothing computes here.

Exit codes: 0 done, 1 the job failed, 2 wrong usage (an option, a file that is not there); 130 interrupted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Doctor:
    """Report device, versions, and which implementation each operator uses here, and why."""


def main() -> None:
    """Entry point of the `cavmae-fast` program."""
    import tyro

    from .training.pretrain import PretrainConfig

    command = tyro.extras.subcommand_cli_from_dict(
        {"pretrain": PretrainConfig, "doctor": Doctor}, prog="cavmae-fast",
        description="Audio-visual masked autoencoders: from video files to trained models.",
    )  # fmt: skip
    if isinstance(command, Doctor):
        from .doctor import render

        print(render())
    else:
        _pretrain(command)


def _pretrain(config) -> None:
    from .data.media import MediaError
    from .models import CheckpointError
    from .training.pretrain import TrainingError, pretrain

    try:
        summary = pretrain(config)
    except KeyboardInterrupt:
        _stop(130, f"interrupted; what was measured is in {config.out}")
    except (MediaError, CheckpointError, TrainingError, OSError, MemoryError) as error:
        _stop(1, str(error) or type(error).__name__)
    except ValueError as error:
        _stop(2, str(error))
    print(_closing(config, summary))


def _stop(code: int, message: str) -> None:
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
        ("metrics.jsonl", "metrics"), ("loss.png", "losses"), ("reconstruction.png", "reconstruction"),
        ("summary.json", "summary"), ("rejects.jsonl", "rejected clips"),
    ):  # fmt: skip
        lines.append(f"{what:<16}{out / name}")
    if config.data:
        lines.append(f"next: train on, from this checkpoint, with --init {out / 'model'}")
    else:
        lines.append("next: your own clips, at full size:  cavmae-fast pretrain --data DIR --model base --steps 3")
    return "\n".join(lines)
