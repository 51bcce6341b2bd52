"""How fast data comes: every stage, `prepare` against decoding alone, the loaders against the published way, and the wait
while a model trains.

    python benchmarks/data.py                                # on generated clips
    python benchmarks/data.py --media FILE_OR_FOLDER ...     # on real ones
    python benchmarks/data.py --sections loaders --batch 48 --workers 2

All contenders of a section run on the same clips, interleaved, in one run; medians over `--rounds`. Writes
`results/<device>/data.json`; a run of some sections alone writes `data-SECTIONS.json`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout: nothing needs to be installed

from benchmarks.common import BenchmarkError, add_arguments, device_name, find_device, provenance
from benchmarks.data_contenders import (
    DecodeOnly,
    HostWork,
    PublishedDataset,
    PublishedHostWork,
    published_loader,
    with_data_loader,
)
from benchmarks.render import data_tables, render
from benchmarks.suite.report import Report
from benchmarks.timing import elapsed, synchronize
from cavmae_fast.data.commands.prepare import PrepareConfig, prepare
from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.workers import Job, Workers, default_count
from cavmae_fast.data.features import audio_features, image_features
from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.encoded import decode_image, decode_sound, encode_image, encode_sound
from cavmae_fast.data.media.files import read_clip
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.shards import ShardSet
from cavmae_fast.data.sets.sources import find_sources
from cavmae_fast.models import create_model

CPU = torch.device("cpu")
SECTIONS = ("stages", "prepare", "host", "loaders", "wait")


def published_layout(folder: Path) -> Path:
    """The list of the published layout of the clips in `folder/shards`: the same bytes, as files; made once."""
    listed = folder / "published" / "list.json"
    return listed if listed.exists() else export_published(ShardSet(folder / "shards"), listed.parent)


def export_published(shards: ShardSet, folder: Path) -> Path:
    """The published layout of the clips in shards: the same bytes, as files beside a JSON list."""
    (folder / "sound").mkdir(parents=True)
    rows = []
    for number_, record in enumerate(shards[i] for i in range(len(shards))):
        name = f"{number_:06d}"
        for k in range(shards.num_frames):
            _, encoded = record.read(k)
            path = folder / f"frame_{k}" / f"{name}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded.image)
        (folder / "sound" / f"{name}.flac").write_bytes(encoded.sound)
        rows.append({"video_id": name, "wav": f"sound/{name}.flac", "video_path": ".", "labels": ""})
    (folder / "list.json").write_text(json.dumps({"data": rows}))
    return folder / "list.json"


def clocked(run: Callable[[], int], device: torch.device) -> float:
    """Clips/s of `run`, which returns how many clips it went through."""
    begin = time.perf_counter()
    clips = run()
    synchronize(device)
    return clips / (time.perf_counter() - begin)


def cpu_seconds() -> float:
    """CPU time of this process and of all its children so far, those included that run on: what other programs on the
    machine do to the clock, they do not do to this."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            for task in Path(f"/proc/{child}/task").glob("*/schedstat"):
                total += int(task.read_text().split()[0]) / 1e9
    return total


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """The clips/s that each contender returns, one epoch per round, all in turn; the first round warms up and does not
    count."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, run in contenders.items():
            rate = run()
            if round_:
                rates[name].append(rate)
    return {
        name: {"clips_per_s": statistics.median(found), "min": min(found), "max": max(found), "rounds": rounds}
        for name, found in rates.items()
    }


def _rest(loader: Loader) -> None:
    loader.load_state_dict({**loader.state_dict(), "position": 0})


def stages(report: Report, listed: Path, folder: Path, options: argparse.Namespace) -> None:
    """Milliseconds per clip of each step of the work, in this process, on one thread: by the clock, and of CPU time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sources = [source.video for source in find_sources([listed])][:8]
    clips = [read_clip(path) for path in sources]
    jpegs, flacs = [encode_image(c.frames[5], 90) for c in clips], [encode_sound(c.waveform) for c in clips]
    shards = ShardSet(folder / "shards")
    records = [shards[i] for i in range(len(clips))]
    samples = max(len(c.waveform) for c in clips)
    waveform = torch.stack(
        [torch.nn.functional.pad(torch.from_numpy(c.waveform), (0, samples - len(c.waveform))) for c in clips]
    ).to(report.device)
    count = torch.tensor([len(c.waveform) for c in clips]).to(report.device)
    image = torch.stack([torch.from_numpy(c.frames[5]) for c in clips]).permute(0, 3, 1, 2).to(report.device)
    work: dict[str, tuple[Callable[[], object], torch.device]] = {
        "decode a video: 10 frames and sound": (lambda: [read_clip(path) for path in sources], CPU),
        "decode a video: 1 frame and sound": (lambda: [read_clip(path, frame=5) for path in sources], CPU),
        "encode 10 JPEG": (lambda: [encode_image(f, 90) for c in clips for f in c.frames], CPU),
        "encode FLAC": (lambda: [encode_sound(c.waveform) for c in clips], CPU),
        "read a clip from a shard, with checksums": (lambda: [record.read(5) for record in records], CPU),
        "decode JPEG": (lambda: [decode_image(data, 224, "") for data in jpegs], CPU),
        "decode FLAC": (lambda: [decode_sound(data, "") for data in flacs], CPU),
        "decode FLAC, with libFLAC": (lambda: [soundfile.read(io.BytesIO(data), dtype="int16") for data in flacs], CPU),
        "log-mel features, batched": (lambda: audio_features(waveform, count), report.device),
        "normalize images, batched": (lambda: image_features(image), report.device),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(options.rounds + 1):
        for name, (run, device) in work.items():
            cpu = time.process_time()
            found[name].append((elapsed(run, 1, device), 1e3 * (time.process_time() - cpu)))
    torch.set_num_threads(threads)
    for name, times in found.items():
        clock, cpu = (statistics.median(values) / len(clips) for values in zip(*times[1:], strict=True))
        report.add("stages", {"stage": name, "ms_per_clip": clock, "cpu_ms_per_clip": cpu})


def preparing(report: Report, listed: Path, folder: Path, options: argparse.Namespace) -> None:
    """`prepare` against the same decoding in the same number of processes, without anything else."""
    sources = find_sources([listed])

    def decode() -> int:
        with Workers(DecodeOnly(), options.workers) as workers:
            for item in enumerate(sources):
                workers.submit(Job([item]))
            while workers.wait():
                pass
        return len(sources)

    def whole() -> int:
        out = folder / "again"
        shutil.rmtree(out, ignore_errors=True)
        prepare(PrepareConfig(src=(str(listed),), out=out, workers=options.workers, shard_clips=100))
        return len(sources)

    contenders = {name: partial(clocked, run, CPU) for name, run in (("decoding alone", decode), ("prepare", whole))}
    rates = interleaved(contenders, options.rounds)
    cost = rates["decoding alone"]["clips_per_s"] / rates["prepare"]["clips_per_s"] - 1
    report.add("prepare", {"workers": options.workers, "rates": rates, "cost_over_decoding": cost})


def host(report: Report, listed: Path, folder: Path, options: argparse.Namespace) -> None:
    """What is left to the host where a GPU computes the features, by each loader: clips/s, and milliseconds of CPU time per
    clip, in all processes. Every contender hands out whole batches of a uint8 frame and int16 sound."""
    published, opened = published_layout(folder), []

    def ours(data: Path, backend: str, data_loader: bool = False) -> Callable[[], int]:
        # Not training: then nothing is decoded beyond the end of the epoch, and CPU time belongs to what was counted.
        loader = Loader(data, options.batch, backend=backend, workers=options.workers)
        loader.builder = HostWork()
        if data_loader:
            with_data_loader(loader, options.workers)
        opened.append(loader)
        return lambda: sum(len(batch.ids) for batch in loader)

    theirs = published_loader(PublishedHostWork(published), options.batch, options.workers)
    contenders = {
        "published way": lambda: sum(len(waveform) for waveform, _ in theirs),
        "torch, published layout": ours(published, "torch"),
        "torch, shards": ours(folder / "shards", "torch"),
        "DataLoader, shards": ours(folder / "shards", "torch", data_loader=True),
    }
    if dali.available() is None:
        contenders["dali, shards"] = ours(folder / "shards", "dali")
    cpu: dict[str, list[float]] = {name: [] for name in contenders}

    def epoch(name: str) -> float:
        cpu_before, begin = cpu_seconds(), time.perf_counter()
        clips = contenders[name]()
        seconds = time.perf_counter() - begin
        cpu[name].append(1e3 * (cpu_seconds() - cpu_before) / clips)
        return clips / seconds

    rates = interleaved({name: partial(epoch, name) for name in contenders}, options.rounds)
    for loader in opened:
        loader.close()
    base = rates["published way"]["clips_per_s"]
    for name, rate in rates.items():
        found = cpu[name][1:]
        times = {"cpu_ms_per_clip": statistics.median(found), "cpu_ms_min": min(found), "cpu_ms_max": max(found)}
        report.add("host", {"loader": name, **rate, **times, "to_published": rate["clips_per_s"] / base})


def loaders(report: Report, listed: Path, folder: Path, options: argparse.Namespace) -> None:
    """Clips/s of each loader in training on the same clips, with as many processes or threads: features included, on
    `--device`."""
    published = published_layout(folder)
    opened: list[Loader] = []

    def ours(data: Path, backend: str, data_loader: bool = False) -> Callable[[], float]:
        loader = Loader(data, options.batch, training=True, backend=backend, workers=options.workers, device=report.device)
        if data_loader:
            with_data_loader(loader, options.workers)
        opened.append(loader)

        def epoch() -> float:
            _rest(loader)  # nothing is decoded ahead when the clock starts
            rate = clocked(lambda: sum(len(batch.ids) for batch in loader), report.device)
            _rest(loader)  # and nothing goes on in the others' time
            return rate

        return epoch

    theirs = published_loader(PublishedDataset(published), options.batch, options.workers)
    contenders = {
        "published way": lambda: clocked(lambda: sum(len(audio) for audio, _ in theirs), report.device),
        "torch, published layout": ours(published, "torch"),
        "torch, shards": ours(folder / "shards", "torch"),
        "DataLoader, shards": ours(folder / "shards", "torch", data_loader=True),
        "torch, videos": ours(listed, "torch"),
    }
    if dali.available() is None:
        contenders["dali, published layout"] = ours(published, "dali")
        contenders["dali, shards"] = ours(folder / "shards", "dali")
    rates = interleaved(contenders, options.rounds)
    for loader in opened:
        loader.close()
    base = rates["published way"]["clips_per_s"]
    for name, rate in rates.items():
        report.add("loaders", {"loader": name, **rate, "to_published": rate["clips_per_s"] / base})


def wait(report: Report, listed: Path, folder: Path, options: argparse.Namespace) -> None:
    """Share of the time that a training loop waits for batches."""
    name = "cav-mae-base" if report.on_gpu else "small"
    batch, steps = (256, 40) if report.on_gpu else (16, 2 if options.tiny else 24)
    model = create_model(name).to(report.device).train()
    sizes = {"image_size": model.patch_embed_v.img_size[0], "audio_length": model.patch_embed_a.img_size[1]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    for backend in ("torch", "dali"):
        if backend == "dali" and dali.available() is not None:
            continue
        loader = Loader(
            folder / "shards",
            min(batch, options.clips),
            training=True,
            backend=backend,
            workers=options.workers,
            device=report.device,
            **sizes,
        )
        begin = waited = 0.0
        for step, one in enumerate(itertools.islice(_endless(loader), steps + 4)):
            if step == 4:  # caches and clocks are warm
                synchronize(report.device)
                begin, waited = time.perf_counter(), loader.waited
            with torch.autocast(report.device.type, torch.bfloat16):
                loss = model(one.audio, one.image)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(report.device)
        seconds = time.perf_counter() - begin
        loader.close()
        report.add(
            "wait",
            {
                "loader": backend,
                "model": name,
                "batch": loader.order.batch_size,
                "steps": steps,
                "clips_per_s": steps * loader.order.batch_size / seconds,
                "waited": (loader.waited - waited) / seconds,
            },
        )


def _endless(loader: Loader) -> Iterator[Any]:
    while True:
        yield from loader


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--media", nargs="*", default=[], help="media files or folders; default: generated clips")
    parser.add_argument("--clips", type=int, default=480, help="clips of an epoch; few files are repeated")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--workers", type=int, default=default_count(), help="processes, or threads of DALI")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--tiny", action="store_true", help="a dry run: few short clips; measures nothing")
    options = parser.parse_args(arguments)
    device = find_device(parser, options.device)
    chosen = options.sections.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--sections names {unknown[0]!r}; it must be of {', '.join(SECTIONS)}")
    if options.clips < options.batch or min(options.batch, options.workers, options.rounds) < 1:
        parser.error("--batch, --workers and --rounds must be 1 or more, and --clips no less than --batch")
    command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    # A run of some sections does not replace the record of all.
    part = "" if set(chosen) == set(SECTIONS) else f"-{'-'.join(chosen)}"
    path = options.out / device_name(device) / f"data{part}.json"
    report = Report(path, "data", device, options.tiny, 0.0, provenance(device, command, options.commit))
    report.data["settings"] = {name: getattr(options, name) for name in ("clips", "batch", "workers", "rounds")} | {
        "media": [Path(place).name for place in options.media] or "generated"
    }
    report.data["load"] = {"before": os.getloadavg()[0]}  # of the whole machine
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if options.media:
                files = [source.video for source in find_sources(options.media)]
            else:
                count, seconds = (4, 1.0) if options.tiny else (24, 10.0)
                files = generate_clips(folder / "clips", num_train=count, num_test=1, seconds=seconds, size=224)[0]
            listed = folder / "list.csv"
            repeated = itertools.islice(itertools.cycle(files), options.clips)
            listed.write_text("".join(f"{Path(file).resolve()}\n" for file in repeated))
            prepare(PrepareConfig(src=(str(listed),), out=folder / "shards", workers=options.workers, shard_clips=100))
            for section, run in zip(SECTIONS, (stages, preparing, host, loaders, wait), strict=True):
                if section in chosen:
                    run(report, listed, folder, options)
        except BenchmarkError as error:
            report.finish("failed", str(error))
            print(error, file=sys.stderr)
            return 1
    report.data["load"]["after"] = os.getloadavg()[0]
    report.finish("ok")
    render(path.parent)
    print(data_tables(report.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
