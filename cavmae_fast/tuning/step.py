"""The whole training step with what was chosen: right, and faster than all PyTorch? `python -m cavmae_fast.tuning.step`.

Operators that are right one by one do not show the chain, and times of their own do not show what they do to each other's
caches and memory. Loss and gradients are held against the reference in float64, on the same clips and masks: they may err
twice as much as the reference does in the dtype of the products; in fp8, which the reference does not have, as PyTorch's
operators do. Then both steps take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cavmae_fast.models.precision import fp8_products
from cavmae_fast.models.systems import System
from cavmae_fast.models.systems import inputs as clips_for
from cavmae_fast.ops import configuration, dispatch, parity
from cavmae_fast.tuning.clock import elapsed, spin, summary
from cavmae_fast.tuning.journal import Journal
from cavmae_fast.tuning.plan import MODELS, Settings
from cavmae_fast.tuning.processes import end_with_parent
from cavmae_fast.tuning.proof import release

PROOF_CLIPS = 4
"Clips of the comparison in float64, which a GPU computes slowly."
FP16_LOSS_SCALE = 1024.0
SEED = 3


def draw(model: nn.Module, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Spectrograms and pictures that `model` takes."""
    torch.manual_seed(SEED)
    audio, imgs = clips_for(model, batch)
    return audio.to(device), imgs.to(device)


def gradients(
    system: System, model: nn.Module, inputs: tuple[Tensor, Tensor], dtype: torch.dtype, fp8: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and the gradients of all that is trained. `dtype`: autocast's where it is a 16-bit one; `fp8`: blocks multiply
    8-bit numbers."""
    torch.manual_seed(SEED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(inputs[0].device.type, dtype, enabled=dtype.itemsize == 2))
        if fp8:
            stack.enter_context(fp8_products())
        loss = system.step_loss(model, *inputs)
    scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
    found = torch.autograd.grad(loss * scale, parameters, allow_unused=True, materialize_grads=True)
    return loss.detach(), found


def in_a_row(loss: Tensor, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Loss and all gradients as one vector, in float64."""
    return loss.double(), torch.cat([g.flatten().double() for g in found])


def prove(settings: Settings, content: configuration.Content, device: torch.device) -> dict[str, Any]:
    """Errors and allowed errors of loss and gradient, and whether both are right."""
    dtype, system = settings.products, MODELS[settings.model].system
    torch.manual_seed(0)
    plain = system.create(plain=True, attention="sdpa").to(device)
    fast = system.create().to(device)
    fast.load_state_dict(plain.state_dict())
    inputs = draw(plain, min(PROOF_CLIPS, settings.batch), device)
    # The reference has no fp8: there the measure is the same model by PyTorch's operators.
    with dispatch.override("torch"):
        base = in_a_row(*gradients(system, fast if settings.fp8 else plain, inputs, dtype, settings.fp8))
    with chosen(content):
        got = in_a_row(*gradients(system, fast, inputs, dtype, settings.fp8))
    del fast
    scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
    want = in_a_row(*gradients(system, plain.double(), (inputs[0].double(), inputs[1]), torch.float64))
    row: dict[str, Any] = {}
    for what, value, near, exact, factor in zip(("loss", "gradient"), got, base, want, (1.0, scale)):
        allowed = 2 * parity.error(near / factor, exact) + 2 * torch.finfo(dtype).eps
        row[what] = {"error": parity.error(value / factor, exact), "allowed": allowed}
    return row | {"right": all(row[what]["error"] <= row[what]["allowed"] for what in ("loss", "gradient"))}


@contextlib.contextmanager
def chosen(content: configuration.Content) -> Iterator[None]:
    """Within, the operators run what `content` says."""
    with dispatch.override("auto"), configuration.trial(content):
        yield


def time(settings: Settings, content: configuration.Content, device: torch.device) -> dict[str, Any]:
    """Milliseconds of forward and backward, with what was chosen and with PyTorch alone, in turn."""
    dtype, system = settings.products, MODELS[settings.model].system
    torch.manual_seed(0)
    model = system.create().to(device)
    inputs = draw(model, settings.batch, device)

    def tuned() -> None:
        with chosen(content):
            gradients(system, model, inputs, dtype, settings.fp8)

    def pytorch() -> None:
        with dispatch.override("torch"):
            gradients(system, model, inputs, dtype, settings.fp8)

    spin(device)
    samples: dict[str, list[float]] = {"tuned": [], "pytorch": []}
    for turn in range(settings.rounds + 1):  # the first one warms up
        for name, run in (("tuned", tuned), ("pytorch", pytorch)):
            ms = elapsed(run, 3 if device.type == "cuda" else 1, device)
            if turn:
                samples[name].append(ms)
    return {name: summary(values, len(values)) for name, values in samples.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--content", required=True, help="what was chosen, as JSON")
    args = parser.parse_args(arguments)
    end_with_parent()
    with args.journal.open() as file:
        header = json.loads(file.readline())
    settings, content = Settings.from_json(header["settings"]), json.loads(args.content)
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    journal = Journal(args.journal, settings, header["made_for"]["target"])
    journal.add({"row": "begin", "unit": "the whole step", "candidate": "", "what": "its proof"})
    row = {"row": "step", "content": content} | prove(settings, content, device)
    release(device)
    if row["right"]:
        journal.add({"row": "begin", "unit": "the whole step", "candidate": "", "what": "its time"})
        row |= time(settings, content, device)
    journal.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
