"""Causal attention on a CPU out of PyTorch's batched products: softmax(q k^T / sqrt(D)) v.

PyTorch's fused CPU attention has no dropout, and in bf16 it takes 1.2 to 3 times as long
(bench/results/forms-cpu-bf16.json). Here each block of ROWS queries is multiplied only by the keys
before its end, which saves nearly half of the products. Few sequences are computed at once, so that
their scores stay in the cache.

Letters: B batch, T sequence, H heads, D head dimension; a block is queries i to e - 1 of b
sequences, and G = b * H.
Precision: products sum in fp32, but PyTorch rounds their results to the dtype of qkv: scores,
probabilities and their gradients. Sums over blocks are fp32.
Saved for backward: qkv and the probabilities. Probabilities larger than KEPT_BYTES are not saved
but computed again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.cpu_dropout import keep_mask
from kernels.reference import visible

ROWS = 128  # queries in a block
CACHE_BYTES = 2 * 2**20  # for the scores of a block
KEPT_BYTES = 2**28  # for the probabilities of a call: 19 sequences of 1,024, 12 heads, bf16

# -- blocks --------------------------------------------------------------------


def _blocks(qkv: Tensor) -> Iterator[tuple[int, slice, int, int, slice]]:
    """For each block: its number, its sequences, i, e, and the place of its kept probabilities.

    The last queries of a sequence come first, because they see all keys: sums over blocks start
    with them.
    """
    B, T, _, H, _ = qkv.shape
    step = max(1, CACHE_BYTES // (H * min(ROWS, T) * T * qkv.element_size()))
    n = at = 0
    for b in range(0, B, step):
        for i in reversed(range(0, T, ROWS)):
            part, e = slice(b, min(b + step, B)), min(i + ROWS, T)
            size = (part.stop - b) * H * (e - i) * e
            yield n, part, i, e, slice(at, at + size)
            n, at = n + 1, at + size


def _by_head(x: Tensor) -> Tensor:
    """(..., b, T, H, D) as (..., G, T, D), which batched products take."""
    return x.transpose(-3, -2).flatten(-4, -3)


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * (a @ b), rounded once."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=factor)


def _hidden(qkv: Tensor, part: slice, doc_start: Tensor | None,
            window: int | None) -> Tensor | None:
    """Which keys each query may not see, (b, T, T); None where only later keys are hidden."""
    if doc_start is None and window is None:
        return None
    seen = visible(qkv.shape[1], None if doc_start is None else doc_start[part], window)
    return ~seen.expand(part.stop - part.start, -1, -1)


def _probabilities(q: Tensor, k: Tensor, i: int, e: int, hidden: Tensor | None,
                   out: Tensor | None = None) -> Tensor:
    """softmax of the scores of queries i to e - 1 over the keys before e, (G, e - i, e)."""
    scores = _product(q[:, i:e], k[:, :e].mT, q.shape[-1] ** -0.5)
    if hidden is None:
        scores[:, :, i:] += scores.new_full((e - i, e - i), float("-inf")).triu_(1)
    else:
        by_sequence = scores.view(len(hidden), -1, e - i, e)
        by_sequence.masked_fill_(hidden[:, None, i:e, :e], float("-inf"))
    return torch.softmax(scores, -1, out=out)


# -- operators -----------------------------------------------------------------


@torch.library.custom_op("ridge::cpu_attention", mutates_args=())
def _forward_op(qkv: Tensor, doc_start: Tensor | None, window: int | None, dropout: float,
                seed: Tensor | None) -> tuple[Tensor, Tensor]:
    y, kept = _forward_outputs(qkv, doc_start, window, dropout, seed)
    _, T, _, H, _ = qkv.shape
    for n, part, i, e, place in _blocks(qkv):
        if e == T:
            q, k, v = _by_head(qkv[part].movedim(2, 0))
            hidden = _hidden(qkv, part, doc_start, window)
        out = kept[place].view(len(q), e - i, e) if len(kept) else None
        p = _probabilities(q, k, i, e, hidden, out)
        if seed is not None:
            p = p * keep_mask(int(seed) + n, p.shape, dropout, p.dtype)
        block = _product(p, v[:, :e], 1 / (1 - dropout))
        y[part, i:e] = block.unflatten(0, (-1, H)).transpose(1, 2)
    return y, kept


@_forward_op.register_fake
def _forward_outputs(qkv, doc_start, window, dropout, seed):
    B, T, _, H, D = qkv.shape
    pairs = sum((min(i + ROWS, T) - i) * min(i + ROWS, T) for i in range(0, T, ROWS))
    n = B * H * pairs
    fits = n * qkv.element_size() <= KEPT_BYTES
    return qkv.new_empty(B, T, H, D), qkv.new_empty(n if fits else 0)


@torch.library.custom_op("ridge::cpu_attention_backward", mutates_args=())
def _backward_op(dy: Tensor, kept: Tensor, qkv: Tensor, doc_start: Tensor | None,
                 window: int | None, dropout: float, seed: Tensor | None) -> Tensor:
    dqkv = _backward_outputs(dy, kept, qkv, doc_start, window, dropout, seed)
    _, T, _, H, D = qkv.shape
    scale, survivors = D**-0.5, 1 / (1 - dropout)
    # the dtype of sums over blocks; a single block needs no sum
    wide = qkv.dtype if T <= ROWS else torch.promote_types(qkv.dtype, torch.float32)
    for n, part, i, e, place in _blocks(qkv):
        if e == T:
            q, k, v = _by_head(qkv[part].movedim(2, 0))
            g, dq = _by_head(dy[part]), torch.empty_like(q)
            hidden = _hidden(qkv, part, doc_start, window)
        if len(kept):
            p = kept[place].view(len(q), e - i, e)
        else:
            p = _probabilities(q, k, i, e, hidden)
        dp, dropped = _product(g[:, i:e], v[:, :e].mT, survivors), p
        if seed is not None:
            keep = keep_mask(int(seed) + n, p.shape, dropout, p.dtype)
            dp, dropped = dp.mul_(keep), p * keep
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq[:, i:e] = _product(ds, k[:, :e], scale)
        more_dk = _product(ds.mT, q[:, i:e], scale)
        more_dv = _product(dropped.mT, g[:, i:e], survivors)
        if e == T:
            dk, dv = more_dk.to(wide), more_dv.to(wide)
        else:
            dk[:, :e] += more_dk
            dv[:, :e] += more_dv
        if i == 0:
            for which, d in enumerate((dq, dk, dv)):
                dqkv[part, :, which] = d.unflatten(0, (-1, H)).transpose(1, 2)
    return dqkv


@_backward_op.register_fake
def _backward_outputs(dy, kept, qkv, doc_start, window, dropout, seed):
    return qkv.new_empty(qkv.shape)


# -- autograd --------------------------------------------------------------------


def _save(ctx, inputs, output):
    qkv, doc_start, ctx.window, ctx.dropout, seed = inputs
    ctx.save_for_backward(output[1], qkv, doc_start, seed)


def _differentiate(ctx, dy, _):
    kept, qkv, doc_start, seed = ctx.saved_tensors
    dqkv = _backward_op(dy, kept, qkv, doc_start, ctx.window, ctx.dropout, seed)
    return dqkv, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


# -- public ----------------------------------------------------------------------


def attention_qkv(qkv: Tensor, *, doc_start: Tensor | None = None, window: int | None = None,
                  dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Attention of the packed projection qkv (B, T, 3, H, D): (B, T, H, D).

    Agrees with `reference.attention_qkv`, but `keep_mask` draws the dropout mask from `seed`.
    Raises ValueError for dropout > 0 without a seed. Has no second derivative.
    """
    if dropout > 0 and seed is None:
        raise ValueError(f"attention: dropout={dropout} needs seed=, an int64 tensor without axes")
    return _forward_op(qkv, doc_start, window, dropout, seed if dropout > 0 else None)[0]
