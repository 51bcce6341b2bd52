"""The operators. One a file: Triton kernels, their PyTorch counterpart, the registered operator, the public function.

The public functions are here under their names; a file's other contents are under `cavmae_fast.ops.<file>` in
`from ... import`.
"""

from cavmae_fast.ops.attention import attention, query_attention
from cavmae_fast.ops.contrastive_loss import contrastive_loss
from cavmae_fast.ops.embed_kept_patches import embed_kept_patches
from cavmae_fast.ops.gather_tokens import gather_tokens
from cavmae_fast.ops.layout import StreamLayout
from cavmae_fast.ops.linear_gelu import linear_gelu
from cavmae_fast.ops.log_mel_fbank import log_mel_fbank, log_mel_features
from cavmae_fast.ops.masked_patch_mse import masked_patch_mse
from cavmae_fast.ops.scatter_tokens import scatter_tokens
from cavmae_fast.ops.stream_layer_norm import stream_layer_norm
from cavmae_fast.ops.stream_linear import stream_linear

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
