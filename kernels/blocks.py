"""Attention on a CPU, always by kernels/cpu_attention.py."""

import torch
from torch import Tensor

from kernels import cpu_attention
from kernels.torch_ops import rotated_qkv


def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Attention of q, k, v (B, T, H, D)."""
    return cpu_attention.attention_qkv(torch.stack((q, k, v), 2), **options)


def attention_qkv(qkv: Tensor, *, rotation: Tensor | None = None, **options) -> Tensor:
    """Attention of the packed projection qkv (B, T, 3, H, D): (B, T, H, D)."""
    if rotation is not None:
        qkv = rotated_qkv(qkv, rotation)
    return cpu_attention.attention_qkv(qkv, **options)
