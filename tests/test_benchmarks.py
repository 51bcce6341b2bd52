"""The benchmarks' own code: what they count, what they refuse to time, and that a crash is recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, data, data_contenders, gpu_suite, prove, render, retrieval, throughput, timing, trainer
from benchmarks.suite import parity, proof
from benchmarks.suite.report import Options, Report
from cavmae_fast.models import flops
from cavmae_fast.ops import catalogue, configuration
from cavmae_fast.reference.cavmae import CAVMAE

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--device", "cpu", "--model", "tiny", "--batch", "2", "--rounds", "1"]
PROVENANCE = {"commit", "dirty", "date", "command", "device", "driver", "clocks", "torch", "triton", "cpu", "threads"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def only_record(folder: Path) -> dict:
    (path,) = folder.glob("*/*.json")
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------------------------- counts


def test_flops_of_vit_b():
    with torch.device("meta"):
        model = CAVMAE()
    parts = {name: macs / 1e9 for name, macs in flops.forward_macs(model).items()}
    assert flops.step_flops(model) == pytest.approx(229.5e9, rel=0.005)
    assert parts["encoders"] == pytest.approx(13.78 + 0.317, rel=0.005)  # products with weights, and attention
    assert parts["shared"] == pytest.approx(2.506 + 0.077, rel=0.005)
    assert parts["decoder"] == pytest.approx(17.354 + 3.978 + 0.070, rel=0.005)
    assert flops.step_flops(model, published=True) > 1.01 * flops.step_flops(model)


def test_flops_match_what_pytorch_counts():
    """The published count is what PyTorch's counter sees in a forward pass of the reference."""
    from torch.utils.flop_counter import FlopCounterMode

    model = CAVMAE(**throughput.MODELS["tiny"])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randn(2, 64, 128), torch.randn(2, 3, 64, 64), contrast_loss_weight=0.01)
    similarity = 2 * 2 * 2 * model.norm.weight.numel()
    wanted = 2 * 2 * sum(flops.forward_macs(model, published=True).values()) + similarity
    assert counter.get_total_flops() == pytest.approx(wanted, rel=1e-6)


# ------------------------------------------------------------------------------------------------------- throughput


def test_throughput_writes_times_with_provenance(tmp_path, capsys):
    command = [*TINY, "--variants", "published,sdpa,fast-torch,fast-graph", "--out", str(tmp_path)]
    assert throughput.main(command) == 0
    record = only_record(tmp_path)
    assert record["provenance"].keys() >= PROVENANCE
    assert str(tmp_path) not in json.dumps(record)
    rows = {row["name"]: row for row in record["variants"]}
    assert rows["fast-graph"]["status"] == "not available"
    for name in ("published", "sdpa", "fast-torch"):
        assert rows[name]["status"] == "ok"
        assert rows[name]["peak_bytes"] is None
        seconds = rows[name]["time"]["median_ms"] / 1e3
        assert rows[name]["samples_per_s"] == pytest.approx(2 / seconds)
        assert rows[name]["tflops"] == pytest.approx(2e-12 * record["flops_per_sample"]["useful"] / seconds)
    assert "| fast-torch | bf16 |" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_wrong_variant_is_not_timed(tmp_path, monkeypatch, capsys, fault):
    class Wrong(throughput.CAVMAE):
        def forward(self, *args, **kwargs):
            loss, *others = super().forward(*args, **kwargs)
            if fault == "loss":
                return 1.01 * loss, *others
            return loss + (self.mask_token - self.mask_token.detach()).sum(), *others  # the right loss

    monkeypatch.setattr(throughput, "CAVMAE", Wrong)
    assert throughput.main([*TINY, "--variants", "sdpa,fast-torch", "--out", str(tmp_path)]) == 1
    assert "'fast-torch' gives losses" in capsys.readouterr().err
    rows = {row["name"]: row for row in only_record(tmp_path)["variants"]}
    assert rows["fast-torch"]["status"] == "wrong"
    assert "time" not in rows["fast-torch"]
    assert "time" in rows["sdpa"]


