"""The tuner: right and fast candidates are chosen, others cost themselves alone, and nothing found is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from cavmae_fast.errors import CavmaeError
from cavmae_fast.models import PRESETS, packed, towers
from cavmae_fast.models.systems import SYSTEMS, CAVMAESystem
from cavmae_fast.models.systems import inputs as clips_for
from cavmae_fast.ops import catalogue, configuration, dispatch
from cavmae_fast.ops.fp8 import Fp8Error
from cavmae_fast.tuning import plan, search
from cavmae_fast.tuning import tune as tuning
from cavmae_fast.tuning.config import TuneConfig
from cavmae_fast.tuning.journal import Journal
from cavmae_fast.tuning.plan import Settings, units
from cavmae_fast.tuning.processes import compile_parts
from cavmae_fast.tuning.tune import Lines, choices, closing, tune, verdict

ROOT = Path(__file__).resolve().parents[1]
PLANTED = (sys.executable, str(ROOT / "tests" / "planted_worker.py"))
ASKED = {"model": "tiny", "batch": "2", "dtype": "float32", "device": "cpu", "rounds": 3, "limit": 12.0}
UNIT = "gather_tokens, float32"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The user's files lie in a folder of the test; no kernels in the interpreter, which takes long."""
    monkeypatch.setenv(configuration.VARIABLE, str(tmp_path / "tuned"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("CAVMAE_OPS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    configuration.forget()
    yield tmp_path / "tuned"
    configuration.forget()


@pytest.fixture
def wins(monkeypatch):
    """The whole step is right and wins, without being run: it takes seconds."""
    seen = []

    def step(journal, content, settings, limit, show):
        seen.append(content)
        row = {"error": 0.0, "allowed": 1.0}
        return {"loss": row, "gradient": row, "right": True, "tuned": {"median_ms": 1.0}, "pytorch": {"median_ms": 2.0}}

    monkeypatch.setattr(tuning, "whole_step", step)
    return seen


def plant(monkeypatch, *names: str) -> None:
    monkeypatch.setenv("CAVMAE_PLANTED", ",".join(names))


def asked(**changes) -> TuneConfig:
    return TuneConfig(**(ASKED | {"operators": ("gather_tokens",)} | changes))


@pytest.fixture
def fast(monkeypatch):
    """Every unit's work is done at once: the form `e fast` of PyTorch's is right and fastest."""

    def work_off(journal, limit, deadline, found, worker):
        for unit in units(journal_settings(journal)):
            content = content_of(unit.operator, "e fast")
            row = {"row": "unit", "unit": unit.name, "chosen": "e fast", "content": content}
            journal.add(row | {"ms": 1.0, "pytorch_ms": 2.0, "candidates": []})

    monkeypatch.setattr(tuning, "work_off", work_off)


def journal_settings(journal: Journal) -> Settings:
    return Settings.from_json(journal.header["settings"])


def test_planted_faults(monkeypatch, folder, wins, capsys):
    """Wrong by little, crashing, hanging, raising, right and slow: the right and fast one is taken, and all are named."""
    plant(monkeypatch, "a wrong", "b crash", "c hang", "d slow", "e fast", "f raising")
    found = tune(asked(limit=8.0), worker=PLANTED, progress=Lines)
    (row,) = found["units"]
    status = {c["name"]: c["status"] for c in row["candidates"]}
    assert status == {
        "PyTorch": "right",
        "a wrong": "wrong",
        "b crash": "crashed",
        "c hang": "timed out",
        "d slow": "right",
        "e fast": "right",
        "f raising": "failed",
    }
    assert row["chosen"] == "e fast" and row["ms"] < row["pytorch_ms"]
    reasons = {c["name"]: c["reason"] for c in row["candidates"]}
    assert "off by" in reasons["a wrong"] and "exit code -6" in reasons["b crash"] and "8 s" in reasons["c hang"]
    assert "no such instruction" in reasons["f raising"]
    times = {c["name"]: c["ms"] for c in row["candidates"]}
    assert times["d slow"] > times["PyTorch"] > times["e fast"] and times["a wrong"] is None

    dispatch.operators["gather_tokens"].add("e fast")
    target = configuration.target_of(torch.device("cpu"))
    assert configuration.implementation(target, "gather_tokens", torch.float32) == "e fast"
    content = configuration.read(found["file"])
    assert found["file"].parent == folder and content["made_for"] == configuration.made_for(target)
    assert list(folder.iterdir()) == [found["file"]]  # the journal of a run that is done is gone
    assert "e fast" in capsys.readouterr().err
    assert "(2.00x)" in closing(asked(), found) and configuration.fingerprint("cpu") in closing(asked(), found)
    dispatch.operators["gather_tokens"].discard("e fast")


def test_a_run_cut_off_goes_on(monkeypatch, folder, wins):
    """The whole program dies in the middle; the same command goes on with what was found before."""
    options = ASKED | {"operators": ("scatter_tokens", "gather_tokens")}
    code = f"from cavmae_fast.tuning.tune import *\ntune(TuneConfig(**{options!r}), worker={PLANTED!r}, progress=Lines)"
    plant(monkeypatch, "cut off")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert died.returncode == -9
    (path,) = folder.glob("*.jsonl")
    before = path.read_text()
    assert (
        '"unit": "scatter_tokens, float32", "chosen"' in before
        and '"unit": "gather_tokens, float32", "chosen"' not in before
    )
    path.write_text(before + '{"row": "begin", "unit": "gat')  # as a writer leaves it that was killed

    seen = []
    plant(monkeypatch, "e fast")
    monkeypatch.setattr(tuning, "report", lambda row, show: seen.append((row["row"], row["unit"])))
    found = tune(asked(operators=("scatter_tokens", "gather_tokens")), worker=PLANTED, progress=Lines)
    assert {row["unit"]: row["chosen"] for row in found["units"]} == {
        "scatter_tokens, float32": "PyTorch",
        UNIT: "e fast",
    }
    assert {unit for _, unit in seen} == {UNIT}  # nothing is done twice
    assert not list(folder.glob("*.jsonl"))


def test_other_settings_begin_anew(folder):
    target = configuration.target_of(torch.device("cpu"))
    path = folder / "run.jsonl"
    first = Settings("tiny", 2, "float32", "cpu")
    journal = Journal(path, first, target)
    assert not journal.begin()
    journal.add({"row": "unit", "unit": "a"})
    assert Journal(path, first, target).begin() and list(Journal(path, first, target).finished()) == ["a"]
    other = Journal(path, Settings("tiny", 4, "float32", "cpu"), target)
    assert not other.begin() and not other.finished()


def test_time_that_runs_out_is_no_loss(monkeypatch, folder, wins):
    """What is not tried keeps PyTorch, is named, and is taken up by the same command."""
    plant(monkeypatch, "e fast")
    found = tune(asked(minutes=1e-6), worker=PLANTED, progress=Lines)
    assert found["left"] == [UNIT] and "not tried for lack of time" in closing(asked(), found)
    assert list(folder.glob("*.jsonl"))
    found = tune(asked(), worker=PLANTED, progress=Lines)
    assert found["left"] == [] and found["units"][0]["chosen"] == "e fast"


def test_a_worker_that_dies_without_a_culprit_is_an_error(monkeypatch, folder):
    with pytest.raises(plan.TuneError, match=r"tuning failed at the worker: its process ended with exit code 3") as error:
        tune(asked(), worker=(sys.executable, "-c", "import sys; sys.exit(3)"), progress=Lines)
    assert isinstance(error.value, CavmaeError) and error.value.exit_code == 1


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    """It is said before any work is done."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(configuration.VARIABLE, str(tmp_path / "file" / "tuned"))
    monkeypatch.setattr(tuning, "work_off", lambda *args: pytest.fail("work was begun"))
    with pytest.raises(plan.TuneError, match=r"cannot be written.*another folder by CAVMAE_TUNED"):
        tune(asked(), progress=Lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": "many"}, "batch is 'many'; it must be auto or a number of clips"),
        ({"batch": "0"}, "at least 1"),
        ({"device": "cuda:7"}, "device is 'cuda:7'; it must be"),
        ({"device": "mps"}, "it must be auto, cpu, cuda"),
        ({"operators": ("gather",)}, "operators has 'gather'; allowed: adam_update, attention,"),
        ({"minutes": 0.0}, "minutes is 0.0; it must be more than 0"),
    ],
)
def test_bad_options(changes, words):
    if changes.get("device", "").startswith("cuda") and torch.cuda.device_count() > 7:
        pytest.skip("it has that many GPUs")
    with pytest.raises(ValueError, match=words):
        tune(asked(**changes), progress=Lines)


# --------------------------------------------------------------------------------------------------------- whole step


def test_the_whole_of_it_at_a_tiny_size(folder):
    """Nothing planted, nothing stood in for: as CI runs it."""
    found = tune(TuneConfig(**(ASKED | {"operators": ("attention", "stream_layer_norm")})), progress=Lines)
    assert {row["unit"].split(",")[0] for row in found["units"]} == {"attention", "stream_layer_norm"}
    for row in found["units"]:
        assert all(c["status"] == "right" for c in row["candidates"]) and len(row["candidates"]) > 1
    assert found["step"]["right"] and found["file"].exists() and found["left"] == []
    assert configuration.read(found["file"])["measured"].keys() == {"tiny, batch 2, float32"}


def content_of(operator: str, form: str) -> dict:
    return {"implementations": {operator: {"float32": form}}, "launches": {}}


def run_step(folder, content: dict, monkeypatch, command=tuning.STEP) -> dict:
    target = configuration.target_of(torch.device("cpu"))
    settings = Settings("tiny", 2, "float32", "cpu", rounds=1)
    journal = Journal(folder / "run.jsonl", settings, target)
    journal.begin()
    monkeypatch.setattr(tuning, "STEP", command)
    return tuning.whole_step(journal, content, settings, 60.0, Lines(1, 0))


def test_a_whole_step_that_is_right(folder, monkeypatch):
    content = content_of("stream_layer_norm", "256 rows")
    step = run_step(folder, content, monkeypatch)
    assert step["right"] and step["loss"]["error"] <= step["loss"]["allowed"]
    assert step["tuned"]["rounds"] == step["pytorch"]["rounds"] == 1
    monkeypatch.setattr(tuning, "watch", lambda *args: pytest.fail("it was run again"))
    assert run_step(folder, content, monkeypatch) == step


def test_a_whole_step_that_is_wrong_is_not_kept(folder, monkeypatch):
    """An operator that is wrong only in the chain: here one that passed no proof."""
    planted = folder / "planted.py"
    folder.mkdir()
    planted.write_text(
        "import sys\nfrom cavmae_fast.ops import dispatch\nfrom cavmae_fast.tuning import step\n"
        "right = dispatch._implementations['scatter_tokens']['torch']\n"
        "dispatch.add_form('scatter_tokens', 'wrong', forward=lambda *args: right(*args) * 1.01)\n"
        "sys.exit(step.main())\n"
    )
    step = run_step(folder, content_of("scatter_tokens", "wrong"), monkeypatch, (sys.executable, str(planted)))
    kept, reason = verdict(step)
    assert not kept and "the whole step is wrong: loss is off by" in reason


def test_a_whole_step_that_crashes_is_not_kept(folder, monkeypatch):
    command = (sys.executable, "-c", "import os; os.abort()")
    kept, reason = verdict(run_step(folder, content_of("attention", "products"), monkeypatch, command))
    assert not kept and "the whole step crashed: its process ended with exit code -6" in reason


@pytest.mark.parametrize(("tuned", "kept"), [(90.0, True), (100.0, False), (110.0, False)])
def test_only_a_whole_that_wins_is_kept(monkeypatch, folder, fast, tuned, kept):
    row = {"error": 0.0, "allowed": 1.0}
    step = {"loss": row, "gradient": row, "right": True, "tuned": {"median_ms": tuned}, "pytorch": {"median_ms": 100.0}}
    monkeypatch.setattr(tuning, "whole_step", lambda *args: step)
    found = tune(asked(), progress=Lines)
    target = configuration.target_of(torch.device("cpu"))
    chosen = configuration.implementation(target, "gather_tokens", torch.float32)
    assert found["kept"] == kept and chosen == ("e fast" if kept else "torch")
    assert ("not kept" in closing(asked(), found)) != kept


def test_what_was_tuned_for_another_dtype_stays(folder, fast, wins):
    target = configuration.target_of(torch.device("cpu"))
    path = configuration.user_file(target)
    folder.mkdir()
    earlier = {"made_for": configuration.made_for(target), "measured": {"base, batch 8, bfloat16": {}}}
    earlier |= {"implementations": {"attention": {"bfloat16 long 32": "products"}}, "launches": {}}
    configuration.write(path, earlier)
    tune(asked(), progress=Lines)
    assert configuration.implementation(target, "attention", torch.bfloat16, "long 32") == "products"
    assert len(configuration.read(path)["measured"]) == 2


def test_a_damaged_file_is_made_anew(folder, fast, wins):
    """Runs that would take it say which file is damaged; tuning writes a whole one."""
    path = configuration.user_file(configuration.target_of(torch.device("cpu")))
    folder.mkdir()
    path.write_text("{")
    configuration.forget()
    with pytest.raises(configuration.ConfigurationError, match="cannot be read as JSON") as error:
        configuration.fingerprint("cpu")
    assert str(path) in str(error.value)
    tune(asked(), progress=Lines)
    assert configuration.read(path)["implementations"] == {"gather_tokens": {"float32": "e fast"}}


def test_export_is_what_ships(folder, fast, wins, tmp_path):
    tune(asked(export=tmp_path / "sm_90.json"), progress=Lines)
    content = configuration.read(tmp_path / "sm_90.json")
    assert content == {"implementations": {"gather_tokens": {"float32": "e fast"}}, "launches": {}}


# --------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("model", plan.MODELS)
def test_units_cover_a_training_step(model, dtype):
    found = units(Settings(model, 2, dtype, "cpu"))
    not_called = plan.NOT_IN_FP8 if dtype == "fp8" else plan.IN_FP8
    not_called = not_called | ({"contrastive_loss"} if model.endswith(("a-mae", "v-mae")) else set())
    assert {unit.operator for unit in found} == set(dispatch.operators) - not_called
    assert len({unit.name for unit in found}) == len(found)
    timed = [call for unit in found for call in unit.calls]
    calls = [call for call in plan.step_calls(model, 2) if call.case.operator not in not_called]
    assert sorted(str(c.case) for c in timed) == sorted(str(c.case) for c in calls)
    for unit in found:
        assert all(unit.dtype in case.dtypes for case in unit.proofs)
        assert len(unit.proofs) > len(unit.calls), f"{unit.name} is not proven at awkward shapes"
    assert get_args(get_type_hints(TuneConfig)["model"]) == tuple(plan.MODELS)
    if isinstance(system := plan.MODELS[model].system, CAVMAESystem):
        counted = plan.calls_per_step(system) | plan.fp8_calls_per_step(system)
        assert {name for name in counted if name.split("-")[0] not in not_called} <= {str(call.case) for call in timed}


@pytest.mark.parametrize("model", ["tiny-v-mae", "tiny-mavil", "tiny-mavil-stage-2"])
def test_calls_are_those_that_a_step_of_towers_makes(model, monkeypatch):
    """How often each operator is called, and on what: held against a real step, forward."""
    system = plan.MODELS[model].system
    seen: dict[str, list] = {}

    def watch(module, name: str, note) -> None:
        real = getattr(module, name)

        def watched(*args, **kwargs):
            seen.setdefault(name, []).append(note(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(packed, "attention", lambda qkv, layout, heads: (layout.batch, layout.lengths, qkv.shape[1] // 3, heads))
    watch(packed, "query_attention", lambda q, kv, wanted, layout, heads: (wanted.lengths, layout.lengths, heads))
    watch(towers, "embed_kept_patches", lambda images, ids, *_: (tuple(images.shape), ids if ids is None else ids.shape[1]))
    watch(towers, "distinct_tokens", lambda x, kept, *_: len(x))
    watch(packed, "scatter_distinct", lambda x, kept: len(kept))
    built = system.create()
    system.step_loss(built, *clips_for(built, 2))
    said = {str(call.case): (call.case, call.weight) for call in plan.step_calls(model, 2)}

    made: dict[tuple, float] = {}
    for name, (case, weight) in said.items():
        if case.attention_of is None:
            continue
        queries, layout, heads = case.attention_of
        if queries == layout:
            key = (layout.batch, layout.lengths, case.head_width * heads, heads)
        else:
            key = (queries.lengths, layout.lengths, heads)
        made[key] = made.get(key, 0) + weight * (3 if "teacher" in name else 1)
    calls = [*seen["attention"], *seen["query_attention"]]
    assert made == pytest.approx({key: calls.count(key) for key in calls})
    kept = [row for row in seen["embed_kept_patches"] if row[1] is not None]
    assert len(kept) == sum(weight for name, (_, weight) in said.items() if name.startswith("embed_kept_patches"))
    for function, operator in (("distinct_tokens", "distinct_tokens"), ("scatter_distinct", "scatter_tokens")):
        assert len(seen[function]) == sum(w for name, (_, w) in said.items() if name.startswith(operator))


def test_sizes_are_those_of_the_models():
    """Tokens as the reference counts them."""
    from cavmae_fast.reference.masking import kept_tokens

    assert plan.sizes_of(SYSTEMS["cav-mae-base"]) == catalogue.BASE
    small = plan.sizes_of(SYSTEMS["small"])
    assert (small.all_a, small.all_v, small.width, small.heads) == (96, 36, 192, 3)
    kept = kept_tokens(small.all_a, PRESETS["small"].mask_ratio, "mask_ratio_a")
    assert small.kept_a == kept
    for name in ("mavil", "a-mae", "v-mae"):
        with torch.device("meta"):
            model = SYSTEMS[name].create()
        assert plan.tower_sizes_of(SYSTEMS[name]).patches == model.lengths


def test_a_whole_step_of_towers_is_proven(monkeypatch):
    """As the tuner does it, with everything left to PyTorch: the reference and the fast model agree in both stages."""
    from cavmae_fast.tuning import step

    for model in ("tiny-mavil", "tiny-mavil-stage-2"):
        found = step.prove(
            Settings(model, 2, "float32", "cpu"), {"implementations": {}, "launches": {}}, torch.device("cpu")
        )
        assert found["right"], found


def test_a_whole_step_in_fp8_is_proven():
    """Against PyTorch's operators in fp8: bfloat16 is nearer to the reference than fp8 can be."""
    from cavmae_fast.tuning import step

    nothing = {"implementations": {}, "launches": {}}
    found = step.prove(Settings("tiny", 2, "fp8", "cpu"), nothing, torch.device("cpu"))
    in_bf16 = step.prove(Settings("tiny", 2, "bfloat16", "cpu"), nothing, torch.device("cpu"))
    assert found["right"] and found["gradient"]["error"] > in_bf16["gradient"]["allowed"], (found, in_bf16)


def test_fp8_is_refused_where_it_cannot_be_had(monkeypatch):
    monkeypatch.setattr(tuning, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    with pytest.raises(Fp8Error, match=r"NVIDIA A10 has 8\.6"):
        tuning.settings_of(TuneConfig(batch="2", dtype="fp8", device="cuda"))


def test_triton_candidates_are_found_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu = torch.device("cpu")
    (unit,) = units(Settings("tiny", 2, "float32", "cpu", ("gather_tokens",)))
    names = [c.name for c in search.plain(unit, cpu)]
    assert names == ["PyTorch", "Triton"]
    triton = search.plain(unit, cpu)[1]
    others = search.launches(unit, triton, [("take_rows", torch.float32, "")], cpu)
    assert len(others) == 3 and all(c.kernel == "take_rows float32" for c in others)
    with configuration.trial(others[0].content):
        assert configuration.launch("take_rows", "sm_90", torch.float32)["BLOCK_D"] == 512
        assert dispatch.choose("gather_tokens", cpu, torch.float32).implementation == "triton"
    (unit,) = units(Settings("tiny", 2, "bfloat16", "cpu", ("gather_tokens",)))
    assert [c.name for c in search.plain(unit, cpu)] == ["PyTorch"]  # the interpreter computes bf16 wrongly


def test_the_best_launches_of_several_kernels_are_combined():
    def candidate(name, kernel, options):
        content = {"implementations": {"o": {"float32": "triton"}}}
        content |= {"launches": {kernel: {"float32": options}}} if kernel else {}
        return search.Candidate(name, "triton", content, kernel)

    all_of = [
        candidate("now", None, {}),
        candidate("a1", "a", {"n": 1}),
        candidate("a2", "a", {"n": 2}),
        candidate("b1", "b", {"n": 3}),
        candidate("c1", "c", {"n": 4}),
    ]
    times = {"now": 10.0, "a1": 9.0, "a2": 8.0, "b1": 9.5, "c1": 11.0}
    best = search.combined(all_of, times)
    assert best.content["launches"] == {"a": {"float32": {"n": 2}}, "b": {"float32": {"n": 3}}}
    assert search.combined(all_of, times | {"b1": 12.0}) is None  # one kernel alone is a candidate already


def test_units_that_are_not_done_take_pytorch():
    wanted = units(Settings("tiny", 2, "float32", "cpu", ("gather_tokens", "scatter_tokens")))
    content = choices(wanted, {UNIT: {"content": content_of("gather_tokens", "e fast")}})
    assert content["implementations"] == {"gather_tokens": {"float32": "e fast"}, "scatter_tokens": {"float32": "torch"}}
    assert json.dumps(content)


@pytest.mark.parametrize("cores", [1, 2, 16, 64])
def test_all_cores_compile_and_the_first_units_have_most_of_them(cores):
    names = [f"unit {i}" for i in range(13)]
    parts = compile_parts(names, cores)
    counts = [sum(name == unit for name, *_ in parts) for unit in names]
    assert counts == sorted(counts, reverse=True) and min(counts) == 1
    assert [(part, of) for name, part, of in parts if name == names[0]] == [(i, counts[0]) for i in range(counts[0])]
    assert cores < 16 or sum(counts[:5]) == cores  # at once; the small ones follow
    assert compile_parts(names[:1], cores) == [(names[0], i, counts[0]) for i in range(counts[0])]
