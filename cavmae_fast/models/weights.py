"""Weights in files: published `.pth` files, safetensors, and our own folders.

Everything is read with `weights_only=True` or as safetensors: a checkpoint cannot run code.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from cavmae_fast.clip import ClipSpec
from cavmae_fast.errors import CavmaeError, first_line
from cavmae_fast.models import hub
from cavmae_fast.models.positions import Adaptation, adapt, adapt_tower

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PRETRAINED_TO_FINE_TUNED = {
    "allow_missing": ("mlp_head.*",),
    "allow_unexpected": ("decoder_*", "mask_token", "*_v", "*_v.*"),
}
"Arguments of `load_checkpoint` that take a pretraining checkpoint into `CAVMAEFT` or `CAVMAEFTAudio`."
ALWAYS_TOLERATED = "cls_token*"
"Class tokens: some published checkpoints of CAV-MAE carry them, and no CAV-MAE ever used them."
_TABLE = re.compile(r"((audio|video)\.)?(decoder_)?pos_embed(_[av])?")
"Names of tables of positions, of CAV-MAE and of towers."


class CheckpointError(CavmaeError, ValueError):
    """A checkpoint that cannot be read or does not fit the model; the message names the file and the keys."""


class _Names(NamedTuple):
    missing: list[str]
    unexpected: list[str]


class LoadReport(_Names):
    """Names that the model has and the checkpoint lacks, and the reverse; empty where everything fitted.

    It unpacks into these two. `adapted` says, a line for each, which tables of positions were brought to the model's size.
    """

    adapted: tuple[str, ...] = ()


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file, a PyTorch file, or a folder written by `save_pretrained`.

    The prefix `module.` (from DataParallel) is taken off; a state dict under the key `model` or `state_dict` is unwrapped.
    Raises CheckpointError, naming the file, when there is none or it holds something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"checkpoint {path} cannot be read as tensors alone: {first_line(error)}") from error
    return _unwrapped(state, f"checkpoint {path}")


def _unwrapped(state: object, origin: str) -> dict[str, Tensor]:
    """The state dict in `state`, without the keys and prefixes that `read_state` documents."""
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{origin} does not hold a state dict (a mapping of names to tensors)")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def state_of(source: str | os.PathLike | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state dict of a file, folder or mapping, and how errors call it."""
    if isinstance(source, Mapping):
        return _unwrapped(source, "the state dict"), "the state dict"
    return read_state(source), f"checkpoint {source}"


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Tensor],
    *,
    allow_missing: str | Iterable[str] = (),
    allow_unexpected: str | Iterable[str] = (),
    adapt_positions: bool | Adaptation = False,
) -> LoadReport:
    """Loads a checkpoint (a path, see `read_state`, or a state dict) into `model`.

    Names missing from the checkpoint or unexpected in it are an error unless they match a pattern (as in file names:
    `decoder_*`) of `allow_missing` or `allow_unexpected`, or are unexpected class tokens (`cls_token*`, which no model
    uses). A shape that differs is an error, but for tables of positions where `adapt_positions` says what to do when audio
    length or image size are others: True or 'cut', 'center', 'interpolate' (see `models.positions.adapt`). Nothing is loaded
    when there is an error. Returns what was missing and unexpected, and what was adapted. Raises CheckpointError.
    """
    state, origin = state_of(source)
    own = model.state_dict()
    report = LoadReport(sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys()))
    problems = []
    for kind, names, allowed in (
        ("missing", report.missing, _patterns(allow_missing)),
        ("unexpected", report.unexpected, [*_patterns(allow_unexpected), ALWAYS_TOLERATED]),
    ):
        names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]
        if names:
            problems.append(f"{kind}: {', '.join(names)} (allow_{kind} takes patterns of names that may be {kind})")
    other_shape = [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    tables = [name for name in other_shape if _TABLE.fullmatch(name) and own[name].shape[::2] == state[name].shape[::2]]
    if adapt_positions:
        try:
            report.adapted = _adapt(model, state, tables, "cut" if adapt_positions is True else adapt_positions)
        except ValueError as error:
            raise CheckpointError(f"{origin} does not fit {type(model).__name__}: {error}") from error
        other_shape = [name for name in other_shape if name not in tables]
    for name in other_shape:
        problems.append(f"{name} has shape {list(state[name].shape)}, the model's has {list(own[name].shape)}")
    if problems:
        message = f"{origin} does not fit {type(model).__name__}: {'; '.join(problems)}"
        if tables and not adapt_positions:
            message += (
                " (positions of another audio length or image size can be cut or interpolated: adapt_positions=True, on the "
                "command line --adapt-positions)"
            )
        raise CheckpointError(message)
    model.load_state_dict({name: state[name] for name in own.keys() & state.keys()}, strict=False)
    return report


def _adapt(model: nn.Module, state: dict[str, Tensor], tables: list[str], how: Adaptation) -> tuple[str, ...]:
    """Brings these tables of positions in `state` to the size of the model's; says what was done to each."""
    said = []
    for name in tables:
        if name.endswith("pos_embed"):
            tower = model.get_submodule(name.rpartition(".")[0])
            state[name], words = adapt_tower(name, state[name], tower.modality, tower.patch_embed.grid, how)
        else:
            modality = name[-1]
            grid = getattr(model, f"patch_embed_{modality}").grid
            state[name], words = adapt(name, state[name], grid[0] if modality == "a" else None, grid, how)
        said.append(words)
    return tuple(said)


def _patterns(allow: str | Iterable[str]) -> list[str]:
    """A single pattern is one pattern, not its letters: one of them may be '*'."""
    return [allow] if isinstance(allow, str) else list(allow)


class Pretrained:
    """`save_pretrained`, `push_to_hub` and `from_pretrained`: a folder, or a repository of the Hugging Face Hub, with
    `config.json` and `model.safetensors`."""

    def save_pretrained(self, folder: str | os.PathLike, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Writes constructor arguments and weights into `folder` (made if absent). Files that are there are replaced only
        once both new ones are whole. `weights` take the place of the model's own, which may lie in shards."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # FSDP puts a class of its own, FSDPCAVMAE say, in front of a model's.
        kind = next(kind for kind in type(self).__mro__ if not kind.__name__.startswith("FSDP"))
        config = {"class": kind.__name__, **self.config}
        state = {name: value.detach().cpu().contiguous() for name, value in (weights or self.state_dict()).items()}
        partial = {name: folder / f".{name}.partial" for name in (WEIGHTS_FILE, CONFIG_FILE)}
        try:
            save_file(state, partial[WEIGHTS_FILE])
            partial[CONFIG_FILE].write_text(json.dumps(config, indent=2) + "\n")
            for name, path in partial.items():
                path.replace(folder / name)
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)
        return folder

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Writes what `save_pretrained` writes into the Hugging Face repository `org/name`, which is made where there is
        none, in one commit; returns the commit's address. Needs huggingface_hub. Raises HubError."""
        message = commit_message or f"{type(self).__name__} of cavmae_fast"
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(Path(folder), repository, private=private, revision=revision, token=token, message=message)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        adapt_positions: bool | Adaptation = False,
        **overrides: Any,
    ) -> Self:
        """Builds the model that `save_pretrained` wrote into `folder`, or `push_to_hub` into a repository `org/name`.

        Args:
            folder: where there is no such folder, `org/name` is a repository of the Hugging Face Hub.
            revision, token, local_files_only: of that repository, as huggingface_hub takes them.
            adapt_positions: as in `load_checkpoint`, where `overrides` change audio length or image size.
            overrides: constructor arguments to change, such as `attention`.

        Raises:
            CheckpointError: names what is missing, of another class, or does not fit.
            HubError: the repository cannot be read.
        """
        if hub.names_repository(folder):
            files = (CONFIG_FILE, WEIGHTS_FILE)
            folder = hub.download(folder, files, revision=revision, token=token, local_files_only=local_files_only)
        path = Path(folder) / CONFIG_FILE
        config = _read_config(path)
        name = config.pop("class", None)
        if name != cls.__name__:
            raise CheckpointError(f"{path} describes a {name}; this is {cls.__name__}.from_pretrained")
        config["norm_layer"] = functools.partial(nn.LayerNorm, eps=config.pop("norm_eps", 1e-5))
        if "clip" in config:  # folders that name no statistics are those of models that take CAV-MAE's
            config["clip"] = _read_clip(config["clip"], path)
        try:
            model = cls(**config | overrides)
        except TypeError as error:
            raise CheckpointError(f"{path} and the overrides do not fit {cls.__name__}: {error}") from error
        load_checkpoint(model, folder, adapt_positions=adapt_positions)
        return model


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no {CONFIG_FILE}; save_pretrained writes one") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}; it must hold the object that save_pretrained writes")
    return config


def _read_clip(values: object, path: Path) -> ClipSpec:
    """The ClipSpec that a configuration holds as an object; JSON knows no tuples."""
    try:
        return ClipSpec(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: clip is {values!r}, which describes no ClipSpec: {error}") from error
