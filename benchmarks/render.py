"""Tables of a device's folder, from the JSON files in it: writes `results/<device>/README.md`, and the results in
docs/learning.md and docs/mavil-learning.md.

python benchmarks/render.py [nvidia-h200 ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks import gradient_error, loss_curves
from benchmarks.common import RESULTS, number, percent, read_json, table
from benchmarks.evidence import mavil_report
from benchmarks.evidence.report import PAGE, page_with, rendered

Record = dict[str, Any]
ORDER = (
    "tune",
    "pytest",
    "throughput",
    "steps",
    "options",
    "races",
    "contenders",
    "breakdown",
    "products",
    "attention",
    "operators",
    "data",
    "learning",
    "mavil-learning",
    "loss_curves",
    "gradient_error",
)
TITLES = {
    "tune": "What was chosen on this device",
    "pytest": "Tests on this device",
    "throughput": "Full training step",
    "steps": "Full training step, ours",
    "options": "Full training step, ours, with one thing different",
    "races": "Attention's backward pass in one launch, again and again",
    "contenders": "Full training step by contender and batch size",
    "attention": "Attention",
    "operators": "Operators",
    "products": "Matrix products of the step",
    "breakdown": "Time by kernel of one step",
    "data": "Data",
    "learning": "Does it learn?",
    "mavil-learning": "What does each part of MAViL add?",
    "loss_curves": "Do cheaper steps train as well?",
    "gradient_error": "Gradients in bfloat16, beside the published model's own error",
}


PASSES = ("forward", "dx", "dw")


def step_table(result: Record) -> str:
    """Variants of one measurement of the training step."""
    published = {row["name"]: row for row in result["variants"]}.get("published", {}).get("samples_per_s")
    rows = []
    for row in result["variants"]:
        if row["status"] != "ok":
            rows.append([row["name"], row["status"], *["-"] * 7])
            continue
        time, peak, rate = row["time"], row["peak_bytes"], row["samples_per_s"]
        rows.append(
            [
                row["name"],
                row["dtype"],
                number(rate, 1 if rate < 100 else 0),
                f"{time['median_ms']:,.1f} ({time['min_ms']:,.1f}-{time['max_ms']:,.1f})",
                number(None if peak is None else peak / 1e9, 1),
                number(row["tflops"], 2 if row["tflops"] < 10 else 0),
                percent(row["gemm_share"]),
                f"{max(row['check']['loss_errors']):.0e}",
                "-" if published is None else f"{rate / published:.2f}x",
            ]
        )
    headings = [
        "variant",
        "dtype",
        "samples/s",
        "ms a step (spread)",
        "peak GB",
        "TFLOP/s",
        "of GEMM rate",
        "loss error",
        "to published",
    ]
    return table(headings, rows)


def _steps(record: Record) -> str:
    parts = []
    for result in record.get("steps", [record] if "variants" in record else []):
        settings = result["settings"]
        parts.append(f"Model {settings['model']}, batch {settings['batch']}:\n\n{step_table(result)}")
    return "\n\n".join(parts)


def _tune(record: Record) -> str:
    """For each unit what was chosen, and what became of the others."""
    rows, notes = [], []
    for unit in record.get("units", []):
        before, ms = unit["pytorch_ms"], unit["ms"]
        gain = "-" if before is None else f"{before / ms:.2f}x"
        rows.append([unit["unit"], unit["chosen"], _milliseconds(ms), _milliseconds(before), gain])
        notes += [f"- {unit['unit']}: {c['name']}: {c['status']}: {c['reason']}" for c in _not_right(unit)]
    headings = ["unit", "chosen", "ms per step", "PyTorch", "gain"]
    result = record.get("result", "")
    return "\n\n".join([table(headings, rows), f"{result[:1].upper()}{result[1:]}.", "\n".join(notes)]).strip()


def _not_right(unit: Record) -> list[Record]:
    return [candidate for candidate in unit["candidates"] if candidate["status"] != "right"]


def _milliseconds(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:,.3g}"


def _products(record: Record) -> str:
    """Rates of every product, forward and both backward."""
    rows = [
        [f"{r['product']} ({r['rows']:,} x {r['k']:,} x {r['n']:,})", *(number(r["tflops"][k], 1) for k in PASSES)]
        for r in record.get("products", [])
    ]
    return "TFLOP/s:\n\n" + table(["product", *PASSES], rows)


def _race(record: Record, key: str) -> str:
    """Contenders' times at each shape, forward and forward with backward, with ours' share of the bound."""
    rows, names = record.get(key, []), []
    for row in rows:
        names += [name for name in row["times"] if name not in names]
    parts = []
    for direction, title in (("forward", "Forward"), ("both", "Forward and backward")):
        body = []
        for row in rows:
            if not any(direction in times for times in row["times"].values()):
                continue
            label = f"{row['operator']} {row['case']}" if "operator" in row else f"{row['case']}, batch {row['batch']}"
            best = next((row["times"][n] for n in ("triton", "torch") if direction in row["times"].get(n, {})), {})
            floor = row["floors"][direction]
            cells = [_ms(row["times"].get(name, {}).get(direction)) for name in names]
            body.append([label, *cells, floor["bound"], percent(best.get(direction, {}).get("share"))])
        parts.append(f"{title}, microseconds:\n\n" + table(["shape", *names, "bound by", "ours, of the bound"], body))
    return "\n\n".join(parts)


def _ms(times: Record | None) -> str:
    return "-" if times is None else number(1e3 * times["median_ms"], 1)


def _breakdown(record: Record) -> str:
    if "kernels" not in record:
        return ""
    total = record["kernels_ms"]
    rows = [
        [f"`{k['name'][:90].replace('|', '/')}`", str(k["calls"]), number(k["ms"], 3), percent(k["ms"] / total)]
        for k in record["kernels"]
    ]
    text = (
        f"Batch {record['settings']['batch']}: {total:,.1f} ms in {record['launches']} launches, of a step of"
        f" {record['step_ms']:,.1f} ms; kernels not listed: {record['others_ms']:,.1f} ms."
    )
    return f"{text}\n\n" + table(["kernel", "calls", "ms", "share"], rows)


def _pytest(record: Record) -> str:
    rows = [[row["tests"], row["status"], row["summary"].replace("|", "/")] for row in record.get("pytest", [])]
    left = record.get("not_run")
    return table(["tests of", "result", "pytest's last line"], rows) + (f"\n\nNot run: {', '.join(left)}." if left else "")


def _races(record: Record) -> str:
    """Launches with how often other bits came, and what the race checker said."""
    rows = [
        [
            f"{r['case']}, {r['launch']['OUTER']} x {r['launch']['INNER']}",
            str(r["repeats"]),
            str(r["other_bits"]),
            *_wrong(r),
        ]
        for r in record.get("repeats", {}).get("rows", [])
    ]
    checker = record.get("checker", {})
    last = (checker.get("tail", "").strip().splitlines() or [""])[-1]
    text = table(["launch, keys x queries", "repeats", "with other bits", "wrong"], rows)
    return f"{text}\n\nThe race checker: {checker.get('status', 'not run')} ({last})."


def _wrong(row: Record) -> list[str]:
    return [", ".join(row["wrong"]) or "-"]


def data_tables(data: Record) -> str:
    """Stages, `prepare`, loaders and the wait while training."""
    parts = []
    if "after" in data.get("load", {}):
        before, after = data["load"]["before"], data["load"]["after"]
        parts.append(
            f"The machine's load average was {before:.1f} before and {after:.1f} after. More than 1 before means that other"
            " programs were running: then CPU times can be compared, and times by the clock and clips/s cannot."
        )
    if "stages" in data:
        rows = [
            [row["stage"], number(row["ms_per_clip"], 2), number(row.get("cpu_ms_per_clip"), 2)] for row in data["stages"]
        ]
        parts.append(table(["stage, one thread", "ms per clip", "CPU ms per clip"], rows))
    for row in data.get("prepare", []):
        rows = [[name, number(rate["clips_per_s"], 1)] for name, rate in row["rates"].items()]
        cost = 100 * row["cost_over_decoding"]
        text = f"`prepare` costs {cost:.1f} % more than decoding alone, on {row['workers']} workers:"
        parts.append(f"{text}\n\n" + table(["", "clips/s"], rows))
    if "host" in data:
        rows = [
            [
                r["loader"],
                number(r["clips_per_s"]),
                f"{r['min']:,.0f}-{r['max']:,.0f}",
                f"{r['to_published']:.2f}x",
                f"{r['cpu_ms_per_clip']:.2f}",
                f"{r['cpu_ms_min']:.2f}-{r['cpu_ms_max']:.2f}",
            ]
            for r in data["host"]
        ]
        headings = ["the host's work, no features", "clips/s", "spread", "to published", "CPU ms per clip", "spread"]
        parts.append(table(headings, rows))
    if "loaders" in data:
        rows = [
            [r["loader"], number(r["clips_per_s"]), f"{r['min']:,.0f}-{r['max']:,.0f}", f"{r['to_published']:.2f}x"]
            for r in data["loaders"]
        ]
        parts.append(table(["loader", "clips/s", "spread", "to published"], rows))
    if "wait" in data:
        rows = [
            [f"{r['loader']}, {r['model']}, batch {r['batch']}", number(r["clips_per_s"]), f"{100 * r['waited']:.1f} %"]
            for r in data["wait"]
        ]
        parts.append(table(["training from shards", "clips/s", "waiting for data"], rows))
    return "\n\n".join(parts)


RENDERERS: dict[str, Callable[[Record], str]] = {
    "tune": _tune,
    "contenders": _steps,
    "options": _steps,
    "races": _races,
    "products": _products,
    "pytest": _pytest,
    "throughput": _steps,
    "steps": _steps,
    "attention": lambda record: _race(record, "attention"),
    "operators": lambda record: _race(record, "operators"),
    "breakdown": _breakdown,
    "data": data_tables,
    "learning": rendered,
    "mavil-learning": mavil_report.rendered,
    "loss_curves": loss_curves.tables,
    "gradient_error": lambda record: gradient_error.report(record["rows"]),
}


def _source(path: Path, record: Record) -> str:
    """The line under a table that says where it came from."""
    p = record["provenance"]
    commit = (p["commit"] or "unknown")[:12] + (" with uncommitted changes" if p["dirty"] else "")
    parts = [f"commit {commit}", f"torch {p['torch']}", f"triton {p['triton']}"]
    if p["driver"]:
        parts.append(f"driver {p['driver']}")
    limits = record.get("ceilings")
    if limits:
        rates = ", ".join(f"{dtype} {rate:,.4g}" for dtype, rate in limits["gemm_tflops"].items())
        parts.append(f"measured here: products {rates} TFLOP/s, copy {limits['copy_gb_per_s']:,.0f} GB/s")
    return f"`{path.name}`, {p['date'][:10]}, `{p['command']}`: {'; '.join(parts)}."


def render(folder: Path) -> str:
    """Writes README.md into `folder` from the JSON files there, and returns its text."""
    records = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    known = sorted((r for r in records.items() if r[1].get("kind") in ORDER), key=lambda r: ORDER.index(r[1]["kind"]))
    device = next((record["provenance"]["device"] for _, record in known), folder.name)
    parts = [f"# {device}", "Written by `benchmarks/render.py` from the JSON files beside this one."]
    for path, record in known:
        parts.append(f"## {TITLES[record['kind']]}")
        if record.get("tiny") or record.get("settings", {}).get("model") == "tiny":
            parts.append("**A dry run at small shapes: the times mean nothing.**")
        if record.get("status", "ok") != "ok":
            parts.append(f"**{record['status']}**: {record.get('reason', '')}")
        parts += [RENDERERS[record["kind"]](record), _source(path, record)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "README.md").write_text(text)
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", help="folders of results (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder that holds the devices' folders")
    args = parser.parse_args(arguments)
    folders = [args.out / name for name in args.devices] or sorted(p for p in args.out.glob("*") if p.is_dir())
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder.name!r} is not among the results")
        render(folder)
        print(folder.name)
    if args.out == RESULTS:
        learned, parts = (
            {path.parent.name: read_json(path) for path in sorted(RESULTS.glob(f"*/{kind}.json"))}
            for kind in ("learning", "mavil-learning")
        )
        PAGE.write_text(page_with(PAGE.read_text(), learned))
        own = mavil_report.PAGE
        own.write_text(page_with(own.read_text(), parts, mavil_report.rendered, mavil_report.PICTURE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
