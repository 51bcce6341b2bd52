"""Every system that is pretrained behind one interface, whatever its family: its model, the same in plain PyTorch, the loss
of a training step and its operations. This is for what counts, measures and tunes systems; a run's losses are its task's.

The second stage of MAViL is a system of its own, `<preset>-stage-2`: its model holds the student and the frozen teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from cavmae_fast.clip import ClipSpec
from cavmae_fast.models.cavmae import CAVMAE
from cavmae_fast.models.flops import forward_macs
from cavmae_fast.models.mae import MAE
from cavmae_fast.models.mavil import MAViL
from cavmae_fast.models.mavil_flops import fused_macs, mae_macs, mavil_macs
from cavmae_fast.models.mavil_presets import TOWER_PRESETS, MAEPreset, MAViLPreset
from cavmae_fast.models.presets import PRESETS, Preset
from cavmae_fast.reference import cavmae as plain_cavmae
from cavmae_fast.reference import mae as plain_mae
from cavmae_fast.reference import mavil as plain_mavil

STAGE_2 = "-stage-2"


class System(Protocol):
    """A system. `model` below is what `create` returns, or a callable that computes the same."""

    def create(self, *, plain: bool = False, **overrides: Any) -> nn.Module:
        """The model, training this system's losses; `plain`: the reference. `overrides` change constructor arguments."""

    def step_loss(self, model: Callable, audio: Tensor, imgs: Tensor) -> Tensor:
        """What a training step minimizes, of clips as `inputs` makes them; masks are drawn."""

    def step_flops(self, model: nn.Module, *, plain: bool = False) -> float:
        """Operations of one clip in a training step, counted as in `models.flops`; `plain`: as the reference computes it."""

    def resized(self, sizes: Mapping[str, Any]) -> Self:
        """The same system with other constructor arguments."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor arguments of the model in which it differs from the defaults of its class."""


@dataclass(frozen=True)
class _Resized:
    preset: Any
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def resized(self, sizes: Mapping[str, Any]) -> Self:
        return replace(self, sizes={**self.sizes, **sizes})

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.preset.model, **self.sizes}

    def _build(self, kind: type[nn.Module], overrides: Mapping[str, Any]) -> nn.Module:
        return kind(**{**self.arguments, **overrides})


@dataclass(frozen=True)
class CAVMAESystem(_Resized):
    """CAV-MAE and its ablations."""

    preset: Preset

    def create(self, *, plain: bool = False, **overrides: Any) -> nn.Module:
        arguments = {"norm_pix_loss": self.preset.model.get("norm_pix_loss", True), **self.sizes, **overrides}
        if not plain:
            return self.preset.create(**arguments)
        model = self._build(plain_cavmae.CAVMAE, arguments)
        model.train_losses(**self.in_force)
        return model

    @property
    def in_force(self) -> dict[str, bool]:
        """Which losses have a weight."""
        return {"reconstruction": self.preset.mae_loss_weight != 0, "contrast": self.preset.contrast_loss_weight != 0}

    def step_loss(self, model: Callable, audio: Tensor, imgs: Tensor) -> Tensor:
        ratio = self.preset.mask_ratio
        return model(audio, imgs, ratio, ratio, self.preset.mae_loss_weight, self.preset.contrast_loss_weight).loss

    def step_flops(self, model: CAVMAE, *, plain: bool = False) -> float:
        ratio = self.preset.mask_ratio
        return 6 * sum(forward_macs(model, ratio, ratio, published=plain, **self.in_force).values())


@dataclass(frozen=True)
class MAESystem(_Resized):
    """A masked autoencoder of sound or of pictures alone; what is not of its modality is not looked at."""

    preset: MAEPreset

    def create(self, *, plain: bool = False, **overrides: Any) -> nn.Module:
        return self._build(plain_mae.MAE if plain else MAE, overrides)

    def step_loss(self, model: Callable, audio: Tensor, imgs: Tensor) -> Tensor:
        return model(audio if self.preset.model["modality"] == "a" else imgs, self.preset.mask_ratio).loss

    def step_flops(self, model: MAE, *, plain: bool = False) -> float:
        return 6 * sum(mae_macs(model, self.preset.mask_ratio, plain=plain).values())


@dataclass(frozen=True)
class MAViLSystem(_Resized):
    """The first stage of MAViL."""

    preset: MAViLPreset
    stage = 1

    @property
    def in_force(self) -> dict[str, bool]:
        """Which losses have a weight."""
        return self.preset.weights(self.stage).in_force

    def create(self, *, plain: bool = False, **overrides: Any) -> nn.Module:
        model = self._build(plain_mavil.MAViL if plain else MAViL, overrides)
        model.train_losses(**self.in_force)
        return model

    def step_loss(self, model: Callable, audio: Tensor, imgs: Tensor) -> Tensor:
        given = self.preset.weights(self.stage)._asdict()
        weights = {f"{loss}_loss_weight": weight for loss, weight in given.items()}
        ratio = self.preset.mask_ratio
        return model(audio, imgs, mask_ratio_a=ratio, mask_ratio_v=ratio, **weights).loss

    def step_flops(self, model: MAViL, *, plain: bool = False) -> float:
        ratio = self.preset.mask_ratio
        return 6 * sum(mavil_macs(model, ratio, ratio, plain=plain, **self.in_force).values())


@dataclass(frozen=True)
class MAViLStage2System(MAViLSystem):
    """The second stage: a student and its teacher."""

    stage = 2

    def create(self, *, plain: bool = False, **overrides: Any) -> StudentAndTeacher:
        student = super().create(plain=plain, **overrides)
        return StudentAndTeacher(student, self._build(type(student), overrides))

    def step_flops(self, model: StudentAndTeacher, *, plain: bool = False) -> float:
        return super().step_flops(model.student, plain=plain) + 2 * fused_macs(model.teacher)


class StudentAndTeacher(nn.Module):
    """A MAViL that regresses the tokens of another, which is frozen."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.clip_spec: ClipSpec = student.clip_spec

    def forward(self, audio: Tensor, imgs: Tensor, **options: Any) -> Any:
        """What the student returns; `options` are its."""
        return self.student(audio, imgs, self.teacher.targets(audio, imgs), **options)


def inputs(model: nn.Module, batch: int, *, empty: bool = False) -> tuple[Tensor, Tensor]:
    """Random clips as `model` takes them, on the CPU: sound `[B, T, 128]`, and pictures in uint8 as loaders give them.
    `empty`: of any contents, for tensors that have none."""
    sound, pictures = ((batch, *shape) for shape in model.clip_spec.shapes)
    if empty:
        return torch.empty(sound), torch.empty(pictures, dtype=torch.uint8)
    return torch.randn(sound), torch.randint(256, pictures, dtype=torch.uint8)


def _systems() -> dict[str, System]:
    found: dict[str, System] = {name: CAVMAESystem(preset) for name, preset in PRESETS.items()}
    for name, preset in TOWER_PRESETS.items():
        found[name] = MAESystem(preset) if isinstance(preset, MAEPreset) else MAViLSystem(preset)
        if isinstance(preset, MAViLPreset):
            found[name + STAGE_2] = MAViLStage2System(preset)
    return found


SYSTEMS = _systems()
"By the name of the preset, and of its second stage."
