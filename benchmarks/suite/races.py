"""The attention backward pass in one launch, whose programs hand unfinished sums on through memory: again and again, with
the same bits, and under NVIDIA's race checker.

    python -m benchmarks.suite.races --batch 256                                            repeats at the decoder's shape
    compute-sanitizer --tool racecheck python -m benchmarks.suite.races --batch 1 --repeats 1

The checker sees hazards in shared memory alone. What passes through the L2 cache shows in the repeats: another order of
reads and writes gives other bits. Writes a JSON line for each launch that the tuner tries; the exit code is 1 where bits
differ or the gradients are wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.common import find_device
from cavmae_fast.ops import catalogue, configuration, dispatch, parity
from cavmae_fast.ops.attention_tiles import launch_key
from cavmae_fast.ops.catalogue import Case

CASES = ("attention-encoders", "attention-decoder")
REHEARSED = {"ONE_PASS": True, "OUTER": 32, "INNER": 16, "PER_SM": 3, "PEEL": True}
"A launch for the interpreter, for which none is offered."


def target_of(device: torch.device) -> str:
    return configuration.target_of(device) if device.type == "cuda" else configuration.INTERPRETED


def one_pass(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[configuration.Content]:
    """The launches by one pass that the tuner tries for the case, each as entries of the configuration."""
    queries, layout, _ = case.attention_of
    key = launch_key((*queries.lengths, *layout.lengths), case.head_width)
    entry = f"{configuration.name_of(dtype)} {key}"
    target = target_of(device)
    offered = configuration.alternatives("attention_backward", target, dtype, key)
    if device.type == "cpu":
        offered = [{**configuration.launch("attention_backward", target, dtype, key), **REHEARSED}]
    for options in offered:
        if options.get("ONE_PASS"):
            yield {
                "implementations": {"attention": {entry: "triton"}},
                "launches": {"attention_backward": {entry: dict(options)}},
            }


def check(
    case: Case, content: configuration.Content, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Whether the launch is right, and how many of `repeats` further runs gave other bits."""
    inputs = case.inputs(dtype, device)
    with dispatch.override("auto"), configuration.trial(content):
        results = parity.compare(case.ours, case.reference, inputs, baseline=case.baseline) if repeats > 1 else []
        wanted = case.ours(*inputs)
        cotangent = torch.ones_like(wanted)
        first = torch.autograd.grad(wanted, parity.leaves(inputs), cotangent)
        other = 0
        for _ in range(repeats):
            again = torch.autograd.grad(case.ours(*inputs), parity.leaves(inputs), cotangent)
            other += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (launch,) = content["launches"]["attention_backward"].values()
    wrong = [result.what for result in results if not result.right]
    return {"case": case.name, "launch": launch, "repeats": repeats, "other_bits": other, "wrong": wrong}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small shapes, in the interpreter")
    args = parser.parse_args(arguments)
    device = find_device(parser, args.device)
    dtype, sizes = (torch.float16, catalogue.TINY) if args.tiny else (torch.bfloat16, catalogue.BASE)
    rows: list[dict[str, Any]] = []
    for case in catalogue.pretraining(args.batch, sizes):
        for content in one_pass(case, device, dtype) if str(case) in CASES else ():
            rows.append(check(case, content, dtype, device, args.repeats))
            print(json.dumps(rows[-1]), flush=True)
    return 0 if rows and not any(row["other_bits"] or row["wrong"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
