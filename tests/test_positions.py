"""Checkpoints of another audio length or image size: their tables of positions are cut or interpolated when asked for."""

from __future__ import annotations

import pytest
import tiny
import tiny_mavil
import torch
from tiny import one_thread  # noqa: F401

from cavmae_fast import CAVMAE, CAVMAEFT, PRESETS, PRETRAINED_TO_FINE_TUNED, CheckpointError, load_checkpoint
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.models import MAE, MAEFT, MAViL, MAViLFT
from cavmae_fast.models.positions import adapt
from cavmae_fast.models.tower_weights import TOWERS_TO_FINE_TUNED
from cavmae_fast.models.weights import LoadReport
from cavmae_fast.reference.positions import sincos_positions
from cavmae_fast.training.pretrain import pretrain
from cavmae_fast.training.pretrain_config import PretrainConfig

ROWS = 8  # 128 mel bins, patches of 16


def audio_table(columns: int, width: int = 3) -> torch.Tensor:
    """`[1, 8 * columns, 3]`: each place holds its row, its column and a number of its own."""
    row, column = torch.meshgrid(torch.arange(ROWS), torch.arange(columns), indexing="ij")
    return torch.stack([row, column, 100 * row + column], dim=-1).reshape(1, ROWS * columns, width).float()


def test_time_columns_are_cut_and_frequency_rows_stay():
    """512 positions are 8 rows of 64 columns: the first half of the *time* is kept, not the first half of the list."""
    whole = audio_table(64)
    first = adapt("pos_embed_a", whole, ROWS, (ROWS, 32))
    assert torch.equal(first.table, audio_table(32))
    assert first.said == "pos_embed_a: 8 x 64 -> 8 x 32, time columns 0 to 31 kept"
    middle = adapt("pos_embed_a", whole, ROWS, (ROWS, 32), "center")
    assert torch.equal(middle.table[..., 1].view(ROWS, 32)[0], torch.arange(16, 48).float())
    assert torch.equal(middle.table[..., 0], audio_table(32)[..., 0])


def test_interpolation_moves_along_time_alone():
    half = adapt("pos_embed_a", audio_table(64), ROWS, (ROWS, 32), "interpolate").table.view(ROWS, 32, 3)
    assert torch.equal(half[..., 0], torch.arange(8.0)[:, None].expand(8, 32))
    assert torch.allclose(half[..., 1], 2 * torch.arange(32.0).expand(8, 32) + 0.5)  # the middle of two columns
    longer = adapt("pos_embed_a", audio_table(16), ROWS, (ROWS, 64))
    assert "interpolated (bilinear)" in longer.said
    columns = longer.table.view(ROWS, 64, 3)[3, :, 1]
    assert (columns.diff() >= 0).all() and columns[0] == 0 and columns[-1] == 15


def test_cut_sine_cosine_positions_are_those_of_the_shorter_model():
    for columns in (1, 12, 31):
        cut = adapt("pos_embed_a", sincos_positions(48, ROWS, 64)[None], ROWS, (ROWS, columns)).table[0]
        assert torch.equal(cut, sincos_positions(48, ROWS, columns))


def test_pictures_are_interpolated_in_both_directions():
    row, column = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    table = torch.stack([row, column], dim=-1).reshape(1, 196, 2)
    small = adapt("pos_embed_v", table, None, (7, 7))
    assert small.said == "pos_embed_v: 14 x 14 -> 7 x 7, interpolated (bicubic)"
    grid = small.table.view(7, 7, 2)
    assert torch.allclose(grid[1:-1, 1:-1, 0], (2 * torch.arange(7.0) + 0.5)[1:-1, None].expand(5, 5), atol=1e-5)
    assert torch.allclose(grid[..., 0], grid[..., 1].T, atol=1e-6)
    wide = adapt("pos_embed_v", table, None, (14, 28)).table.view(14, 28, 2)
    assert torch.allclose(wide[..., 0], torch.arange(14.0)[:, None].expand(14, 28), atol=1e-5)


@pytest.mark.parametrize("kind", [CAVMAE, CAVMAEFT])
def test_a_checkpoint_of_another_size_goes_in_when_asked_for(kind, tmp_path):
    arguments = () if kind is CAVMAE else (4,)
    config = tiny.TINY if kind is CAVMAE else tiny.ENCODER
    torch.manual_seed(0)
    long = tiny.randomize(kind(*arguments, **config))
    short = kind(*arguments, **config | {"audio_length": 32, "img_size": 48})
    untouched = {name: value.clone() for name, value in short.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"pos_embed_a has shape \[1, 32, 48\].*--adapt-positions"):
        load_checkpoint(short, long.state_dict())
    assert all(torch.equal(value, untouched[name]) for name, value in short.state_dict().items())
    report = load_checkpoint(short, long.state_dict(), adapt_positions=True)
    missing, unexpected = report
    assert isinstance(report, LoadReport) and missing == unexpected == []
    assert any(line.startswith("pos_embed_a: 8 x 4 -> 8 x 2, time columns 0 to 1 kept") for line in report.adapted)
    assert any(line.startswith("pos_embed_v: 2 x 2 -> 3 x 3") for line in report.adapted)
    assert len(report.adapted) == (4 if kind is CAVMAE else 2)
    assert torch.equal(short.state_dict()["blocks_a.0.attn.qkv.weight"], long.state_dict()["blocks_a.0.attn.qkv.weight"])
    long.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, audio_length=32, img_size=48, adapt_positions=True)
    assert all(torch.equal(value, short.state_dict()[name]) for name, value in again.state_dict().items())


