"""`--rounds N`: stage 1 of MAViL and N rounds of stage 2, one run after the other, each the teacher of the next."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cavmae_fast.data.sets.shards import write_whole
from cavmae_fast.models.opening import open_model
from cavmae_fast.training.pretrain_config import PretrainConfig, preset_name, resolve
from cavmae_fast.training.pretrain_options import family_of, flag
from cavmae_fast.training.ranks import Ranks
from cavmae_fast.training.run_folder import RunFolder


def stage_configs(config: PretrainConfig) -> dict[str, PretrainConfig]:
    """The options of every run of the chain, in order, by the name of its folder inside of `config.out`.

    Raises ValueError when `rounds` is below 1, when the options are not those of a chain, or not those of one of its runs.
    """
    family = family_of(preset_name(config.model))
    if family != "MAViL":
        raise ValueError(f"--rounds is for MAViL; --model is {config.model}")
    if config.rounds < 1:
        raise ValueError(
            f"--rounds is {config.rounds}; it must be 1 or more, the rounds of stage 2 that follow stage 1 (for stage 1 "
            "alone, leave it out)"
        )
    for option in ("teacher", "teacher_hash"):
        if getattr(config, option) is not None:
            raise ValueError(
                f"{flag(option)} is given beside --rounds, which begins with stage 1 and takes each run as the next one's "
                "teacher; one of them must be left out"
            )
    alone = replace(config, rounds=None)
    runs = {
        "stage-1": replace(alone, out=config.out / "stage-1", regression_loss_weight=None, cache_targets=None),
    }
    for number in range(1, config.rounds + 1):
        name, before = f"round-{number}", list(runs)[-1]
        runs[name] = replace(
            alone,
            out=config.out / name,
            teacher=config.out / before / "model",
            raw_loss_weight=None,
            cache_targets=None if config.cache_targets is None else config.cache_targets / name,
        )
    for run in runs.values():
        resolve(replace(run, dtype="float32"))  # another one might have to be measured
    return runs


def chain(
    config: PretrainConfig, ranks: Ranks, run: Callable[[PretrainConfig, Ranks, Path], dict[str, Any]]
) -> dict[str, Any]:
    """Does all runs of the chain with `run` (options, ranks, folder for generated clips -> summary); those that are finished
    already are left as they are, so the same command goes on after a kill. The last model is left in `out` itself.

    Returns the last run's summary, and those of all by name under `stages`. Raises as `run` does, and ValueError for options
    that do not fit.
    """
    runs = stage_configs(config)
    with RunFolder(config.out, config.overwrite) as folder:

        def begin() -> PretrainConfig:
            before = folder.unfinished() or {}
            settled = config
            if config.dtype == "auto":  # all runs compute in the same dtype
                settled = replace(config, dtype=before.get("dtype") or resolve(runs["stage-1"]).dtype)
            folder.begin(settled)
            return settled

        settled = ranks.from_first(begin)
        summaries: dict[str, Any] = {}
        for name, options in stage_configs(settled).items():
            finished = None if config.overwrite else ranks.from_first(functools.partial(_summary, options.out))
            ranks.say(f"{name} of {', '.join(runs)}" + ("" if finished is None else " is finished"))
            summaries[name] = finished or run(options, ranks, config.out / "clips")

        def close() -> dict[str, Any]:
            open_model(options.out / "model").save_pretrained(folder.model)
            summary = {**summaries[name], "stages": summaries}
            write_whole(folder.summary, json.dumps(summary, indent=2) + "\n")
            return summary

        return ranks.from_first(close)


def _summary(out: Path) -> dict[str, Any] | None:
    """Of the run in this folder, where it is finished."""
    path = RunFolder(out).summary
    return json.loads(path.read_text()) if path.exists() else None
