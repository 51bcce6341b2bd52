"""DALI's decoding: Pillow's pixels and soundfile's samples, in order, whatever is damaged on the way."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from media_sets import write_shards

from cavmae_fast.clip import ClipSpec
from cavmae_fast.data.decode import dali
from cavmae_fast.data.decode.dali import DaliError, EncodedVideo, decode_batches, decode_videos
from cavmae_fast.data.decode.decoder import Decoded, InProcess, UnusableDataError
from cavmae_fast.data.decode.in_dali import InDali
from cavmae_fast.data.decode.reading import Reader
from cavmae_fast.data.draws import Augmentation, draw
from cavmae_fast.data.media.encoded import Encoded
from cavmae_fast.data.media.synthetic import generate_clips
from cavmae_fast.data.plan import Step, Want
from cavmae_fast.data.sets.shards import ShardSet

pytest.importorskip("nvidia.dali", reason="the optional dependency nvidia-dali is not installed")

SIZE, SAMPLES = 64, 2000
CLIP = ClipSpec(image_size=(SIZE, SIZE), audio_length=11)
assert CLIP.samples == SAMPLES
CPU = torch.device("cpu")
OPTIONS = {"clip": CLIP, "device": CPU, "threads": 2, "max_batch": 4}


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
    return Encoded((image_bytes(gray),), sound_bytes(np.full(500 + number, number, np.int16)))


@pytest.fixture(scope="module")
def clips():
    return [plain(number) for number in range(40)]


def images_of(images, size=SIZE):
    """Decode pictures alone, four a batch: `[n, size, size, 3]` int64."""
    sound = sound_bytes(np.zeros(400, np.int16))
    batches = [[Encoded((image,), sound) for image in images[i : i + 4]] for i in range(0, len(images), 4)]
    return torch.cat([image[:, 0] for image, _, _ in decode_batches(iter(batches), **OPTIONS)]).numpy().astype(int)


def numbers_of(batches, **options):
    """Decode batches of `plain` clips; which clips came out, batch by batch."""
    result = list(decode_batches(iter(batches), **{**OPTIONS, **options}))
    for image, waveform, num_samples in result:  # looked at when all are there: no buffer was used again
        assert image.is_contiguous() and waveform.is_contiguous()
        numbers = waveform[:, 0].long()
        assert torch.equal(image, numbers.to(torch.uint8)[:, None, None, None, None].expand(-1, 1, SIZE, SIZE, 3))
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
        batch.append(Encoded((image,), sound_bytes(samples, format, subtype)))
        first = soundfile.read(io.BytesIO(batch[-1].sound), dtype="int16", always_2d=True)[0][:SAMPLES, 0]
        expected.append(np.pad(first, (0, SAMPLES - len(first))))
    ((_, waveform, num_samples),) = decode_batches(iter([batch]), **OPTIONS)
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
    views = [[Encoded((memoryview(clip.image),), memoryview(clip.sound)) for clip in batch] for batch in batches]
    assert numbers_of(views, prefetch=prefetch) == expected


def test_it_reads_ahead_but_not_further(clips):
    asked = []

    def batches():
        for i in range(8):
            asked.append(i)
            yield clips[i : i + 1]

    for i, _ in enumerate(decode_batches(batches(), **OPTIONS, prefetch=3)):
        assert len(asked) == min(8, i + 1 + 3)


DAMAGE = {
    "JPEG cut short": lambda clip: clip._replace(images=(clip.image[:-2],)),
    "no image": lambda clip: clip._replace(images=(b"not an image",)),
    "empty image": lambda clip: clip._replace(images=(b"",)),
    "PNG cut short": lambda clip: clip._replace(images=(image_bytes(picture(SIZE, SIZE), "PNG")[:-200],)),
    "FLAC cut short": lambda clip: clip._replace(sound=clip.sound[:-5]),
    "no sound": lambda clip: clip._replace(sound=b"not a sound"),
    "empty sound": lambda clip: clip._replace(sound=b""),
    "25 ms": lambda clip: clip._replace(sound=sound_bytes(np.zeros(399, np.int16))),
    "rate": lambda clip: clip._replace(sound=sound_bytes(np.zeros(500, np.int16), rate=44100)),
}


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_is_an_error_after_the_batches_before_it(clips, kind, prefetch):
    """What was taken from the iterator is lost, and nothing more: another call goes on there."""
    taken = []

    def stream():
        for number in range(12):
            taken.append(number)
            yield [clips[number], DAMAGE[kind](clips[0])] if number == 2 else [clips[number]]

    batches, came = stream(), []
    with pytest.raises(DaliError):
        for _, waveform, _ in decode_batches(batches, **OPTIONS, prefetch=prefetch):
            came += waveform[:, 0].tolist()
    assert came == [0, 1] and taken == list(range(2 + prefetch))
    assert numbers_of(batches, prefetch=prefetch) == [[number] for number in range(2 + prefetch, 12)]


@pytest.mark.parametrize("kind, message", [("no sound", "fn.decoders.audio: .*Format not recogni"), ("rate", "44100")])
def test_an_error_is_in_dalis_words(clips, kind, message):
    with pytest.raises(DaliError, match=message):
        numbers_of([[DAMAGE[kind](clips[2])]])


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
        for _, waveform, _ in decode_batches(stream(), **OPTIONS):
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
    before = pipelines()
    second = [DAMAGE["no image"](clips[1])] if damage else clips[1:2]
    batches = decode_batches(iter([clips[:1], second, *([clip] for clip in clips)]), **OPTIONS)
    image, waveform, _ = next(batches)
    assert pipelines() == before + 1
    if damage:
        with pytest.raises(DaliError):
            next(batches)
    else:
        batches.close()
    assert pipelines() == before
    assert image.max() == 0 and waveform.max() == 0  # still there
    numbers_of([clips[:1]])
    assert pipelines() == before


def test_a_process_ends_with_batches_under_way():
    code = (
        "import sys; sys.path[:0] = ['tests']; import test_dali as t\n"
        "clips = [t.plain(i) for i in range(20)]\n"
        "batches = t.decode_batches(iter([[clip] for clip in clips]), **t.OPTIONS, prefetch=8)\n"
        "print(next(batches)[1][0, 0].item())"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"


@pytest.mark.parametrize("name", ["threads", "max_batch", "prefetch"])
def test_numbers_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is 0; allowed: 1 or more"):
        decode_batches(iter([]), **{**OPTIONS, name: 0})


def test_devices_out_of_range_are_named():
    with pytest.raises(ValueError, match="device is meta; allowed: cpu or cuda"):
        decode_batches(iter([]), **{**OPTIONS, "device": torch.device("meta")})
    with pytest.raises(ValueError, match=r"decodes videos with NVDEC, which needs a CUDA device; .*backend='torch'"):
        decode_videos(iter([]), **OPTIONS)


def test_absence_of_dali_is_named(monkeypatch):
    assert dali.available() is None
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    monkeypatch.delattr(sys.modules["nvidia.dali"], "fn", raising=False)
    assert "pip install 'cavmae_fast[dali]'" in dali.available()
    with pytest.raises(ImportError, match="cannot be imported"):
        decode_batches(iter([]), **OPTIONS)


def test_nothing_of_dali_is_imported_with_the_module():
    code = "import sys, cavmae_fast.data.decode.dali; print([name for name in sys.modules if name.startswith('nvidia')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("graph, outputs", [(dali._clips, "gpu gpu cpu cpu"), (dali._videos, "gpu gpu cpu")])
def test_the_graph_for_the_gpu_can_be_built(graph, outputs):
    """Without a GPU: operators, their arguments and where their outputs lie; running them is another matter."""
    from nvidia.dali import Pipeline

    with Pipeline(4, 2, 0):
        nodes = graph(lambda: None, clip=CLIP, gpu=True)
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


def run_videos(batches):
    """`decode_videos` with DALI's decoder for the CPU."""
    graph = partial(dali._videos, clip=CLIP, gpu=False)
    return list(dali._run(dali._Feed(iter(batches), dali._video_arrays, 4), graph, CLIP, CPU, 2, 2))