def test_a_variant_that_crashes_is_recorded(tmp_path, monkeypatch):
    class Broken(throughput.CAVMAE):
        def forward(self, *args, **kwargs):
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(throughput, "CAVMAE", Broken)
    assert throughput.main([*TINY, "--variants", "fast-torch,sdpa", "--out", str(tmp_path)]) == 1
    broken, good = only_record(tmp_path)["variants"]
    assert (broken["status"], broken["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert "Traceback" in broken["error"] and str(BENCHMARKS.parent) not in broken["error"]
    assert good["status"] == "ok"


def test_out_of_memory_is_recorded(tmp_path, monkeypatch):
    class Large(throughput.CAVMAE):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(throughput, "CAVMAE", Large)
    assert throughput.main([*TINY, "--variants", "fast-torch", "--out", str(tmp_path)]) == 0
    assert only_record(tmp_path)["variants"][0]["status"] == "out of memory"


@pytest.mark.parametrize(
    "arguments", [["--variants", "fastest"], ["--batch", "0"], ["--device", "tpu"], ["--device", "cuda:99"]], ids=str
)
def test_usage_errors(arguments):
    with pytest.raises(SystemExit) as stopped:
        throughput.main(arguments)
    assert stopped.value.code == 2


# ------------------------------------------------------------------------------------------------------------ suite


def test_a_crash_of_one_section_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def crash(report):
        report.add("rows", {"before": "the crash"})
        raise ZeroDivisionError("in a section")

    monkeypatch.setattr(gpu_suite, "SECTIONS", {"parity": crash, "steps": lambda report: report.add("rows", {})})
    arguments = ["--in-process", "--device", "cpu", "--tiny", "--sections", "parity,steps", "--out", str(tmp_path)]
    assert gpu_suite.main(arguments) == 1
    (folder,) = tmp_path.iterdir()
    crashed, good = (json.loads((folder / f"{name}.json").read_text()) for name in ("parity", "steps"))
    assert (crashed["status"], crashed["reason"]) == ("failed", "ZeroDivisionError: in a section")
    assert "in crash" in crashed["error"] and crashed["rows"] == [{"before": "the crash"}]
    assert good["status"] == "ok" and good["provenance"].keys() >= PROVENANCE
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("import os, sys; print('a fault', file=sys.stderr, flush=True); os._exit(7)", "crashed", "exit code 7"),
        ("import time; time.sleep(60)", "timed out", "more than 2 s"),
    ],
)
def test_a_section_whose_process_dies(tmp_path, code, status, reason):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"kind": "steps", "status": "running", "steps": ["a row"]}))
    assert not gpu_suite.supervise([sys.executable, "-c", code], path, 2.0, {})
    record = json.loads(path.read_text())
    assert record["status"] == status and reason in record["reason"] and record["steps"] == ["a row"]
    assert ("a fault" in record["error"]) == (status == "crashed")


