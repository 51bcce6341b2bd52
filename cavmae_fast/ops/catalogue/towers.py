"""What a training step of models of towers calls: A-MAE, V-MAE and MAViL, whose teacher's pass is a forward pass alone."""

from __future__ import annotations

from dataclasses import dataclass

from cavmae_fast.clip import SAMPLE_RATE, SHIFT_SECONDS
from cavmae_fast.ops.catalogue import calls, fp8_calls
from cavmae_fast.ops.catalogue.case import Case
from cavmae_fast.ops.layout import StreamLayout

MEL_BINS = 128
FORWARD = 1 / 3
"Of a step's work, the share of the forward pass."


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a model of towers: MAViL's by default, in its first stage."""

    modalities: str = "av"
    image: int = 224
    frames: int = 8
    tubelet: int = 2
    audio_length: int = 1024
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    fusion_depth: int = 2
    "0: there is none."
    views: int = 2
    mask_ratio: float = 0.8
    teacher: bool = False

    @property
    def patches(self) -> dict[str, int]:
        """Of a clip, by modality."""
        counts = {
            "a": self.audio_length * MEL_BINS // self.patch**2,
            "v": max(1, self.frames // self.tubelet) * (self.image // self.patch) ** 2,
        }
        return {m: counts[m] for m in self.modalities}


def step(batch: int, sizes: TowerSizes) -> list[tuple[Case, float]]:
    """The calls for `batch` clips, and how often a step makes each. A product that is not among them counts as its share, by
    operations, of one that is: proj and fc2 are 1/3 and 4/3 of qkv. What the fusion encoder computes of products and norms
    counts as its share of the encoders', by rows."""
    s, width, wide = sizes, sizes.width, sizes.decoder_width
    kept = {m: int(count * (1 - s.mask_ratio)) for m, count in s.patches.items()}
    removed = {m: count - kept[m] for m, count in s.patches.items()}
    encoders = StreamLayout(s.views * batch, tuple(1 + count for count in kept.values()))
    fusion = StreamLayout(batch, (sum(1 + count for count in kept.values()),))
    decoders = StreamLayout(batch, tuple(1 + count for count in s.patches.values()))
    whole = StreamLayout(batch, decoders.lengths)
    blocks = s.depth + s.fusion_depth * fusion.rows / encoders.rows
    found = [
        (calls.layer_norm("encoders", encoders, width), 2 * blocks + 1),
        (calls.layer_norm("decoders", decoders, wide), 2 * s.decoder_depth),
        (calls.linear("encoders-qkv", encoders, width, 3 * width, shared=False, gelu=False), blocks * 8 / 3),
        (calls.linear("decoders-fc2", decoders, 4 * wide, wide, shared=False, gelu=False), s.decoder_depth * 2),
        (calls.linear("encoders-fc1", encoders, width, 4 * width, shared=False, gelu=True), blocks),
        (calls.linear("decoders-fc1", decoders, wide, 4 * wide, shared=False, gelu=True), s.decoder_depth),
        (calls.hidden("encoders", encoders, width, 4 * width, shared=False), blocks),
        (calls.hidden("decoders", decoders, wide, 4 * wide, shared=False), s.decoder_depth),
        (calls.gradient("encoders-fc1", encoders, width, 4 * width, shared=False), 3 * blocks),
        (calls.gradient("decoders-fc2", decoders, 4 * wide, wide, shared=False), 3 * s.decoder_depth),
        (calls.attend("encoders", encoders, encoders, width, s.heads, owed=len(kept)), s.depth),
        (calls.attend("decoders", decoders, decoders, wide, s.decoder_heads, owed=len(kept)), s.decoder_depth - 1),
    ]
    with_class = [1 + count for count in kept.values()]
    found += [
        (calls.scatter("decoders", batch, decoders.lengths, with_class, wide, full=True), 1),
        (calls.scatter("decoders-qkv", batch, decoders.lengths, with_class, 3 * wide), 1),
    ]
    for name, layout, of, count in (("encoders", encoders, width, blocks), ("decoders", decoders, wide, s.decoder_depth)):
        found += [(case, each * count) for case, each in fp8_calls.block(name, layout, of, shared=False)]
    if s.fusion_depth:
        found.append((calls.attend("fusion", fusion, fusion, width, s.heads, owed=1), s.fusion_depth))
    for m, count in s.patches.items():
        all_of_it, gone = StreamLayout(batch, (1 + count,)), StreamLayout(batch, (removed[m],))
        found += [
            (calls.attend(f"decoder-last-{m}", gone, all_of_it, wide, s.decoder_heads, owed=1), 1),
            (calls.gather(f"decoder-{m}", batch, 1 + count, removed[m], wide), 2),
            (calls.distinct(f"decoder-{m}", batch, 1 + count, 1 + kept[m], wide, trained=False), 1),
            *_pixels(m, batch, s, kept[m], removed[m]),
        ]
    if len(s.modalities) > 1:
        contrasts = 1 + (2 if s.views > 1 else 0)
        found.append((calls.contrastive("batch", batch, width, bidirectional=True), contrasts))
    if s.teacher:
        joint = StreamLayout(batch, (sum(whole.lengths),))
        blocks = s.depth + s.fusion_depth
        found += [
            (calls.layer_norm("teacher", whole, width), 2 * blocks * FORWARD),
            (calls.linear("teacher-qkv", whole, width, 3 * width, shared=False, gelu=False), blocks * 8 / 3 * FORWARD),
            (calls.linear("teacher-fc1", whole, width, 4 * width, shared=False, gelu=True), blocks * FORWARD),
            (calls.attend("teacher", whole, whole, width, s.heads), s.depth * FORWARD),
            (calls.attend("teacher-fusion", joint, joint, width, s.heads), s.fusion_depth * FORWARD),
        ]
    samples = int(SAMPLE_RATE * SHIFT_SECONDS * s.audio_length)
    optimized = len(s.modalities) * (s.depth + s.decoder_depth * (wide / width) ** 2) + s.fusion_depth
    return [
        *found,
        (calls.adam("block", [12 * width * width, 3 * width, width, 4 * width, width]), optimized),
        (calls.log_mel("clips", batch, samples), 0),
        (calls.features("features", [samples] * batch, s.audio_length), 1 if "a" in s.modalities else 0),
    ]


def _pixels(m: str, batch: int, s: TowerSizes, kept: int, removed: int) -> list[tuple[Case, float]]:
    """The patch projection, once for each view, and the loss of one modality."""
    tubelet = 1
    if m == "a":
        kind, shape = "frame", (batch, 1, s.audio_length, MEL_BINS)
    elif s.frames == 1:
        kind, shape = "bytes", (batch, 3, s.image, s.image)
    else:
        kind, shape, tubelet = "clip-bytes", (batch, 3, s.frames, s.image, s.image), s.tubelet
    return [
        (calls.embed(f"kept-{m}", kind, shape, s.patch, kept, s.width, tubelet=tubelet), s.views),
        (calls.patch_mse(f"removed-{m}", kind, shape, s.patch, removed, tubelet=tubelet), 1),
    ]
