"""DALI's decoding: Pillow's pixels and soundfile's samples, in order, whatever is damaged on the way."""

import gc
import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from media_sets import write_shards

from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.dali import Encoded, EncodedVideo, decode_batches, decode_videos
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.sets.shards import ShardSet

pytest.importorskip("nvidia.dali", reason="the optional dependency nvidia-dali is not installed")

SIZE, SAMPLES = 64, 2000
CPU = torch.device("cpu")
OPTIONS = {"image_size": SIZE, "samples": SAMPLES, "device": CPU, "threads": 2, "max_batch": 4}


def picture(height, width, seed=0, noise=8):
    """A smooth picture with a little noise, as photographs have it (`noise=128`: noise that saturates)."""
    from PIL import Image

    rng = np.random.default_rng([height, width, seed])
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-noise, noise + 1, smooth.shape)).clip(0, 255).astype(np.uint8))


def image_bytes(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def sound_bytes(samples, format="FLAC", subtype="PCM_16", rate=16000):
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def square(image, size=SIZE):
    """`[size, size, 3]` int64: what torchvision does with Pillow."""
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    image = image.resize([size if side == short else int(size * side / short) for side in (width, height)], Image.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).astype(int)


def plain(number):
    """A clip that says which it is: the picture's gray level and the sound's samples are `number`."""
    from PIL import Image

    gray = Image.new("RGB", (SIZE, SIZE), (number, number, number))
    return Encoded(image_bytes(gray), sound_bytes(np.full(500 + number, number, np.int16)))


@pytest.fixture(scope="module")
def clips():
    return [plain(number) for number in range(40)]


def never(batch):
    raise AssertionError("repair was called")


def images_of(images, size=SIZE):
    """Decode pictures alone, four a batch: `[n, size, size, 3]` int64."""
    sound = sound_bytes(np.zeros(400, np.int16))
    batches = [[Encoded(image, sound) for image in images[i : i + 4]] for i in range(0, len(images), 4)]
    return torch.cat([image for image, _, _ in decode_batches(iter(batches), repair=never, **OPTIONS)]).numpy().astype(int)


def numbers_of(batches, repair=never, **options):
    """Decode batches of `plain` clips; which clips came out, batch by batch."""
    result = list(decode_batches(iter(batches), repair=repair, **{**OPTIONS, **options}))
    for image, waveform, num_samples in result:  # looked at when all are there: no buffer was used again
        assert image.is_contiguous() and waveform.is_contiguous()
        numbers = waveform[:, 0].long()
        assert torch.equal(image, numbers.to(torch.uint8)[:, None, None, None].expand(-1, SIZE, SIZE, 3))
        assert torch.equal(num_samples, 500 + numbers)
        own = torch.arange(SAMPLES) < num_samples[:, None]
        assert torch.equal(waveform.long(), torch.where(own, numbers[:, None], 0))
    return [waveform[:, 0].tolist() for _, waveform, _ in result]


@pytest.mark.parametrize("shape", [(64, 64), (64, 113), (90, 64)])
def test_pixels_are_exactly_pillows(shape):
    from PIL import Image

    image, gray = picture(*shape), picture(*shape).convert("L")
    files = [image_bytes(image, quality=95, subsampling=subsampling) for subsampling in (0, 1, 2)]
    files += [image_bytes(image, quality=60, progressive=True), image_bytes(gray, quality=95)]
    files += [image_bytes(image, "PNG"), image_bytes(gray, "PNG"), image_bytes(image.convert("P"), "PNG")]
    exif = Image.Exif()
    exif[0x112] = 6  # "turn me": Pillow does not
    files += [image_bytes(image, quality=95, exif=exif)]
    expected = [square(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    np.testing.assert_array_equal(images_of(files), expected)


SHAPES = [(65, 65), (63, 64), (37, 53), (53, 38), (97, 640), (240, 320), (480, 271), (64, 65), (128, 131), (720, 1280)]


@pytest.mark.parametrize("noise, most, mean", [(8, 10, 0.25), (128, 26, 0.55)])
def test_scaled_pictures_are_close_to_pillows(noise, most, mean):
    pictures = [picture(*shape, noise=noise) for shape in SHAPES]
    difference = np.abs(images_of([image_bytes(image, "PNG") for image in pictures]) - [square(image) for image in pictures])
    assert difference.max(axis=(1, 2, 3)).max() <= most
    assert difference.mean(axis=(1, 2, 3)).max() <= mean


@pytest.mark.parametrize("side", range(64, 72))
def test_the_cut_is_at_pillows_pixel(side):
    """All roundings of the offset, halves included, on a picture whose every column differs."""
    from PIL import Image

    image = Image.fromarray(np.arange(64 * side * 3, dtype=np.uint32).view(np.uint8)[: 64 * side * 3].reshape(64, side, 3))
    for turned in (image, image.transpose(Image.Transpose.TRANSPOSE)):
        np.testing.assert_array_equal(images_of([image_bytes(turned, "PNG")])[0], square(turned))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "format, subtype",
    [("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "PCM_U8")],
)
def test_sound_is_exactly_soundfiles(format, subtype, channels):
    import soundfile

    rng = np.random.default_rng(0)
    image, batch, expected = image_bytes(picture(SIZE, SIZE)), [], []
    for length in (400, SAMPLES, 3 * SAMPLES):
        samples = rng.integers(-32768, 32768, (length, channels)).astype(np.int16)
        if subtype == "FLOAT":
            samples = (samples / 30000).astype(np.float32)  # some beyond full scale
        batch.append(Encoded(image, sound_bytes(samples, format, subtype)))
        first = soundfile.read(io.BytesIO(batch[-1].sound), dtype="int16", always_2d=True)[0][:SAMPLES, 0]
        expected.append(np.pad(first, (0, SAMPLES - len(first))))
    ((_, waveform, num_samples),) = decode_batches(iter([batch]), repair=never, **OPTIONS)
    assert waveform.dtype == torch.int16
    np.testing.assert_array_equal(waveform.numpy(), expected)
    assert num_samples.tolist() == [400, SAMPLES, SAMPLES]


@pytest.mark.parametrize("prefetch", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[1], [4, 4, 1], [3, 1, 4, 2, 4, 4, 1, 1], []])
def test_batches_of_any_size_come_in_order(clips, sizes, prefetch):
    starts = np.cumsum([0, *sizes]).tolist()
    batches = [clips[start : start + size] for start, size in zip(starts, sizes)]
    expected = [list(range(start, start + size)) for start, size in zip(starts, sizes)]
    assert numbers_of(batches, prefetch=prefetch) == expected
    views = [[Encoded(memoryview(clip.image), memoryview(clip.sound)) for clip in batch] for batch in batches]
    assert numbers_of(views, prefetch=prefetch) == expected


def test_it_reads_ahead_but_not_further(clips):
    asked = []

    def batches():
        for i in range(8):
            asked.append(i)
            yield clips[i : i + 1]

    for i, _ in enumerate(decode_batches(batches(), repair=never, **OPTIONS, prefetch=3)):
        assert len(asked) == min(8, i + 1 + 3)


def cut(clip, **fields):
    return clip._replace(**{name: getattr(clip, name)[:-share] for name, share in fields.items()})


DAMAGE = {
    "JPEG cut short": lambda clip: cut(clip, image=2),
    "no image": lambda clip: clip._replace(image=b"not an image"),
    "empty image": lambda clip: clip._replace(image=b""),
    "PNG cut short": lambda clip: clip._replace(image=image_bytes(picture(SIZE, SIZE), "PNG")[:-200]),
    "FLAC cut short": lambda clip: cut(clip, sound=5),
    "no sound": lambda clip: clip._replace(sound=b"not a sound"),
    "empty sound": lambda clip: clip._replace(sound=b""),
    "25 ms": lambda clip: clip._replace(sound=sound_bytes(np.zeros(399, np.int16))),
    "rate": lambda clip: clip._replace(sound=sound_bytes(np.zeros(500, np.int16), rate=44100)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_reaches_repair(clips, kind):
    batches = [clips[:3], [clips[3], DAMAGE[kind](clips[4]), clips[5]], clips[6:9]]
    seen = []
    assert numbers_of(batches, repair=lambda batch: seen.append(batch) or clips[3:6]) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert seen == [batches[1]]


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("damaged", [[0], [9], [4], [4, 5], [0, 1, 2], [8, 9], list(range(10))])
def test_nothing_is_lost_or_repeated(clips, damaged, prefetch):
    """Batches before, between and after damaged ones come out once, in order; each damaged one is repaired once."""
    whole = [clips[4 * i : 4 * i + 1 + i % 4] for i in range(10)]
    batches = list(whole)
    for i in damaged:
        kind = ("JPEG cut short", "FLAC cut short")[i % 2]
        batches[i] = [*whole[i][:-1], DAMAGE[kind](whole[i][-1])]
    repaired = []

    class Stream:
        """Unlike a generator, not to be asked again after its end."""

        asked = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.asked += 1
            assert self.asked <= len(batches) + 1
            if self.asked > len(batches):
                raise StopIteration
            return batches[self.asked - 1]

    def repair(batch):
        repaired.append(batches.index(batch))
        return whole[repaired[-1]]

    assert numbers_of(Stream(), repair, prefetch=prefetch) == [[4 * i + j for j in range(1 + i % 4)] for i in range(10)]
    assert repaired == damaged


def test_repair_may_take_several_goes_and_leave_clips_out(clips):
    """One clip at a time is found to be damaged, and left out: every batch returned is another one."""
    broken = [DAMAGE["no image"](clip) for clip in clips[1:4]]
    goes = []

    def repair(batch):
        goes.append(len(batch))
        return batch[:-1]

    assert numbers_of([clips[:1], [clips[1], *broken], clips[8:9]], repair) == [[0], [1], [8]]
    assert goes == [4, 3, 2]


@pytest.mark.parametrize("kind, message", [("no sound", "fn.decoders.audio: .*Format not recognized"), ("rate", "44100")])
def test_a_repair_that_changes_nothing_ends_in_dalis_words(clips, kind, message):
    goes = []
    batches = decode_batches(
        iter([clips[:2], [DAMAGE[kind](clips[2])], clips[3:5]]),
        repair=lambda batch: goes.append(1) or list(batch),
        **OPTIONS,
    )
    assert next(batches)[1][:, 0].tolist() == [0, 1]
    with pytest.raises(RuntimeError, match=f"repair returned a batch that DALI cannot decode: .*{message}"):
        next(batches)
    assert len(goes) == 2


def test_failures_that_pass_are_not_added_up(clips):
    """A batch that fails once and then decodes, unchanged to the eye, is no reason to give up a later one."""

    def repair(batch):
        batch[0].sound[:4] = b"fLaC"
        return batch

    batches = [[clip._replace(sound=bytearray(b"gone" + clip.sound[4:]))] for clip in clips[:5]]
    assert numbers_of(batches, repair) == [[0], [1], [2], [3], [4]]


def test_errors_of_repair_are_the_callers(clips):
    error = KeyError("mine")

    def repair(batch):
        raise error

    with pytest.raises(KeyError) as caught:
        numbers_of([clips[:2], [DAMAGE["no image"](clips[2])]], repair)
    assert caught.value is error


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_errors_of_the_batches_are_the_callers(clips, after):
    """Unchanged, their cause included, and after all batches that came before."""
    error, cause = RuntimeError("mine"), OSError("disk")

    def stream():
        for i in range(after):
            yield clips[i : i + 1]
        raise error from cause

    came = []
    with pytest.raises(RuntimeError) as caught:
        for _, waveform, _ in decode_batches(stream(), repair=never, **OPTIONS):
            came += waveform[:, 0].tolist()
    assert caught.value is error and error.__cause__ is cause
    assert came == list(range(after))


@pytest.mark.parametrize("size", [0, 5])
def test_a_batch_of_a_wrong_size_is_an_error(clips, size):
    with pytest.raises(ValueError, match=f"a batch holds {size} clips; allowed: 1 to max_batch=4"):
        numbers_of([clips[:4], clips[:size]])


@pytest.mark.parametrize("damage", [False, True])
def test_a_pipeline_is_gone_when_it_is_of_no_use(clips, damage):
    """At once, without the garbage collector, also when closed early: a pipeline is threads and memory."""
    from nvidia.dali import Pipeline

    def pipelines():
        return sum(type(thing) is Pipeline for thing in gc.get_objects())

    gc.collect()
    before, in_repair = pipelines(), []
    first = [DAMAGE["no image"](clips[0])] if damage else clips[:1]

    def repair(batch):
        in_repair.append(pipelines())
        return clips[:1]

    batches = decode_batches(iter([first, *([clip] for clip in clips)]), repair=repair, **OPTIONS)
    image, waveform, _ = next(batches)
    assert pipelines() == before + 1
    batches.close()
    assert pipelines() == before
    assert in_repair == [before] * damage
    assert image.max() == 0 and waveform.max() == 0  # still there
    numbers_of([clips[:1]])
    assert pipelines() == before


def test_a_process_ends_with_batches_under_way():
    code = (
        "import sys; sys.path[:0] = ['tests']; import test_dali as t\n"
        "clips = [t.plain(i) for i in range(20)]\n"
        "batches = t.decode_batches(iter([[clip] for clip in clips]), repair=t.never, **t.OPTIONS, prefetch=8)\n"
        "print(next(batches)[1][0, 0].item())"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"


@pytest.mark.parametrize("name", ["image_size", "samples", "threads", "max_batch", "prefetch"])
def test_numbers_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is 0; allowed: 1 or more"):
        decode_batches(iter([]), repair=never, **{**OPTIONS, name: 0})


def test_devices_out_of_range_are_named():
    with pytest.raises(ValueError, match="device is meta; allowed: cpu or cuda"):
        decode_batches(iter([]), repair=never, **{**OPTIONS, "device": torch.device("meta")})
    with pytest.raises(ValueError, match=r"decodes videos with NVDEC, which needs a CUDA device; allowed: .*loader='torch'"):
        decode_videos(iter([]), repair=never, **OPTIONS)


def test_absence_of_dali_is_named(monkeypatch):
    assert dali.available() is None
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    monkeypatch.delattr(sys.modules["nvidia.dali"], "fn", raising=False)
    assert "pip install 'cavmae_fast[dali]'" in dali.available()
    with pytest.raises(ImportError, match="cannot be imported"):
        decode_batches(iter([]), repair=never, **OPTIONS)


def test_nothing_of_dali_is_imported_with_the_module():
    code = "import sys, cavmae_fast.data.decode.dali; print([name for name in sys.modules if name.startswith('nvidia')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("graph, outputs", [(dali._clips, "gpu gpu cpu cpu"), (dali._videos, "gpu gpu cpu")])
def test_the_graph_for_the_gpu_can_be_built(graph, outputs):
    """Without a GPU: operators, their arguments and where their outputs lie; running them is another matter."""
    from nvidia.dali import Pipeline

    with Pipeline(4, 2, 0):
        nodes = graph(lambda: None, image_size=SIZE, samples=SAMPLES, gpu=True)
    assert [node.device for node in nodes] == outputs.split()


def video_bytes(frames, height=72, width=96, format="avi"):
    """MJPEG, frame `i` of gray level `20 * i`, its left half the inverse."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=format) as out:
        stream = out.add_stream("mjpeg", rate=10, width=width, height=height, pix_fmt="yuvj420p")
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        for i in range(frames):
            image = np.full((height, width, 3), 20 * i, np.uint8)
            image[:, : width // 2] = 255 - 20 * i
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def run_videos(batches, repair):
    """`decode_videos` with DALI's decoder for the CPU."""
    graph = partial(dali._videos, image_size=SIZE, samples=SAMPLES, gpu=False)
    return list(dali._run(dali._Feed(iter(batches), dali._video_arrays, 4), graph, repair, CPU, 2, 2))


@pytest.mark.parametrize("format", ["avi", "mov", "matroska"])
def test_videos_give_the_frame_asked_for(format):
    sizes = [(72, 96), (130, 64), (64, 64)]
    waveform = np.arange(3000, dtype=np.int16)
    files = [video_bytes(12, *size, format) for size in sizes]
    batches = [[EncodedVideo(file, frame, waveform[::2][:1500]) for file in files] for frame in (0, 7, 11)]
    for frame, (image, sound, num_samples) in zip((0, 7, 11), run_videos(batches, never)):
        assert image.shape == (3, SIZE, SIZE, 3) and num_samples.tolist() == [1500] * 3
        assert (image[:, :, -8:].int() - 20 * frame).abs().max() <= 3
        assert (image[:, :, :8].int() - (255 - 20 * frame)).abs().max() <= 3
        assert torch.equal(sound[:, :1500], torch.arange(0, 3000, 2, dtype=torch.int16).expand(3, -1))
        assert sound[:, 1500:].abs().max() == 0


def test_a_frame_past_the_end_reaches_repair():
    waveform = np.zeros(500, np.int16)
    good, past = EncodedVideo(video_bytes(5), 4, waveform), EncodedVideo(video_bytes(5), 5, waveform)
    seen = []
    result = run_videos([[good, past], [good]], lambda batch: seen.append(batch) or [good])
    assert [len(image) for image, _, _ in result] == [1, 1]
    assert seen == [[good, past]]


def test_dali_reads_our_shards_through_their_index(tmp_path):
    """With its own reader: for those who build pipelines of their own."""
    from nvidia.dali import Pipeline, fn

    videos, _ = generate_clips(tmp_path / "clips", num_train=3, num_test=1, seconds=1.0, size=64, seed=5)
    folder = write_shards(tmp_path / "shards", videos[0].parent)
    tar, exts = folder / "shard-000000.tar", ["json", "flac", "7.jpg"]
    pipe = Pipeline(3, 1, None)
    with pipe:
        index = [str(tar.with_suffix(".idx"))]
        pipe.set_outputs(*fn.readers.webdataset(paths=[str(tar)], index_paths=index, ext=exts, name="reader"))
    outputs = pipe.run()
    assert pipe.epoch_size("reader") == 3
    clips = ShardSet(folder)
    for number in range(3):
        meta, sound, image = (bytes(np.asarray(output[number])) for output in outputs)
        assert (json.loads(meta), Encoded(image, sound)) == clips[number].read(7)
