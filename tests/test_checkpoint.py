"""Reading, fitting and writing checkpoints: what is loaded, what is said, and what a bad file can do (nothing)."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ENCODER, TINY, inputs, one_thread, randomize, relative  # noqa: F401
from torch import nn

from cavmae_fast.clip import ClipSpec
from cavmae_fast.models import (
    CAVMAE,
    CAVMAEFT,
    PRESETS,
    PRETRAINED_TO_FINE_TUNED,
    CAVMAEFTAudio,
    CheckpointError,
    create_model,
    load_checkpoint,
    load_imagenet_mae,
    weights,
)


@pytest.fixture(scope="module")
def trained() -> CAVMAE:
    return randomize(CAVMAE(**TINY), seed=7)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


# ------------------------------------------------------------------------------------------------- files that fit

FORMS = {
    "plain": lambda state: state,
    "data-parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "under-model": lambda state: {"model": state, "epoch": 3},
    "under-state_dict": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "lr": 0.1},
    "half": lambda state: {key: value.half() for key, value in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", "", ".safetensors", "mapping"])
def test_official_files(tmp_path, trained, form, suffix):
    state = FORMS[form](trained.state_dict())
    source = state
    if suffix == ".safetensors":
        if form.startswith("under"):
            pytest.skip("safetensors hold no nested mappings")
        save_file(state, source := tmp_path / "best.safetensors")
    elif suffix != "mapping":
        torch.save(state, source := tmp_path / f"best_audio_model{suffix}")
    model = CAVMAE(**TINY)
    report = load_checkpoint(model, str(source) if suffix == ".pth" else source)
    assert report == ([], [])
    want = values(trained)
    if form == "half":
        want = {key: value.half().float() for key, value in want.items()}
    assert same(values(model), want)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_old_pickle_format(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = CAVMAE(**TINY)
    assert load_checkpoint(model, tmp_path / "old.pth") == ([], [])
    assert same(values(model), values(trained))


def test_what_is_frozen_stays_frozen(trained):
    model = CAVMAE(**TINY)
    before = [p.requires_grad for p in model.parameters()]
    load_checkpoint(model, trained.state_dict())
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("prefix", ["", "module."])
def test_class_tokens_are_tolerated_and_reported(tmp_path, trained, prefix):
    """Some published checkpoints carry class tokens that no model uses."""
    tokens = {name: torch.zeros(1, 1, 48) for name in ("cls_token_a", "cls_token_v", "cls_token_av", "cls_token")}
    state = {prefix + key: value for key, value in (trained.state_dict() | tokens).items()}
    torch.save(state, tmp_path / "as-pretrain.pth")
    model = CAVMAE(**TINY)
    assert load_checkpoint(model, tmp_path / "as-pretrain.pth") == ([], sorted(tokens))
    assert same(values(model), values(trained))


def test_class_tokens_do_not_excuse_other_names(trained):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(CAVMAE(**TINY), trained.state_dict() | {"cls_token_a": torch.zeros(1), "cls": torch.zeros(1)})
    assert "unexpected: cls (" in str(caught.value) and "cls_token_a" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- files that do not


def assert_refused(model: nn.Module, source, *parts: str, **allow) -> None:
    before = values(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, source, **allow)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"
    assert same(values(model), before)  # nothing is loaded


def test_every_missing_and_unexpected_name_is_listed(tmp_path, trained):
    state = trained.state_dict()
    for name in ("norm_a.weight", "blocks_a.1.mlp.fc1.bias"):
        del state[name]
    state |= {"head.weight": torch.zeros(3), "other": torch.zeros(2)}
    torch.save(state, path := tmp_path / "x.pth")
    model = CAVMAE(**TINY)
    assert_refused(
        model,
        path,
        str(path),
        "CAVMAE",
        "missing: blocks_a.1.mlp.fc1.bias, norm_a.weight",
        "unexpected: head.weight, other",
        "allow_missing",
        "allow_unexpected",
    )
    assert_refused(model, path, "missing: norm_a.weight (", allow_missing=["blocks_a.*"], allow_unexpected=["*"])
    assert_refused(model, path, "unexpected: other (", allow_missing=("*",), allow_unexpected=("head.*",))
    allow = {"allow_missing": ["blocks_?.1.*", "norm_*"], "allow_unexpected": ["head.*", "other"]}
    report = load_checkpoint(model, path, **allow)
    assert report == (["blocks_a.1.mlp.fc1.bias", "norm_a.weight"], ["head.weight", "other"])
    got, want = values(model), values(trained)
    assert all(torch.equal(got[key], want[key]) for key in state.keys() & want.keys())
    assert torch.equal(got["norm_a.weight"], torch.ones(48))


def test_patterns_are_case_sensitive_and_whole(trained):
    state = trained.state_dict()
    del state["norm.weight"]
    assert_refused(CAVMAE(**TINY), state, "missing: norm.weight", allow_missing=["Norm.*", "norm", "orm.weight"])


def test_one_pattern_given_as_a_string_is_not_taken_letter_by_letter(trained):
    """'*' would be one of the letters of 'decoder_*', and allow everything."""
    state = trained.state_dict()
    del state["norm.weight"]
    assert_refused(CAVMAE(**TINY), state, "missing: norm.weight", allow_missing="decoder_*")
    assert load_checkpoint(CAVMAE(**TINY), state, allow_missing="norm.*").missing == ["norm.weight"]


def test_shapes_are_always_an_error(trained):
    model = CAVMAE(**TINY | {"audio_length": 96})
    assert_refused(
        model,
        trained.state_dict(),
        "pos_embed_a has shape [1, 32, 48], the model's has [1, 48, 48]",
        "decoder_pos_embed_a",
        allow_missing=["*"],
        allow_unexpected=["*"],
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 100, b"not a checkpoint\n", b"PK\x03\x04broken", b"\x80\x02}q\x00.", b"\x80\x04K\x01.", b"{}"],
    ids=["empty", "zeros", "text", "zip", "pickled-dict", "pickled-int", "json"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, content, suffix):
    (path := tmp_path / f"bad{suffix}").write_bytes(content)
    assert_refused(CAVMAE(**TINY), path, str(path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".old"])
def test_truncated_and_damaged_files(tmp_path, trained, suffix):
    """Cut anywhere, or with bytes changed: an error that names the file, or (changed numbers) a state that fits."""
    path = tmp_path / f"damaged{suffix}"
    if suffix == ".safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pth")
    content = path.read_bytes()
    model = CAVMAE(**TINY)
    for share in (0.0, 0.001, 0.01, 0.3, 0.9, 0.999):
        path.write_bytes(content[: int(len(content) * share)])
        assert_refused(model, path, str(path))
    generator = torch.Generator().manual_seed(0)
    for start in torch.randint(min(len(content), 20000), (40,), generator=generator).tolist():
        noise = bytes(torch.randint(256, (16,), generator=generator).tolist())
        path.write_bytes(content[:start] + noise + content[start + 16 :])
        try:
            load_checkpoint(model, path)
        except CheckpointError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        [torch.zeros(1)],
        3,
        None,
        "text",
        {"a": 1},
        {"model": {}},
        {"model": 3},
        {"epoch": 1, "loss": 0.5},
        torch.zeros(3),
    ],
    ids=repr,
)
def test_files_that_hold_something_else(tmp_path, content):
    torch.save(content, path := tmp_path / "else.pth")
    assert_refused(CAVMAE(**TINY), path, str(path))
    if isinstance(content, dict):
        assert_refused(CAVMAE(**TINY), content, "the state dict")


def test_a_whole_pickled_model_is_refused(tmp_path, trained):
    torch.save(trained, path := tmp_path / "model.pth")
    assert_refused(CAVMAE(**TINY), path, str(path), "cannot be read as tensors alone")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path / "no.safetensors", tmp_path / "no" / "folder"):
        assert_refused(CAVMAE(**TINY), path, str(path), "does not exist")
    assert_refused(CAVMAE(**TINY), tmp_path, str(tmp_path), "model.safetensors", "does not exist")
    (tmp_path / "model.safetensors").mkdir()
    assert_refused(CAVMAE(**TINY), tmp_path, str(tmp_path / "model.safetensors"))


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "torch-old", "pickle", "safetensors-name"])
def test_malicious_pickles_do_not_run(tmp_path, trained, writer):
    mark, path = tmp_path / "executed", tmp_path / ("bad.safetensors" if "name" in writer else "bad.pth")
    state = {"model": trained.state_dict(), "extra": Malicious(str(mark))}
    if writer.startswith("torch"):
        torch.save(state, path, _use_new_zipfile_serialization=writer == "torch")
    else:
        path.write_bytes(pickle.dumps({"norm.weight": Malicious(str(mark))}))
    assert_refused(CAVMAE(**TINY), path, str(path))
    assert not mark.exists()
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_imagenet_mae(CAVMAE(**TINY), path)
    assert not mark.exists()
    if writer == "pickle":  # the trap works
        pickle.loads(path.read_bytes())
        assert mark.exists()


# --------------------------------------------------------------------------------------- pretraining to fine-tuning


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pretraining_checkpoint_into_the_classifiers(tmp_path, trained, prefix):
    torch.save({prefix + k: v for k, v in trained.state_dict().items()}, path := tmp_path / "pretrained.pth")
    for kind in (CAVMAEFT, CAVMAEFTAudio):
        model = kind(5, **ENCODER)
        head = values(model.mlp_head)
        assert_refused(model, path, "mlp_head.1.weight", "decoder_embed.weight", "mask_token")
        report = load_checkpoint(model, path, **PRETRAINED_TO_FINE_TUNED)
        assert report.missing == [f"mlp_head.{i}.{kind}" for i in (0, 1) for kind in ("bias", "weight")]
        assert "mask_token" in report.unexpected
        got, want = values(model), values(trained)
        assert all(torch.equal(got[key], want[key]) for key in got if not key.startswith("mlp_head"))
        assert same(values(model.mlp_head), head)
    tuned = CAVMAEFT(5, **ENCODER)
    load_checkpoint(tuned, path, **PRETRAINED_TO_FINE_TUNED)
    for got, want in zip(tuned.double().forward_feat(*inputs()), copy.deepcopy(trained).double().forward_feat(*inputs())):
        assert relative(got, want) < 1e-12


def test_fine_tuning_does_not_excuse_a_missing_encoder(trained):
    state = trained.state_dict()
    for name in ("blocks_v.0.attn.qkv.weight", "norm_v.weight", "blocks_u.0.norm1_v.bias"):
        part = {key: value for key, value in state.items() if key != name}
        assert_refused(CAVMAEFT(5, **ENCODER), part, f"missing: {name} ", **PRETRAINED_TO_FINE_TUNED)


# -------------------------------------------------------------------------------------------------- ImageNet MAE

WIDTH, DECODER_WIDTH = 48, 32


def image_mae(depth: int = 3, decoder: bool = True, cls_token: bool = True, grid: int = 2) -> dict[str, torch.Tensor]:
    """The state dict of a ViT masked autoencoder (the published image MAE's names) with random values."""
    generator = torch.Generator().manual_seed(3)

    def block(name: str, width: int) -> dict[str, tuple]:
        shapes = {"norm1": (width,), "norm2": (width,), "attn.proj": (width, width), "attn.qkv": (3 * width, width)}
        shapes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        both = {"weight": lambda s: s, "bias": lambda s: s[:1]}
        return {f"{name}.{leaf}.{kind}": cut(shape) for leaf, shape in shapes.items() for kind, cut in both.items()}

    shapes = {"patch_embed.proj.weight": (WIDTH, 3, 16, 16), "patch_embed.proj.bias": (WIDTH,)}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "pos_embed": (1, grid**2 + cls_token, WIDTH)}
    if cls_token:
        shapes["cls_token"] = (1, 1, WIDTH)
    for i in range(depth):
        shapes |= block(f"blocks.{i}", WIDTH)
    if decoder:
        width = DECODER_WIDTH
        shapes |= {"decoder_embed.weight": (width, WIDTH), "decoder_embed.bias": (width,), "mask_token": (1, 1, width)}
        shapes |= {"decoder_norm.weight": (width,), "decoder_norm.bias": (width,)}
        shapes |= {"decoder_pred.weight": (768, width), "decoder_pred.bias": (768,)}
        shapes |= {"decoder_pos_embed": (1, grid**2 + cls_token, width)}
        for i in range(2):
            shapes |= block(f"decoder_blocks.{i}", width)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected_from_image_mae(state: dict, cls_token: bool) -> dict[str, torch.Tensor]:
    """Written from the specification, name by name: blocks 0 and 1 to both branches, block 2 to the shared one."""
    want = {}
    for m in "av":
        for key, value in state.items():
            if key.startswith(("blocks.0.", "blocks.1.")):
                want[key.replace("blocks", f"blocks_{m}")] = value
        for kind in ("weight", "bias"):
            want[f"norm_{m}.{kind}"] = state[f"norm.{kind}"]
            for norm in ("norm1", "norm2"):
                want[f"blocks_u.0.{norm}_{m}.{kind}"] = state[f"blocks.2.{norm}.{kind}"]
        want[f"patch_embed_{m}.proj.bias"] = state["patch_embed.proj.bias"]
    want |= {key.replace("blocks.2", "blocks_u.0"): v for key, v in state.items() if key.startswith("blocks.2.")}
    want |= {key: state[key] for key in ("norm.weight", "norm.bias")}
    want["patch_embed_v.proj.weight"] = state["patch_embed.proj.weight"]
    red, green, blue = state["patch_embed.proj.weight"].unbind(1)
    want["patch_embed_a.proj.weight"] = (red + green + blue).unsqueeze(1)
    want["pos_embed_v"] = state["pos_embed"][:, int(cls_token) :]
    if "mask_token" in state:
        want |= {k: v for k, v in state.items() if k.startswith(("decoder_blocks", "decoder_embed", "decoder_norm"))}
        want |= {"mask_token": state["mask_token"]}
        want["decoder_pos_embed_v"] = state["decoder_pos_embed"][:, int(cls_token) :]
        for kind in ("weight", "bias"):
            want[f"decoder_pred_v.{kind}"] = state[f"decoder_pred.{kind}"]
            want[f"decoder_pred_a.{kind}"] = state[f"decoder_pred.{kind}"][:256]
    return want


