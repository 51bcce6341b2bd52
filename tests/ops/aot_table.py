"""docs/kernels.md: what the compiler makes of the kernels, a line for each at the shapes of a training step.

Run as a program it compiles what the record lacks, for all cases and architectures (a quarter of an hour for all of it),
and writes the page and the record anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import triton

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
CASES = (
    "attention-decoder-bf16",
    "attention-queries-bf16",
    "attention-shared-bf16",
    "attention-decoder-one-pass-bf16",
    "attention-encoders-one-pass-bf16",
    "stream_layer_norm-decoder-bf16",
    "stream_layer_norm-shared-bf16",
    "dgelu_bias-decoder-bf16",
    "dgelu_bias-encoder-bf16",
    "product-decoder-bf16",
    "quantize-hidden-bf16",
    "fp8-encoder-bf16",
    "fp8-decoder-bf16",
    "fp8_product-decoder-bf16",
    "tokens-decoder-bf16",
    "patches-bytes-bf16",
    "contrastive-1-bf16",
    "log_mel-int16",
    "adam_update-bf16",
)
SIZES = {
    "attention_forward_kernel": ("BLOCK_Q", "BLOCK_K"),
    "attention_backward_kernel": ("OUTER", "INNER"),
    "attention_one_pass_kernel": ("OUTER", "INNER"),
    "stream_layer_norm_forward_kernel": ("BLOCK_R", "D"),
    "stream_layer_norm_backward_kernel": ("BLOCK_R", "D"),
    "dgelu_bias_kernel": ("BLOCK_R", "BLOCK_N"),
}
"Kernel -> the two sizes whose product is the scores or elements of one pass of its loop."
LOOPS = {"attention_backward_kernel": 2}
"Kernel -> its longest loops that every score passes through, where it is not one."
HEAD = """# What the compiler makes of the kernels

Written by `python tests/ops/aot_table.py`, which compiles every kernel at the shapes of a training step, without a GPU, with
Triton {version}; a test compares this page with what is compiled. No number here is a measurement. In each column stand the
registers of a thread, the shared memory of a block in KB, and, where it is counted, the instructions that a thread executes
for each score or element (`i`): those of the main loop, or of the whole kernel where there is no loop; for attention, how
many of them are exponentials (`e`). `mma` marks products on matrix units; a dash, that an architecture lacks the kernel's
instructions. Several launches of one kernel in a case share a line, which holds the most of them.

Every score passes both loops of attention_backward, so their instructions are added. The cases `one-pass` are the launches
of attention's backward pass that the tuner tries in its place.

A block may have 163 KB of shared memory on sm_80, 99 on sm_86, sm_89 and sm_120, and 227 on sm_90 and sm_100
(`tests/ops/test_aot.py` asserts it). An architecture without launches of its own takes those of the nearest older one.

"""


def compiled(*words: str) -> list[dict]:
    """The rows that `aot.py` prints, called with `words`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), *words]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(run.stderr[-4000:])
    return [json.loads(line) for line in run.stdout.splitlines()]


def page(rows: list[dict]) -> str:
    """The page, from the rows of `CASES` among these."""
    capabilities = sorted({row["capability"] for row in rows})
    lines: dict[tuple[str, str], dict[int, list[dict]]] = {}
    for row in rows:
        if row["case"] in CASES:
            lines.setdefault((row["case"], row["kernel"]), {}).setdefault(row["capability"], []).append(row)
    text = [
        "| case | kernel | " + " | ".join(f"sm_{capability}" for capability in capabilities) + " |",
        "| --- | --- |" + " ---: |" * len(capabilities),
    ]
    for case, kernel in sorted(lines, key=lambda key: CASES.index(key[0])):
        found = lines[case, kernel]
        cells = [_cell(kernel, found[one]) if one in found else "-" for one in capabilities]
        text.append(f"| {case} | {kernel.removesuffix('_kernel')} | " + " | ".join(cells) + " |")
    return HEAD.format(version=triton.__version__) + "\n".join(text) + "\n"


def _cell(kernel: str, rows: list[dict]) -> str:
    """`registers, shared KB, instructions per element`, the most of each."""
    parts = [f"{max(row['registers'] for row in rows)} r", f"{max(row['shared_bytes'] for row in rows) / 1024:.0f} KB"]
    if kernel in SIZES:
        instructions, exponentials = (max(numbers) for numbers in zip(*map(per_element, rows)))
        parts.append(f"{instructions:.1f} i" + (f" {exponentials:.1f} e" if kernel.startswith("attention") else ""))
    return ", ".join(parts) + (" mma" if all(row["matrix"] for row in rows) else "")


def per_element(row: dict) -> tuple[float, float]:
    """Instructions of a thread for each score or element that it computes, and how many of them are exponentials."""
    first, second = (row["launch"][name] for name in SIZES[row["kernel"]])
    elements = first * second / (32 * row["launch"]["num_warps"])
    instructions = exponentials = 0.0
    for count, of_them in row["loops"][: LOOPS.get(row["kernel"], 1)] or [(row["instructions"], 0)]:
        # The assembler may have put two passes into one; then there are twice as many exponentials as scores.
        passes = max(1, round(of_them / elements)) if row["kernel"].startswith("attention") else 1
        instructions += count / (passes * elements)
        exponentials += of_them / (passes * elements)
    return instructions, exponentials


if __name__ == "__main__":
    from aot import RECORD, record

    everything = compiled()
    PAGE.write_text(page(everything))
    RECORD.write_text(record(everything))
