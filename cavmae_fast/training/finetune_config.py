"""The options of a fine-tuning run, and what stands in for those that are not given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cavmae_fast.data.draws import Augmentation
from cavmae_fast.training.finetune_recipes import FINE_TUNING, FineTuning
from cavmae_fast.training.run_config import RunConfig, recipe_in_force, resolve_run

PRETRAINED = Path("runs/pretrain/model")
"Where `cavmae-fast pretrain` leaves its model unless it is told otherwise."
_AUGMENTATION = ("mixup", "freq_mask", "time_mask", "noise", "label_smoothing")
_OF_RECIPE = ("loss", "metric", "balanced", "average_epochs", "frozen_base")
"The options that are named like the fields of `FineTuning`."
_SWITCHES = ("balanced", "noise", "frozen_base")
"Those of them that are on or off: an option that is not given is neither."


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tune a pretrained model to classify clips. Without --data it goes on from the model that `cavmae-fast pretrain`
    left, on the clips that this generated, whose attributes are the classes."""

    out: Path = Path("runs/finetune")
    """Folder for checkpoints, metrics and figures."""
    labels: Path | None = None
    """CSV of the classes: index, mid, display_name. Default: that of the shards, or of ESC-50 or Speech Commands."""
    recipe: Literal["as20k", "as2m", "vggsound", "esc50", "speechcommands", "linear-probe", "small"] | None = None
    """Published settings, each of which an option changes. Default with generated clips: small."""
    fold: int | None = None
    """With the folder of a data set in folds (ESC-50) as --data: the fold that judges what is trained on the others.
    Default: each of them in turn, and the mean of their figures."""
    mode: Literal["multimodal", "audioonly", "videoonly"] | None = None
    """What of a clip the classifier is trained with. Default: multimodal; of a classifier with one encoder, that one."""
    model: Literal["av", "audio", "video"] | None = None
    """The encoders of the checkpoint that the classifier has: both, as CAVMAEFT has in every mode, or one alone. Default:
    all that the checkpoint has."""
    loss: Literal["bce", "ce"] | None = None
    """bce: any number of labels per clip; ce: one. Default: the recipe's."""
    metric: Literal["mAP", "accuracy"] | None = None
    """By which the best epoch is chosen. Default: the recipe's."""
    balanced: Literal["on", "off"] | None = None
    """Draw clips of rare classes more often. Default: the recipe's."""
    weights: Path | None = None
    """File of one sampling weight per clip, for balanced sampling. Default: computed from the labels, as published."""
    mixup: float | None = None
    """Share of the clips that another is mixed into. Default: the recipe's."""
    freq_mask: int | None = None
    """Most mel bins that are masked (SpecAugment); 0: none. Default: the recipe's."""
    time_mask: int | None = None
    """Most spectrogram frames that are masked (SpecAugment); 0: none. Default: the recipe's."""
    noise: Literal["on", "off"] | None = None
    """Add noise to the spectrogram, and roll it in time. Default: the recipe's."""
    label_smoothing: float | None = None
    """Default: the recipe's."""
    frozen_base: Literal["on", "off"] | None = None
    """Train the head alone. Default: the recipe's."""
    average_epochs: tuple[int, int] | None = None
    """First and last epoch, from 1, whose weights are averaged in the end. Default: the recipe's."""
    audio_length: int | None = None
    """Spectrogram frames of 10 ms that the model takes; default: as many as the checkpoint's."""
    image_size: int | None = None
    """Height and width of the pictures; default: the checkpoint's."""
    new_head: bool = False
    """Leave the head of a checkpoint that is already fine-tuned, for other classes."""


def resolve(config: FinetuneConfig, begun: dict[str, Any] | None = None) -> FinetuneConfig:
    """`config` with every default filled in: from the run that was `begun` in its folder, where one was, else from the
    recipe and the machine. ValueError names a bad value."""
    if config.recipe is None:
        if config.data:
            raise ValueError(f"--recipe is not given; with --data it must be one of {', '.join(FINE_TUNING)}")
        config = replace(config, recipe="small")
    if config.init is None:
        if config.data:
            raise ValueError("--init is not given; with --data it must name the checkpoint to start from")
        if not PRETRAINED.is_dir():
            raise ValueError(f"there is no {PRETRAINED} to start from; run `cavmae-fast pretrain` first, or give --init")
        config = replace(config, init=PRETRAINED)
    if config.data and not config.eval_data:
        raise ValueError("--eval-data is not given; with --data it must name the clips that every epoch is judged on")
    recipe = FINE_TUNING[config.recipe]
    defaults = {option: getattr(recipe, option) for option in _OF_RECIPE}
    defaults |= {option: getattr(recipe.augmentation, option) for option in _AUGMENTATION}
    defaults |= {option: "on" if defaults[option] else "off" for option in _SWITCHES}
    chosen = {option: value for option, value in defaults.items() if getattr(config, option) is None}
    config = resolve_run(replace(config, **chosen), recipe.optimization, begun)
    first, last = config.average_epochs
    if not 1 <= first <= last:
        raise ValueError(f"--average-epochs is {first} {last}; it must be two epochs from 1 on, the first not the later")
    if config.weights is not None and config.balanced == "off":
        raise ValueError("--weights is given, but sampling is not balanced; add --balanced on")
    for option in ("audio_length", "image_size"):
        value = getattr(config, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be above 0")
    return config


def fine_tuning_in_force(config: FinetuneConfig) -> FineTuning:
    """The recipe with what the (resolved) configuration changes. ValueError names what is out of range."""
    recipe = FINE_TUNING[config.recipe]
    values = {option: getattr(config, option) for option in (*_AUGMENTATION, *_OF_RECIPE)}
    values |= {option: values[option] == "on" for option in _SWITCHES}
    return replace(
        recipe,
        optimization=recipe_in_force(config, recipe.optimization),
        augmentation=Augmentation(**{option: values[option] for option in _AUGMENTATION}),
        **{option: values[option] for option in _OF_RECIPE},
    )
