"""Opening a checkpoint without being told what it is: its class and its sizes follow from the file itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cavmae_fast.clip import MEL_BINS
from cavmae_fast.models.cavmae import CAVMAE
from cavmae_fast.models.cavmae_ft import CAVMAEFT, CAVMAEFTAudio
from cavmae_fast.models.mae import MAE, MAEFT
from cavmae_fast.models.mavil import MAViL, MAViLFT
from cavmae_fast.models.weights import CONFIG_FILE, CheckpointError, load_checkpoint, read_state

PUBLISHED = {kind.__name__: kind for kind in (CAVMAE, CAVMAEFT, CAVMAEFTAudio)}
"Those whose class follows from the weights alone."
CLASSES = PUBLISHED | {kind.__name__: kind for kind in (MAE, MAEFT, MAViL, MAViLFT)}
Model = CAVMAE | CAVMAEFT | CAVMAEFTAudio | MAE | MAEFT | MAViL | MAViLFT
HEAD_WIDTH, DECODER_HEAD_WIDTH = 64, 32
"Of all published models and presets. Weights do not show how many heads they are cut into."


def open_model(path: str | os.PathLike, **overrides: Any) -> Model:
    """The model in a checkpoint, in float32 on the CPU, in evaluation mode.

    Args:
        path: a folder that `save_pretrained` wrote, which says everything itself; or a published `.pth` or a
            `.safetensors` file, whose class and sizes are read off the names and shapes of its weights. Such a file does
            not say how many attention heads there are (taken: one per 64 channels, in the decoder one per 32) nor whether
            patches were normalized in the loss (taken: yes, as published).
        overrides: constructor arguments that are known better, such as `num_heads` or `norm_pix_loss`.

    Raises:
        CheckpointError: it does not exist, cannot be read, is no model of these classes, or does not fit the overrides.
    """
    path = Path(path)
    if path.is_file() and (path.parent / CONFIG_FILE).is_file() and path.suffix == ".safetensors":
        path = path.parent  # somebody named the weights in such a folder
    if path.is_dir():
        return class_of(path).from_pretrained(path, **overrides).eval()
    state = read_state(path)
    kind = class_of_state(state, f"checkpoint {path}")
    try:
        model = kind(**{**_sizes(kind, state), **overrides})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} does not look like a {kind.__name__}: {error}") from error
    load_checkpoint(model, state)
    return model.eval()


def class_of(folder: Path) -> type[Model]:
    """The class that a folder's configuration names. CheckpointError when there is none or it is another."""
    file, inside = folder / CONFIG_FILE, folder / "model"
    hint = f"; the model of this run lies in {inside}" if (inside / CONFIG_FILE).is_file() else ""
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}, which save_pretrained writes{hint}")
    try:
        name = json.loads(file.read_text())["class"]
    except (OSError, ValueError, KeyError, TypeError) as error:  # a run's own configuration, for one
        raise CheckpointError(f"{file} cannot be read as the configuration of a model: {error!r}{hint}") from error
    if name not in CLASSES:
        raise CheckpointError(f"{file} describes a {name}; allowed: {', '.join(CLASSES)}")
    return CLASSES[name]


def class_of_state(state: Mapping[str, Tensor], origin: str) -> type[CAVMAE] | type[CAVMAEFT] | type[CAVMAEFTAudio]:
    """The class whose weights these are, by their names. CheckpointError, which begins with `origin`, when there is none."""
    if "patch_embed_a.proj.weight" in state:
        if "mlp_head.1.weight" in state:
            return CAVMAEFT if "patch_embed_v.proj.weight" in state else CAVMAEFTAudio
        if "decoder_pred_a.weight" in state:
            return CAVMAE
    raise CheckpointError(
        f"{origin} holds the weights of none of {', '.join(PUBLISHED)}: it lacks patch_embed_a.proj.weight, or both "
        "mlp_head.1.weight and decoder_pred_a.weight"
    )


def _sizes(kind: type[nn.Module], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments of `kind` that the shapes of its weights give."""
    width, _, patch, _ = state["patch_embed_a.proj.weight"].shape
    specific, shared = _count(state, "blocks_a"), _count(state, "blocks_u")
    stack = "blocks_u" if shared else "blocks_a"
    sizes = {
        "audio_length": state["pos_embed_a"].shape[1] * patch * patch // MEL_BINS,
        "patch_size": patch,
        "embed_dim": width,
        "num_heads": max(1, width // HEAD_WIDTH),
        "modality_specific_depth": specific,
        "depth": specific + shared,
        "mlp_ratio": state[f"{stack}.0.mlp.fc1.weight"].shape[0] / width,
        "norm_pix_loss": True,
    }
    if "patch_embed_v.proj.weight" in state:
        sizes["img_size"] = math.isqrt(state["pos_embed_v"].shape[1]) * patch
        sizes["in_chans"] = state["patch_embed_v.proj.weight"].shape[1]
    if kind is CAVMAE:
        decoder = state["decoder_embed.weight"].shape[0]
        sizes["decoder_embed_dim"] = decoder
        sizes["decoder_num_heads"] = max(1, decoder // DECODER_HEAD_WIDTH)
        sizes["decoder_depth"] = _count(state, "decoder_blocks")
    else:
        sizes["label_dim"] = state["mlp_head.1.weight"].shape[0]
    return sizes


def _count(state: Mapping[str, Tensor], stack: str) -> int:
    """Blocks in a stack."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights, names and values: what tells whether two files hold the same model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
