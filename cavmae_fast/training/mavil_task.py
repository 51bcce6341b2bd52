"""What a MAViL is pretrained for, in both stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from cavmae_fast.data.batches import Batch
from cavmae_fast.models import MAViL
from cavmae_fast.models.mavil import LossWeights
from cavmae_fast.models.mavil_flops import mavil_macs
from cavmae_fast.reference.outputs import FeatureOutput, MAViLOutput, MAViLParts
from cavmae_fast.training.held_out import retrieval_among
from cavmae_fast.training.teacher import Targets


@dataclass(frozen=True, eq=False)
class MAViLTask:
    """Four losses, each by its weight: reconstruction of pixels, contrast between modalities and between two views, and, in
    stage 2, the regression of a teacher's tokens. Judged by retrieval between sound and picture.

    Attributes:
        mask_ratio: share of the patches of each modality that is removed.
        weights: of the losses.
        teacher: gives what is regressed; needed where that loss has a weight.
    """

    mask_ratio: float
    weights: LossWeights
    teacher: Targets | None = None

    recorded: ClassVar = (
        "loss",
        "loss_raw",
        "loss_raw_a",
        "loss_raw_v",
        "loss_inter",
        "loss_intra",
        "loss_regression",
    )
    shown: ClassVar = {
        "audio": "loss_raw_a",
        "video": "loss_raw_v",
        "regression": "loss_regression",
        "inter": "loss_inter",
        "intra": "loss_intra",
    }
    panels: ClassVar = {
        "reconstruction": {"audio": "loss_raw_a", "video": "loss_raw_v", "teacher's tokens": "loss_regression"},
        "contrastive (weighted)": {"audio-video": "loss_inter", "between views": "loss_intra"},
    }

    @property
    def reconstructs(self) -> bool:
        """Whether the model learns to fill in pixels."""
        return self.weights.raw != 0

    def prepare(self, model: MAViL) -> None:
        """The losses in force decide what is trained. Raises ValueError when nothing would be left to reconstruct."""
        model.train_losses(**self.weights.in_force)
        if self.weights.raw != 0:
            model.check_removed(self.mask_ratio, self.mask_ratio)

    def losses(self, model: MAViL, batch: Batch) -> dict[str, Tensor]:
        """The model's losses, weighted but for those of single modalities, and the inter-modal accuracy."""
        output = self._forward(model, batch, self.weights)
        return {name: getattr(output, name) for name in (*self.recorded, "c_acc")}

    def step_flops(self, model: MAViL) -> float:
        """As the fast model computes it, and what its teacher computes."""
        macs = 3 * sum(mavil_macs(model, self.mask_ratio, self.mask_ratio, **self.weights.in_force).values())
        return 2 * (macs + (self.teacher.macs if self.weights.regression != 0 else 0.0))

    @property
    def contrasts(self) -> bool:
        """Whether there is a contrastive loss in force."""
        return self.weights.inter != 0 or self.weights.intra != 0

    def embed(self, model: MAViL, batch: Batch) -> tuple[Tensor, ...]:
        """The embeddings of every view of audio and of video, without decoders and teacher; masks as in `part`."""
        return self._forward(model, batch, self.weights._replace(raw=0.0, regression=0.0), parts=True).embeddings

    def part(self, model: MAViL, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The losses of reconstruction and regression, and the embeddings."""
        output = self._forward(model, batch, self.weights, parts=True)
        *losses, embeddings = output
        return {"loss": output.loss_raw + output.loss_regression, **dict(zip(output._fields, losses))}, embeddings

    def contrast(self, model: MAViL, embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
        """The contrastive losses of a batch's embeddings, weighted, and the accuracy."""
        inter, intra, c_acc = model.contrast(embeddings, self.weights)
        loss_inter, loss_intra = self.weights.inter * inter, self.weights.intra * intra
        return {"loss": loss_inter + loss_intra, "loss_inter": loss_inter, "loss_intra": loss_intra, "c_acc": c_acc}

    def _forward(self, model: MAViL, batch: Batch, weights: LossWeights, **options: Any) -> MAViLOutput | MAViLParts:
        targets: FeatureOutput | None = self.teacher.targets(batch) if weights.regression != 0 else None
        named = {f"{loss}_loss_weight": weight for loss, weight in weights._asdict().items()}
        return model(batch.audio, batch.image, targets, self.mask_ratio, self.mask_ratio, **named, **options)

    def evaluate(self, model: MAViL, batches: Iterable[Batch]) -> dict[str, float]:
        """`held_out_clips`, and recall and median rank of retrieval in both directions, over the clips of all ranks, by the
        mean tokens of the encoders, each modality seen alone."""
        return retrieval_among(model, batches)
