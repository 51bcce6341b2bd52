"""What models of towers share, be it one tower or two: their tokens seen alone, and how patches become images again."""

from __future__ import annotations

from torch import Tensor

from cavmae_fast.models import towers
from cavmae_fast.models.abilities import Embeds, FillsIn
from cavmae_fast.models.encoder import compute_dtype, mean_tokens
from cavmae_fast.models.packed import RECOMPUTE
from cavmae_fast.ops.attention import BACKENDS
from cavmae_fast.reference import operators
from cavmae_fast.reference.tower import CHANNELS, Tower


class PackedTowers(Embeds):
    """A model whose `towers` each take one modality."""

    attentions = ("auto", *BACKENDS)
    recomputations = RECOMPUTE
    pool_class_token = False
    "Whether the class token is counted in the mean."
    towers: tuple[Tower, ...]
    attention: str
    recompute: str

    @property
    def lengths(self) -> dict[str, int]:
        """Patches by modality."""
        return {tower.modality: tower.num_patches for tower in self.towers}

    def encoded(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `features`, with the class token first: `[B, 1 + L, D]`."""
        chosen = [tower for tower in self.towers if tower.modality in inputs]
        dtype = compute_dtype(chosen[0].norm.weight)
        given = [inputs[tower.modality] for tower in chosen]
        state = towers.whole(chosen, given, self.clip_spec, dtype, self.attention, self.recompute)
        _, tokens = towers.normed(chosen, state, dtype)
        return {tower.modality: part for tower, part in zip(chosen, tokens)}

    def features(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unmasked inputs by modality ('a', 'v', or both) -> the normed tokens `[B, L, D]` of all patches of each, seen
        alone."""
        return {m: tokens[:, 1:] for m, tokens in self.encoded(inputs).items()}

    def embeddings(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """As in `Embeds`; the mean is over the tokens that are contrasted."""
        first, weight = 0 if self.pool_class_token else 1, self.towers[0].norm.weight
        return {m: mean_tokens(tokens[:, first:], weight) for m, tokens in self.encoded(inputs).items()}


class TowersFillIn(FillsIn):
    """A model of towers with decoders."""

    usual_mask_ratio = 0.8
    towers: tuple[Tower, ...]

    def _tower(self, m: str) -> Tower:
        return next(tower for tower in self.towers if tower.modality == m)

    def to_patches(self, m: str, x: Tensor) -> Tensor:
        """As in `FillsIn`: `[B, L, t * p * p * C]`, of t frames of p x p pixels."""
        tower = self._tower(m)
        return operators.patchify(tower.images(x), tower.patch_size, tower.tubelet_size)

    def to_images(self, m: str, patches: Tensor) -> Tensor:
        """As in `FillsIn`."""
        tower = self._tower(m)
        grid = (1, *tower.patch_embed.grid)[-3:]
        images = operators.unpatchify_clips(patches, CHANNELS[m], grid, tower.patch_size, tower.tubelet_size)
        images = images.squeeze(2) if tower.frames == 1 else images
        return images.transpose(2, 3) if m == "a" else images  # towers see time downwards
