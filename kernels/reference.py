"""The definitions: each operator in plain PyTorch, computed in fp32 or wider.

These are the specification, and every other implementation is tested against them. They run
anywhere, differentiate by autograd and switch autocast off. Nothing here is fast.

Letters: B batch, T sequence, H heads, D head dimension; M rows, N features, V vocabulary.
"""

import torch
from torch import Tensor


def _wide(*tensors: Tensor | None) -> list:
    """The tensors in fp32 or wider; None stays None."""
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32))
            for t in tensors]


def visible(T: int, doc_start: Tensor | None = None, window: int | None = None,
            device=None) -> Tensor:
    """Which keys each query sees, a boolean (1 or B, T, T): itself and earlier ones.

    `doc_start` hides the keys of other documents. `window` hides all but the last `window`
    positions, of which the query is the last.
    """
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)[None, :]
    seen = (j <= i)[None]
    if window is not None:
        seen = seen & (j > i - window)
    if doc_start is not None:
        seen = seen & (j >= doc_start[:, :, None])
    return seen


def philox_keep(seed: Tensor, shape: tuple[int, int, int, int], dropout: float) -> Tensor:
    """Which of the (B, H, T, T) attention probabilities survive dropout, by Philox 4x32-10.

    The counter is (i, j, b * H + h, 0), the key is the 64-bit `seed`, and the first of the four
    words decides. So the mask depends on position and seed alone, not on the size of blocks, and is
    the same in the forward and in the backward. Source: Salmon et al., "Parallel random numbers: as
    easy as 1, 2, 3", SC 2011.
    """
    B, H, T, _ = shape
    low = 0xFFFFFFFF

    # the high and the low 32 bits of a * b, which does not fit int64
    def mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        p, q = a * (b & 0xFFFF), a * (b >> 16)
        return (q + (p >> 16)) >> 16, (p + ((q & 0xFFFF) << 16)) & low

    def axis(n: int, dim: int) -> Tensor:
        shape = [n if d == dim else 1 for d in range(3)]
        return torch.arange(n, device=seed.device).view(shape).expand(B * H, T, T)

    c0, c1, c2, c3 = axis(T, 1), axis(T, 2), axis(B * H, 0), torch.zeros_like(axis(T, 1))
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = mulhilo(0xD2511F53, c0), mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return (c0 >= int(dropout * 2**32)).view(shape)


def attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None,
              window: int | None = None, dropout: float = 0.0,
              seed: Tensor | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(D)) v of q, k, v (B, T, H, D).

    `doc_start` (B, T) int32: the first position of the document that each position belongs to.
    `window`: a query sees itself and the window - 1 positions before it. `dropout`: the probability
    that `philox_keep` drops a probability. It needs `seed`, an int64 tensor without axes on the
    device of q; raises ValueError without one.
    """
    with torch.autocast(q.device.type, enabled=False):
        B, T, H, D = q.shape
        qs, ks, vs = (t.transpose(1, 2) for t in _wide(q, k, v))
        scores = qs @ ks.transpose(-2, -1) * D**-0.5
        seen = visible(T, doc_start, window, q.device)[:, None]
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        if dropout > 0:
            if seed is None:
                raise ValueError(f"attention: dropout={dropout} needs seed=, an int64 tensor "
                                 "without axes")
            p = p * philox_keep(seed, (B, H, T, T), dropout) / (1 - dropout)
        return (p @ vs).transpose(1, 2).to(q.dtype)


def attention_qkv(qkv: Tensor, *, rotation: Tensor | None = None, **options) -> Tensor:
    """`attention` of the packed projection qkv (B, T, 3, H, D): (B, T, H, D).

    `rotation` (T, D) fp32: `rotated_qkv` comes first.
    """
    if rotation is not None:
        qkv = rotated_qkv(qkv, rotation)
    return attention(*qkv.unbind(2), **options)


def rotated_qkv(qkv: Tensor, rotation: Tensor, eps: float = 1e-6) -> Tensor:
    """qkv (B, T, 3, H, D) with q and k normalised by `rmsnorm` over D, and then rotated.

    `rotation` (T, D) has the cosine of each position's D / 2 angles, then the sine. Element i is
    rotated with element i + D / 2, as (a, b) -> (a cos + b sin, b cos - a sin). Source: Su et al.,
    "RoFormer: enhanced transformer with rotary position embedding", 2021; the sign is nanochat's.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        wide, (cos, sin) = _wide(qkv)[0], rotation[:, None, None].to(qkv.device).chunk(2, -1)
        a, b = rmsnorm(wide[:, :, :2], eps).chunk(2, -1)
        qk = torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
        return torch.cat([qk, wide[:, :, 2:]], 2).to(qkv.dtype)


def layernorm(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis of x (..., N) to mean 0 and variance 1; times w, plus b (N,)."""
    with torch.autocast(x.device.type, enabled=False):
        xs, ws, bs = _wide(x, w, b)
        centred = xs - xs.mean(-1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * ws
        return (y if bs is None else y + bs).to(x.dtype)


def add_layernorm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None = None,
                  eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The pre-norm residual step (residual + x, layernorm(residual + x)); x, residual (..., N).

    The sum is rounded once, to the dtype of the residual stream. The norm reads the rounded sum and
    has the dtype of x, the branch.
    """
    with torch.autocast(x.device.type, enabled=False):
        xs, rs = _wide(x, residual)
        total = (rs + xs).to(residual.dtype)
        (wide,) = _wide(total)
        return total, layernorm(wide, w, b, eps).to(x.dtype)


def rmsnorm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x (..., N) over its root mean square, without weights: x / sqrt(mean(x^2) + eps).

    Source: Zhang and Sennrich, "Root mean square layer normalization", 2019.
    """
    with torch.autocast(x.device.type, enabled=False):
        (xs,) = _wide(x)
        return (xs * torch.rsqrt(xs.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rmsnorm(x: Tensor, residual: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The pre-norm residual step (residual + x, rmsnorm(residual + x)); x, residual (..., N).

    Rounded as `add_layernorm` is.
    """
    with torch.autocast(x.device.type, enabled=False):
        xs, rs = _wide(x, residual)
        total = (rs + xs).to(residual.dtype)
        (wide,) = _wide(total)
        return total, rmsnorm(wide, eps).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean",
                  ignore_index: int = -1) -> Tensor:
    """-log softmax(logits)[target] for logits (M, V) and targets (M,) int64, in fp32.

    Rows whose target is `ignore_index` do not count. `reduction` is "sum", or "mean" over the rows
    that count; without any the mean is nan, as in PyTorch.
    """
    with torch.autocast(logits.device.type, enabled=False):
        (wide,) = _wide(logits)
        kept = targets != ignore_index
        losses = wide.logsumexp(-1) - wide.gather(-1, targets.where(kept, 0)[:, None])[:, 0]
        total = losses.where(kept, 0).sum()
        return total / kept.sum() if reduction == "mean" else total


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, cap: float = 0.0,
                         reduction: str = "mean", ignore_index: int = -1) -> Tensor:
    """cross_entropy(x @ weight^T, targets) of features x (M, N) and weight (V, N).

    `cap`: the logits are cap * tanh(logits / cap), which keeps them within it; 0: as they are.
    """
    with torch.autocast(x.device.type, enabled=False):
        xs, ws = _wide(x, weight)
        logits = xs @ ws.T
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)


__all__ = ["add_layernorm", "add_rmsnorm", "attention", "attention_qkv", "cross_entropy",
           "layernorm", "linear_cross_entropy", "rmsnorm", "rotated_qkv"]
