"""`convert` and `average`: the same weights in another form, every name accounted for, and nothing overwritten."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from evaluating import cli
from safetensors.torch import load_file, save_file
from tiny import ENCODER, TINY, inputs, one_thread, randomize  # noqa: F401

from cavmae_fast.evaluation import converting
from cavmae_fast.evaluation.converting import ConversionError, average, convert, epoch_checkpoints, parse_epochs
from cavmae_fast.models import CAVMAE, CAVMAEFT, PRESETS, CAVMAEFTAudio, CheckpointError, Preset
from cavmae_fast.models.opening import open_model, weights_hash

WIDE = TINY | {"embed_dim": 64, "num_heads": 1, "decoder_num_heads": 1}
"Heads as wide as the published ones, so that a bare file can be opened."


@pytest.fixture
def pretrained() -> CAVMAE:
    return randomize(CAVMAE(**WIDE, norm_pix_loss=True)).eval()


def test_round_trip(pretrained, tmp_path):
    """Folder -> published file -> safetensors -> folder: the same model, bit for bit."""
    folder = pretrained.save_pretrained(tmp_path / "model")
    steps = [folder, tmp_path / "a.pth", tmp_path / "b.safetensors", tmp_path / "again"]
    for source, out in itertools.pairwise(steps):
        result = convert(source, out)
        assert (result.dropped, result.added, result.renamed, result.out) == ((), (), (), out)
        assert weights_hash(open_model(out)) == weights_hash(pretrained)
    published = torch.load(tmp_path / "a.pth", weights_only=True)
    assert all(name.startswith("module.") for name in published) and len(published) == result.names
    assert open_model(tmp_path / "again").config == pretrained.config
    assert not list(tmp_path.rglob(".*"))


def test_what_a_bare_file_does_not_say(tmp_path):
    model = randomize(CAVMAE(**WIDE | {"num_heads": 4}, norm_pix_loss=False))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model", num_heads=4, norm_pix_loss=False)
    opened = CAVMAE.from_pretrained(tmp_path / "model")
    assert opened.config == model.config


def test_tokens_that_no_model_uses_are_named(pretrained, tmp_path):
    torch.save(pretrained.state_dict() | {"cls_token_a": torch.zeros(1, 1, 64)}, tmp_path / "old.pth")
    assert convert(tmp_path / "old.pth", tmp_path / "new.pth").dropped == ("cls_token_a",)


@pytest.mark.parametrize(("to", "kind"), [("fine-tuned", CAVMAEFT), ("fine-tuned-audio", CAVMAEFTAudio)])
def test_pretrained_to_fine_tuned(to, kind, pretrained, tmp_path):
    folder = pretrained.save_pretrained(tmp_path / "model")
    result = convert(folder, tmp_path / "classifier", to=to, classes=7)
    model = kind.from_pretrained(tmp_path / "classifier")
    frames = 0 if kind is CAVMAEFTAudio else 1  # it takes sound alone
    assert model.config["label_dim"] == 7 and model.clip_spec == replace(pretrained.clip_spec, frames=frames)
    own, theirs = model.state_dict(), pretrained.state_dict()
    assert set(result.added) == own.keys() - theirs.keys() == {name for name in own if name.startswith("mlp_head.")}
    assert set(result.dropped) == theirs.keys() - own.keys()
    assert any(name.startswith("decoder_blocks") for name in result.dropped) and "mask_token" in result.dropped
    assert all(torch.equal(own[name], theirs[name]) for name in own.keys() & theirs.keys())
    other = convert(folder, tmp_path / "twin", to=to, classes=7)
    assert other.added == result.added
    assert weights_hash(kind.from_pretrained(tmp_path / "twin")) == weights_hash(model)  # the seed decides on what is new


def test_image_mae_into_both_streams(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", model=WIDE))
    torch.manual_seed(0)
    mae = {
        "cls_token": torch.randn(1, 1, 64),
        "pos_embed": torch.randn(1, 5, 64),
        "patch_embed.proj.weight": torch.randn(64, 3, 16, 16),
        "patch_embed.proj.bias": torch.randn(64),
        "norm.weight": torch.randn(64),
        "norm.bias": torch.randn(64),
        "head.weight": torch.randn(10, 64),
    }
    own = CAVMAE(**WIDE).state_dict()
    for number, stack in ((0, "blocks_a.0"), (1, "blocks_a.1"), (2, "blocks_u.0")):
        for name in own:
            leaf = name.removeprefix(f"{stack}.")
            if leaf != name and "_a" not in leaf and "_v" not in leaf:
                mae[f"blocks.{number}.{leaf}"] = torch.randn_like(own[name])
    torch.save({"model": mae}, tmp_path / "mae.pth")
    result = convert(tmp_path / "mae.pth", tmp_path / "model", to="from-image-mae", model="tiny")
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert result.dropped == ("cls_token", "head.weight")
    assert ("blocks.1.attn.qkv.weight", "blocks_v.1.attn.qkv.weight") in result.renamed
    assert ("blocks.2.norm1.weight", "blocks_u.0.norm1_a.weight") in result.renamed
    assert "mask_token" in result.added and "blocks_a.0.attn.qkv.weight" not in result.added
    for m in "av":
        assert torch.equal(state[f"blocks_{m}.1.attn.qkv.weight"], mae["blocks.1.attn.qkv.weight"])
    torch.testing.assert_close(state["patch_embed_a.proj.weight"], mae["patch_embed.proj.weight"].sum(1, keepdim=True))
    # Each tensor of the result is either new or came from somewhere.
    came = {new for _, new in result.renamed} | (state.keys() & mae.keys())
    assert came | set(result.added) == state.keys() and not came & set(result.added)


def test_nothing_is_overwritten_unasked(pretrained, tmp_path):
    folder = pretrained.save_pretrained(tmp_path / "model")
    other = randomize(CAVMAE(**WIDE), seed=5).save_pretrained(tmp_path / "other")
    torch.save({"mine": torch.zeros(1)}, tmp_path / "mine.pth")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, words in (
        (other, r"other/config.json: is there already; allowed: another name, or overwrite"),
        (tmp_path / "mine.pth", r"mine.pth: is there already"),
        (folder, r"model: is what is read"),
        (tmp_path / "no" / "x.pth", r"no is no folder; it must be there"),
    ):
        with pytest.raises(ConversionError, match=words):
            convert(folder, out)
    with pytest.raises(ConversionError, match=r"is what is read"):
        convert(folder, folder, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    convert(folder, other, overwrite=True)
    assert weights_hash(open_model(other)) == weights_hash(pretrained)


def test_a_full_disk_leaves_nothing_behind(pretrained, tmp_path, monkeypatch):
    folder = pretrained.save_pretrained(tmp_path / "model")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converting.torch, "save", full)
    with pytest.raises(OSError, match=r"No space left"):
        convert(folder, tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bad_arguments(pretrained, tmp_path):
    folder = pretrained.save_pretrained(tmp_path / "model")
    tuned = CAVMAEFT(3, **ENCODER).save_pretrained(tmp_path / "tuned")
    for source, options, words in (
        (folder, {"to": "fine-tuned"}, r"a new classifier needs classes"),
        (folder, {"classes": 3}, r"nothing else takes them"),
        (folder, {"to": "smaller"}, r"to is 'smaller'; allowed: same, fine-tuned"),
        (tuned, {"to": "fine-tuned", "classes": 3}, r"holds a CAVMAEFT; only a pretrained CAVMAE becomes a classifier"),
        (folder, {"to": "from-image-mae", "model": "huge"}, r"model is 'huge'; allowed: small, cav"),
    ):
        with pytest.raises(ConversionError, match=words):
            convert(source, tmp_path / "out", **options)
    torch.save({"pos": torch.zeros(1)}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"vit.pth is no image MAE checkpoint"):
        convert(tmp_path / "vit.pth", tmp_path / "out", to="from-image-mae", model="small")
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- average


@pytest.fixture
def run(tmp_path):
    """The folder of a fine-tuning run with four epochs, whose weights are epoch, epoch, ..."""
    model = CAVMAEFT(3, **ENCODER)
    (tmp_path / "run" / "epochs").mkdir(parents=True)
    for epoch in range(1, 5):
        state = {name: torch.full_like(value, float(epoch)) for name, value in model.state_dict().items()}
        save_file(state, tmp_path / "run" / "epochs" / f"epoch-{epoch:03d}.safetensors")
    model.save_pretrained(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_average(run, tmp_path):
    for epochs, mean in (((), 2.5), ((2, 4), 3.0), (parse_epochs("1-3"), 2.0)):
        result = average(run, tmp_path / f"{mean}", epochs=epochs)
        model = CAVMAEFT.from_pretrained(tmp_path / f"{mean}")
        assert {float(value.min()) for value in model.state_dict().values()} == {mean}
        assert model.config["num_heads"] == ENCODER["num_heads"] and len(result.sources) == (len(epochs) or 4)
        assert model(*inputs(dtype=torch.float32), "multimodal").shape == (3, 3)


def test_average_of_published_files(tmp_path):
    model = CAVMAEFT(3, **ENCODER | {"embed_dim": 64, "num_heads": 1})
    for epoch in (9, 10, 11):
        state = {f"module.{name}": torch.full_like(value, float(epoch)) for name, value in model.state_dict().items()}
        (tmp_path / "models").mkdir(exist_ok=True)
        torch.save(state, tmp_path / "models" / f"audio_model.{epoch}.pth")
    average(tmp_path, tmp_path / "mean.pth", epochs=(10, 11))
    assert {float(value.min()) for value in torch.load(tmp_path / "mean.pth").values()} == {10.5}


def test_bad_averages(run, tmp_path):
    with pytest.raises(ConversionError, match=r"has no checkpoint of epoch 7; there are 1, 2, 3, 4"):
        average(run, tmp_path / "out", epochs=(3, 7))
    with pytest.raises(ConversionError, match=r"no such folder"):
        average(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"holds no checkpoint of an epoch"):
        epoch_checkpoints(tmp_path / "empty")
    save_file({"w": torch.zeros(1)}, run / "epochs" / "epoch-4.safetensors")
    with pytest.raises(ConversionError, match=r"epoch 4 has two checkpoints"):
        average(run, tmp_path / "out")
    (run / "epochs" / "epoch-004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"does not fit .*epoch-001.safetensors"):
        average(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "want"), [("3-5", (3, 4, 5)), ("1, 3-4", (1, 3, 4)), ("7", (7,))])
def test_epochs(text, want):
    assert parse_epochs(text) == want


@pytest.mark.parametrize("text", ["", "a", "5-3", "-1", "1-", "1-99999999999"])
def test_bad_epochs(text):
    with pytest.raises(ValueError, match=r"allowed: numbers and ranges such as 3-15"):
        parse_epochs(text)


def test_the_commands(run, tmp_path):
    done = cli("average", run, "--epochs", "2-3", "--out", tmp_path / "mean")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("read     ") == 2 and "wrote    " in done.stdout
    done = cli("convert", tmp_path / "mean", tmp_path / "mean.pth")
    assert done.returncode == 0 and "0 dropped, 0 added, 0 renamed" in done.stdout and "module." in done.stdout
    again = cli("convert", tmp_path / "mean", tmp_path / "mean.pth")
    assert again.returncode == 2 and "is there already" in again.stderr
