"""What models of towers are for: embeddings, retrieval, search and inpainting with MAViL, A-MAE and V-MAE; and what each of
them cannot do, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluating import QUICK, cli, write_picture, write_sound
from PIL import Image
from tiny import one_thread, randomize  # noqa: F401
from tiny_mavil import MAVIL, TINY, TOWER

from cavmae_fast.data.loader import Loader
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.evaluation import Index, embed, inpaint, retrieve, search
from cavmae_fast.evaluation.commands.inpaint import write_inpainted
from cavmae_fast.evaluation.drawing import mosaic
from cavmae_fast.evaluation.inpainting import Errors, InpaintError
from cavmae_fast.evaluation.reconstruction import draw_reconstructions
from cavmae_fast.models.mae import MAE, MAEFT
from cavmae_fast.models.mavil import MAViL, MAViLFT


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Five clips of three seconds, so that a crop of two has a place in the middle."""
    folder = tmp_path_factory.mktemp("clips")
    generate_clips(folder, num_train=5, num_test=0, seconds=3.0, size=48)
    return folder / "train"


@pytest.fixture(scope="module")
def mavil() -> MAViL:
    return randomize(MAViL(**MAVIL), seed=3).eval()


@pytest.fixture(scope="module")
def index(mavil, videos, tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    return embed(mavil.save_pretrained(folder / "model"), videos, folder / "index", running=QUICK)


def batch_of(model, videos):
    (batch,) = Loader(videos, 5, model.clip_spec, workers=0)
    return batch


@torch.no_grad()
def test_mavils_embeddings_are_what_it_contrasts(mavil, index, videos):
    """The mean of the patches' normed tokens of each encoder, of the crop in the middle."""
    batch = batch_of(mavil, videos)
    tokens = mavil.forward_feat(batch.audio, batch.image)
    assert index.streams == ["audio", "video"] and index.ids == batch.ids
    for name, want in zip(("audio", "video"), tokens):
        (got,) = index.arrays(name)
        np.testing.assert_allclose(got, F.normalize(want.mean(dim=1), dim=-1).numpy(), atol=1e-6)


@torch.no_grad()
def test_the_class_token_is_counted_where_it_is_contrasted():
    model = randomize(MAViL(**MAVIL, pool_class_token=True)).eval()
    x = torch.randn(2, 32, 128)
    (want,) = (tokens.mean(dim=1) for tokens in model.encoded({"a": x}).values())
    torch.testing.assert_close(model.embeddings({"a": x})["a"], want)
    model.pool_class_token = False
    torch.testing.assert_close(model.embeddings({"a": x})["a"], model.features({"a": x})["a"].mean(dim=1))


@pytest.mark.parametrize(
    ("build", "options", "shapes"),
    [
        (lambda: MAE("a", **TINY), {}, {"audio": (48,)}),
        (lambda: MAE("v", **TINY), {"pooling": "tokens"}, {"video": (8, 48)}),
        (lambda: MAE("v", **TINY | {"frames": 1}), {"frames": 3}, {"video": (48,)}),
        (lambda: MAEFT(3, "a", **TOWER), {"store": "float16"}, {"audio": (48,)}),
        (lambda: MAViLFT(3, **TOWER), {"streams": ("video",)}, {"video": (48,)}),
        (lambda: MAViL(**MAVIL), {"pooling": "tokens"}, {"audio": (16, 48), "video": (8, 48)}),
    ],
)
def test_each_model_embeds_what_it_has(build, options, shapes, videos, tmp_path):
    index = embed(randomize(build()), videos, tmp_path / "index", running=QUICK, **options)
    assert {name: next(iter(index.arrays(name))).shape[1:] for name in index.streams} == shapes


def test_retrieval(mavil, videos):
    found = retrieve(mavil, videos, running=QUICK)
    assert found.scores.clips == 5 and found.audio.shape == found.video.shape == (5, 48)
    assert found.scores.chance[1] == 20


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MAE("a", **TINY), "the model is a MAE of audio alone; allowed: one that embeds both"),
        (lambda: MAEFT(3, "v", **TOWER), "the model is a MAEFT of video alone"),
    ],
)
def test_what_cannot_retrieve_says_so(build, words, videos):
    with pytest.raises(ValueError, match=words):
        retrieve(build(), videos, running=QUICK)


def test_a_crop_is_one_look(mavil, videos, tmp_path):
    for job in (
        lambda: retrieve(mavil, videos, frames=3, running=QUICK),
        lambda: embed(mavil, videos, tmp_path / "index", frames=3, running=QUICK),
    ):
        with pytest.raises(
            ValueError, match="frames is 3, but MAViL sees 4 pictures of a crop at once; allowed: 1, the crop"
        ):
            job()


