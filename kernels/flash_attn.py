"""The flash-attn package (FlashAttention-2, Dao 2023) under our signature: a peer, and a choice
(--attention=flash_attn).

Same two signatures as kernels/reference.py, with three differences that are the package's own: fp16
and bf16 only; no `doc_start` (its way to documents, cumulative lengths, needs the host to know how
many there are, so every step would wait); dropout is drawn from PyTorch's generator, so `seed` is
not used. Its backward is asked to be deterministic, as that of kernels/attention.py is. Written for
the interface of flash-attn 2.7 and 2.8.
"""

import torch
from flash_attn import flash_attn_func, flash_attn_qkvpacked_func
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None,
              window: int | None = None,
              dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Causal attention of q, k, v (B, T, H, D); agrees with `reference.attention`."""
    return flash_attn_func(q, k, v, **_options(q, doc_start, window, dropout))


def attention_qkv(qkv: Tensor, *, doc_start: Tensor | None = None, window: int | None = None,
                  dropout: float = 0.0,
                  seed: Tensor | None = None) -> Tensor:
    """`attention` of the packed projection qkv (B, T, 3, H, D), whose gradient comes packed, too:
    (B, T, H, D)."""
    return flash_attn_qkvpacked_func(qkv, **_options(qkv, doc_start, window, dropout))


def _options(q: Tensor, doc_start: Tensor | None, window: int | None, dropout: float) -> dict:
    """Validates, and says our options in the package's words: a window there counts the keys before
    the query."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention: flash-attn has no {q.dtype}; give --dtype=bfloat16 or "
                         "float16, or --attention=torch")
    if doc_start is not None:
        raise ValueError("attention: flash-attn cannot take doc_start unless the host waits; "
                         "choose --attention=triton or torch")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; a query sees at least itself: give 1 or "
                         "more, or None")
    return {"dropout_p": dropout, "causal": True,
            "window_size": (-1 if window is None else window - 1, 0), "deterministic": True}
