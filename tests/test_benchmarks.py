"""The benchmarks' own code: what they count, what they refuse to time, and that a crash is recorded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import ENCODER, inputs
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    bench_operators,
    common,
    data,
    data_contenders,
    gpu_suite,
    render,
    retrieval,
    throughput,
    timing,
    trainer,
)
from benchmarks.suite import checks, races, steps
from benchmarks.suite.report import Report
from cavmae_fast import models as fast
from cavmae_fast.models import flops, presets
from cavmae_fast.ops import configuration, dispatch
from cavmae_fast.reference.cavmae import CAVMAE, CAVMAEFT
from cavmae_fast.reference.cavmae_parameters import MODES
from cavmae_fast.training.finetune import FineTuneTask

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
    model = throughput.MODELS["tiny"].system.create(plain=True)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randn(2, 64, 128), torch.randn(2, 3, 64, 64), contrast_loss_weight=0.01)
    similarity = 2 * 2 * 2 * model.norm.weight.numel()
    wanted = 2 * 2 * sum(flops.forward_macs(model, published=True).values()) + similarity
    assert counter.get_total_flops() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_flops_of_a_classifier_match_what_pytorch_counts(mode):
    model = CAVMAEFT(7, **ENCODER)
    audio, image = inputs(batch=1, dtype=torch.float32)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(audio, image, mode)
    assert counter.get_total_flops() == 2 * (flops.classifier_macs(model, mode) + model.mlp_head[-1].weight.numel())


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_a_fine_tuning_step_match_what_pytorch_counts(frozen):
    """But for the gradient of the inputs, which nobody needs and the convention counts."""
    model = CAVMAEFT(7, **ENCODER)
    audio, image = inputs(batch=1, dtype=torch.float32)
    task = FineTuneTask("multimodal", "bce", None, frozen)
    task.prepare(model)
    counter = FlopCounterMode(display=False)
    with counter:
        model(audio, image, "multimodal").sum().backward()
    projections = model.patch_embed_a, model.patch_embed_v
    of_inputs = 0 if frozen else sum(2 * one.num_patches * one.proj.weight.numel() for one in projections)
    assert counter.get_total_flops() == task.step_flops(fast.CAVMAEFT(7, **ENCODER)) - of_inputs


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
    class Wrong(presets.CAVMAE):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if fault == "loss":
                return output._replace(loss=1.01 * output.loss)
            return output._replace(loss=output.loss + (self.mask_token - self.mask_token.detach()).sum())  # the right loss

    monkeypatch.setattr(presets, "CAVMAE", Wrong)
    assert throughput.main([*TINY, "--variants", "sdpa,fast-torch", "--out", str(tmp_path)]) == 1
    assert "'fast-torch' gives losses" in capsys.readouterr().err
    rows = {row["name"]: row for row in only_record(tmp_path)["variants"]}
    assert rows["fast-torch"]["status"] == "wrong"
    assert "time" not in rows["fast-torch"]
    assert "time" in rows["sdpa"]


@pytest.mark.parametrize("model", ["tiny-v-mae", "tiny-mavil", "tiny-mavil-stage-2"])
def test_throughput_of_models_of_towers(tmp_path, model):
    """All variants compute the same step, in the second stage with the teacher's pass."""
    command = ["--device", "cpu", "--batch", "2", "--rounds", "1", "--steps", "1", "--model", model, "--out", str(tmp_path)]
    assert throughput.main([*command, "--variants", "published,sdpa,fast-torch", "--dtype", "fp32"]) == 0
    record = only_record(tmp_path)
    assert [row["status"] for row in record["variants"]] == ["ok"] * 3
    flops_of = record["flops_per_sample"]
    assert 0 < flops_of["useful"] < flops_of["published"]


