"""The backend --attention=flash_attn: the flash-attn package (FlashAttention-2, Dao 2023).

The signatures are those of kernels/reference.py. The package differs in three points:
- fp16 and bf16 only;
- no `doc_start`: its form of documents, cumulative lengths, needs their number on the host, so the
  host would wait in every step;
- dropout is drawn from PyTorch's generator, so `seed` is not used.
Its backward runs in deterministic mode, like that of kernels/attention.py. Written for flash-attn
2.7 and 2.8.
"""

import torch
from flash_attn import flash_attn_func, flash_attn_qkvpacked_func
from torch import Tensor

from kernels.inputs import check_attention_window
from kernels.torch_ops import rotated_qkv


def attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None,
              window: int | None = None, dropout: float = 0.0,
              seed: Tensor | None = None) -> Tensor:
    """Causal attention of q, k, v (B, T, H, D); agrees with `reference.attention`."""
    return flash_attn_func(q, k, v, **_options(q, doc_start, window, dropout))


def attention_qkv(qkv: Tensor, *, rotation: Tensor | None = None, doc_start: Tensor | None = None,
                  window: int | None = None, dropout: float = 0.0,
                  seed: Tensor | None = None) -> Tensor:
    """`attention` of the packed projection qkv (B, T, 3, H, D): (B, T, H, D).

    `rotation` (T, D): `rotated_qkv` comes first, as PyTorch's operators.
    """
    if rotation is not None:
        qkv = rotated_qkv(qkv, rotation)
    return flash_attn_qkvpacked_func(qkv, **_options(qkv, doc_start, window, dropout))


def _options(q: Tensor, doc_start: Tensor | None, window: int | None, dropout: float) -> dict:
    """Our options as the package's arguments. Raises ValueError for what it does not have.

    Its window counts the keys before the query; ours also counts the query.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention: flash-attn has no {q.dtype}; give --dtype=bfloat16 or "
                         "float16, or --attention=torch")
    if doc_start is not None:
        raise ValueError("attention: flash-attn cannot take doc_start unless the host waits; "
                         "choose --attention=triton or torch")
    check_attention_window(window)
    return {"dropout_p": dropout, "causal": True,
            "window_size": (-1 if window is None else window - 1, 0), "deterministic": True}
