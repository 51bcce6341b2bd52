"""Time and memory of ranking N sounds and N pictures in both directions, beside the published way: loops in Python.

    python benchmarks/retrieval.py --sizes 1000 10000 100000 --threads 2

Embeddings are drawn at random, a video's being its sound's with noise, so that ranks are neither all first nor by chance. At
the smallest size the published way is run too, and R@k of both must agree before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    BenchmarkError,
    add_arguments,
    device_name,
    find_device,
    number,
    provenance,
    table,
    write_json,
)
from cavmae_fast.evaluation.ranking import rank_both
from cavmae_fast.evaluation.retrieval import TOP

NOISE = 6.0
"Of a video's embedding, times its sound's length: R@1 among 1,000 clips is then neither 0 nor 100 %."


def draw(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Matching rows `[count, width]` of unit length, made in place: no second copy raises the peak of memory."""
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(count, width, generator=generator)
    video = torch.randn(count, width, generator=generator)
    for x in (audio, video):
        x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))
    video.mul_(NOISE).add_(audio)
    video.div_(torch.linalg.vector_norm(video, dim=1, keepdim=True))
    return audio, video


def published(queries: np.ndarray, candidates: np.ndarray) -> dict[int, float]:
    """R@k in per cent as the published `retrieval.py` computes it: one dot product after the other, then a full sort."""
    count = len(queries)
    scores = np.empty((count, count))
    for i in range(count):
        for j in range(count):
            scores[i, j] = np.dot(queries[i], candidates[j]) / (np.linalg.norm(queries[i]) * np.linalg.norm(candidates[j]))
    order = np.sort(-scores, axis=1)
    found = np.where(order - np.diag(-scores)[:, None] == 0)[1]
    return {k: 100.0 * float((found < k).mean()) for k in TOP}


def agree(audio: Tensor, video: Tensor, ranks: tuple[Tensor, Tensor]) -> float:
    """Seconds of the published way for both directions. BenchmarkError unless its R@k are exactly those of `ranks`."""
    arrays = audio.numpy(), video.numpy()
    begin = time.perf_counter()
    theirs = published(*arrays), published(*arrays[::-1])
    seconds = time.perf_counter() - begin
    ours = tuple({k: 100.0 * float((rank <= k).double().mean()) for k in TOP} for rank in ranks)
    if ours != theirs:
        raise BenchmarkError(f"R@k differ: {ours} here, {theirs} by the published way")
    return seconds


def measure(count: int, width: int, device: torch.device, rounds: int) -> tuple[dict[str, Any], tuple]:
    """Times and peak memory of one size; the first round of the sizes that allow several warms up and is not counted."""
    embeddings = [x.to(device) for x in draw(count, width)]
    before = _peak(device)
    seconds, cpu_seconds = [], []
    for _ in range(rounds):
        begin, cpu = time.perf_counter(), time.process_time()
        ranks = rank_both(*embeddings)
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu)
    kept = seconds[1:] or seconds
    row = {
        "clips": count,
        "seconds": float(np.median(kept)),
        "rounds": kept,
        # Of all threads: what the work costs where other programs took their share of the time.
        "cpu_seconds": float(np.median(cpu_seconds[1:] or cpu_seconds)),
        "gflop_per_s": 2 * count * count * width / float(np.median(kept)) / 1e9,
        "bytes_beyond_embeddings": _peak(device) - before,
    }
    return row, (*embeddings, ranks)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="of sizes up to 20,000; larger ones are run once")
    options = parser.parse_args(arguments)
    if min(*options.sizes, options.width, options.threads, options.rounds) < 1:
        parser.error("--sizes, --width, --threads and --rounds must be 1 or more")
    device = find_device(parser, options.device)
    torch.set_num_threads(options.threads)
    command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    record: dict[str, Any] = {"benchmark": "retrieval", **provenance(device, command, options.commit)}
    record |= {"width": options.width, "load": {"before": os.getloadavg()[0]}, "sizes": []}
    path = options.out / device_name(device) / "retrieval.json"
    for count in sorted(options.sizes):
        row, found = measure(count, options.width, device, options.rounds if count <= 20_000 else 1)
        if not record["sizes"]:
            try:
                row["published_seconds"] = agree(*(x.cpu() for x in found[:2]), found[2])
            except BenchmarkError as error:
                print(error, file=sys.stderr)
                return 1
        record["sizes"].append(row)
    record["load"]["after"] = os.getloadavg()[0]
    write_json(path, record)
    rows = [
        [
            f"{row['clips']:,}",
            number(row["seconds"], 2),
            number(row["cpu_seconds"], 2),
            number(row["bytes_beyond_embeddings"] / 2**20),
            number(row["gflop_per_s"]),
            number(row.get("published_seconds"), 1),
        ]
        for row in record["sizes"]
    ]
    print(
        table(
            [
                "clips",
                "s, both directions",
                "CPU s, all threads",
                "MiB beyond the embeddings",
                "GFLOP/s",
                "s, published way",
            ],
            rows,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
