"""Calls of every operator: for the tests, for the proof on a GPU, for the benchmarks and for the tuner.

    for case in pretraining(batch=256):
        inputs = case.inputs(torch.bfloat16, "cuda")
        results = parity.compare(case.ours, case.reference, inputs, baseline=case.baseline)

Three sets: `small` (awkward shapes, some milliseconds each), `pretraining` (what a training step of CAV-MAE calls, in its
dtypes: these are timed) and `variants` (at the models' shapes, what other uses call). Nothing is drawn before `inputs` is
called. Neither `import cavmae_fast` nor `cavmae_fast.ops` loads this package.
"""

from __future__ import annotations

from dataclasses import dataclass

from cavmae_fast.clip import SAMPLE_RATE
from cavmae_fast.ops.catalogue import calls, fp8_calls
from cavmae_fast.ops.catalogue.case import Case, outputs_of
from cavmae_fast.ops.layout import StreamLayout

__all__ = ["BASE", "TINY", "Case", "Sizes", "in_fp8", "outputs_of", "pretraining", "small", "variants"]


@dataclass(frozen=True)
class Sizes:
    """Token counts and widths of a model: ViT-B at 75 % masking by default."""

    image: int = 224
    frames: int = 1024
    patch: int = 16
    width: int = 768
    heads: int = 12
    decoder_width: int = 512
    decoder_heads: int = 16
    seconds: float = 10.24
    "Of sound, for the features."
    mask_ratio: float = 0.75
    "Share of the patches of each modality that is removed."

    @property
    def all_a(self) -> int:
        return self.frames * 128 // self.patch**2

    @property
    def all_v(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def kept_a(self) -> int:
        return int(self.all_a * (1 - self.mask_ratio))

    @property
    def kept_v(self) -> int:
        return int(self.all_v * (1 - self.mask_ratio))

    @property
    def total(self) -> int:
        return self.all_a + self.all_v

    @property
    def kept(self) -> int:
        return self.kept_a + self.kept_v

    @property
    def samples(self) -> int:
        """Samples of sound."""
        return int(SAMPLE_RATE * self.seconds)


BASE = Sizes()
TINY = Sizes(image=64, frames=32, width=32, heads=2, decoder_width=32, decoder_heads=2, seconds=0.2)


def pretraining(batch: int, sizes: Sizes = BASE) -> list[Case]:
    """What a training step calls for `batch` clips, and their features."""
    s, width, decoder_width = sizes, sizes.width, sizes.decoder_width
    encoders = StreamLayout(batch, (s.kept_a, s.kept_v))
    shared = StreamLayout(batch, (s.kept_a, s.kept_v, s.kept))
    decoder, removed = StreamLayout(batch, (s.total,)), StreamLayout(batch, (s.total - s.kept,))
    spectrogram, frame = (batch, 1, 128, s.frames), (batch, 3, s.image, s.image)
    removed_a, removed_v = s.all_a - s.kept_a, s.all_v - s.kept_v
    return [
        calls.layer_norm("encoders", encoders, width, owed=2),
        calls.layer_norm("shared", shared, width, owed=1),
        calls.layer_norm("decoder", decoder, decoder_width, owed=1),
        calls.linear("encoders-qkv", encoders, width, 3 * width, shared=False, gelu=False),
        calls.linear("decoder-fc2", decoder, 4 * decoder_width, decoder_width, shared=True, gelu=False),
        calls.linear("encoders-fc1", encoders, width, 4 * width, shared=False, gelu=True),
        calls.linear("decoder-fc1", decoder, decoder_width, 4 * decoder_width, shared=True, gelu=True),
        calls.hidden("encoders", encoders, width, 4 * width, shared=False),
        calls.hidden("decoder", decoder, decoder_width, 4 * decoder_width, shared=True),
        calls.gradient("encoders-fc1", encoders, width, 4 * width, shared=False),
        calls.gradient("decoder-fc2", decoder, 4 * decoder_width, decoder_width, shared=True),
        calls.attend("encoders", encoders, encoders, width, s.heads, owed=2),
        calls.attend("shared", shared, shared, width, s.heads, owed=1),
        calls.attend("decoder", decoder, decoder, decoder_width, s.decoder_heads, owed=1),
        calls.attend("decoder-last", removed, decoder, decoder_width, s.decoder_heads, owed=1),
        calls.gather("decoder", batch, s.total, s.total - s.kept, decoder_width),
        calls.distinct("decoder", batch, s.total, s.kept, decoder_width),
        calls.scatter("decoder", batch, [s.total], [s.kept], decoder_width, full=True),
        calls.scatter("decoder-qkv", batch, [s.total], [s.kept], 3 * decoder_width),
        calls.embed("audio", "spectrogram", spectrogram, s.patch, s.kept_a, width),
        calls.embed("video", "frame", frame, s.patch, s.kept_v, width),
        calls.embed("bytes", "bytes", frame, s.patch, s.kept_v, width),
        calls.patch_mse("audio", "spectrogram", spectrogram, s.patch, removed_a),
        calls.patch_mse("video", "frame", frame, s.patch, removed_v),
        calls.patch_mse("bytes", "bytes", frame, s.patch, removed_v),
        calls.contrastive("batch", batch, width),
        calls.log_mel("clips", batch, s.samples),
        calls.features("features", [s.samples] * batch, s.frames),
        calls.adam("block", [12 * width * width, 3 * width, width, 4 * width, width]),
        *(case for _, case, _ in in_fp8(batch, sizes)),
    ]


def in_fp8(batch: int, sizes: Sizes = BASE) -> list[tuple[str, Case, float]]:
    """What blocks call in fp8 besides: kind of block ('encoders' or 'decoder'), call, and how often a block makes it."""
    encoders, decoder = StreamLayout(batch, (sizes.kept_a, sizes.kept_v)), StreamLayout(batch, (sizes.total,))
    kinds = {
        "encoders": fp8_calls.block("encoders", encoders, sizes.width, shared=False),
        "decoder": fp8_calls.block("decoder", decoder, sizes.decoder_width, shared=True),
    }
    return [(kind, case, count) for kind, found in kinds.items() for case, count in found]


def variants(batch: int, sizes: Sizes = BASE) -> list[Case]:
    """What fine-tuning, retrieval and other settings call for `batch` clips, at the models' shapes."""
    s, width, decoder_width = sizes, sizes.width, sizes.decoder_width
    encoders = StreamLayout(batch, (s.kept_a, s.kept_v))
    shared = StreamLayout(batch, (s.kept_a, s.kept_v, s.kept))
    decoder = StreamLayout(batch, (s.total,))
    frame = (batch, 3, s.image, s.image)
    # MAViL's: clips of 8 frames in tubelets of 2, a fifth of the patches kept; towers and decoders with class tokens.
    clip, all_clip, kept_clip = (batch, 3, 8, s.image, s.image), 4 * s.all_v, 4 * s.all_v // 5
    towers = StreamLayout(batch, (1 + s.all_a, 1 + all_clip))
    shorter = [max(400, s.samples * (1 + i % 4) // 4) for i in range(batch)]
    return [
        calls.layer_norm("encoders-first", encoders, width, delta=False),
        calls.layer_norm("decoder-low", decoder, decoder_width, full=False),
        calls.linear("shared-qkv", shared, width, 3 * width, shared=True, gelu=False),
        calls.linear("shared-fc1", shared, width, 4 * width, shared=True, gelu=True),
        calls.hidden("shared", shared, width, 4 * width, shared=True),
        calls.distinct("decoder-fixed", batch, s.total, s.kept, decoder_width, trained=False),
        calls.distinct("decoder-low", batch, s.total, s.kept, decoder_width, full=False),
        calls.scatter("tower-decoders", batch, towers.lengths, [1 + s.all_a // 5, 1 + kept_clip], 3 * decoder_width),
        calls.gradient("shared-proj", shared, width, width, shared=True),
        calls.embed("video-all", "frame", frame, s.patch, None, width, trained=True),
        calls.patch_mse("video-plain", "frame", frame, s.patch, s.all_v - s.kept_v, norm=False),
        calls.embed("clips", "clip-bytes", clip, s.patch, kept_clip, width, tubelet=2),
        calls.patch_mse("clips", "clip-bytes", clip, s.patch, all_clip - kept_clip, tubelet=2),
        calls.attend("towers", towers, towers, width, s.heads),
        calls.attend("tower-decoders", towers, towers, decoder_width, s.decoder_heads),
        calls.contrastive("both-ways", max(batch, 97), width, bidirectional=True, full=False),
        calls.features("lengths", shorter, s.frames),
    ]


def small() -> list[Case]:
    """Awkward shapes: odd widths, streams of one token, fewer rows than a tile."""
    three, two, one = StreamLayout(2, (3, 7, 10)), StreamLayout(3, (1, 5)), StreamLayout(2, (11,))
    return [
        calls.layer_norm("delta", three, 24, full=False, owed=1),
        calls.layer_norm("streams", two, 17, owed=2),
        calls.layer_norm("nothing-owed", two, 17),
        calls.layer_norm("alone", one, 33, delta=False, full=False),
        calls.linear("shared", three, 24, 40, shared=True, gelu=False),
        calls.linear("streams", two, 17, 33, shared=False, gelu=False),
        calls.linear("shared", three, 24, 40, shared=True, gelu=True),
        calls.linear("streams", two, 17, 33, shared=False, gelu=True),
        calls.hidden("one-weight", three, 24, 40, shared=True),
        calls.hidden("streams", two, 17, 33, shared=False),
        fp8_calls.quantized("odd", 7, 33),
        fp8_calls.norm("streams", two, 33),
        fp8_calls.linear("one-weight", three, 32, 48, shared=True),
        fp8_calls.linear("streams", two, 16, 48, shared=False),
        fp8_calls.linear("gradient", two, 16, 48, shared=False, gradient=True),
        fp8_calls.activation("odd", 7, 33),
        fp8_calls.hidden("one-weight", three, 32, 48, shared=True),
        fp8_calls.hidden("streams", two, 16, 48, shared=False),
        calls.gradient("one-weight", three, 24, 40, shared=True),
        calls.gradient("streams", two, 17, 33, shared=False),
        calls.attend("packed", three, three, 32, 2),
        calls.attend("owed", three, three, 32, 2, owed=1),
        calls.attend("owed-apart", two, two, 32, 2, owed=2),
        calls.attend("queries", StreamLayout(2, (5,)), one, 32, 2, owed=1),
        calls.gather("some", 2, 11, 5, 24),
        calls.distinct("some", 2, 11, 5, 24, full=False),
        calls.distinct("fixed", 3, 7, 1, 33, trained=False),
        calls.scatter("some", 2, [11], [5], 24),
        calls.scatter("streams", 3, [1, 9], [1, 2], 33),
        calls.embed("kept", "frame", (2, 3, 12, 8), 4, 3, 24, trained=True, full=False),
        calls.embed("all", "spectrogram", (2, 1, 8, 12), 4, None, 24, trained=True, full=False),
        calls.embed("bytes-kept", "bytes", (2, 3, 8, 12), 4, 3, 24, trained=True, full=False),
        calls.embed("clip-kept", "clip", (2, 3, 6, 8, 12), 4, 5, 24, full=False, tubelet=2),
        calls.embed("clip-bytes-kept", "clip-bytes", (2, 3, 4, 8, 8), 4, 3, 24, full=False, tubelet=2),
        calls.patch_mse("normalized", "frame", (2, 3, 12, 8), 4, 4),
        calls.patch_mse("plain", "spectrogram", (2, 1, 8, 12), 4, 3, norm=False),
        calls.patch_mse("bytes-some", "bytes", (2, 3, 8, 12), 4, 3),
        calls.patch_mse("clip", "clip", (2, 3, 6, 8, 12), 4, 5, tubelet=2),
        calls.patch_mse("clip-bytes", "clip-bytes", (2, 3, 4, 8, 8), 4, 3, tubelet=2),
        calls.contrastive("one-way", 33, 24, full=False),
        calls.contrastive("both-ways-odd", 17, 33, bidirectional=True, full=False),
        calls.log_mel("waveform", 2, 1000),
        calls.features("clips-odd", [800, 400, 1100], 6),
        calls.adam("odd", [1, 97, 8193, 24]),
        calls.adam("l2", [1000], decoupled=False),
    ]
