"""Fine-tuned CAV-MAE models on packed streams: the audio-visual classifier and the audio branch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cavmae_fast.models.encoder import PackedEncoder
from cavmae_fast.models.weights import Pretrained
from cavmae_fast.reference import cavmae as reference


class CAVMAEFT(Pretrained, PackedEncoder, reference.CAVMAEFT):
    """The classifier. Arguments, modes and state-dict keys are the published ones; `depth`, `attention` as in `CAVMAE`.

    uint8 RGB images are normalized with ImageNet's mean and standard deviation on the way into the patch projection.
    """

    def forward(self, a: Tensor | None, v: Tensor | None, mode: str) -> Tensor:
        reference.check_mode(mode, a, v)
        inputs = {m: x for m, x in (("a", a), ("v", v)) if mode == "multimodal" or _MODALITY[mode] == m}
        self.check_inputs(**inputs)
        single, joint = mode != "multimodal", mode == "multimodal" or mode.startswith("missing")
        tokens = self.encode(inputs, None, single=single, joint=joint)
        statistics = torch.promote_types(self.norm.weight.dtype, torch.float32)
        means = [part.mean(dim=1, dtype=statistics) for part in tokens.values()]
        mean = means[0] if len(means) == 1 else (means[0] + means[1]) / 2
        return self.mlp_head(mean.to(self.norm.weight.dtype))

    def forward_feat(self, a: Tensor, v: Tensor | None = None, mode: str = "av") -> tuple[Tensor, Tensor] | Tensor:
        if mode == "av" and v is not None:
            self.check_inputs(a=a, v=v)
            tokens = self.encode({"a": a, "v": v}, None, single=True, joint=False)
            return tokens["a"], tokens["v"]
        return super().forward_feat(a, v, mode)


_MODALITY = {"audioonly": "a", "missingaudioonly": "a", "videoonly": "v", "missingvideoonly": "v"}


class CAVMAEFTAudio(Pretrained, PackedEncoder, reference.CAVMAEFTAudio):
    """The audio branch alone: `forward(a)` gives normed tokens, `forward_pred(a)` logits. Arguments as in `CAVMAEFT`."""

