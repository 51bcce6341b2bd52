"""Published splits: which clips of a data set are trained on and which judge, and the cross-validation of one in folds."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cavmae_fast.data.sets.audio_sets import AudioSet, read_audio_set
from cavmae_fast.data.sets.shards import write_whole
from cavmae_fast.training.finetune_config import FinetuneConfig
from cavmae_fast.training.ranks import Ranks
from cavmae_fast.training.run_config import RunConfig
from cavmae_fast.training.run_folder import RunFolder


def folds_in_turn(config: FinetuneConfig) -> tuple[str, ...]:
    """The folds that judge one after the other: all of a data set in folds, unless the options say which clips judge."""
    found = _whole_set(config)
    return found.folds if found is not None and config.fold is None else ()


def with_splits(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with the splits that are trained on and that judge for its data, where --data is a whole published data set
    and --eval-data is not given: the other folds and --fold, or training and validation.

    Raises:
        ValueError: --fold is given, and there is no such fold.
        MediaError: the data set's list cannot be read.
    """
    found = _whole_set(config)
    if config.fold is not None:
        folds = () if found is None else found.folds
        if str(config.fold) not in folds:
            there = f"which has {', '.join(folds)}" if folds else "the folder of a data set in folds, without --eval-data"
            raise ValueError(f"--fold is {config.fold}; it must be a fold of --data, {there}")
        judging = str(config.fold)
        training = [fold for fold in folds if fold != judging]
    elif found is None or found.folds:
        return config
    else:
        judging, training = "validation", ["training"]
    data, eval_data = (Path(f"{config.data[0]}@{names}") for names in (",".join(training), judging))
    return replace(config, data=(data,), eval_data=(eval_data,), fold=None)


def _whole_set(config: FinetuneConfig) -> AudioSet | None:
    """The published data set that --data is; None where it is something else, or --eval-data is given."""
    return read_audio_set(config.data[0]) if len(config.data) == 1 and not config.eval_data else None


class FoldsFolder(RunFolder):
    """The folder of a cross-validation: `fold-N` is the run that fold N judges, `summary.json` holds the means."""

    def fold(self, name: str) -> Path:
        """The folder of a fold's run."""
        return self.path / f"fold-{name}"

    def begin(self, options: RunConfig) -> bool:
        """As `RunFolder.begin`. ValueError, too, when there are runs of folds that belong to no cross-validation."""
        strangers = sorted(self.path.glob("fold-*"))
        if strangers and self.unfinished() is None and not self.overwrite:
            raise ValueError(
                f"--out {self.path} holds {strangers[0].name} of another run; name another folder, or add --overwrite"
            )
        return super().begin(options)

    def _clear(self) -> None:
        super()._clear()
        for folder in self.path.glob("fold-*"):
            shutil.rmtree(folder, ignore_errors=True)


def cross_validate(
    config: FinetuneConfig,
    folds: tuple[str, ...],
    folder: FoldsFolder,
    ranks: Ranks,
    look: Callable[[FinetuneConfig, dict[str, Any] | None], FinetuneConfig],
    run: Callable[[FinetuneConfig], dict[str, Any]],
) -> dict[str, Any]:
    """Fine-tunes once for each fold, which judges what was trained on the others. A fold that is done is not done again by
    the same command; one that was cut short goes on.

    Args:
        config: as given.
        folds: their names.
        folder: where their runs lie.
        ranks: that share the runs.
        look: (a run's options, those that were begun with) -> the options resolved; raises what is wrong with them.
        run: a run's options -> its summary.

    Returns:
        The summary, which is also written to `summary.json`: `folds`, with the figures of each, and the means of these.
    """
    begun = ranks.from_first(folder.unfinished)

    def of(name: str) -> FinetuneConfig:
        return replace(config, fold=int(name), out=folder.fold(name), overwrite=False)

    config = replace(config, dtype=look(of(folds[0]), begun).dtype)  # the same in all folds
    going_on = ranks.from_first(lambda: folder.begin(config))
    summaries: dict[str, dict[str, Any]] = {}
    for name in folds:
        done = of(name).out / "summary.json"
        finished = ranks.from_first(lambda done=done: json.loads(done.read_text()) if going_on and done.exists() else None)
        if finished is None:
            ranks.say(f"fold {name} of {len(folds)}")
            finished = run(of(name))
        summaries[name] = finished

    def close() -> dict[str, Any]:
        figures = {name: {key: one[key] for key in ("accuracy", "mAP", "clips")} for name, one in summaries.items()}
        accuracies = [one["accuracy"] for one in figures.values()]
        summary = {
            "mode": summaries[folds[0]]["mode"],
            "metric": "accuracy",
            "folds": figures,
            "accuracy": statistics.fmean(accuracies),
            "accuracy_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
            "mAP": statistics.fmean(one["mAP"] for one in figures.values()),
        }
        write_whole(folder.summary, json.dumps(summary, indent=2) + "\n")
        return summary

    return ranks.from_first(close)