def test_a_clip_finds_itself(index, videos, tmp_path):
    """By its video it is looked at as it was for the index: the cosine is 1. Its sound alone, which has no pictures to begin
    with, may begin a few milliseconds elsewhere."""
    wanted = sorted(videos.glob("*.mp4"))[2]
    by_video = search(index, video=wanted, top=2, match="all", running=QUICK)
    assert by_video.query.frames.shape == (4, 32, 32, 3)
    for match, pairs in (("same", 2), ("auto", 2)):
        answer = search(index, video=wanted, top=2, match=match, running=QUICK)
        assert len(answer.pairs) == pairs and answer.hits[0].id == wanted.stem
        assert answer.hits[0].score == pytest.approx(1, abs=1e-5)
    import soundfile

    from cavmae_fast.data.media.files import read_sound

    sound, _ = read_sound(str(wanted), sample_rate=16000, seconds=60)
    soundfile.write(tmp_path / "own.wav", sound, 16000)
    (hit,) = search(index, audio=tmp_path / "own.wav", top=1, running=QUICK).hits
    assert hit.id == wanted.stem and hit.score > 0.99


def test_a_picture_is_a_clip_in_which_nothing_moves(index, videos, tmp_path):
    picture = write_picture(tmp_path / "a.png", sorted(videos.glob("*.mp4"))[0])
    answer = search(index, image=picture, top=3, running=QUICK)
    assert answer.query.frames.shape == (4, 32, 32, 3) and (answer.query.frames == answer.query.frames[0]).all()
    assert answer.pairs == (("video", "video"),) and len(answer.hits) == 3


@pytest.mark.parametrize(("modality", "missing", "there"), [("v", "audio", "video"), ("a", "video", "audio")])
def test_a_query_that_the_model_cannot_see(modality, missing, there, videos, tmp_path):
    model = randomize(MAE(modality, **TINY))
    embed(model, videos, tmp_path / "index", running=QUICK)
    first = sorted(videos.glob("*.mp4"))[0]
    write = write_sound if missing == "audio" else write_picture
    query = write(tmp_path / ("a.wav" if missing == "audio" else "a.png"), first)
    kind = "audio" if missing == "audio" else "image"
    with pytest.raises(ValueError, match=f"streams holds '{missing}', but MAE has no such stream; allowed: {there}"):
        search(tmp_path / "index", **{kind: query}, top=1, model=model, running=QUICK)
    assert search(tmp_path / "index", video=first, top=1, model=model, running=QUICK).hits[0].id == first.stem


# --------------------------------------------------------------------------------------------------------- inpainting

FILLING = {
    "mavil": (lambda **changes: MAViL(**MAVIL | changes), {"picture", "spectrogram"}),
    "a-mae": (lambda **changes: MAE("a", **TINY | changes), {"spectrogram"}),
    "v-mae": (lambda **changes: MAE("v", **TINY | changes), {"picture"}),
}


@pytest.mark.parametrize("name", FILLING)
def test_what_is_filled_in(name, videos, tmp_path):
    build, kinds = FILLING[name]
    result = inpaint(randomize(build(norm_pix_loss=False)), videos, clips=2, running=QUICK)
    assert result.mask_ratio == 0.8 and len(result.clips) == 2
    (clip, _) = result.clips
    assert {kind for kind in ("picture", "spectrogram") if getattr(clip, kind) is not None} == kinds
    if clip.picture is not None:
        assert clip.picture.original.shape == (4, 32, 32, 3) and clip.picture.original.dtype == np.uint8
        removed = (clip.picture.masked != clip.picture.original).any(axis=-1)
        # A tubelet is removed as a whole: both of its pictures lose the same patches. 6 of 8 tubelets are removed.
        assert (removed[::2] | removed[1::2]).reshape(2, 2, 16, 2, 16).any(axis=(2, 4)).sum() == 7
    if clip.spectrogram is not None:
        assert clip.spectrogram.original.shape == (32, 128)
        assert 0.6 < (clip.spectrogram.masked != clip.spectrogram.original).mean() < 0.9
    assert (clip.errors.audio_db is None, clip.errors.video_psnr_db is None) == (
        "spectrogram" not in kinds,
        "picture" not in kinds,
    )
    write_inpainted(result, tmp_path / "out", sound=False)
    files = {path.name for path in (tmp_path / "out" / "0000").iterdir()}
    assert files == {"overview.png"} | {f"{kind}-{view}.png" for kind in kinds for view in ("original", "masked", "filled")}
    if "picture" in kinds:  # four pictures, two by two
        assert Image.open(tmp_path / "out" / "0000" / "picture-filled.png").size == (64, 64)
    (row, _) = json.loads((tmp_path / "out" / "clips.json").read_text())["clips"]
    assert row.keys() - {"folder", "id", "path"} == {n for n, v in vars(clip.errors).items() if v is not None}


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_model_that_predicts_what_is_true_makes_no_error(norm_pix_loss, videos):
    """Tubelets and spectrograms are put together as they were taken apart."""
    model = randomize(MAViL(**MAVIL, norm_pix_loss=norm_pix_loss))
    fill_in = MAViL.fill_in

    def true(inputs, *options):
        found = {}
        for m, prediction in fill_in(model, inputs, *options).items():
            patches = model.to_patches(m, inputs[m])
            if norm_pix_loss:
                variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
                patches = (patches - mean) / (variance + 1e-6).sqrt()
            found[m] = prediction._replace(patches=patches)
        return found

    model.fill_in = true
    (clip,) = inpaint(model, videos, clips=1, running=QUICK).clips
    assert clip.errors.audio_db < 1e-3 and clip.errors.video_psnr_db > 80
    assert clip.errors.audio_mean_db > 1 and clip.errors.video_mean_psnr_db < 60
    np.testing.assert_array_equal(clip.picture.filled, clip.picture.original)


