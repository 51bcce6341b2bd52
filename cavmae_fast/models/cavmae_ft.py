"""Fine-tuned CAV-MAE models on packed streams: the audio-visual classifier and the audio branch alone."""

from __future__ import annotations

from torch import Tensor

from cavmae_fast.models.encoder import PackedEncoder
from cavmae_fast.models.weights import Pretrained
from cavmae_fast.reference.cavmae_parameters import CAVMAEFTAudioParameters, CAVMAEFTParameters
from cavmae_fast.reference.outputs import FeatureOutput


class CAVMAEFT(Pretrained, PackedEncoder, CAVMAEFTParameters):
    """The classifier. Arguments, modes and state-dict keys are the published ones.

    `depth`, `attention`, `clip`, `recompute` and the attribute `drop_path` are ours, as in `CAVMAE`.
    uint8 RGB images are normalized on the way into the patch projection, with the statistics in `clip_spec`.
    `norm_pix_loss` is accepted, as in the published signature, and has no effect.
    """

    def forward(self, a: Tensor | None, v: Tensor | None, mode: str) -> Tensor:
        """Logits `[B, label_dim]`. `mode`: 'multimodal'; 'audioonly' or 'videoonly' (the modality's own norms);
        'missingaudioonly' or 'missingvideoonly' (only that modality is *there*: the mean of the joint-norm and the
        own-norm passes). The input that a mode does not use may be None.

        Raises TypeError or ValueError, naming the argument, for a mode that is not known and inputs that do not fit.
        """
        inputs = self.classifier_inputs(a, v, mode)
        first = next(iter(inputs.values()))
        return self.compute(inputs, mode, self.draw_paths(first.shape[0], first.device))

    def compute(self, inputs: dict[str, Tensor], mode: str, paths: Tensor | None) -> Tensor:
        """All of a pass that is heavy, and neither draws nor checks anything -> logits `[B, label_dim]`."""
        missing = mode.startswith("missing")
        tokens = self.encode(inputs, None, single=mode != "multimodal", joint=missing or mode == "multimodal", paths=paths)
        means = [self.mean_tokens(part) for part in tokens.values()]
        mean = (means[0] + means[1]) / 2 if missing else means[0]
        return self.mlp_head(mean.to(self.norm.weight.dtype))

    def forward_feat(self, a: Tensor, v: Tensor | None = None, mode: str = "av") -> FeatureOutput | Tensor:
        """Normed tokens of each stream seen alone: both for mode 'av', audio's `[B, La, D]` for 'a'."""
        tokens = self.features(self.feature_inputs(a, v, mode))
        return FeatureOutput(tokens["a"], tokens["v"]) if mode == "av" else tokens["a"]


class CAVMAEFTAudio(Pretrained, PackedEncoder, CAVMAEFTAudioParameters):
    """The audio branch alone: `forward(a)` gives normed tokens, `forward_pred(a)` logits. Arguments as in `CAVMAEFT`.

    `in_chans` and `norm_pix_loss` are accepted, as in the published signature, and have no effect.
    """

    def forward(self, a: Tensor) -> Tensor:
        """Audio `[B, audio_length, 128]` -> normed tokens `[B, La, D]`."""
        self.check_inputs(a=a)
        return self.compute(a, self.draw_paths(a.shape[0], a.device))

    def compute(self, a: Tensor, paths: Tensor | None) -> Tensor:
        """All of a pass that is heavy, and neither draws nor checks anything -> normed tokens `[B, La, D]`."""
        return self.features({"a": a}, paths)["a"]

    def forward_feat(self, a: Tensor, v: Tensor | None = None, mode: str = "a") -> Tensor:
        """As `forward`; `v` and `mode` are there so that code for `CAVMAEFT` runs, and are not used."""
        return self(a)

    def forward_pred(self, a: Tensor, v: Tensor | None = None, mode: str = "audioonly") -> Tensor:
        """Logits `[B, label_dim]`; `v` and `mode` are not used, as in `forward_feat`."""
        return self.mlp_head(self(a).mean(dim=1))