@pytest.mark.parametrize("format", ["avi", "mov", "matroska"])
def test_videos_give_the_frame_asked_for(format):
    sizes = [(72, 96), (130, 64), (64, 64)]
    waveform = np.arange(3000, dtype=np.int16)
    files = [video_bytes(12, *size, format) for size in sizes]
    batches = [[EncodedVideo(file, frame, waveform[::2][:1500]) for file in files] for frame in (0, 7, 11)]
    for frame, (image, sound, num_samples) in zip((0, 7, 11), run_videos(batches)):
        assert image.shape == (3, 1, SIZE, SIZE, 3) and num_samples.tolist() == [1500] * 3
        assert (image[:, 0, :, -8:].int() - 20 * frame).abs().max() <= 3
        assert (image[:, 0, :, :8].int() - (255 - 20 * frame)).abs().max() <= 3
        assert torch.equal(sound[:, :1500], torch.arange(0, 3000, 2, dtype=torch.int16).expand(3, -1))
        assert sound[:, 1500:].abs().max() == 0


def test_a_frame_past_the_end_is_damage():
    waveform = np.zeros(500, np.int16)
    good, past = EncodedVideo(video_bytes(5), 4, waveform), EncodedVideo(video_bytes(5), 5, waveform)
    assert len(run_videos([[good], [good, good]])) == 2
    with pytest.raises(DaliError):
        run_videos([[good, past]])


