"""Which implementation runs: one order of precedence, everywhere."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cavmae_fast import doctor
from cavmae_fast.errors import CavmaeError
from cavmae_fast.ops import configuration, dispatch, native
from cavmae_fast.ops.attention import attention
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import linear_gelu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PROVEN = {"linear_gelu": {"bfloat16": "triton"}, "gather_tokens": {"float32": "triton"}}


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A Hopper GPU on which two pairs are proven, with a library from csrc/ that must not be called."""

    def refuse(*args):
        raise AssertionError("the CUDA library was called")

    for name in ("CAVMAE_OPS", "CAVMAE_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(configuration, "target_of", lambda device: "sm_90" if device.type == "cuda" else "cpu")
    monkeypatch.setattr(native, "library", object)
    monkeypatch.setattr(native, "call", refuse)
    with configuration.trial({"implementations": PROVEN, "launches": {}}):
        yield


def chosen(operator: str, device=CUDA, dtype=torch.bfloat16, shape=()) -> str:
    return dispatch.choose(operator, device, dtype, shape).implementation


@pytest.mark.parametrize(
    ("override", "environment", "want"),
    [
        (None, None, "triton"),  # the configuration file
        (None, "auto", "triton"),
        (None, "torch", "torch"),
        (None, "triton", "triton"),
        (None, "cuda", "cuda"),
        ("torch", "cuda", "torch"),
        ("torch", "triton", "torch"),
        ("triton", "torch", "triton"),
        ("cuda", "torch", "cuda"),
        ("auto", "torch", "triton"),
        ("auto", "cuda", "triton"),
    ],
)
def test_order_of_precedence(monkeypatch, override, environment, want):
    if environment is not None:
        monkeypatch.setenv("CAVMAE_OPS", environment)
    if override is None:
        choice = dispatch.choose("linear_gelu", CUDA, torch.bfloat16)
    else:
        with dispatch.override(override):
            choice = dispatch.choose("linear_gelu", CUDA, torch.bfloat16)
    assert choice.implementation == want
    if override not in (None, "auto"):
        assert choice.reason == f"override('{override}')"
    elif override is None and environment not in (None, "auto"):
        assert choice.reason == f"CAVMAE_OPS={environment}"
    else:
        assert choice.reason == "on trial (bfloat16)"


def test_what_was_not_proven_is_pytorch():
    for dtype in (torch.float16, torch.float32):
        choice = dispatch.choose("linear_gelu", CUDA, dtype)
        assert str(choice) == f"PyTorch: nothing is tuned for {str(dtype)[6:]} on sm_90; `cavmae-fast tune` does it"
    assert chosen("gather_tokens", dtype=torch.float32) == "triton"
    assert chosen("gather_tokens", dtype=torch.bfloat16) == "torch"


def run_linear_gelu(device="cpu"):
    layout = StreamLayout(1, (3, 5))
    x = torch.randn(8, 16, device=device).requires_grad_()
    weights = [torch.randn(32, 16, device=device).requires_grad_() for _ in range(2)]
    biases = [torch.randn(32, device=device).requires_grad_() for _ in range(2)]
    linear_gelu(x, weights, biases, layout).sum().backward()


@pytest.mark.parametrize("variable", ["CAVMAE_OPS", "CAVMAE_NATIVE"])
def test_torch_never_calls_the_cuda_library(monkeypatch, variable):
    """Whatever the environment asks for: `override("torch")` is what timings of PyTorch rely on."""
    monkeypatch.setenv(variable, "cuda" if variable == "CAVMAE_OPS" else "1")
    monkeypatch.setattr(dispatch, "_refusal", lambda *_: None)  # as if the tensors were on a device that it runs on
    with dispatch.override("torch"):
        assert chosen("linear_gelu") == "torch"
        run_linear_gelu()


def test_the_environment_calls_the_cuda_library(monkeypatch):
    """So that the test above can fail: without `override`, this very call reaches the library."""
    monkeypatch.setenv("CAVMAE_OPS", "cuda")
    monkeypatch.setattr(dispatch, "_refusal", lambda *_: None)
    monkeypatch.setattr(dispatch, "_missing", lambda implementation: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=0))
    with pytest.raises(AssertionError, match="the CUDA library was called"):
        run_linear_gelu()


