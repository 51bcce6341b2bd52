"""What a training command prints when it is done: what was reached, where it lies, and what to run next."""

from __future__ import annotations

from typing import Any

from cavmae_fast.evaluation.commands.options import next_line, printable
from cavmae_fast.training.dry_run import DryRun
from cavmae_fast.training.finetune_config import PRETRAINED
from cavmae_fast.training.pretrain_config import PretrainConfig


def pretrained(config: PretrainConfig, summary: dict[str, Any] | DryRun) -> str:
    """The text after a pretraining run with this summary, or after a dry run."""
    if isinstance(summary, DryRun):
        return summary.render()
    out = config.out
    lines = [
        f"{summary['steps']} steps, loss {summary['loss']:.3f} (audio {summary['loss_mae_a']:.3f}, "
        f"video {summary['loss_mae_v']:.3f}, contrastive {summary['loss_c']:.3f}), {summary['clips_per_s']:.1f} clips/s"
    ]
    if summary["rejected_clips"]:
        lines.append(f"{summary['rejected_clips']} clips could not be used: see {out / 'rejects.jsonl'}")
    if summary["skipped_steps"]:
        lines.append(f"{summary['skipped_steps']} steps were skipped: see {out / 'skipped.jsonl'}")
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
        lines.append(next_line("retrieve", out / "model", "--data", *(config.eval_data or config.data)))
    else:
        init = () if out / "model" == PRETRAINED else ("--init", out / "model")
        lines.append(next_line("finetune", *init))
        lines.append("or your own clips, at full size:  cavmae-fast pretrain --data DIR --model base --steps 3")
    return printable(lines)