def assert_loaded(key: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal, but for a sum over three colors, which has two roundings in an order of its own."""
    bound = 2 * torch.finfo(torch.float32).eps * 3 * want.abs().max() if key == "patch_embed_a.proj.weight" else 0
    assert (got - want).abs().max() <= bound, key


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("form", ["mapping", "file", "data-parallel"])
def test_image_mae_into_pretraining(tmp_path, form, decoder, cls_token):
    state = image_mae(decoder=decoder, cls_token=cls_token)
    model = CAVMAE(**TINY)
    before, source = values(model), state
    if form == "file":
        torch.save({"model": state, "args": {"lr": 1}}, source := tmp_path / "mae_pretrain_vit_base.pth")
    elif form == "data-parallel":
        source = {f"module.{key}": value for key, value in state.items()}
    report = load_imagenet_mae(model, source)
    want = expected_from_image_mae(state, cls_token)
    got = values(model)
    for key in got:
        assert_loaded(key, got[key], want.get(key, before[key]))
    assert report.unexpected == []
    assert report.missing == sorted(got.keys() - want.keys())
    # the norms that no stream passes, modality embeddings, audio's positions; without a decoder the decoder
    assert {"modality_a", "modality_v", "pos_embed_a", "blocks_a.0.norm1_v.weight"} <= set(report.missing)
    assert ("decoder_embed.weight" in report.missing) == (not decoder)
    assert model(*inputs(dtype=torch.float32))[0].isfinite()


def test_image_mae_into_the_classifiers():
    state = image_mae()
    want = expected_from_image_mae(state, True)
    for kind in (CAVMAEFT, CAVMAEFTAudio):
        model = kind(5, **ENCODER)
        report = load_imagenet_mae(model, state)
        got = values(model)
        loaded = got.keys() & want.keys()
        for key in loaded:
            assert_loaded(key, got[key], want[key])
        assert report.missing == sorted(got.keys() - loaded)
        unused = {key for key in state if key.startswith("decoder") or key == "mask_token"}
        assert set(report.unexpected) == unused | ({"pos_embed"} if kind is CAVMAEFTAudio else set())


@pytest.mark.parametrize("depths", [(3, 0), (3, 1), (3, 3)])
def test_image_mae_with_other_splits(depths):
    depth, specific = depths
    state = image_mae()
    model = CAVMAE(**TINY | {"depth": depth, "modality_specific_depth": specific})
    load_imagenet_mae(model, state)
    for i in range(depth):
        name = f"blocks_v.{i}" if i < specific else f"blocks_u.{i - specific}"
        assert torch.equal(model.get_parameter(f"{name}.mlp.fc1.weight"), state[f"blocks.{i}.mlp.fc1.weight"])


def test_image_mae_that_does_not_fit(tmp_path):
    model = CAVMAE(**TINY)
    before = values(model)

    def refused(source, *parts: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            load_imagenet_mae(model, source)
        assert all(part in str(caught.value) for part in parts), caught.value
        assert same(values(model), before)

    refused(image_mae(depth=2), "image MAE")
    refused({"blocks.first.norm1.weight": torch.zeros(48)}, "image MAE")
    refused({"something": torch.zeros(3)}, "image MAE")
    refused(image_mae() | {"norm.weight": torch.zeros(50)}, "norm.weight", "[50]", "[48]")
    refused(CAVMAE(**TINY).state_dict(), "image MAE")
    refused(tmp_path / "absent.pth", "absent.pth", "does not exist")
    torch.save({"a": 1}, tmp_path / "else.pth")
    refused(tmp_path / "else.pth", "else.pth")


@pytest.mark.parametrize("grid", [3, 14])
def test_positions_of_another_grid_are_not_cut_to_size(grid):
    """A 14 x 14 checkpoint holds no positions for a 2 x 2 model: its last four are those of one corner."""
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_imagenet_mae(CAVMAE(**TINY), image_mae(grid=grid))


# ---------------------------------------------------------------------------------------- save and load in our format

SAVED = {
    "default": {},
    "norm-eps": {"norm_layer": lambda width: nn.LayerNorm(width, eps=1e-2)},
    "non-square": {"img_size": (32, 64)},
    "options": {"norm_pix_loss": True, "bidirect_contrast": True, "tr_pos": True, "in_chans": 1, "mlp_ratio": 2.5},
    "splits": {"depth": 4, "modality_specific_depth": 0, "decoder_depth": 1},
}


@pytest.mark.parametrize("name", SAVED)
def test_round_trip(tmp_path, name):
    config = TINY | SAVED[name]
    model = randomize(CAVMAE(**config))
    folder = model.save_pretrained(tmp_path / "deep" / "folder")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    again = CAVMAE.from_pretrained(folder)
    assert same(values(again), values(model))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    results = []
    for one in (model, again, CAVMAE.from_pretrained(str(folder), attention="sdpa")):
        torch.manual_seed(0)
        results.append(copy.deepcopy(one).double()(*inputs(config)))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert relative(results[2][0], results[0][0]) < 1e-12
    config_files = [each / "config.json" for each in (folder, again.save_pretrained(tmp_path / "again"))]
    assert config_files[0].read_text() == config_files[1].read_text()


@pytest.mark.parametrize("kind", [CAVMAEFT, CAVMAEFTAudio])
def test_round_trip_of_the_classifiers(tmp_path, kind):
    model = randomize(kind(5, **ENCODER, norm_layer=lambda width: nn.LayerNorm(width, eps=1e-3)))
    again = kind.from_pretrained(model.save_pretrained(tmp_path))
    assert same(values(again), values(model)) and again.norm_a.eps == 1e-3
    audio, imgs = inputs(dtype=torch.float32)
    if kind is CAVMAEFT:
        assert torch.equal(again(audio, imgs, "multimodal"), model(audio, imgs, "multimodal"))
    else:
        assert torch.equal(again.forward_pred(audio), model.forward_pred(audio))


def test_the_folder_is_read_without_torch_pickles(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), values(trained))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class"] == "CAVMAE" and config["embed_dim"] == 48 and config["norm_eps"] == 1e-5
    assert "attention" not in config


def test_overrides(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    model = CAVMAE.from_pretrained(tmp_path, attention="sdpa", norm_pix_loss=True, bidirect_contrast=True)
    assert (model.attention, model.norm_pix_loss, model.bidirect_contrast) == ("sdpa", True, True)
    with pytest.raises(ValueError, match="attention is 'none'"):
        CAVMAE.from_pretrained(tmp_path, attention="none")
    with pytest.raises(CheckpointError, match=r"pos_embed_a has shape \[1, 32, 48\]"):
        CAVMAE.from_pretrained(tmp_path, audio_length=96)
    with pytest.raises(CheckpointError, match="atention"):
        CAVMAE.from_pretrained(tmp_path, atention="sdpa")


def test_folders_that_do_not_fit(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"describes a CAVMAE; this is CAVMAEFT\.from_pretrained"):
        CAVMAEFT.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"absent holds no config\.json"):
        CAVMAE.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CAVMAE.from_pretrained(tmp_path / "config.json")
    for text in ("", "{", "[]", "3", "null", '{"class": null}', '{"class": "CAVMAE", "unknown": 1}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            CAVMAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CAVMAE.from_pretrained(tmp_path)
    trained.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        CAVMAE.from_pretrained(tmp_path)


CLIP = ClipSpec(
    image_size=(32, 32), audio_length=64, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.25, 0.3), audio_mean=-4.0
)


@pytest.mark.parametrize("kind", [CAVMAE, CAVMAEFT, CAVMAEFTAudio])
def test_statistics_are_kept(tmp_path, kind):
    model = kind(**TINY, clip=CLIP) if kind is CAVMAE else kind(5, **ENCODER, clip=CLIP)
    again = kind.from_pretrained(model.save_pretrained(tmp_path))
    clip = replace(CLIP, frames=0) if kind is CAVMAEFTAudio else CLIP  # it takes no pictures
    assert again.clip_spec == clip and hash(again.clip_spec) == hash(clip) and again.config == model.config


def test_folders_without_statistics_are_those_of_cav_mae(tmp_path, trained):
    """As earlier versions wrote them; and a model that takes the default statistics still writes the same."""
    trained.save_pretrained(tmp_path)
    assert "clip" not in json.loads((tmp_path / "config.json").read_text())
    assert CAVMAE.from_pretrained(tmp_path).clip_spec == ClipSpec(image_size=(32, 32), audio_length=64)


@pytest.mark.parametrize("value", [3, None, "x", [], {"frames": -1}, {"audio_std": "wide"}, {"colour": 1}])
def test_statistics_that_cannot_be_read(tmp_path, trained, value):
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"clip": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: clip is .* no ClipSpec"):
        CAVMAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("moment", ["weights", "half-written", "config"])
def test_an_interrupted_save_leaves_the_old_files(tmp_path, trained, monkeypatch, moment):
    trained.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}

    def interrupted(state, path):
        if moment == "half-written":
            path.write_bytes(b"half")
        raise KeyboardInterrupt

    other = randomize(CAVMAE(**TINY | {"norm_pix_loss": True}), seed=9)
    with monkeypatch.context() as patch:
        if moment == "config":
            patch.setattr(weights.json, "dumps", lambda *_, **__: interrupted(None, None))
        else:
            patch.setattr("safetensors.torch.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    other.save_pretrained(tmp_path)
    assert same(values(CAVMAE.from_pretrained(tmp_path)), values(other))


def test_saving_takes_any_dtype_and_strides(tmp_path):
    model = randomize(CAVMAE(**TINY)).to(torch.bfloat16)
    model.decoder_embed.weight.data = model.decoder_embed.weight.data.T.contiguous().T
    again = CAVMAE.from_pretrained(model.save_pretrained(tmp_path))
    assert same(values(again.to(torch.bfloat16)), values(model))


# ------------------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    preset = PRESETS[name]
    split = {"modality_specific_depth": min(2, preset.model.get("modality_specific_depth", 2))}
    model = create_model(name, **TINY | split)
    assert type(model) is CAVMAE and model.attention == "auto"
    assert model.norm_pix_loss == preset.model.get("norm_pix_loss", True)
    weights = {"mae_loss_weight": preset.mae_loss_weight, "contrast_loss_weight": preset.contrast_loss_weight}
    out = model(*inputs(dtype=torch.float32), **weights)
    assert out.loss.isfinite() and out.loss > 0
    assert (out.loss_mae == 0) == (preset.mae_loss_weight == 0)
    assert (out.loss_c == 0) == (preset.contrast_loss_weight == 0)
    out.loss.backward()
    for key, parameter in model.named_parameters():  # exactly what the losses train: plain DDP waits for the rest
        assert parameter.requires_grad == (parameter.grad is not None), key
    assert preset.summary


@pytest.mark.parametrize("name", PRESETS)
def test_presets_without_overrides(name):
    with torch.device("meta"):
        model = create_model(name)
    if name != "small":
        assert model.norm_pix_loss and (len(model.blocks_a) == 0) == (name == "vanilla-av-mae")


@pytest.mark.parametrize("name", ["cavmae", "", None, "CAV-MAE"])
def test_unknown_preset(name):
    with pytest.raises(ValueError, match=re.escape(f"model is {name!r}")) as caught:
        create_model(name)
    assert all(known in str(caught.value) for known in PRESETS)


def test_preset_overrides_win():
    assert not create_model("cav-mae-base", **TINY, norm_pix_loss=False).norm_pix_loss
    with pytest.raises(TypeError, match="depht"):
        create_model("cav-mae-base", depht=3)
