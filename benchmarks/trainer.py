"""What the trainer costs over the bare step: `fit` with all that a run records, against forward, backward and fused Adam.

    python benchmarks/trainer.py --device cpu --model small

Both train a model of their own, from the same weights, on the same batch, which is ready: what the data path costs is
measured in `data.py`. They take turns, step by step, in one process, because a machine that is shared drifts by more than
the difference; the overhead is the median of the ratios of neighboring steps. On a GPU turns are of `--steps` steps, so that
the host may run ahead as it does in a run. Writes `results/<device>/trainer-*.json`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.common import add_arguments, device_name, find_device, provenance, write_json
from benchmarks.timing import synchronize
from cavmae_fast.data.batches import Batch
from cavmae_fast.models import PRESETS
from cavmae_fast.models.precision import DTYPES, Precision
from cavmae_fast.training.fit import fit
from cavmae_fast.training.metrics import JsonLines
from cavmae_fast.training.pretrain import PretrainTask
from cavmae_fast.training.progress import Progress
from cavmae_fast.training.recipes import PRETRAINING
from cavmae_fast.training.run_config import LOG_EVERY_ON_GPU
from cavmae_fast.training.state import RunState

MODELS = {"small": "small", "base": "cav-mae-base"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 3


class SameBatch:
    """A loader that gives one ready batch for ever."""

    waited = 0.0
    epoch_done = False

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch


def ready_batch(spec: Any, clips: int, device: torch.device) -> Batch:
    """Random clips on the device, as the loader gives them."""
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(clips, spec.audio_length, spec.mel_bins, generator=generator)
    image = torch.randint(0, 256, (clips, *spec.image_size, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)
    ids = [str(number) for number in range(clips)]
    return Batch(ids, audio.to(device), image.to(device), None, np.arange(clips), 0, 0, [])


def start(args: argparse.Namespace, device: torch.device) -> tuple[PretrainTask, RunState]:
    """The system's task, and a run of it before its first step; the same weights every time."""
    preset, recipe = PRESETS[MODELS[args.model]], PRETRAINING[MODELS[args.model]]
    task = PretrainTask(preset.mask_ratio, "unstructured", preset.mae_loss_weight, preset.contrast_loss_weight)
    torch.manual_seed(0)
    model = preset.create().to(device).train()
    task.prepare(model)
    batch = ready_batch(model.clip_spec, args.batch or recipe.batch_size, device)
    return task, RunState.start(model, recipe, SameBatch(batch), Precision(device, DTYPES[args.dtype]))


def bare_step(task: PretrainTask, state: RunState) -> None:
    """What nobody can do without."""
    with state.precision.autocast():
        loss = task.losses(state.model, state.loader.batch)["loss"]
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)


class Turns:
    """Lets the bare step have its turn after each turn of the trainer, and times both.

    One call of `fit` serves all turns, because what it does once per run is no step's cost: it calls `stepped` after every
    step, which does not return before the bare step has had its turn.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, bare: Callable[[], None], state: RunState) -> None:
        self.steps, self.rounds, self.clock = args.steps, args.rounds, CLOCKS[args.clock]
        self.device, self.bare, self.state = device, bare, state
        self.bare_ms: list[float] = []
        self.trainer_ms: list[float] = []
        self._begin = 0.0

    def stepped(self) -> None:
        done = self.state.step - WARM_UP
        if done < 0 or done % self.steps:
            return
        if done:
            self.trainer_ms.append(self._since())
        if done < self.rounds * self.steps:
            self._start()
            for _ in range(self.steps):
                self.bare()
            self.bare_ms.append(self._since())
        self._start()

    def _start(self) -> None:
        synchronize(self.device)
        self._begin = self.clock()

    def _since(self) -> float:
        """Milliseconds per step since `_start`."""
        synchronize(self.device)
        return (self.clock() - self._begin) * 1e3 / self.steps


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Milliseconds per step of both, turn by turn, and what the trainer costs over the bare step."""
    task, bare = start(args, device)
    _, trained = start(args, device)
    turns = Turns(args, device, lambda: bare_step(task, bare), trained)
    for _ in range(WARM_UP):
        bare_step(task, bare)
    total = WARM_UP + args.rounds * args.steps
    with (
        tempfile.TemporaryDirectory() as folder,
        JsonLines(Path(folder) / "metrics.jsonl") as metrics,
        Progress(total, 0, lambda row: f"loss {row['loss']:.3f} audio {row['loss_mae_a']:.3f}") as progress,
    ):

        def record(row: dict[str, Any]) -> None:
            metrics.write(row)
            progress.show(row)

        def stepped() -> None:
            progress.step()
            turns.stepped()

        log_every = LOG_EVERY_ON_GPU if device.type == "cuda" else 1
        fit(task, trained, total, record, log_every=log_every, stepped=stepped, cuda_graph=args.cuda_graph)
    ratios = [100 * (ours / theirs - 1) for theirs, ours in zip(turns.bare_ms, turns.trainer_ms, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    clips = len(trained.loader.batch.ids)
    return {
        "settings": {"model": args.model, "clips": clips, "dtype": args.dtype, "steps": args.steps, "rounds": args.rounds},
        "cuda_graph": args.cuda_graph,
        "clock": args.clock,
        "bare_ms": statistics.median(turns.bare_ms),
        "trainer_ms": statistics.median(turns.trainer_ms),
        "overhead_percent": statistics.median(ratios),
        "overhead_quartiles_percent": [low, high],
        "turns_ms": {"bare": turns.bare_ms, "trainer": turns.trainer_ms},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, help="clips per step; default: the recipe's")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--steps", type=int, help="steps per turn; default: 1 on a CPU, 50 on a GPU")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: time of this process alone, for a busy CPU and one thread"
    )
    parser.add_argument("--cuda-graph", choices=("off", "on"), default="off", help="of the trainer's step")
    args = parser.parse_args()
    device = find_device(parser, args.device)
    args.steps = args.steps or (50 if device.type == "cuda" else 1)
    for name in ("batch", "steps", "rounds"):
        if (value := getattr(args, name)) is not None and value < (2 if name == "rounds" else 1):
            parser.error(f"--{name} is {value}; it must be above {1 if name == 'rounds' else 0}")
    result = measure(args, device) | {"provenance": provenance(device, sys.argv, args.commit)}
    graph = "-graph" if args.cuda_graph == "on" else ""
    path = args.out / device_name(device) / f"trainer-{args.model}-{args.dtype}{graph}.json"
    write_json(path, result)
    low, high = result["overhead_quartiles_percent"]
    print(
        f"{args.model}, {result['settings']['clips']} clips, {args.dtype}: bare {result['bare_ms']:.1f} ms, trainer "
        f"{result['trainer_ms']:.1f} ms, overhead {result['overhead_percent']:.2f} % (quartiles {low:.2f} to {high:.2f})"
    )
    print(path)


if __name__ == "__main__":
    main()