def test_nothing_is_adapted_that_fits():
    model = CAVMAE(**tiny.TINY)
    assert load_checkpoint(model, model.state_dict(), adapt_positions=True).adapted == ()


def test_what_cannot_be_adapted():
    model = CAVMAEFT(4, **tiny.ENCODER)
    state = dict(model.state_dict())
    for name, shape, words in (
        ("pos_embed_a", (1, 30, 48), "pos_embed_a holds 30 positions, which fill no grid of 8 rows"),
        ("pos_embed_v", (1, 6, 48), "pos_embed_v holds 6 positions, which fill no square"),
        ("pos_embed_v", (1, 4, 40), r"pos_embed_v has shape \[1, 4, 40\]"),
        ("mlp_head.1.weight", (5, 48), "mlp_head.1.weight has shape"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(model, state | {name: torch.zeros(shape)}, adapt_positions=True)
    with pytest.raises(CheckpointError, match="adapt_positions is 'stretch'; it must be one of True, False, cut, cent"):
        load_checkpoint(model, state | {"pos_embed_a": torch.zeros(1, 16, 48)}, adapt_positions="stretch")


def test_pretraining_goes_on_from_shorter_sound(tmp_path, capfd):
    clips, _ = generate_clips(tmp_path / "clips", num_train=4, num_test=0, seconds=0.7, size=64)
    PRESETS["small"].create(audio_length=96).save_pretrained(tmp_path / "short")
    options = {"data": tuple(clips), "init": tmp_path / "short", "out": tmp_path / "out", "device": "cpu"}
    with pytest.raises(CheckpointError, match="--adapt-positions"):
        pretrain(PretrainConfig(steps=1, **options))
    summary = pretrain(PretrainConfig(steps=1, adapt_positions=True, **options))
    assert summary["steps"] == 1
    assert "adapted pos_embed_a: 8 x 6 -> 8 x 12, interpolated (bilinear)" in "".join(capfd.readouterr())


def test_pretrained_to_fine_tuned_on_shorter_sound():
    torch.manual_seed(0)
    pretrained = CAVMAE(**tiny.TINY)
    model = CAVMAEFT(4, **tiny.ENCODER | {"audio_length": 48})
    report = load_checkpoint(model, pretrained.state_dict(), **PRETRAINED_TO_FINE_TUNED, adapt_positions=True)
    assert report.adapted == ("pos_embed_a: 8 x 4 -> 8 x 3, time columns 0 to 2 kept",)
    assert torch.equal(model.pos_embed_a[0], sincos_positions(48, 8, 3))


@pytest.mark.parametrize("modality", ["a", "v"])
def test_towers_of_another_size(modality):
    """Sound is cut to the table of a model that short, exactly; each frame of pictures is interpolated by itself."""
    whole = MAE(modality, **tiny_mavil.TINY | {"audio_length": 64})
    small = {"audio_length": 32, "img_size": 48}
    model = MAEFT(3, modality, **tiny_mavil.TOWER | small)
    with pytest.raises(CheckpointError, match=r"pos_embed has shape .*--adapt-positions"):
        load_checkpoint(model, whole.state_dict(), **TOWERS_TO_FINE_TUNED)
    fresh = model.pos_embed.clone()
    report = load_checkpoint(model, whole.state_dict(), **TOWERS_TO_FINE_TUNED, adapt_positions=True)
    if modality == "a":
        assert report.adapted == ("pos_embed: 8 x 4 -> 8 x 2, time columns 0 to 1 kept",)
        assert torch.equal(model.pos_embed, fresh)
        longer = MAEFT(3, "a", **tiny_mavil.TOWER | {"audio_length": 96})
        load_checkpoint(longer, whole.state_dict(), **TOWERS_TO_FINE_TUNED, adapt_positions=True)
        table = whole.pos_embed[:, 1:].unflatten(1, (4, 8)).transpose(1, 2).flatten(1, 2)  # frequency by frequency
        want = adapt("pos_embed", table, 8, (8, 6)).table.unflatten(1, (8, 6)).transpose(1, 2).flatten(1, 2)
        assert torch.equal(longer.pos_embed[:, 1:], want)
    else:
        assert report.adapted == ("pos_embed: 2 x 2 -> 3 x 3, interpolated (bicubic)",)
        frames = model.pos_embed[0, 1:].unflatten(0, (2, 9))
        want = [adapt("pos_embed", part.unsqueeze(0), None, (3, 3)).table[0] for part in whole.pos_embed[0, 1:].split(4)]
        torch.testing.assert_close(frames, torch.stack(want))
    assert torch.equal(model.pos_embed[:, :1], whole.pos_embed[:, :1])


def test_both_towers_of_mavil_and_bad_tables():
    whole = MAViL(**tiny_mavil.MAVIL)
    model = MAViLFT(3, **tiny_mavil.TOWER | {"audio_length": 16, "img_size": 48})
    report = load_checkpoint(model, whole.state_dict(), **TOWERS_TO_FINE_TUNED, adapt_positions=True)
    assert [line.split(":")[0] for line in report.adapted] == ["audio.pos_embed", "video.pos_embed"]
    for name, length, words in (
        ("audio.pos_embed", 1 + 12, "audio.pos_embed holds 12 positions, which fill no grid of 8 rows"),
        ("video.pos_embed", 1 + 7, "video.pos_embed holds 7 positions, which are not those of 2 frames"),
        ("video.pos_embed", 1 + 6, "video.pos_embed holds 3 positions, which fill no square"),
    ):
        with pytest.raises(CheckpointError, match=words):
            state = whole.state_dict() | {name: torch.zeros(1, length, 48)}
            load_checkpoint(model, state, **TOWERS_TO_FINE_TUNED, adapt_positions=True)