# ----------------------------------------------------------------------------------------------------- steps by DALI


@dataclass(frozen=True)
class Record:
    """A clip in memory, as the decoders see one that lies in files."""

    number: int
    encoded: Encoded

    def __str__(self) -> str:
        return f"clip {self.number}"

    def head(self) -> tuple[str, tuple[str, ...], bytes]:
        return str(self), (), self.encoded.sound

    def picture_seconds(self) -> None:
        """They are as long as the sound."""

    def image(self, frame: int) -> bytes:
        return self.encoded.images[frame % len(self.encoded.images)]


def steps_of(sizes: list[int]) -> Iterator[Step]:
    """Steps of the clips 0, 1, 2 and so on, so many in each."""
    begin = 0
    for size in sizes:
        draws = draw(Augmentation(), seed=1, epoch=0, position=begin, rows=size, num_clips=100)
        yield Step(0, begin, draws, [Want(begin + k, False, begin + k, draws.moment[k]) for k in range(size)])
        begin += size


def run_steps(decoder, sizes: list[int]) -> tuple[list[Decoded], Exception | None]:
    found = []
    try:
        for decoded in decoder.decode(steps_of(sizes), Event()):
            found.append(decoded)
            decoded.release()
        return found, None
    except Exception as error:
        return found, error
    finally:
        decoder.close()


def assert_as_in_process(records, sizes, substitute, clip=CLIP, num_frames=1, **options):
    """DALI gives what is decoded in this process: arrays, order, what is named, and the error that ends it."""
    reader = Reader(clip, num_frames)
    options = {"rows": max(sizes), "threads": 2, "device": CPU, **options}
    found, error = run_steps(InDali(records, reader, substitute, **options), sizes)
    expected, cause = run_steps(InProcess(records, reader, substitute), sizes)
    assert (type(error), str(error)) == (type(cause), str(cause))
    assert [decoded.step.position for decoded in found] == [decoded.step.position for decoded in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.waveform, other.waveform)
        assert (one.clips, one.infos, one.rejects) == (other.clips, other.infos, other.rejects)
    return found


