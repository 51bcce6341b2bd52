"""Every kernel, compiled for sm_80, sm_90 and sm_100 in bf16 and fp16: no spills, and matrix units where they belong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

# Triton 3.6.0 spills eight bytes of two kernels: attention of odd sizes on sm_100, and log-mel features on sm_80.
SPILLED_BYTES = 8 if triton.__version__ == "3.6.0" else 0

#: kernels whose products must run on the matrix units
MATRIX_KERNELS: set[str] = {
    "attention_forward_kernel",
    "attention_backward_kernel",
    "contrastive_tile_kernel",
    "contrastive_backward_kernel",
    "log_mel_fbank_kernel",
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("aot.py")
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_kernels_compile_without_spills(rows):
    assert {row["capability"] for row in rows} == {80, 90, 100}
    failures = [row for row in rows if "error" in row or row["spilled_bytes"] > SPILLED_BYTES]
    assert not failures, "\n".join(map(str, failures))


def test_matrix_instructions(rows):
    # float32 products are exact ("ieee"), which no matrix unit offers
    compiled = [row for row in rows if row["kernel"] in MATRIX_KERNELS and not row["case"].endswith("fp32")]
    assert {row["kernel"] for row in compiled} == MATRIX_KERNELS
    failures = [row for row in compiled if not row["matrix"]]
    assert not failures, "\n".join(map(str, failures))
