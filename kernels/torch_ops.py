"""PyTorch's own fused operators under our signatures: the baseline that every kernel here must beat.

Same six signatures as kernels/reference.py. Two differences, both in dropout: PyTorch draws the mask from its own
generator, so `seed` is not used; and on a CPU, attention drops keys instead of probabilities (see `attention`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import visible


def attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None, window: int | None = None,
              dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """scaled_dot_product_attention of q, k, v (B, T, H, D), causal; agrees with `reference.attention`.

    Dropout on a CPU: PyTorch's fused CPU attention has none, and asking for it falls back to one that writes (T, T)
    matrices. There, whole values are dropped instead: one draw per key and head, shared by all queries. Every
    probability is still zeroed with probability `dropout` and scaled by 1 / (1 - dropout), so the expectation is the
    same, and the fused path is kept.
    """
    if dropout > 0 and q.device.type == "cpu":
        B, T, H, _ = v.shape
        v = v * (torch.rand(B, T, H, 1) >= dropout).to(v.dtype).div(1 - dropout)
        dropout = 0.0
    mask = None
    if doc_start is not None or window is not None:
        mask = visible(q.shape[1], doc_start, window, q.device)[:, None]
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
    return y.transpose(1, 2)


def attention_qkv(qkv: Tensor, **options) -> Tensor:
    """`attention` of the packed projection qkv (B, T, 3, H, D): (B, T, H, D)."""
    return attention(*qkv.unbind(2), **options)


def layernorm(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """F.layer_norm of x (..., N); weights wider than x are not rounded to it."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.to(w.dtype), w.shape, w, b, eps).to(x.dtype)


def add_layernorm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None = None,
                  eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(residual + x, layer norm of it) for x and residual (..., N)."""
    total = (residual + x).to(residual.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return total, F.layer_norm(total.to(w.dtype), w.shape, w, b, eps).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean", ignore_index: int = -1) -> Tensor:
    """F.cross_entropy of logits (M, V) in fp32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction=reduction, ignore_index=ignore_index)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean",
                         ignore_index: int = -1) -> Tensor:
    """F.cross_entropy of F.linear(x, weight), for x (M, N) and weight (V, N): all logits exist at once."""
    logits = F.linear(x, weight.to(x.dtype))
    return cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)
