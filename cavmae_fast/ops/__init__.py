"""The operators. One a file: Triton kernels, their PyTorch counterpart, the registered operator, the public function.

The public functions are here under their names; a file's other contents are under `cavmae_fast.ops.<file>` in
`from ... import`.
"""

from .attention import attention, query_attention
from .contrastive_loss import contrastive_loss
from .embed_kept_patches import embed_kept_patches
from .gather_tokens import gather_tokens
from .layout import StreamLayout
from .linear_gelu import linear_gelu
from .log_mel_fbank import log_mel_fbank, log_mel_features
from .masked_patch_mse import masked_patch_mse
from .scatter_tokens import scatter_tokens
from .stream_layer_norm import stream_layer_norm
from .stream_linear import stream_linear

__all__ = [
    "StreamLayout",
    "attention",
    "contrastive_loss",
    "embed_kept_patches",
    "gather_tokens",
    "linear_gelu",
    "log_mel_fbank",
    "log_mel_features",
    "masked_patch_mse",
    "query_attention",
    "scatter_tokens",
    "stream_layer_norm",
    "stream_linear",
]
