"""A checkpoint says itself what it is: class and sizes from a folder's configuration, or from names and shapes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import ENCODER, TINY, inputs, one_thread, randomize  # noqa: F401

from cavmae_fast.models import CAVMAE, CAVMAEFT, CAVMAEFTAudio, CheckpointError
from cavmae_fast.models.opening import open_model, weights_hash

# Heads as wide as the published ones, so that a bare file can be opened.
WIDTHS = {"embed_dim": 64, "num_heads": 1}
MODELS = {
    "pretrained": lambda: CAVMAE(**TINY | WIDTHS | {"decoder_num_heads": 1, "norm_pix_loss": True}),
    "fine-tuned": lambda: CAVMAEFT(5, **ENCODER | WIDTHS | {"norm_pix_loss": True}),
    "audio": lambda: CAVMAEFTAudio(5, **ENCODER | WIDTHS | {"norm_pix_loss": True}),
}


def features(model) -> torch.Tensor:
    audio, imgs = inputs(dtype=torch.float32)
    with torch.no_grad():
        found = model.forward_feat(audio, imgs)
    return found if isinstance(found, torch.Tensor) else torch.cat(found, dim=1)


@pytest.mark.parametrize("form", ["folder", "weights in folder", ".pth", ".safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_every_class_in_every_form(name, form, tmp_path):
    model = randomize(MODELS[name]()).eval()
    path = tmp_path / f"checkpoint{form}"
    if "folder" in form:
        path = model.save_pretrained(tmp_path / "model")
        path = path / "model.safetensors" if form.startswith("weights") else path
    elif form == ".pth":
        torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, path)
    else:
        save_file(model.state_dict(), path)
    opened = open_model(path)
    assert type(opened) is type(model) and not opened.training
    # A video is no part of the audio model; whether audio's file was normalized it cannot say.
    unknown = {"img_size", "in_chans"} if name == "audio" and form.startswith(".") else set()
    assert {k: v for k, v in opened.config.items() if k not in unknown} == {
        k: v for k, v in model.config.items() if k not in unknown
    }
    torch.testing.assert_close(features(opened), features(model), rtol=0, atol=0)
    assert weights_hash(opened) == weights_hash(model)


def test_overrides_win(tmp_path):
    model = CAVMAE(**TINY)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    opened = open_model(tmp_path / "a.pth", num_heads=3, decoder_num_heads=4, norm_pix_loss=False)
    assert opened.config == model.config


def test_the_hash_tells_weights_apart():
    first, second = CAVMAE(**TINY), CAVMAE(**TINY)
    second.load_state_dict(first.state_dict())
    assert weights_hash(first) == weights_hash(second)
    second.mask_token.data[..., 0] += 1
    assert weights_hash(first) != weights_hash(second)


def test_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.pth does not exist"):
        open_model(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        open_model(tmp_path)
    CAVMAE(**TINY).save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=r"the model of this run lies in .*run/model"):
        open_model(tmp_path / "run")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth holds the weights of none of CAVMAE, CAVMAEFT, CAVMAEFTAudio"):
        open_model(tmp_path / "other.pth")
    cut = {name: value for name, value in CAVMAE(**TINY).state_dict().items() if not name.startswith("pos_embed_a")}
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"cut.pth does not look like a CAVMAE: 'pos_embed_a'"):
        open_model(tmp_path / "cut.pth")
    config = tmp_path / "run" / "model" / "config.json"
    config.write_text(json.dumps({"class": "ResNet"}))
    with pytest.raises(CheckpointError, match=r"describes a ResNet; allowed: CAVMAE, CAVMAEFT, CAVMAEFTAudio"):
        open_model(tmp_path / "run" / "model")
    config.write_text("[]")
    with pytest.raises(CheckpointError, match=r"cannot be read as the configuration"):
        open_model(tmp_path / "run" / "model")
