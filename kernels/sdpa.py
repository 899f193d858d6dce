"""PyTorch's scaled_dot_product_attention, always; kernels/torch_ops.py takes others on a CPU."""

from torch import Tensor

from kernels.torch_ops import fused_attention as attention
from kernels.torch_ops import rotated_qkv

__all__ = ["attention", "attention_qkv"]


def attention_qkv(qkv: Tensor, *, rotation: Tensor | None = None, **options) -> Tensor:
    """Attention of the packed projection qkv (B, T, 3, H, D): (B, T, H, D)."""
    if rotation is not None:
        qkv = rotated_qkv(qkv, rotation)
    return attention(*qkv.unbind(2), **options)
