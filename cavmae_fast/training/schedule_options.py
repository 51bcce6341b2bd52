"""The options that say how the learning rate falls: from a recipe's schedule to their values, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cavmae_fast.training.schedules import Constant, Cosine, Schedule, StepDecay, WarmUp

if TYPE_CHECKING:
    from cavmae_fast.training.run_config import RunConfig

_TAKEN = {"step": ("decay_start", "decay_every", "decay_factor"), "cosine": ("end_factor",), "constant": ()}
"The options that a schedule takes, by its name."
_FALLBACK: dict[str, dict[str, Any]] = {"step": {"decay_factor": 0.5}, "cosine": {"end_factor": 0.0}, "constant": {}}
"What they are where the recipe has another schedule."


def schedule_options(config: RunConfig, schedule: Schedule) -> dict[str, Any]:
    """The values of the options that are not given, for a recipe that has `schedule`. ValueError for one that belongs to
    another schedule, and for one that is missing."""
    options = _options_of(schedule)
    if config.warmup_steps and config.warmup_share:
        raise ValueError("--warmup-steps and --warmup-share are both above 0; one of them must be 0 or left out")
    if config.warmup_steps is not None:
        options.pop("warmup_share", None)
    chosen = config.schedule or options["schedule"]
    for name, taken in _TAKEN.items():
        for option in taken:
            if name != chosen and getattr(config, option) is not None:
                raise ValueError(f"{_dashed(option)} is for --schedule {name}; the schedule is {chosen}")
    if chosen == options["schedule"]:
        return options
    for option in _TAKEN[chosen]:
        if option not in _FALLBACK[chosen] and getattr(config, option) is None:
            raise ValueError(f"--schedule {chosen} needs {_dashed(option)}, because the recipe has none")
    warm_up = {option: value for option, value in options.items() if option.startswith("warmup_")}
    return {"schedule": chosen, **warm_up, **_FALLBACK[chosen]}


def schedule_in_force(config: RunConfig, schedule: Schedule) -> Schedule:
    """The schedule that the (resolved) options say: `schedule` itself where they change nothing."""
    options = {"warmup_share": None} | _options_of(schedule)
    if all(getattr(config, option) == value for option, value in options.items()):
        return schedule
    changed: Schedule = Constant()
    if config.schedule == "step":
        changed = StepDecay(config.decay_start, config.decay_every, config.epochs, config.decay_factor)
    elif config.schedule == "cosine":
        changed = Cosine(config.end_factor)
    share = config.warmup_share or 0.0
    return WarmUp(config.warmup_steps, changed, share) if config.warmup_steps or share else changed


def _options_of(schedule: Schedule) -> dict[str, Any]:
    """A schedule as values of the options."""
    warm_up: dict[str, Any] = {"warmup_steps": 0}
    if isinstance(schedule, WarmUp):
        # Without a share there is no such option to fill in, so that runs without one stay as they are recorded.
        warm_up = {"warmup_steps": schedule.steps} | ({"warmup_share": schedule.share} if schedule.share else {})
        schedule = schedule.schedule
    fields: dict[str, Any] = {"schedule": "constant"}
    if isinstance(schedule, StepDecay):
        fields = {
            "schedule": "step",
            "decay_start": schedule.start,
            "decay_every": schedule.every,
            "decay_factor": schedule.factor,
        }
    elif isinstance(schedule, Cosine):
        fields = {"schedule": "cosine", "end_factor": schedule.end_factor}
    return warm_up | fields


def _dashed(option: str) -> str:
    return f"--{option.replace('_', '-')}"
