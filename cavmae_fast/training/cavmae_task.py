"""What a CAV-MAE is pretrained for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.models import CAVMAE, PretrainOutput, PretrainParts
from cavmae_fast.models.flops import forward_macs
from cavmae_fast.training.held_out import retrieval_among


@dataclass(frozen=True)
class PretrainTask:
    """Masked reconstruction and audio-visual contrast, each by its weight; judged by retrieval between sound and picture."""

    recorded: ClassVar = ("loss", "loss_mae", "loss_mae_a", "loss_mae_v", "loss_c")
    shown: ClassVar = {"audio": "loss_mae_a", "video": "loss_mae_v", "contrastive": "loss_c"}
    panels: ClassVar = {
        "reconstruction": {"audio": "loss_mae_a", "video": "loss_mae_v"},
        "contrastive (weighted)": {"audio-video": "loss_c"},
    }

    mask_ratio: float
    mask_mode: str
    mae_loss_weight: float
    contrast_loss_weight: float

    @property
    def reconstructs(self) -> bool:
        """The figure is drawn in any case: of contrast alone it shows that nothing was learned."""
        return True

    def prepare(self, model: CAVMAE) -> None:
        """The losses in force decide what is trained. Raises ValueError when nothing would be left to reconstruct."""
        model.train_losses(reconstruction=self.mae_loss_weight != 0, contrast=self.contrast_loss_weight != 0)
        if self.mae_loss_weight != 0:
            model.check_removed(self.mask_ratio, self.mask_ratio)

    def losses(self, model: CAVMAE, batch: Batch) -> dict[str, Tensor]:
        """The model's losses, both already weighted, and the share of videos whose own audio ranks first in the batch."""
        output = self._forward(model, batch, self.mae_loss_weight)
        return {name: getattr(output, name) for name in (*self.recorded, "c_acc")}

    def step_flops(self, model: CAVMAE) -> float:
        """As the fast model computes it; what a loss of weight 0 would need is not computed."""
        losses = {"reconstruction": self.mae_loss_weight != 0, "contrast": self.contrast_loss_weight != 0}
        return 6 * sum(forward_macs(model, self.mask_ratio, self.mask_ratio, **losses).values())

    @property
    def contrasts(self) -> bool:
        """Whether there is a contrastive loss in force."""
        return self.contrast_loss_weight != 0

    def embed(self, model: CAVMAE, batch: Batch) -> tuple[Tensor, ...]:
        """The embeddings of audio and video, without reconstruction; masks as in `part`."""
        return self._forward(model, batch, 0.0, parts=True).embeddings

    def part(self, model: CAVMAE, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The reconstruction losses, and the embeddings of audio and video."""
        output = self._forward(model, batch, self.mae_loss_weight, parts=True)
        losses = {name: getattr(output, name) for name in ("loss_mae", "loss_mae_a", "loss_mae_v")}
        return {"loss": output.loss_mae, **losses}, output.embeddings

    def contrast(self, model: CAVMAE, embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
        """The contrastive loss of a batch's embeddings, weighted, and its accuracy."""
        nce, c_acc = model.contrast(*embeddings)
        loss_c = self.contrast_loss_weight * nce
        return {"loss": loss_c, "loss_c": loss_c, "c_acc": c_acc}

    def _forward(
        self, model: CAVMAE, batch: Batch, mae_loss_weight: float, **options: Any
    ) -> PretrainOutput | PretrainParts:
        ratios = self.mask_ratio, self.mask_ratio
        weights = mae_loss_weight, self.contrast_loss_weight
        return model(batch.audio, batch.image, *ratios, *weights, self.mask_mode, **options)

    def evaluate(self, model: CAVMAE, batches: Iterable[Batch]) -> dict[str, float]:
        """`held_out_clips`, and recall and median rank of retrieval in both directions, over the clips of all ranks."""
        return retrieval_among(model, batches)
