"""Causal flash attention: y = softmax(q k^T / sqrt(D)) v, without the (T, T) matrices.

Shapes: q, k, v, y, y_low and all gradients (B, T, H, D); lse and delta (B, H, T) fp32; first and
end (B, T) int32. Query i sees the keys first[i] to i, key j is seen by the queries j to end[j] - 1.
Without documents and without a window, first and end are None.
Letters: i is a query and j a key, m and n the first of a block of them; s are scores, p
probabilities, ds = p (dp - delta) the gradient of s; alpha rescales sums when a maximum grows.

Precision: sums are fp32. For the matrix units p and ds are rounded to the dtype of the inputs;
fp32 inputs are multiplied in fp32. The exponent includes 1 / sqrt(D) and log2(e), so lse is in
base 2. Saved for backward: the inputs, lse, y, and y_low, which is what rounding took from y.
One program sums each gradient, without atomics, so every run gives the same bits. The price is
seven matrix products in the backward instead of five.

y_low is there for rows whose maximum is repeated (arXiv 2510.04212). Rounding biases y there, and
delta = rowsum(dy * y) adds the bias to every ds of the row. The paper shifts the maximum, so that
no p is 1; here delta = rowsum(dy * (y + y_low)). Emulated in bf16 on rows with two equal maxima,
the rms error of delta is 0.021 with y alone, 0.087 with the shift (p = 1 is exact, a shifted p is
not; it also underflows for logits beyond 87) and 0.0002 with y + y_low. It costs 4 bytes of traffic
per element of y, about 0.6 % of a 124M step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import inputs, launch
from kernels.inputs import strided, with_dense_rows
from kernels.primitives import LOG2E, dot, inside, load_tile, store_tile, tile, tile_step

# -- kernels ------------------------------------------------------------------


@triton.jit
def _bound(bounds, position, T):
    """`first` or `end` of one sequence at a position; beyond T, at the last position."""
    return tl.load(bounds + tl.minimum(position, T - 1))


@triton.jit
def _query_block(T, BLOCK_M: tl.constexpr):
    """The head and the first query of this program. The longest rows of a head come first."""
    blocks = tl.cdiv(T, BLOCK_M)
    return tl.program_id(0) // blocks, (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M


@triton.jit
def _keys_of_block(first, b, m, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`first` of each query of a block; the first key block it needs; `first` of its last query.

    From that last bound on, only the causal mask hides keys from the block.
    """
    first += b.to(tl.int64) * T
    firsts = _bound(first, m + tl.arange(0, BLOCK_M), T)
    return firsts, _bound(first, m, T) // BLOCK_N * BLOCK_N, _bound(first, m + BLOCK_M - 1, T)


