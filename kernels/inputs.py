"""What the Triton operators accept: dtypes, memory layout, shapes, the masks of attention."""

import torch
from torch import Tensor

from kernels.launch import LAYERNORM_WIDEST

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def with_dense_rows(t: Tensor) -> Tensor:
    """t, copied unless the elements of a row are neighbours. Rows may be any distance apart."""
    return t if t.stride(-1) == 1 else t.contiguous()


def check_norm(name: str, x: Tensor, residual: Tensor | None = None) -> None:
    """Raise ValueError for rows that kernels/layernorm.py and kernels/rmsnorm.py cannot take."""
    if not 1 <= (x.shape[-1] if x.dim() else 0) <= LAYERNORM_WIDEST:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; the last axis may have 1 to "
                         f"{LAYERNORM_WIDEST} elements (use --layernorm=torch for wider ones)")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: x is {x.dtype}; use fp16, bf16 or fp32, or "
                         "--layernorm=reference")
    if residual is None:
        return
    if residual.shape != x.shape or residual.dtype not in DTYPES or residual.device != x.device:
        raise ValueError(f"{name}: x is {tuple(x.shape)} on {x.device}, residual is "
                         f"{tuple(residual.shape)} {residual.dtype} on {residual.device}; they "
                         "must agree in shape and device, in fp16, bf16 or fp32")


def check_attention(q: Tensor, doc_start: Tensor | None, window: int | None, dropout: float,
                    seed: Tensor | None) -> None:
    """Raise ValueError for what kernels/attention.py cannot take."""
    if q.ndim != 4 or q.dtype not in DTYPES:
        raise ValueError(f"attention: q is {tuple(q.shape)} {q.dtype}; give (B, T, H, D) in "
                         "float32, bfloat16 or float16")
    B, T, _, D = q.shape
    if D % 8 or not 16 <= D <= 256:
        raise ValueError(f"attention: head dimension {D}; choose n_embd / n_head as a multiple of "
                         "8 from 16 to 256, or take --attention=torch")
    check_attention_window(window)
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout={dropout}; give a probability of at least 0 and "
                         "below 1")
    seeded = seed is not None and (seed.ndim, seed.dtype, seed.device) == (0, torch.int64, q.device)
    if dropout > 0 and not seeded:
        raise ValueError(f"attention: dropout={dropout} needs seed=, an int64 tensor without axes "
                         f"on {q.device}")
    wanted = ((B, T), torch.int32, q.device)
    if doc_start is not None and (doc_start.shape, doc_start.dtype, doc_start.device) != wanted:
        raise ValueError(f"attention: doc_start is {tuple(doc_start.shape)} {doc_start.dtype} on "
                         f"{doc_start.device}; give {(B, T)} torch.int32 on {q.device}")


def check_attention_window(window: int | None) -> None:
    """Raise ValueError for a window without positions."""
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; a query sees at least itself: give 1 or "
                         "more, or None")


def first_keys(q: Tensor, doc_start: Tensor | None, window: int | None) -> Tensor | None:
    """The first key that each query sees, (B, T); None where that is always key 0."""
    B, T = q.shape[:2]
    first = None if doc_start is None else doc_start.contiguous()
    if window is not None and window < T:
        i = torch.arange(T, dtype=torch.int32, device=q.device)
        reach = (i - (window - 1)).clamp(min=0).repeat(B, 1)
        first = reach if first is None else torch.maximum(first, reach)
    return first