def test_a_variant_that_crashes_is_recorded(tmp_path, monkeypatch):
    class Broken(presets.CAVMAE):
        def forward(self, *args, **kwargs):
            raise RuntimeError("no such kernel")

    monkeypatch.setattr(presets, "CAVMAE", Broken)
    assert throughput.main([*TINY, "--variants", "fast-torch,sdpa", "--out", str(tmp_path)]) == 1
    broken, good = only_record(tmp_path)["variants"]
    assert (broken["status"], broken["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert "Traceback" in broken["error"] and str(BENCHMARKS.parent) not in broken["error"]
    assert good["status"] == "ok"


def test_out_of_memory_is_recorded(tmp_path, monkeypatch):
    class Large(presets.CAVMAE):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(presets, "CAVMAE", Large)
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

    monkeypatch.setattr(gpu_suite, "SECTIONS", {"tune": crash, "steps": lambda report: report.add("rows", {})})
    arguments = ["--in-process", "--device", "cpu", "--tiny", "--sections", "tune,steps", "--out", str(tmp_path)]
    assert gpu_suite.main(arguments) == 1
    (folder,) = tmp_path.iterdir()
    crashed, good = (json.loads((folder / f"{name}.json").read_text()) for name in ("tune", "steps"))
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
    [
        ["--sections", "everything"],
        ["--batch", "0"],
        ["--operators", "attention,everything"],
        ["--call", "4"],
        ["--call", "1", "--sections", "tune"],
        ["--tuned", "no-such-folder"],
    ],
    ids=str,
)
def test_suite_usage_errors(arguments):
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2


# ------------------------------------------------------------------------------------------------------- the suite's calls


def test_the_sections_of_a_call_fit_into_its_time():
    """All together, at their limits: a section that is not begun is no data."""
    for names in gpu_suite.CALLS.values():
        assert sum(gpu_suite.LIMITS[name] for name in names) <= gpu_suite.BUDGET < 480
    assert [name for names in gpu_suite.CALLS.values() for name in names] == list(gpu_suite.SECTIONS)
    assert gpu_suite.LIMITS.keys() == gpu_suite.SECTIONS.keys()


def test_a_section_leaves_time_to_those_after_it(tmp_path, monkeypatch):
    """A section that could take all that is left does not take what the next ones of its call are given."""
    seen = {}

    def supervise(command, path, seconds, environment):
        seen[path.stem] = seconds
        return True

    monkeypatch.setattr(gpu_suite, "supervise", supervise)
    monkeypatch.setattr(gpu_suite, "_line", lambda path: "")
    assert gpu_suite.main(["--device", "cpu", "--tiny", "--call", "1", "--out", str(tmp_path)]) == 0
    later = sum(gpu_suite.LIMITS[name] for name in ("steps", "breakdown", "products"))
    assert seen["tune"] <= gpu_suite.BUDGET - later and list(seen) == list(gpu_suite.CALLS["1"])


CONTENDER = """
import json, os, pathlib, sys, time
from benchmarks.suite import contender
variant = sys.argv[sys.argv.index("--variant") + 1]
if variant == "fast":
    os.kill(os.getpid(), 9)
if variant == "fast-graph":
    time.sleep(600)
sys.exit(contender.main())
"""
"`fast` is killed, `fast-graph` hangs, `fast-torch` is as it is."


def test_a_contender_that_is_killed_costs_itself_alone(tmp_path, monkeypatch):
    path = tmp_path / "contender.py"
    path.write_text(CONTENDER)
    monkeypatch.setattr(steps, "CONTENDER_COMMAND", (sys.executable, str(path)))
    real = steps._contender

    def impatient(report, name, batch, seconds, content):
        return real(report, name, batch, 16.0 if name == "fast-graph" else seconds, content)

    monkeypatch.setattr(steps, "_contender", impatient)
    report = Report(tmp_path / "steps.json", "steps", torch.device("cpu"), True, 400.0, {"device": "cpu"})
    with pytest.raises(
        common.BenchmarkError, match=r"no time for fast at batch 2 \(crashed\), fast-graph at batch 2 \(timed out\)"
    ):
        steps.steps(report)
    rows = {v["name"]: v for step in json.loads(report.path.read_text())["steps"] for v in step["variants"]}
    assert rows["fast"]["status"] == "crashed" and "exit code -9" in rows["fast"]["reason"]
    assert rows["fast-graph"]["status"] == "timed out" and "16 s" in rows["fast-graph"]["reason"]
    assert rows["fast-torch"]["status"] == "ok" and rows["fast-torch"]["time"]["median_ms"] > 0
    assert "| fast | crashed |" in render.RENDERERS["steps"](json.loads(report.path.read_text()))


def test_the_tuner_as_a_section_and_its_files(tmp_path):
    """Cut off in the middle, and gone on with by the same command; few enough files, with names that travel."""
    arguments = ["--device", "cpu", "--tiny", "--sections", "tune", "--operators", "stream_linear,stream_layer_norm"]
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), *arguments, "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as running:
        while not any('"chosen"' in path.read_text() for path in tmp_path.glob("*/*.jsonl")):
            assert running.poll() is None
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "tune.json").read_text())
    assert record["status"] == "ok" and record["left"] == []
    assert [row["unit"].split(",")[0] for row in record["units"]] == ["stream_layer_norm", "stream_linear"]
    names = [path.name for path in folder.iterdir()]
    assert not any(name.endswith(".jsonl") for name in names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert len(names) + len(gpu_suite.CALLS["1"]) - 1 <= 8
    assert "| stream_linear, float32 |" in (folder / "README.md").read_text()


def test_no_call_leaves_more_files_than_travel():
    """A record for each section, README.md, and of `tune` the user's file, and the journal or the file that may ship."""
    assert all(len(names) + 1 + 2 * ("tune" in names) <= 8 for names in gpu_suite.CALLS.values())


@pytest.mark.parametrize("target", ["cpu", "sm_90 nvidia-h200"])
def test_choices_that_are_forced_into_the_whole_step(monkeypatch, target):
    """Beside what was tuned, whose other entries stay; in bfloat16 a CPU has none of the kernels."""
    device = torch.device("cpu") if target == "cpu" else torch.device("cuda", 0)
    monkeypatch.setattr(configuration, "target_of", lambda device: target)
    tuned = {"gather_tokens": {"bfloat16": "triton"}, "linear_gelu": {"bfloat16": "triton", "float16": "triton"}}
    with configuration.trial({"implementations": tuned, "launches": {}}):
        found = steps.forced_choices(device, torch.bfloat16)
        known = configuration.table(target)["launches"]
    assert set(found) == ({"side by side"} if target == "cpu" else {"side by side", "products", "one pass"})
    for content in found.values():
        assert content["implementations"]["gather_tokens"] == {"bfloat16": "triton"}
        assert content["implementations"]["linear_gelu"]["float16"] == "triton"
        for operator, entries in content["implementations"].items():
            assert set(entries.values()) <= dispatch.operators[operator]
    if target == "cpu":
        return
    assert found["products"]["implementations"]["linear_gelu"]["bfloat16"] == "triton product"
    assert found["products"]["launches"] == known
    launches = found["one pass"]["launches"]["attention_backward"]
    changed = {case for case, launch in launches.items() if known["attention_backward"].get(case) != launch}
    assert changed == {"bfloat16 short 64", "bfloat16 long 32"} and all(launches[case]["ONE_PASS"] for case in changed)
    assert found["one pass"]["implementations"]["attention"] == dict.fromkeys(changed, "triton")


def test_options_of_the_whole_step(tmp_path, monkeypatch):
    """Each is a contender of its own; a choice that is forced is said in its name, and handed to its process."""
    seen = []

    def contender(report, name, batch, seconds, content):
        seen.append((name, content))
        return {"settings": {}, "variants": [{"name": name, "status": "ok"}]}

    monkeypatch.setattr(steps, "_contender", contender)
    report = Report(tmp_path / "options.json", "options", torch.device("cpu"), True, 400.0, {"device": "cpu"})
    steps.options(report)
    names = [v["name"] for step in report.data["steps"] for v in step["variants"]]
    assert names[-1] == "fast, side by side" and set(names[:-1]) <= throughput.VARIANTS.keys()
    assert all((content is not None) == (name == "fast") for name, content in seen)


RACES = """
import json, sys, time
row = {"case": "decoder", "launch": {"OUTER": 64, "INNER": 64}, "repeats": 20, "other_bits": 0, "wrong": []}
print(json.dumps(row), flush=True)
print("a word in the end", flush=True)
%s
"""


@pytest.mark.parametrize(
    ("end", "status"), [("", "ok"), ("sys.exit(1)", "exit code 1"), ("time.sleep(60)", "timed out")], ids=str
)
def test_races_that_fail_or_hang_leave_their_rows(end, status):
    good, found = checks._races([sys.executable, "-c", RACES % end], 3.0)
    assert good == (status == "ok") and found["status"] == status
    assert found["rows"][0]["repeats"] == 20 and found["tail"] == "a word in the end"


def test_the_race_checker_is_asked_where_it_is_at_hand(tmp_path, monkeypatch):
    commands = []

    def run(command, seconds):
        commands.append(command)
        return True, {"status": "ok", "rows": [], "tail": ""}

    monkeypatch.setattr(checks, "_races", run)
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}")
    on_gpu = Report(tmp_path / "races.json", "races", torch.device("cuda", 0), False, 60.0, {"device": "a GPU"}, 256)
    checks.one_pass(on_gpu)
    plain, checker = commands
    assert plain[0] == sys.executable
    assert checker[:3] == ["compute-sanitizer", "--tool", "racecheck"] and checker[-2:] == ["--repeats", "1"]
    on_cpu = Report(tmp_path / "races.json", "races", torch.device("cpu"), True, 60.0, {"device": "a CPU"})
    checks.one_pass(on_cpu)
    assert len(commands) == 3 and on_cpu.data["checker"]["status"] == "not available"
    assert "The race checker: not available" in render.RENDERERS["races"](on_cpu.data)