def test_the_former_variable_says_what_replaced_it(monkeypatch):
    monkeypatch.setenv("CAVMAE_NATIVE", "1")
    with pytest.raises(CavmaeError, match="CAVMAE_OPS=cuda selects the CUDA library") as error:
        run_linear_gelu()
    assert error.value.exit_code == 2
    monkeypatch.setenv("CAVMAE_NATIVE", "0")
    run_linear_gelu()


def test_unknown_modes(monkeypatch):
    words = "mode is 'fast'; it must be one of auto, torch, triton, cuda"
    with pytest.raises(ValueError, match=words), dispatch.override("fast"):
        pass
    monkeypatch.setenv("CAVMAE_OPS", "fast")
    with pytest.raises(ValueError, match="CAVMAE_OPS is 'fast'; it must be one of"):
        run_linear_gelu()


def test_what_is_asked_for_and_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    with dispatch.override("cuda"):
        with pytest.raises(CavmaeError, match=r"libcavmae\.so does not exist; build it: CAVMAE_BUILD_CUDA=1 pip install"):
            chosen("linear_gelu")
        assert chosen("gather_tokens", dtype=torch.float32) == "triton"  # has none, so that nothing is missing
    assert chosen("linear_gelu") == "triton"  # nor is it missed where it was not asked for
    monkeypatch.setattr(dispatch._triton, "AVAILABLE", False)
    with dispatch.override("triton"), pytest.raises(CavmaeError, match="pip install triton"):
        chosen("gather_tokens")
    choice = dispatch.choose("gather_tokens", CUDA, torch.float32)
    assert choice.implementation == "torch" and "pip install triton" in choice.reason


def test_what_kernels_cannot_take():
    with dispatch.override("triton"):
        assert chosen("gather_tokens", dtype=torch.float64) == "torch"
        assert chosen("stream_linear") == "torch"  # it has no kernel
        assert chosen("attention", shape=(128,)) == "triton"
        choice = dispatch.choose("attention", CUDA, torch.bfloat16, (160,))
        assert str(choice) == "PyTorch: the kernels take heads of width 128 at most, not 160"
        assert chosen("log_mel_fbank", dtype=torch.float32, shape=(2, 2**31, 128)) == "torch"
        assert chosen("log_mel_fbank", dtype=torch.float32, shape=(2, 16000, 129)) == "torch"
        assert chosen("log_mel_fbank", dtype=torch.float32, shape=(2, 16000, 128)) == "triton"
    with dispatch.override("cuda"):  # what the library does not take goes the way of `auto`
        assert chosen("linear_gelu", shape=(8, 64)) == "cuda"
        assert chosen("linear_gelu", shape=(8, 63)) == "triton"
        assert chosen("linear_gelu", dtype=torch.float32, shape=(8, 63)) == "torch"