def test_one_section_as_a_process_and_its_table(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--device", "cpu", "--tiny", "--sections", "breakdown"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert only_record(tmp_path)["status"] == "ok"
    (readme,) = tmp_path.glob("*/README.md")
    assert "Time by kernel of one step" in readme.read_text()
    assert "dry run" in readme.read_text()


@pytest.mark.parametrize(
    "arguments",
    [["--sections", "everything"], ["--batch", "0"], ["--operators", "attention,stream_linear"], ["--write-proven"]],
    ids=str,
)
def test_suite_usage_errors(arguments):
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2


# ----------------------------------------------------------------------------------------------------------- parity

PLANTED = """
import ctypes, time
import torch
from benchmarks.suite import proof
from cavmae_fast.ops import catalogue, gather_tokens

def wrong_in_fp32(*inputs):
    y = gather_tokens(*inputs)
    return y * 1.01 if y.dtype == torch.float32 else y

def crashes(*inputs):
    ctypes.string_at(0)

def hangs(*inputs):
    time.sleep(600)

small = catalogue.small()
faults = {"gather_tokens": wrong_in_fp32, "scatter_tokens": crashes, "contrastive_loss": hangs}
for case in small:
    if case.operator in faults:
        object.__setattr__(case, "ours", faults[case.operator])
catalogue.small = lambda: small
raise SystemExit(proof.main())
"""
"An operator that is wrong in fp32 alone, one that crashes its process and one that hangs."


@pytest.fixture
def configurations(tmp_path, monkeypatch):
    """The configuration files, copied where marks can be written."""
    folder = tmp_path / "configs"
    shutil.copytree(configuration.FOLDER, folder)
    monkeypatch.setattr(configuration, "FOLDER", folder)
    configuration.table.cache_clear()
    yield folder
    configuration.table.cache_clear()


def marks(folder: Path) -> dict:
    return json.loads((folder / "sm_90.json").read_text())["implementations"]


@pytest.mark.slow
def test_one_fault_costs_no_other_operator_its_proof(tmp_path, monkeypatch, configurations):
    """Four operators, three of them broken: what is right is marked, what is wrong loses its mark, what timed out keeps
    it; and the section goes on to the end."""
    for operator in ("gather_tokens", "scatter_tokens", "contrastive_loss"):
        configuration.mark_proven("sm_90", operator, torch.float32)
    operators = ["contrastive_loss", "scatter_tokens", "gather_tokens", "stream_layer_norm"]
    command_of, watch = parity.command_of, parity.watch

    def planted(job, report):
        return [sys.executable, "-c", PLANTED, *command_of(job, report)[3:]]

    def impatient(command, seconds, found):  # with the one that hangs: on a busy machine the others need their time
        return watch(command, 4.0 if "contrastive_loss" in command else seconds, found)

    monkeypatch.setattr(parity, "command_of", planted)
    monkeypatch.setattr(parity, "watch", impatient)
    monkeypatch.setattr(parity, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(parity, "at_a_time", lambda device: 2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = Options(2, operators, prove=True)
    report = Report(tmp_path / "parity.json", "parity", torch.device("cpu"), True, 400.0, {}, options)
    with pytest.raises(common.BenchmarkError, match=r"gather_tokens in fp32 \(wrong\)"):
        parity.run(report)

    record = json.loads(report.path.read_text())
    status = {(p["operator"], p["dtype"]): p["status"] for p in record["proofs"]}
    assert {key: value for key, value in status.items() if key[1] != "bf16"} == {
        ("stream_layer_norm", "fp16"): "right",
        ("stream_layer_norm", "fp32"): "right",
        ("gather_tokens", "fp16"): "right",
        ("gather_tokens", "fp32"): "wrong",
        ("scatter_tokens", "fp16"): "crashed",
        ("scatter_tokens", "fp32"): "crashed",
        ("contrastive_loss", "fp16"): "timed out",
        ("contrastive_loss", "fp32"): "timed out",
    }
    assert set(status.values()) == {"right", "wrong", "crashed", "timed out", "not tried"}  # bf16, in the interpreter
    assert marks(configurations) == {
        "contrastive_loss": {"float32": "triton"},
        "gather_tokens": {"float16": "triton"},
        "stream_layer_norm": {"float16": "triton", "float32": "triton"},
    }
    reasons = {(p["operator"], p["dtype"]): p.get("reason", "") for p in record["proofs"]}
    assert "output 0 is off by 1.0e-02" in reasons["gather_tokens", "fp32"]
    assert "exit code -11" in reasons["scatter_tokens", "fp16"] and "more than" in reasons["contrastive_loss", "fp16"]


def test_a_mark_is_written_as_soon_as_its_proof_ends(tmp_path, monkeypatch, configurations):
    """What comes later, here the death of the whole section, takes nothing back."""
    seen = []

    def watch(command, seconds, found):
        dtype = command[command.index("--dtype") + 1]
        seen.append((dtype, marks(configurations)))
        if dtype == "fp32":
            raise KeyboardInterrupt
        found({"operator": "gather_tokens", "dtype": dtype, "case": "some", "right": True})
        return 0, ""

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(parity, "watch", watch)
    monkeypatch.setattr(parity, "architecture_of", lambda device: "sm_90")
    options = Options(2, ["gather_tokens"], prove=True)
    report = Report(tmp_path / "parity.json", "parity", torch.device("cpu"), True, 400.0, {}, options)
    with pytest.raises(KeyboardInterrupt):
        parity.run(report)
    bf16 = {"gather_tokens": {"bfloat16": "triton"}}
    both = {"gather_tokens": {"bfloat16": "triton", "float16": "triton"}}
    assert seen == [("bf16", {}), ("fp16", bf16), ("fp32", both)]
    assert marks(configurations) == both
    assert [p["status"] for p in json.loads(report.path.read_text())["proofs"]] == ["right", "right"]


def test_bf16_comes_first_and_models_last():
    order = parity.jobs()
    dtypes = [job.dtype for job in order]
    assert dtypes == sorted(dtypes, key=["bf16", "fp16", "fp32", None].index)
    assert [job.model for job in order[-2:]] == ["CAVMAE", "CAVMAEFT"]
    assert parity.Job("log_mel_fbank", "fp32") in order and parity.Job("log_mel_fbank", "bf16") not in order


def test_jobs_that_do_not_fit_into_the_time_are_not_run(tmp_path):
    report = Report(tmp_path / "parity.json", "parity", torch.device("cpu"), True, 1.0, {}, Options(2, ["attention"]))
    with pytest.raises(common.BenchmarkError, match=r"attention in fp32 \(not run\)"):
        parity.run(report)
    assert "operators" not in report.data


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def compare(ours, reference, inputs, baseline):
        tried.append(inputs[1].shape[0])
        if len(tried) < 3:
            raise torch.OutOfMemoryError("too much")
        return []

    monkeypatch.setattr(proof.parity, "compare", compare)
    rows = []
    monkeypatch.setattr(catalogue, "pretraining", lambda batch: [catalogue.calls.gather("some", batch, 11, 5, 8)])
    monkeypatch.setattr(catalogue, "variants", lambda batch: [])
    proof.prove_operator("gather_tokens", "fp16", 64, False, torch.device("cpu"), rows.append)
    assert [(row["case"], row["batch"], row["right"]) for row in rows] == [("some", 16, True), ("some", None, True)]
    assert tried == [64, 32, 16, 2]
    tried.clear()
    rows.clear()
    proof.prove_operator("gather_tokens", "fp16", 8, False, torch.device("cpu"), rows.append)
    assert [(row["right"], row["reason"]) for row in rows] == [(False, "OutOfMemoryError: too much")]


def test_pytorch_is_not_proven_in_the_place_of_a_kernel(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = []
    proof.prove_operator("gather_tokens", "fp16", 2, True, torch.device("cpu"), rows.append)
    assert [(row["right"], row["reason"]) for row in rows] == [(None, "the device is a CPU")]
    assert parity.verdict(0, 9.0, "", rows) == {"status": "not tried", "reason": "the device is a CPU"}


def test_parity_as_a_section_and_its_table(tmp_path):
    arguments = ["--device", "cpu", "--tiny", "--sections", "parity", "--operators", "gather_tokens"]
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = only_record(tmp_path)
    assert {(p["dtype"], p["status"]) for p in record["proofs"]} == {
        ("bf16", "not tried"),
        ("fp16", "right"),
        ("fp32", "right"),
    }
    assert record["architecture"] is None and all(row["repeats"] for row in record["operators"])
    (readme,) = tmp_path.glob("*/README.md")
    assert "| gather_tokens | **not tried** | 0." in readme.read_text()


def test_proven_operators(configurations):
    configuration.mark_proven("sm_90", "attention", torch.bfloat16)
    configuration.mark_proven("sm_90", "scatter_tokens", torch.float32)
    configuration.mark_proven("sm_90", "linear_gelu", torch.bfloat16, "cuda")
    proofs = [
        {"operator": "attention", "dtype": "bf16", "status": "crashed"},
        {"operator": "linear_gelu", "dtype": "bf16", "status": "right"},
        {"operator": "gather_tokens", "dtype": "fp16", "status": "right"},
        {"operator": "scatter_tokens", "dtype": "fp32", "status": "timed out"},
        {"model": "CAVMAE", "status": "right"},
    ]
    record = {"kind": "parity", "architecture": "sm_90", "proofs": proofs, "tiny": False}
    assert prove.update(record) == ["linear_gelu in bf16", "gather_tokens in fp16"]
    assert marks(configurations) == {
        "gather_tokens": {"float16": "triton"},
        "linear_gelu": {"bfloat16": "cuda"},
        "scatter_tokens": {"float32": "triton"},
    }


@pytest.mark.parametrize("change", [{"architecture": None}, {"tiny": True}, {"kind": "steps"}, {"proofs": []}], ids=str)
def test_a_dry_run_proves_nothing(configurations, change):
    proofs = [{"operator": "attention", "dtype": "bf16", "status": "right"}]
    record = {"kind": "parity", "architecture": "sm_90", "proofs": proofs, "tiny": False}
    with pytest.raises(common.BenchmarkError, match="proves nothing"):
        prove.update(record | change)
    assert marks(configurations) == {}


# ------------------------------------------------------------------------------------------------------------ tools


def test_interleaved_times():
    device = torch.device("cpu")
    called = []
    times = timing.interleave({name: lambda name=name: called.append(name) for name in "ab"}, device, 3, 0.0)
    assert called == ["a", "a", "b", "b", *"ababab"]
    assert all(t["rounds"] == 3 and t["min_ms"] <= t["median_ms"] <= t["max_ms"] for t in times.values())


def test_device_names(monkeypatch):
    monkeypatch.setattr(common, "processor_name", lambda: "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz")
    assert common.device_name(torch.device("cpu")) == "cpu-intel-xeon-platinum-8488c-cpu-2-40ghz"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert common.device_name(torch.device("cuda", 0)) == "nvidia-h200"


def test_a_written_file_is_whole(tmp_path):
    path = tmp_path / "folder" / "record.json"
    common.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_render_refuses_an_unknown_device(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        render.main(["no-such-device", "--out", str(tmp_path)])
    assert stopped.value.code == 2


# ------------------------------------------------------------------------------------------------------------- data


def test_data_writes_every_section(tmp_path, capsys):
    command = ["--device", "cpu", "--tiny", "--clips", "6", "--batch", "3", "--workers", "1", "--rounds", "1"]
    assert data.main([*command, "--out", str(tmp_path)]) == 0
    record = only_record(tmp_path)
    assert record["status"] == "ok" and record["tiny"] and record["provenance"].keys() >= PROVENANCE
    assert str(tmp_path) not in json.dumps(record)
    rates = {row["loader"]: row for row in record["loaders"]}
    assert rates["published way"]["to_published"] == 1.0
    assert {"torch, shards", "torch, published layout", "torch, videos"} <= rates.keys()
    for row in rates.values():
        assert row["to_published"] == pytest.approx(row["clips_per_s"] / rates["published way"]["clips_per_s"])
    host = {row["loader"]: row for row in record["host"]}
    assert {"published way", "torch, shards", "DataLoader, shards"} <= host.keys()
    assert all(0 < row["cpu_ms_min"] <= row["cpu_ms_per_clip"] <= row["cpu_ms_max"] for row in host.values())
    (prepared,) = record["prepare"]
    alone, whole = (prepared["rates"][name]["clips_per_s"] for name in ("decoding alone", "prepare"))
    assert prepared["cost_over_decoding"] == pytest.approx(alone / whole - 1)
    assert len(record["stages"]) == 10 and all(row["ms_per_clip"] > 0 for row in record["stages"])
    assert all(0 <= row["waited"] <= 1 and row["clips_per_s"] > 0 for row in record["wait"])
    text = capsys.readouterr().out
    assert "| torch, shards |" in text and "more than decoding alone" in text
    assert "**A dry run at small shapes" in next(tmp_path.glob("*/README.md")).read_text()


def test_the_published_way_gives_our_features(tmp_path):
    """What is timed against our loader computes the same: image and, but for noise and roll, spectrogram."""
    from media_sets import write_published

    from cavmae_fast.data.loader import Loader
    from cavmae_fast.data.media.synthetic import generate_clips

    videos, _ = generate_clips(tmp_path / "clips", num_train=3, num_test=1, seconds=2.0, size=224)
    listed = write_published(tmp_path / "p", videos, size=224)
    dataset = data_contenders.PublishedDataset(listed)
    (batch,) = Loader(listed, 3, workers=0, normalize_images=True)
    for row, entry in enumerate(dataset.rows):
        features = (dataset.fbank(dataset.base / entry["wav"]) + 5.081) / 4.4849
        torch.testing.assert_close(batch.audio[row], features, atol=1e-3, rtol=0)
        image = dataset.image(dataset.base / "frame_5" / f"{entry['video_id']}.jpg")
        torch.testing.assert_close(batch.image[row], image, atol=1e-5, rtol=0)


def test_a_data_loader_over_shards_gives_our_batches(tmp_path):
    """What is timed against our worker processes hands out the same frames and sounds, epoch after epoch."""
    from media_sets import write_shards

    from cavmae_fast.data.loader import Loader
    from cavmae_fast.data.media.synthetic import generate_clips

    generate_clips(tmp_path / "clips", num_train=5, num_test=1, seconds=0.5, size=64)
    shards = write_shards(tmp_path / "shards", tmp_path / "clips")
    ours, theirs = (Loader(shards, 2, training=True, workers=1) for _ in range(2))
    data_contenders.with_data_loader(theirs, 2)
    for _ in range(2):
        pairs = list(zip(ours, theirs, strict=True))
        assert len(pairs) == 3
        for one, other in pairs:
            assert one.ids == other.ids
            assert torch.equal(one.image, other.image) and torch.equal(one.audio, other.audio)
    ours.close()
    theirs.close()


# -------------------------------------------------------------------------------------------------------- retrieval


def test_retrieval_agrees_with_the_published_way(tmp_path, capsys):
    arguments = ["--device", "cpu", "--sizes", "60", "150", "--width", "16", "--threads", "1", "--out", str(tmp_path)]
    assert retrieval.main(arguments) == 0
    record = only_record(tmp_path)
    assert record.keys() >= PROVENANCE
    assert [row["clips"] for row in record["sizes"]] == [60, 150]
    assert record["sizes"][0]["published_seconds"] > 0 and "published_seconds" not in record["sizes"][1]
    assert "| 150 |" in capsys.readouterr().out


def test_retrieval_that_disagrees_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retrieval, "published", lambda queries, candidates: {1: 0.0, 5: 0.0, 10: 0.0})
    assert retrieval.main(["--device", "cpu", "--sizes", "40", "--width", "8", "--out", str(tmp_path)]) == 1
    assert "R@k differ" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_trainers_cost_is_measured_turn_by_turn(tmp_path, monkeypatch, capsys):
    command = ["benchmarks/trainer.py", "--device", "cpu", "--batch", "2", "--rounds", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    trainer.main()
    (path,) = tmp_path.rglob("trainer-small-float32.json")
    result = json.loads(path.read_text())
    assert [len(turns) for turns in result["turns_ms"].values()] == [3, 3] and result["bare_ms"] > 0
    assert result["settings"] == {"model": "small", "clips": 2, "dtype": "float32", "steps": 1, "rounds": 3}
    assert "overhead" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--rounds", "1"])
    with pytest.raises(SystemExit):
        trainer.main()
    assert "--rounds is 1; it must be above 1" in capsys.readouterr().err
