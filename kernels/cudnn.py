"""PyTorch's scaled_dot_product_attention, always by cuDNN."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import sdpa


def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Attention of q, k, v (B, T, H, D). Raises RuntimeError for what cuDNN cannot compute."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa.attention(q, k, v, **options)


def attention_qkv(qkv: Tensor, **options) -> Tensor:
    """Attention of the packed projection qkv (B, T, 3, H, D): (B, T, H, D)."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa.attention_qkv(qkv, **options)