def test_on_the_cpu(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(dispatch.operators, "stream_linear", {"torch", "onednn"})
        assert str(dispatch.choose("stream_linear", CUDA, torch.float32)) == "PyTorch: it has no kernel of this package"
    assert chosen("gather_tokens", CPU, torch.float32) == "triton"  # the fixture's, in Triton's interpreter
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert str(dispatch.choose("gather_tokens", CPU, torch.float32)) == "PyTorch: it has no other form on a CPU"
    assert str(dispatch.choose("linear_gelu", CPU, torch.bfloat16)) == "PyTorch: the device is a CPU"
    with configuration.trial({"implementations": {}, "launches": {}}):
        words = "PyTorch: nothing is tuned for float32 on this CPU; `cavmae-fast tune` does it"
        assert str(dispatch.choose("stream_linear", CPU, torch.float32)) == words
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dispatch.override("triton"):
        assert chosen("gather_tokens", CPU) == "triton"  # Triton's interpreter
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert chosen("gather_tokens", CPU) == "torch"
    with dispatch.override("cuda"):
        assert chosen("linear_gelu", CPU) == "torch"


def test_launches_are_those_of_the_nearest_architecture(monkeypatch):
    assert dispatch.choose("attention", CPU, torch.float32).configuration == configuration.INTERPRETED
    for here, want in (("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_90", "sm_90"), ("sm_103", "sm_100"), ("sm_70", "sm_80")):
        monkeypatch.setattr(configuration, "target_of", lambda device, here=here: f"{here} some-gpu")
        target = dispatch.choose("attention", CUDA, torch.float32).configuration
        assert target == f"{here} some-gpu"
        launch = configuration.launch("attention_forward", target, torch.bfloat16, "long 64")
        assert launch == configuration.launch("attention_forward", want, torch.bfloat16, "long 64")


class Record(TorchDispatchMode):
    """The implementations that calls of attention's backward name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.cavmae_fast.attention_backward.default:
            self.seen.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_attention_is_chosen_once(monkeypatch):
    """What ran forward runs backward, wherever the backward pass is started."""
    choices = []
    module, choose = importlib.import_module("cavmae_fast.ops.attention"), dispatch.choose
    monkeypatch.setattr(module, "choose", lambda *args: choices.append(args) or choose(*args))
    qkv = torch.randn(10, 3 * 32, requires_grad=True)
    with dispatch.override("triton"):
        out = attention(qkv, StreamLayout(2, (5,)), 2)
    with Record() as record:
        out.sum().backward()
    assert record.seen == ["triton"] and len(choices) == 1


def test_an_implementation_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="attention got 'auto'; it has torch, triton, cuda, flash, products"):
        torch.ops.cavmae_fast.attention(torch.randn(4, 96), None, 1, [4], [4], 1, "auto")


def test_forms_for_cpus_stay_there():
    content = {"implementations": {"stream_linear": {"float32": "onednn"}}, "launches": {}}
    with configuration.trial(content):
        assert chosen("stream_linear", CPU, torch.float32) == "onednn"
        assert str(dispatch.choose("stream_linear", CUDA, torch.float32)) == "PyTorch: it is a form for CPUs" or (
            chosen("stream_linear", dtype=torch.float32) == "torch"
        )
        assert chosen("stream_linear", CPU, torch.float64) == "torch"
    with configuration.trial({"implementations": {"stream_linear": {"float32": "no such form"}}, "launches": {}}):
        choice = dispatch.choose("stream_linear", CPU, torch.float32)
        assert str(choice) == "PyTorch: it has no kernel for PyTorch (no such form)"


def test_keys_take_choices_of_their_own():
    entries = {"bfloat16 long 32": "triton", "bfloat16": "sdpa_cudnn"}
    with configuration.trial({"implementations": {"attention": entries}, "launches": {}}):
        assert dispatch.choose("attention", CUDA, torch.bfloat16, (32,), "long 32").implementation == "triton"
        assert dispatch.choose("attention", CUDA, torch.bfloat16, (64,), "short 64").implementation == "sdpa_cudnn"


def test_advice_where_nothing_is_known_of_a_gpu(monkeypatch, tmp_path):
    """Once in a process; a file of another version is named."""
    dispatch._advise.cache_clear()
    monkeypatch.setenv(configuration.VARIABLE, str(tmp_path))
    stale = tmp_path / "some-gpu-sm_90-torch1.0-triton1.0-cavmae_fast0.0.json"
    configuration.write(stale, {"made_for": {"target": "sm_90 some-gpu"}, "implementations": {}, "launches": {}})
    monkeypatch.setattr(configuration, "target_of", lambda device: "sm_90 some-gpu")
    with configuration.trial({"implementations": {}, "launches": {}}):
        with pytest.warns(UserWarning, match="run `cavmae-fast tune` once") as caught:
            assert chosen("linear_gelu") == "torch"
            assert chosen("linear_gelu") == "torch"
        assert len(caught) == 1 and f"{stale} was measured with other releases" in str(caught[0].message)
    dispatch._advise.cache_clear()


def test_doctor_prints_the_choice(monkeypatch):
    with configuration.trial({"implementations": {}, "launches": {}}):
        rows = dict(dict(doctor.report())["operators in bf16"])
    assert set(dispatch.operators) <= set(rows)
    assert rows["linear_gelu"] == "PyTorch: nothing is tuned for bfloat16 on this CPU; `cavmae-fast tune` does it"
    monkeypatch.setattr(doctor, "_device", lambda: CUDA)
    rows = dict(doctor._operators())
    assert rows["linear_gelu"] == "Triton: on trial (bfloat16)"
    words = "PyTorch: nothing is tuned for float32 on sm_90; `cavmae-fast tune` does it"
    assert rows["linear_gelu in float32"] == words
    assert rows["gather_tokens in float32"] == "Triton: on trial (float32)"
    assert rows["attention='auto'"] == "sdpa"
