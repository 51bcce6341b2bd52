"""Compiles what a launcher launches, for architectures that are not here: no GPU is needed.

`capture(function)` runs a launcher on CPU tensors with every kernel launch recorded instead of run: arguments, their
specialization (divisible by 16, equal to 1) and the launch options are exactly those of the real call.
`compile_launch(launch, capability)` compiles one of them and reads registers, spills, shared memory, matrix instructions and
the length of the main loop off the machine code. Kernels must be compiled ones: this file runs in a process of its own,
without TRITON_INTERPRET.

Run as a program it compiles the cases of `tests/ops/aot_cases.py` and prints one JSON line for each launch. All of it takes
a quarter of an hour, so a launch is read off the record beside this file where the same source was compiled before by the
same Triton, with the same options, for the same architecture. `aot_table.py` writes the record.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"Compute capability -> the shared memory that a block may have there."
CAPABILITIES = tuple(SHARED_KB)
RECORD = Path(__file__).with_name("aot_record.json")
"`key_of` a launch -> its `MEASURED`, in their order."
MEASURED = ("registers", "spilled_bytes", "instructions", "loops", "shared_bytes", "tma", "matrix")
"What is read off a compiled launch."
SINCE = {"quantize": 89, "fp8": 89, "fp8_product": 89}
"First word of a case -> the least capability that has its instructions."
MATRIX_INSTRUCTIONS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
"Those of the other capabilities are mma.sync."
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}
SHOWN = ("BLOCK_Q", "BLOCK_K", "OUTER", "INNER", "ON_FMA", "BLOCK_R", "BLOCK_N", "D", "num_warps", "num_stages", "maxnreg")
"Launch options that the report names."
POINTERS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


def capture(function: Callable[[], object]) -> list[tuple[JITFunction, tuple, dict]]:
    """The kernel launches `(kernel, args, kwargs)` that calling `function` makes; none is run."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        function()
    return launches


def source_of(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """The specialized source that Triton would compile for this launch, and the compiler options."""
    options = {k: v for k, v in kwargs.items() if k in OPTIONS}
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (value is not True and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            raise TypeError(f"argument {parameter.name} of {kernel.__name__} is {type(value).__name__}")
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def key_of(source: ASTSource, options: dict, capability: int) -> str:
    """Stands for all that the compiler's result depends on."""
    text = f"{source.hash()} {sorted(options.items())} {capability} {triton.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@functools.cache
def recorded() -> dict[str, dict[str, Any]]:
    """The record."""
    lines = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return {key: dict(zip(MEASURED, values, strict=True)) for key, values in lines.items()}


def record(rows: list[dict]) -> str:
    """What `recorded` reads, of the rows of all cases; those that did not compile are left out."""
    lines = {row["key"]: [row[name] for name in MEASURED] for row in rows if "error" not in row}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(lines[key])}" for key in sorted(lines)) + "\n}\n"


def compile_launch(
    launch: tuple[JITFunction, tuple, dict], capability: int, known: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> dict[str, Any]:
    """What becomes of one launch on `sm_<capability>`: `MEASURED`, taken from `known` where it is there."""
    source, options = source_of(*launch)
    key = key_of(source, options, capability)
    return {
        "kernel": launch[0].__name__,
        "capability": capability,
        "launch": {name: value for name, value in launch[2].items() if name in SHOWN},
        "key": key,
        **(known.get(key) or measured(source, options, capability)),
    }


def measured(source: ASTSource, options: dict, capability: int) -> dict[str, Any]:
    """`MEASURED`, of what is compiled now."""
    of_fp8 = any(str(kind).startswith("*fp8") for kind in source.signature.values())
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = machine_code(compiled.asm["cubin"]) | {
        "shared_bytes": compiled.metadata.shared,
        "tma": "cp.async.bulk.tensor" in compiled.asm["ptx"],
        "matrix": uses_matrix_units(compiled.asm["ptx"], capability, of_fp8),
    }
    return {name: found[name] for name in MEASURED}


def uses_matrix_units(ptx: str, capability: int, of_fp8: bool) -> bool:
    """Whether the code has matrix instructions, `of_fp8`: of 8-bit numbers in both factors."""
    found = re.findall(rf"{re.escape(MATRIX_INSTRUCTIONS.get(capability, 'mma.sync'))}\S*", ptx)
    if of_fp8 and capability == 100:  # the instruction's descriptor holds the types
        return any(".kind::f8f6f4" in text for text in found)
    if of_fp8:
        return any(len(re.findall(r"\.e[45]m[23]", text)) == 2 for text in found)
    return bool(found)


@functools.cache
def machine_code(cubin: bytes) -> dict[str, Any]:
    """What NVIDIA's tools read off the machine code: registers, spilled bytes, instructions, those of the main loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    loops, instructions = loops_of(code)
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["LOCAL"]) + int(found["STACK"]),
        "instructions": instructions,
        "loops": loops,
    }


def loops_of(code: str) -> tuple[list[tuple[int, int]], int]:
    """Of each loop that holds no other its instructions and how many of them are exponentials, the longest first; and the
    instructions of the whole kernel, in machine code as cuobjdump prints it."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", code)
    places = {int(address, 16): index for index, (address, _) in enumerate(lines)}
    loops = []
    for index, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and (first := places.get(int(jump[1], 16), index)) < index:  # to itself: the padding behind the end
            loops.append((first, index))
    innermost = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    counts = [(b - a + 1, sum("MUFU.EX2" in text for _, text in lines[a : b + 1])) for a, b in innermost]
    return sorted(counts, reverse=True), len(lines)


def compile_case(name: str, capability: int, anew: bool = False) -> list[dict]:
    """Every launch of the case `name`; an exception becomes a row with the key `error`. `anew`: none from the record."""
    from aot_cases import CASES

    rows, known = [], {} if anew else recorded()
    for launch in capture(lambda: CASES[name](f"sm_{capability}")):
        try:
            rows.append({"case": name, **compile_launch(launch, capability, known)})
        except Exception as error:  # reported as this case's failure
            text = f"{type(error).__name__}: {error}"[:2000]
            rows.append({"case": name, "kernel": launch[0].__name__, "capability": capability, "error": text})
    return rows


def by_chance(pairs: list[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """`count` of the pairs, others for every record."""
    text = RECORD.read_bytes()
    return sorted(pairs, key=lambda pair: hashlib.sha256(text + str(pair).encode()).digest())[:count]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from aot_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "cases", nargs="*", help="beginnings of names (default: all but those the tuner alone tries, 'offered')"
    )
    parser.add_argument("--anew", action="store_true", help="take nothing from the record")
    parser.add_argument("--sample", type=int, help="compile so many pairs of a case and an architecture alone, and anew")
    options = parser.parse_args()
    wanted = tuple(options.cases)
    names = [name for name in CASES if (name.startswith(wanted) if wanted else not name.startswith("offered"))]
    pairs = [(name, c) for name in names for c in CAPABILITIES if c >= SINCE.get(name.split("-")[0], 0)]
    if options.sample is not None:
        pairs = by_chance(pairs, options.sample)
    with ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(compile_case, *pair, options.anew or options.sample is not None) for pair in pairs]
        for job in jobs:
            for row in job.result():
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
