"""What the Triton operators accept: dtypes, memory layout, shapes, masks of attention, targets."""

import torch
from torch import Tensor

from kernels.launch import LAYERNORM_WIDEST

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def with_dense_rows(t: Tensor) -> Tensor:
    """t, copied unless the elements of a row are neighbours. Rows may be any distance apart."""
    return t if t.stride(-1) == 1 else t.contiguous()


def strided(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor and its strides, which a kernel takes as one argument."""
    return x, x.stride()


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


def check_packed(qkv: Tensor) -> None:
    """Raise ValueError unless qkv is (B, T, 3, H, D)."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention_qkv: qkv has shape {tuple(qkv.shape)}; view the projection as "
                         "(B, T, 3, H, D)")


def check_rotation(qkv: Tensor, rotation: Tensor) -> None:
    """Raise ValueError unless `rotation` fits a qkv (B, T, 3, H, D)."""
    wanted = (qkv.shape[1::3], torch.float32, qkv.device)
    if (rotation.shape, rotation.dtype, rotation.device) != wanted:
        raise ValueError(f"attention_qkv: rotation is {tuple(rotation.shape)} {rotation.dtype} on "
                         f"{rotation.device}; give {tuple(wanted[0])} torch.float32 on "
                         f"{qkv.device}")


def check_attention(qkv: list[Tensor], doc_start: Tensor | None, window: int | None,
                    dropout: float, seed: Tensor | None) -> None:
    """Raise ValueError for what kernels/attention.py cannot take; qkv is [q, k, v]."""
    q, k, v = qkv
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"attention: {name} is {tuple(x.shape)} {x.dtype} on {x.device}, q is "
                             f"{tuple(q.shape)} {q.dtype} on {q.device}; make them alike")
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


def last_queries(first: Tensor | None) -> Tensor | None:
    """The end of the queries that see each key, (B, T), for the `first_keys` of each query."""
    if first is None:
        return None
    B, T = first.shape
    keys = torch.arange(T, dtype=torch.int32, device=first.device).repeat(B, 1)
    # how many queries have their first key at or before this one
    return torch.searchsorted(first, keys, right=True, out_int32=True)


def check_loss(name: str, label: str, t: Tensor, targets: Tensor, reduction: str) -> None:
    """Raise ValueError for logits or features, targets or a reduction that no loss takes."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction is {reduction!r}; choose 'mean' or 'sum'")
    if t.dim() != 2 or t.shape[1] == 0 or t.dtype not in DTYPES:
        raise ValueError(f"{name}: {label} is {tuple(t.shape)} {t.dtype}; it must have two axes "
                         "and be fp16, bf16 or fp32")
    if targets.shape != t.shape[:1] or targets.dtype != torch.int64 or targets.device != t.device:
        raise ValueError(f"{name}: targets are {tuple(targets.shape)} {targets.dtype} on "
                         f"{targets.device}; for {label} of {tuple(t.shape)} on {t.device} they "
                         f"must be ({len(t)},) int64 there")


def check_head(weight: Tensor, x: Tensor, cap: float) -> None:
    """Raise ValueError for what `linear_cross_entropy` cannot take besides x and targets."""
    if not 0 <= cap < float("inf"):
        raise ValueError(f"linear_cross_entropy: cap={cap}; give a finite number above 0, or 0 for "
                         "logits as they are")
    N = x.shape[1]
    fits = weight.dim() == 2 and weight.shape[1] == N and weight.device == x.device
    if not fits or weight.dtype not in DTYPES:
        raise ValueError(f"linear_cross_entropy: weight is {tuple(weight.shape)} {weight.dtype} on "
                         f"{weight.device}, x is {tuple(x.shape)} on {x.device}; weight must be "
                         f"(V, {N}) on the same device, in fp16, bf16 or fp32")