@triton.jit
def _scores(qs, ks, m, n, firsts, unmasked, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """q k^T, with -inf where query m + row does not see key n + column.

    A block in which every query sees every key skips the mask, by a branch: with two loops instead,
    one masked and one not, ptxas may serialise the matrix units (C7515).
    """
    s = dot(qs, ks.T)
    if (n < unmasked) | (n + BLOCK_N > m + 1):
        i, j = m + tl.arange(0, BLOCK_M)[:, None], n + tl.arange(0, BLOCK_N)[None, :]
        seen = j <= i
        if firsts is not None:
            seen &= j >= firsts[:, None]
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _keep(seed, i, j, head, DROPPED: tl.constexpr):
    """Which probabilities dropout keeps: it drops DROPPED of 2**32. See reference.philox_keep."""
    return tl.philox(tl.load(seed), i, j, head, 0)[0] >= DROPPED


@triton.jit
def attention_forward(qkv, first, seed, y, y_low, lse, T, H, DROPPED: tl.constexpr,
                      D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y, y_low and lse of one block of queries, over the blocks of keys that they see."""
    scale: tl.constexpr = LOG2E * D**-0.5
    q, k, v = qkv
    head, m = _query_block(T, BLOCK_M)
    i = m + tl.arange(0, BLOCK_M)
    firsts, lo, unmasked = None, 0, 0
    if first is not None:
        firsts, lo, unmasked = _keys_of_block(first, head // H, m, T, BLOCK_M, BLOCK_N)

    qs = load_tile(q, head, H, m, T, BLOCK_M, D)
    k_tile = tile(k, head, H, lo, BLOCK_N, D)
    v_tile = tile(v, head, H, lo, BLOCK_N, D)
    acc = tl.zeros((BLOCK_M, triton.next_power_of_2(D)), tl.float32)
    sum_exp = tl.zeros((BLOCK_M,), tl.float32)
    # finite: a block can hide a whole row, and inf - inf would be nan
    row_max = tl.full((BLOCK_M,), -1e38, tl.float32)
    for n in range(lo, tl.minimum(m + BLOCK_M, T), BLOCK_N):
        exists = inside(n, T, BLOCK_N, D)
        ks = tl.load(k_tile, mask=exists, other=0.0)
        vs = tl.load(v_tile, mask=exists, other=0.0)
        s = _scores(qs, ks, m, n, firsts, unmasked, BLOCK_M, BLOCK_N)
        m_new = tl.maximum(row_max, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        alpha = tl.exp2(row_max - m_new)
        sum_exp = sum_exp * alpha + tl.sum(p, 1)
        if DROPPED:
            j = n + tl.arange(0, BLOCK_N)
            p = tl.where(_keep(seed, i[:, None], j[None, :], head, DROPPED), p, 0.0)
        acc = dot(p.to(vs.dtype), vs, acc * alpha[:, None])
        row_max = m_new
        k_tile += tile_step(k, BLOCK_N)
        v_tile += tile_step(v, BLOCK_N)
    acc *= (2**32 / (2**32 - DROPPED) / sum_exp)[:, None]
    store_tile(y, acc, head, H, m, T, BLOCK_M, D)
    if y_low is not None:
        lost = acc - acc.to(y[0].dtype.element_ty).to(tl.float32)
        store_tile((y_low, y[1]), lost, head, H, m, T, BLOCK_M, D)
    tl.store(lse + head.to(tl.int64) * T + i, row_max + tl.log2(sum_exp), mask=i < T)


@triton.jit
def attention_backward_q(qkv, first, seed, y, y_low, lse, dy, dq, delta, T, H,
                         DROPPED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr):
    """dq of one block of queries, and delta, which attention_backward_kv reads."""
    scale: tl.constexpr = LOG2E * D**-0.5
    q, k, v = qkv
    head, m = _query_block(T, BLOCK_M)
    i = m + tl.arange(0, BLOCK_M)
    firsts, lo, unmasked = None, 0, 0
    if first is not None:
        firsts, lo, unmasked = _keys_of_block(first, head // H, m, T, BLOCK_M, BLOCK_N)

    dys = load_tile(dy, head, H, m, T, BLOCK_M, D)
    ys = load_tile(y, head, H, m, T, BLOCK_M, D).to(tl.float32)
    if y_low is not None:
        ys += load_tile((y_low, y[1]), head, H, m, T, BLOCK_M, D).to(tl.float32)
    deltas = tl.sum(ys * dys.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * T + i, deltas, mask=i < T)
    lses = tl.load(lse + head.to(tl.int64) * T + i, mask=i < T, other=0.0)
    qs = load_tile(q, head, H, m, T, BLOCK_M, D)
    k_tile = tile(k, head, H, lo, BLOCK_N, D)
    v_tile = tile(v, head, H, lo, BLOCK_N, D)
    acc = tl.zeros((BLOCK_M, triton.next_power_of_2(D)), tl.float32)
    for n in range(lo, tl.minimum(m + BLOCK_M, T), BLOCK_N):
        exists = inside(n, T, BLOCK_N, D)
        ks = tl.load(k_tile, mask=exists, other=0.0)
        vs = tl.load(v_tile, mask=exists, other=0.0)
        s = _scores(qs, ks, m, n, firsts, unmasked, BLOCK_M, BLOCK_N)
        dp = dot(dys, vs.T)
        if DROPPED:
            j = n + tl.arange(0, BLOCK_N)
            keep = _keep(seed, i[:, None], j[None, :], head, DROPPED)
            dp = tl.where(keep, dp * (2**32 / (2**32 - DROPPED)), 0.0)
        p = tl.exp2(s * scale - lses[:, None])
        acc = dot((p * (dp - deltas[:, None])).to(ks.dtype), ks, acc)
        k_tile += tile_step(k, BLOCK_N)
        v_tile += tile_step(v, BLOCK_N)
    store_tile(dq, acc * D**-0.5, head, H, m, T, BLOCK_M, D)


@triton.jit
def attention_backward_kv(qkv, end, seed, lse, delta, dy, dk, dv, T, H, DROPPED: tl.constexpr,
                          D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dk and dv of one block of keys, over the blocks of queries that see it.

    Scores are transposed, (keys, queries): then p and ds leave the matrix units in the registers in
    which the next products need them.
    """
    scale: tl.constexpr = LOG2E * D**-0.5
    q, k, v = qkv
    blocks = tl.cdiv(T, BLOCK_N)
    head = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_N  # the longest columns of a head come first
    j = n + tl.arange(0, BLOCK_N)
    lse += head.to(tl.int64) * T
    delta += head.to(tl.int64) * T
    lo, unmasked, hi = n // BLOCK_M * BLOCK_M, T, T
    if end is not None:
        end += (head // H).to(tl.int64) * T
        ends, unmasked = _bound(end, j, T), _bound(end, n, T)
        hi = _bound(end, n + BLOCK_N - 1, T)

    ks = load_tile(k, head, H, n, T, BLOCK_N, D)
    vs = load_tile(v, head, H, n, T, BLOCK_N, D)
    q_tile = tile(q, head, H, lo, BLOCK_M, D)
    dy_tile = tile(dy, head, H, lo, BLOCK_M, D)
    dks = tl.zeros((BLOCK_N, triton.next_power_of_2(D)), tl.float32)
    dvs = tl.zeros((BLOCK_N, triton.next_power_of_2(D)), tl.float32)
    for m in range(lo, hi, BLOCK_M):
        exists = inside(m, T, BLOCK_M, D)
        qs = tl.load(q_tile, mask=exists, other=0.0)
        dys = tl.load(dy_tile, mask=exists, other=0.0)
        i = m + tl.arange(0, BLOCK_M)
        lses = tl.load(lse + i, mask=i < T, other=0.0)
        deltas = tl.load(delta + i, mask=i < T, other=0.0)
        s = dot(ks, qs.T)
        if (m + 1 < n + BLOCK_N) | (m + BLOCK_M > unmasked):
            seen = j[:, None] <= i[None, :]
            if end is not None:
                seen &= i[None, :] < ends[:, None]
            s = tl.where(seen, s, float("-inf"))
        dp = dot(vs, dys.T)  # below the branch, for the exponentials to run beside it
        p = tl.exp2(s * scale - lses[None, :])
        kept = p
        if DROPPED:
            keep = _keep(seed, i[None, :], j[:, None], head, DROPPED)
            dp = tl.where(keep, dp * (2**32 / (2**32 - DROPPED)), 0.0)
            kept = tl.where(keep, p, 0.0)
        dvs = dot(kept.to(dys.dtype), dys, dvs)
        dks = dot((p * (dp - deltas[None, :])).to(qs.dtype), qs, dks)
        q_tile += tile_step(q, BLOCK_M)
        dy_tile += tile_step(dy, BLOCK_M)
    store_tile(dk, dks * D**-0.5, head, H, n, T, BLOCK_N, D)
    store_tile(dv, dvs * (2**32 / (2**32 - DROPPED)), head, H, n, T, BLOCK_N, D)


# -- operators ----------------------------------------------------------------


def _views(q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> list[Tensor]:
    """[q, k, v], also of q = qkv (B, T, 3, H, D) alone; of a list autograd makes 80 calls more."""
    return list(q.unbind(2)) if k is None or v is None else [q, k, v]


@torch.library.custom_op("ridge::attention_forward", mutates_args=())
def _forward_op(q: Tensor, k: Tensor | None, v: Tensor | None, first: Tensor | None,
                seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    y, y_low, lse = _forward_outputs(q, k, v, first, seed, dropout)
    launch_forward(_views(q, k, v), first, seed, y, y_low, lse, dropout)
    return y, y_low, lse


@_forward_op.register_fake
def _forward_outputs(q, k, v, first, seed, dropout):
    return forward_outputs(_views(q, k, v)[0])


def forward_outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, y_low and lse, not filled."""
    B, T, H, D = q.shape
    y_low = q.new_empty((B, T, H, D) if q.dtype != torch.float32 else 0)  # fp32 loses nothing
    return q.new_empty(B, T, H, D), y_low, q.new_empty(B, H, T, dtype=torch.float32)


def launch_forward(qkv, first, seed, y, y_low, lse, dropout) -> None:
    """Fill y, y_low and lse of [q, k, v]."""
    B, T, H, D = y.shape
    settings = launch.attention_forward(D, y.dtype, launch.capability(y.device))
    with torch.cuda.device_of(y):
        attention_forward[(triton.cdiv(T, settings["BLOCK_M"]) * B * H,)](
            tuple(map(strided, qkv)), first, seed, strided(y), y_low if y_low.numel() else None,
            lse, T, H, int(dropout * 2**32), D, **settings)


@torch.library.custom_op("ridge::attention_backward", mutates_args=())
def _backward_op(dy: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, y: Tensor,
                 y_low: Tensor, lse: Tensor, first: Tensor | None, end: Tensor | None,
                 seed: Tensor | None, dropout: float) -> list[Tensor]:
    grads = _backward_outputs(dy, q, k, v)
    launch_backward(dy, _views(q, k, v), _views(*grads), y, y_low, lse, first, end, seed, dropout)
    return grads


@_backward_op.register_fake
def _backward_outputs(dy, q, k, v, *_):
    return [x.new_empty(x.shape) for x in (q, k, v) if x is not None]


def launch_backward(dy, qkv, grads, y, y_low, lse, first, end, seed, dropout) -> None:
    """Fill the gradients of [q, k, v]."""
    B, T, H, D = y.shape
    dq, dk, dv = map(strided, grads)
    inputs, delta = tuple(map(strided, qkv)), torch.empty_like(lse)
    strided_dy = strided(with_dense_rows(dy))  # the dy of y.sum() has strides of 0
    sizes, capability = (T, H, int(dropout * 2**32), D), launch.capability(y.device)
    for_q = launch.attention_backward_q(D, y.dtype, capability)
    for_kv = launch.attention_backward_kv(D, y.dtype, capability)
    with torch.cuda.device_of(y):  # autograd's thread may have another current device
        attention_backward_q[(triton.cdiv(T, for_q["BLOCK_M"]) * B * H,)](
            inputs, first, seed, strided(y), y_low if y_low.numel() else None, lse, strided_dy,
            dq, delta, *sizes, **for_q)
        attention_backward_kv[(triton.cdiv(T, for_kv["BLOCK_N"]) * B * H,)](
            inputs, end, seed, lse, delta, strided_dy, dk, dv, *sizes, **for_kv)


@register_flop_formula(torch.ops.ridge.attention_forward)
def _forward_flops(q, *_, **__) -> int:
    """Two products of B H T^2 D multiply-adds, half of them masked; windows are not counted."""
    B, T, *_, H, D = q
    return 2 * B * H * T * T * D


@register_flop_formula(torch.ops.ridge.attention_backward)
def _backward_flops(dy, q, *_, **__) -> int:
    """Five products to the forward's two; what is computed again is not counted."""
    return _forward_flops(q) * 5 // 2


# -- autograd -----------------------------------------------------------------


def _save(ctx, inputs, output):
    q, k, v, first, seed, ctx.dropout = inputs
    ctx.save_for_backward(q, k, v, *output, first, seed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    *saved, first, seed = ctx.saved_tensors
    grads = _backward_op(dy, *saved, first, inputs.last_queries(first), seed, ctx.dropout)
    return *grads, *[None] * (6 - len(grads))


_forward_op.register_autograd(_differentiate, setup_context=_save)


# -- public -------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None,
              window: int | None = None, dropout: float = 0.0,
              seed: Tensor | None = None) -> Tensor:
    """Causal attention of q, k, v (B, T, H, D); agrees with `reference.attention`.

    D is a multiple of 8 from 16 to 256. Raises ValueError for other shapes, dtypes and devices.
    `doc_start` must not decrease along T, nor exceed its position; else keys are missed or y is
    nan. This is not checked, because the host would have to wait.
    """
    return _attention(q, k, v, doc_start, window, dropout, seed)


def attention_qkv(qkv: Tensor, **options) -> Tensor:
    """`attention` of the packed projection qkv (B, T, 3, H, D), read in place: (B, T, H, D)."""
    inputs.check_packed(qkv)
    return _attention(qkv, None, None, **options)


def _attention(q: Tensor, k: Tensor | None, v: Tensor | None, doc_start: Tensor | None = None,
               window: int | None = None, dropout: float = 0.0,
               seed: Tensor | None = None) -> Tensor:
    inputs.check_attention(_views(q, k, v), doc_start, window, dropout, seed)
    first = inputs.first_keys(q, doc_start, window)
    k, v = (x if x is None else with_dense_rows(x) for x in (k, v))
    return _forward_op(with_dense_rows(q), k, v, first, seed, dropout)[0]
