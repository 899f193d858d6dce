"""PyTorch's own fused operators under our signatures: the baseline that our kernels must beat.

The signatures are those of kernels/reference.py. Dropout masks differ from its masks: on a GPU
they are drawn by PyTorch's generator, so `seed` is not used; on a CPU by `cpu_dropout.keep_mask`.
On a CPU, attention is kernels/cpu_attention.py where that is faster than PyTorch's fused operator,
and RMS norm and rotary positions are kernels/cpu_norms.py unless they are compiled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu_attention, cpu_norms
from kernels.reference import visible


def attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None,
              window: int | None = None, dropout: float = 0.0,
              seed: Tensor | None = None) -> Tensor:
    """Causal scaled_dot_product_attention of q, k, v (B, T, H, D).

    Agrees with `reference.attention`. On a CPU, `cpu_attention` computes dropout, which the fused
    operator does not have, and bf16, whose fused backward is slow, most of all for short sequences
    (bench/results/forms-cpu-bf16.json).
    """
    if _in_blocks(q, dropout):
        qkv = torch.stack((q, k, v), 2)
        return cpu_attention.attention_qkv(qkv, doc_start=doc_start, window=window,
                                           dropout=dropout, seed=seed)
    return fused_attention(q, k, v, doc_start=doc_start, window=window, dropout=dropout)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None,
                    window: int | None = None, dropout: float = 0.0,
                    seed: Tensor | None = None) -> Tensor:
    """`attention` by scaled_dot_product_attention, on any device."""
    mask = None
    if doc_start is not None or window is not None:
        mask = visible(q.shape[1], doc_start, window, q.device)[:, None]
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, dropout_p=dropout,
                                       is_causal=mask is None)
    return y.transpose(1, 2)


def attention_qkv(qkv: Tensor, *, rotation: Tensor | None = None, dropout: float = 0.0,
                  **options) -> Tensor:
    """`attention` of the packed projection qkv (B, T, 3, H, D): (B, T, H, D).

    `rotation` (T, D): `rotated_qkv` comes first.
    """
    if rotation is not None:
        qkv = rotated_qkv(qkv, rotation)
    if _in_blocks(qkv, dropout):
        return cpu_attention.attention_qkv(qkv, dropout=dropout, **options)
    return attention(*qkv.unbind(2), dropout=dropout, **options)


def rotated_qkv(qkv: Tensor, rotation: Tensor, eps: float = 1e-6) -> Tensor:
    """qkv (B, T, 3, H, D) with q and k normalised and rotated by `rotation` (T, D), in fp32."""
    if _in_few_passes(qkv):
        return cpu_norms.rotated_qkv(qkv, rotation, eps)
    with torch.autocast(qkv.device.type, enabled=False):
        cos, sin = rotation[:, None, None].chunk(2, -1)
        qk = qkv[:, :, :2].to(torch.promote_types(qkv.dtype, torch.float32))
        a, b = F.rms_norm(qk, qk.shape[-1:], eps=eps).chunk(2, -1)
        qk = torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
        return torch.cat([qk.to(qkv.dtype), qkv[:, :, 2:]], 2)


def _in_blocks(x: Tensor, dropout: float) -> bool:
    """Whether kernels/cpu_attention.py is faster than the fused operator."""
    return x.device.type == "cpu" and (dropout > 0 or x.dtype == torch.bfloat16)


def _in_few_passes(x: Tensor) -> bool:
    """Whether kernels/cpu_norms.py is faster than PyTorch's parts, which a compiler fuses."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def layernorm(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """F.layer_norm of x (..., N) in the dtype of w, so that w is not rounded to that of x."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.to(w.dtype), w.shape, w, b, eps).to(x.dtype)


def add_layernorm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None = None,
                  eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(residual + x, layer norm of it) for x and residual (..., N)."""
    total = (residual + x).to(residual.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return total, F.layer_norm(total.to(w.dtype), w.shape, w, b, eps).to(x.dtype)


def rmsnorm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """F.rms_norm of x (..., N), without weights."""
    if _in_few_passes(x):
        return cpu_norms.rmsnorm(x, eps)
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], eps=eps)


def add_rmsnorm(x: Tensor, residual: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(residual + x, RMS norm of it) for x and residual (..., N)."""
    if _in_few_passes(x):
        return cpu_norms.add_rmsnorm(x, residual, eps)
    total = (residual + x).to(residual.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return total, F.rms_norm(total, total.shape[-1:], eps=eps).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean",
                  ignore_index: int = -1) -> Tensor:
    """F.cross_entropy of logits (M, V) in fp32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction=reduction, ignore_index=ignore_index)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, cap: float = 0.0,
                         reduction: str = "mean", ignore_index: int = -1) -> Tensor:
    """F.cross_entropy of F.linear(x, weight), for x (M, N) and weight (V, N).

    All logits exist at once, with a `cap` as cap * tanh(logits / cap), in fp32.
    """
    logits = F.linear(x, weight.to(x.dtype))
    if cap:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = cap * torch.tanh(wide / cap)
    return cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)