def test_one_pass_again_and_again(capsys):
    assert races.main(["--device", "cpu", "--tiny", "--repeats", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"] for row in rows] == ["encoders", "decoder"]
    assert all(row["launch"]["ONE_PASS"] and not row["other_bits"] and not row["wrong"] for row in rows)


def test_one_pass_that_is_wrong_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(races, "check", lambda *args: {"other_bits": 1, "wrong": []})
    assert races.main(["--device", "cpu", "--tiny"]) == 1
    monkeypatch.setattr(races, "one_pass", lambda *args: [])
    assert races.main(["--device", "cpu", "--tiny"]) == 1  # nothing was tried


PYTESTS = """
import os, sys, time
words = " ".join(sys.argv)
if "gather" in words:
    os._exit(139)
if "scatter" in words:
    time.sleep(60)
print("1 passed" if "graph" not in words else "no tests ran")
sys.exit(0 if "graph" not in words else 5)
"""


def test_tests_of_each_operator_are_a_process_of_their_own(tmp_path, monkeypatch):
    script = tmp_path / "tests.py"
    script.write_text(PYTESTS)
    real = checks.processes.process
    monkeypatch.setattr(checks.processes, "process", lambda c, output: real([sys.executable, str(script), *c[3:]], output))
    monkeypatch.setattr(Report, "on_gpu", True)
    report = Report(tmp_path / "pytest.json", "pytest", torch.device("cpu"), True, 15.0, {"device": "cpu"})
    with pytest.raises(common.BenchmarkError, match="tests of gather_tokens, scatter_tokens failed or had no time"):
        checks.pytest(report)
    rows = {row["tests"]: row["status"] for row in report.data["pytest"]}
    assert rows["attention"] == rows["a step in a CUDA graph"] == rows["adam_update"] == "ok"
    assert (rows["gather_tokens"], rows["scatter_tokens"]) == ("exit code 139", "timed out")
    assert "| gather_tokens | exit code 139 |" in render.RENDERERS["pytest"](report.data)


# ------------------------------------------------------------------------------------------------------------ tools


def test_every_operator_has_a_benchmark():
    assert {case.operator for case, _ in bench_operators.CASES} == set(dispatch.operators)


def test_interleaved_times():
    device = torch.device("cpu")
    called = []
    times = timing.interleave({name: lambda name=name: called.append(name) for name in "ab"}, device, 3, 0.0)
    assert called == ["a", "a", "b", "b", *"ababab"]
    assert all(t["rounds"] == 3 and t["min_ms"] <= t["median_ms"] <= t["max_ms"] for t in times.values())


def test_device_names(monkeypatch):
    monkeypatch.setattr(configuration, "processor_name", lambda: "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz")
    assert common.device_name(torch.device("cpu")) == "cpu-intel-xeon-platinum-8488c-cpu-2-40ghz"
    monkeypatch.setattr(configuration, "_gpu_name", lambda index: "NVIDIA H200")
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
