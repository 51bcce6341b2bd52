"""The teacher of stage 2: a frozen model that sees the whole clip, and whose tokens a student regresses."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from torch import nn

from cavmae_fast.data.batches import Batch
from cavmae_fast.errors import CavmaeError
from cavmae_fast.models import MAViL, load_checkpoint
from cavmae_fast.models.mavil_flops import fused_macs
from cavmae_fast.models.opening import open_model, weights_hash
from cavmae_fast.models.weights import CONFIG_FILE, CheckpointError
from cavmae_fast.reference.outputs import FeatureOutput


class TeacherError(CavmaeError):
    """A teacher that cannot teach this student, or did not stay as it was; the message names it."""


class Targets(Protocol):
    """What stage 2 asks for the tokens that are regressed: a teacher, or what one said before (`target_cache`)."""

    @property
    def macs(self) -> float:
        """Multiply-adds of what is computed for one clip."""

    def targets(self, batch: Batch) -> FeatureOutput:
        """The tokens of all patches of the batch's clips, without gradient."""


class Teacher:
    """A model that gives targets: frozen, and in evaluation mode. `hash`: SHA-256 of its weights.

    Args:
        model: on the device of the training.
        origin: how errors call it.
    """

    def __init__(self, model: MAViL, origin: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.origin = origin
        self.hash = weights_hash(model)

    @property
    def macs(self) -> float:
        """As the fast model computes it: one pass over the whole clip, without decoders."""
        return fused_macs(self.model)

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def targets(self, batch: Batch) -> FeatureOutput:
        """The fused tokens of the whole clips; nothing is kept for a backward pass."""
        return self.model.targets(batch.audio, batch.image)

    def check_unchanged(self) -> None:
        """TeacherError when the weights are not what they were in the beginning."""
        if weights_hash(self.model) != self.hash:
            raise TeacherError(f"{self.origin} has changed while it taught; its student is not to be used")


def open_teacher(path: Path, student: MAViL, expected: str | None = None) -> Teacher:
    """The teacher in a checkpoint or in the folder of a run, fit to teach `student`, on the student's device.

    Args:
        path: what `open_model` opens, the folder of a run, or a state dict of a model of the student's sizes.
        student: whose tokens are compared with the teacher's.
        expected: hash that the weights must have, where it is known.

    Raises:
        TeacherError: it is no MAViL, takes other clips, has tokens of another shape, or is not the expected one.
        CheckpointError: it cannot be read.
    """
    origin = f"--teacher {path}"
    model = _opened(path, student)
    if not isinstance(model, MAViL):
        raise TeacherError(f"{origin} holds a {type(model).__name__}; it must be a MAViL, which pretraining leaves")
    theirs, own = asdict(model.clip_spec), asdict(student.clip_spec)
    for name, value in own.items():
        if theirs[name] != value:
            raise TeacherError(f"{origin} takes clips with {name} {theirs[name]}, its student with {value}; they must agree")
    for one, other in zip(model.towers, student.towers):
        shapes = [[tower.num_patches, tower.norm.normalized_shape[0]] for tower in (one, other)]
        if shapes[0] != shapes[1]:
            raise TeacherError(
                f"{origin} has {NAMES[one.modality]} tokens {shapes[0]} (patches, width), its student {shapes[1]}; they "
                "must agree"
            )
    teacher = Teacher(model.to(next(student.parameters()).device), origin)
    if expected not in (None, teacher.hash):
        raise TeacherError(f"{origin} has weights of hash {teacher.hash}; --teacher-hash says that it must be {expected}")
    return teacher


NAMES = {"a": "audio", "v": "video"}


def _opened(path: Path, student: MAViL) -> nn.Module:
    if (path / "model" / CONFIG_FILE).is_file():  # a run's folder, whose own configuration describes no model
        path = path / "model"
    if path.is_dir() or (path.parent / CONFIG_FILE).is_file():
        return open_model(path)
    model = copy.deepcopy(student)
    try:
        load_checkpoint(model, path)
    except CheckpointError as error:
        raise CheckpointError(f"--teacher: {error}") from error
    return model