SIZES = [1 + i % 4 for i in range(10)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("damaged", [[], [0], [22], [9], [9, 10, 12], [0, 1, 2, 3], list(range(23))[::2]])
def test_nothing_is_lost_or_repeated(clips, damaged, prefetch, training):
    """Steps before, between and after damaged ones come out once, in order, and each damaged clip is named."""
    records = [Record(number, clip) for number, clip in enumerate(clips[: sum(SIZES)])]
    for k, number in enumerate(damaged):
        records[number] = Record(number, list(DAMAGE.values())[k % 8](clips[number]))  # all but the rate, which we read
    found = assert_as_in_process(
        records, SIZES, lambda want, attempt: (want.clip + 7 * attempt) % 23 if training else None, prefetch=prefetch
    )
    named = {reject.path for decoded in found for reject in decoded.rejects}
    assert named == {f"clip {number}" for number in damaged}
    assert [len(decoded.image) for decoded in found] == SIZES or not training


@pytest.mark.parametrize("prefetch", [1, 3])
def test_an_error_comes_after_the_steps_before_it(clips, prefetch):
    records = [Record(number, clip) for number, clip in enumerate(clips[: sum(SIZES)])]
    for number in (11, 20):  # DALI fails at the first; the second has no substitute that can be used
        records[number] = Record(number, DAMAGE["no image"](clips[number]))
    found = assert_as_in_process(
        records, SIZES, lambda want, attempt: 20 if want.clip == 20 else want.clip - 1, prefetch=prefetch
    )
    assert len(found) == SIZES.index(4, 5) + 1
    _, error = run_steps(InDali(records, Reader(CLIP, 1), lambda want, attempt: 20, rows=4, threads=1, device=CPU), SIZES)
    assert isinstance(error, UnusableDataError)


def odd(number: int) -> Encoded:
    """A clip that DALI reads in another way than we do."""
    sound = np.full(700, number, np.int16)
    kinds = [
        Encoded((image_bytes(picture(SIZE, SIZE, number), "PNG"),), sound_bytes(sound)),
        Encoded((image_bytes(picture(SIZE, SIZE, number)),), sound_bytes(sound, subtype="PCM_24")),
        Encoded((image_bytes(picture(SIZE, SIZE, number)),), sound_bytes(np.tile(sound, 4), rate=48000)),
    ]
    return kinds[number % 3]


@pytest.mark.parametrize("share", [1, 2, 5])
def test_what_dali_reads_in_another_way_is_decoded_here(clips, share):
    records = [Record(n, odd(n) if n % share == 0 else clip) for n, clip in enumerate(clips[: sum(SIZES)])]
    assert_as_in_process(records, SIZES, lambda want, attempt: None)


def test_it_does_not_run_ahead_of_what_is_taken(clips):
    """Also where there is nothing for DALI to do."""
    records = [Record(number, odd(number)) for number in range(40)]
    decoder = InDali(records, Reader(CLIP, 1), lambda want, attempt: None, rows=1, threads=1, device=CPU, prefetch=2)
    asked = count()
    steps = (step for step in steps_of([1] * 40) if next(asked) >= 0)
    decoded = decoder.decode(steps, Event())
    for one in islice(decoded, 5):
        one.release()
    assert next(asked) <= 5 + 2 + 1
    decoded.close()
    decoder.close()


@pytest.mark.parametrize("kind", ["JPEG cut short", "FLAC cut short"])
def test_a_crop_is_the_same_as_in_process(clips, kind):
    """Several pictures and a part of the sound."""
    rng, records = np.random.default_rng(0), []
    for number in range(sum(SIZES)):
        pictures = tuple(image_bytes(picture(SIZE, SIZE, 20 * number + k)) for k in range(20))
        sound = rng.integers(-9000, 9000, 16000 * (2, 7, 10, 12)[number % 4]).astype(np.int16)
        records.append(Record(number, Encoded(pictures, sound_bytes(sound))))
    clip = replace(CLIP, frames=3, frame_rate=2.0)
    found = assert_as_in_process(records, SIZES, lambda want, attempt: None, clip, 20)
    assert found[3].image.shape == (4, 3, SIZE, SIZE, 3) and len(found[3].waveform.unique()) > 1000
    for number in (4, 13):
        records[number] = Record(
            number,
            records[number].encoded._replace(
                **({"sound": records[number].encoded.sound[:-5]} if kind[0] == "F" else {"images": (b"\xff\xd8\xff",) * 20})
            ),
        )
    assert_as_in_process(records, SIZES, lambda want, attempt: want.clip - 1, clip, 20)


def test_a_clip_that_cannot_be_used_is_met_once(clips, monkeypatch):
    """It is not given to DALI again: a pipeline is not rebuilt in each epoch."""
    pipelines = []
    run = dali._run
    monkeypatch.setattr(dali, "_run", lambda *arguments: pipelines.append(1) or run(*arguments))
    records = [Record(number, clip) for number, clip in enumerate(clips[:25])]
    records[5] = Record(5, DAMAGE["no sound"](clips[5]))
    decoder = InDali(records, Reader(CLIP, 1), lambda want, attempt: None, rows=4, threads=1, device=CPU)
    for _ in range(3):
        decoded = []
        for one in decoder.decode(steps_of(SIZES), Event()):
            decoded.append(one)
            one.release()
        assert [reject.path for one in decoded for reject in one.rejects] == ["clip 5"]
    decoder.close()
    # A sound without a header is never given to DALI; a picture that begins as a JPEG is, once.
    assert len(pipelines) == 3


def test_failures_without_damage_are_told_and_end_it(clips, monkeypatch):
    """DALI is asked for: that it fails at what can be decoded is no secret, and not for long."""
    records = [Record(number, clip) for number, clip in enumerate(clips[:25])]
    collect, calls, told = dali._collect, count(), []

    def fails_at(*numbers):
        def sometimes(*arguments):
            if next(calls) in numbers:
                raise ValueError("sound at 7 Hz")
            return collect(*arguments)

        monkeypatch.setattr(dali, "_collect", sometimes)

    fails_at(2, 5)
    assert_as_in_process(records, SIZES, lambda want, attempt: None, prefetch=1, report=told.append)
    assert told == ["DALI failed at a batch that is not damaged, which was decoded without it: sound at 7 Hz"] * 2
    fails_at(*range(100))
    decoder = InDali(records, Reader(CLIP, 1), lambda want, attempt: None, rows=4, threads=1, device=CPU, prefetch=1)
    found, error = run_steps(decoder, SIZES)
    assert isinstance(error, DaliError) and len(found) == 2


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
        assert (json.loads(meta), Encoded((image,), sound)) == clips[number].read(7)