def test_images_are_as_the_clip_has_them():
    """Pictures in their order and upright, spectrograms with time across."""
    model = MAViL(**MAVIL)
    sound, imgs = torch.randn(2, 32, 128), torch.randn(2, 4, 3, 32, 32)
    torch.testing.assert_close(model.to_images("v", model.to_patches("v", imgs)), imgs.transpose(1, 2))
    torch.testing.assert_close(model.to_images("a", model.to_patches("a", sound)), sound.transpose(1, 2).unsqueeze(1))
    single = MAE("v", **TINY | {"frames": 1})
    torch.testing.assert_close(single.to_images("v", single.to_patches("v", imgs[:, 0])), imgs[:, 0])


def test_several_pictures_lie_in_a_grid():
    pictures = np.arange(8 * 2 * 2 * 3, dtype=np.uint8).reshape(8, 2, 2, 3)
    grid = mosaic(pictures)
    assert grid.shape == (4, 8, 3)
    np.testing.assert_array_equal(grid[:2, 6:], pictures[3])
    np.testing.assert_array_equal(grid[2:, :2], pictures[4])
    assert mosaic(pictures[:5]).shape == (4, 6, 3) and not mosaic(pictures[:5])[2:, 4:].any()
    np.testing.assert_array_equal(mosaic(pictures[0]), pictures[0])


@pytest.mark.parametrize("name", FILLING)
def test_the_figure_of_a_run(name, tmp_path):
    model = randomize(FILLING[name][0]())
    sound, imgs = torch.randn(2, 32, 128), torch.randn(2, 4, 3, 32, 32)
    inputs = (sound if "a" in model.modalities else None, imgs if "v" in model.modalities else None)
    draw_reconstructions(model, *inputs, 0.8, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_filled_in_is_said(mavil, videos):
    with pytest.raises(ValueError, match=r"mask_mode is 'time'; for MAViL it must be one of unstructured$"):
        inpaint(mavil, videos, mask_mode="time", running=QUICK)
    for model in (MAViLFT(3, **TOWER), MAEFT(3, "a", **TOWER)):
        words = f"the model is a {type(model).__name__}, which has no decoder; allowed: a pretrained CAVMAE, MAE or MAViL"
        with pytest.raises(InpaintError, match=words):
            inpaint(model, videos, running=QUICK)
    with pytest.raises(ValueError, match=r"mask_ratio is 0.0, which removes none"):
        inpaint(MAE("a", **TINY), videos, mask_ratio=0.0, running=QUICK)
    assert Errors() == Errors(None, None, None, None)


def test_the_commands(videos, tmp_path):
    folder = randomize(MAE("a", **TINY)).save_pretrained(tmp_path / "model")
    options = ("--data", videos, "--device", "cpu", "--dtype", "float32")
    done = cli("inpaint", folder, *options, "--clips", 1, "--no-sound", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "80% of the patches removed" in done.stdout and "sound" in done.stdout and "PSNR" not in done.stdout
    refused = cli("retrieve", folder, *options)
    assert refused.returncode == 2 and refused.stderr.count("error:") == 1 and "MAE of audio alone" in refused.stderr
