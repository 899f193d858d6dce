"""Causal flash attention: y = softmax(q k^T / sqrt(D)) v, without the (T, T) matrices. Definition: reference.attention.

Shapes: q, k, v, y, y_low, dy, dq, dk, dv (B, T, H, D); lse, delta (B, H, T) fp32. Letters: i a query's position, j a
key's, m and n the first of a block of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import launch

# -- kernels ------------------------------------------------------------------


@triton.jit
def _tile(x, strides, head, H, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (ROWS, BLOCK_D) to rows `start` and on of head `head` (of B * H) of x, whose strides are (B, T, H, 1)."""
    row, col = start + tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    return x + (head // H).to(tl.int64) * strides[0] + (head % H).to(tl.int64) * strides[2] + row * strides[1] + col


@triton.jit
def _inside(start, T, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return (start + tl.arange(0, ROWS)[:, None] < T) & (tl.arange(0, BLOCK_D)[None, :] < D)


@triton.jit
def _first(doc_start, i, T, window):
    """The first key that query i sees."""
    first = tl.maximum(i - window + 1, 0)
    if doc_start is not None:
        first = tl.maximum(first, tl.load(doc_start + i, mask=i < T, other=0))
    return first


@triton.jit
def _end(doc_end, j, T, window):
    """The first query that no longer sees key j."""
    end = tl.minimum(j + window, T)
    if doc_end is not None:
        end = tl.minimum(end, tl.load(doc_end + j, mask=j < T, other=0))
    return end


@triton.jit
def _keys(doc_start, m, T, window, LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """lo, a, b, hi: queries m to m + BLOCK_M - 1 read the keys from lo to hi, and all see all of those from a to b."""
    hi = tl.minimum(m + BLOCK_M, T)
    if LEFT:
        return _first(doc_start, m, T, window) // BLOCK_N * BLOCK_N, _first(doc_start, hi - 1, T, window), m + 1, hi
    return 0, 0, m + 1, hi


@triton.jit
def _keep(seed, i, j, head, DROPPED: tl.constexpr):
    """Which probabilities survive dropout; see reference.philox_keep."""
    zero = i * 0 + j * 0
    word, _, _, _ = tl.philox(tl.load(seed), i + zero, j + zero, head + zero, zero)
    return word >= DROPPED


@triton.jit
def _forward(q, k, v, doc_start, seed, y, y_low, lse, q_strides, k_strides, v_strides, y_strides, T, H, window,
             LEFT: tl.constexpr, DROPPED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # the longest rows first
    if doc_start is not None:
        doc_start += (head // H).to(tl.int64) * T
    i = m + tl.arange(0, BLOCK_M)
    if LEFT:
        first = _first(doc_start, i, T, window)
    lo, a, b, hi = _keys(doc_start, m, T, window, LEFT, BLOCK_M, BLOCK_N)

    rows = _inside(m, T, BLOCK_M, D, BLOCK_D)
    qs = tl.load(_tile(q, q_strides, head, H, m, BLOCK_M, BLOCK_D), mask=rows, other=0.0)
    k_tile = _tile(k, k_strides, head, H, lo, BLOCK_N, BLOCK_D)
    v_tile = _tile(v, v_strides, head, H, lo, BLOCK_N, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -1e38, tl.float32)  # finite: a block that hides a whole row must not make inf - inf
    for n in range(lo, hi, BLOCK_N):
        inside = _inside(n, T, BLOCK_N, D, BLOCK_D)
        ks = tl.load(k_tile, mask=inside, other=0.0)
        vs = tl.load(v_tile, mask=inside, other=0.0)
        s = tl.dot(qs, ks.T, input_precision="ieee")
        j = n + tl.arange(0, BLOCK_N)
        if LEFT:
            if (n < a) | (n + BLOCK_N > b):
                s = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]), s, float("-inf"))
        else:
            if n + BLOCK_N > b:
                s = tl.where(j[None, :] <= i[:, None], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        if DROPPED:
            p = tl.where(_keep(seed, i[:, None], j[None, :], head, DROPPED), p, 0.0)
        acc = tl.dot(p.to(vs.dtype), vs, acc * shrink[:, None], input_precision="ieee")
        top = higher
        k_tile += tl.cast(BLOCK_N, tl.int64) * k_strides[1]
        v_tile += tl.cast(BLOCK_N, tl.int64) * v_strides[1]

    acc *= (1 / total * (2**32 / (2**32 - DROPPED)))[:, None]
    ys = acc.to(y.dtype.element_ty)
    tl.store(_tile(y, y_strides, head, H, m, BLOCK_M, BLOCK_D), ys, mask=rows)
    if y_low is not None:
        low = (acc - ys.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(_tile(y_low, y_strides, head, H, m, BLOCK_M, BLOCK_D), low, mask=rows)
    tl.store(lse + head.to(tl.int64) * T + i, top + tl.log2(total), mask=i < T)


@triton.jit
def _backward_q(q, k, v, doc_start, seed, y, y_low, lse, dy, dq, delta, q_strides, k_strides, v_strides, y_strides,
                dy_strides, dq_strides, T, H, window, LEFT: tl.constexpr, DROPPED: tl.constexpr, D: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    if doc_start is not None:
        doc_start += (head // H).to(tl.int64) * T
    i = m + tl.arange(0, BLOCK_M)
    if LEFT:
        first = _first(doc_start, i, T, window)
    lo, a, b, hi = _keys(doc_start, m, T, window, LEFT, BLOCK_M, BLOCK_N)

    rows = _inside(m, T, BLOCK_M, D, BLOCK_D)
    dys = tl.load(_tile(dy, dy_strides, head, H, m, BLOCK_M, BLOCK_D), mask=rows, other=0.0)
    ys = tl.load(_tile(y, y_strides, head, H, m, BLOCK_M, BLOCK_D), mask=rows, other=0.0).to(tl.float32)
    if y_low is not None:
        ys += tl.load(_tile(y_low, y_strides, head, H, m, BLOCK_M, BLOCK_D), mask=rows, other=0.0).to(tl.float32)
    deltas = tl.sum(ys * dys.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * T + i, deltas, mask=i < T)
    lses = tl.load(lse + head.to(tl.int64) * T + i, mask=i < T, other=0.0)

    qs = tl.load(_tile(q, q_strides, head, H, m, BLOCK_M, BLOCK_D), mask=rows, other=0.0)
    k_tile = _tile(k, k_strides, head, H, lo, BLOCK_N, BLOCK_D)
    v_tile = _tile(v, v_strides, head, H, lo, BLOCK_N, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in range(lo, hi, BLOCK_N):
        inside = _inside(n, T, BLOCK_N, D, BLOCK_D)
        ks = tl.load(k_tile, mask=inside, other=0.0)
        vs = tl.load(v_tile, mask=inside, other=0.0)
        s = tl.dot(qs, ks.T, input_precision="ieee")
        dp = tl.dot(dys, vs.T, input_precision="ieee")
        j = n + tl.arange(0, BLOCK_N)
        if LEFT:
            if (n < a) | (n + BLOCK_N > b):
                s = tl.where((j[None, :] <= i[:, None]) & (j[None, :] >= first[:, None]), s, float("-inf"))
        else:
            if n + BLOCK_N > b:
                s = tl.where(j[None, :] <= i[:, None], s, float("-inf"))
        p = tl.exp2(s * scale - lses[:, None])
        if DROPPED:
            keep = _keep(seed, i[:, None], j[None, :], head, DROPPED)
            dp = tl.where(keep, dp * (2**32 / (2**32 - DROPPED)), 0.0)
        acc = tl.dot((p * (dp - deltas[:, None])).to(ks.dtype), ks, acc, input_precision="ieee")
        k_tile += tl.cast(BLOCK_N, tl.int64) * k_strides[1]
        v_tile += tl.cast(BLOCK_N, tl.int64) * v_strides[1]
    tl.store(_tile(dq, dq_strides, head, H, m, BLOCK_M, BLOCK_D), (acc * D**-0.5).to(dq.dtype.element_ty), mask=rows)


@triton.jit
def _backward_kv(q, k, v, doc_end, seed, lse, delta, dy, dk, dv, q_strides, k_strides, v_strides, dy_strides,
                 dk_strides, dv_strides, T, H, window, LEFT: tl.constexpr, DROPPED: tl.constexpr, D: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """All is transposed: p^T and ds^T come out of the matrix units in the registers from which they go in again."""
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    blocks = tl.cdiv(T, BLOCK_N)
    head = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_N  # the longest columns first
    lse += head.to(tl.int64) * T
    delta += head.to(tl.int64) * T
    if doc_end is not None:
        doc_end += (head // H).to(tl.int64) * T
    j = n + tl.arange(0, BLOCK_N)
    lo = n // BLOCK_M * BLOCK_M
    hi = T
    if LEFT:
        end = _end(doc_end, j, T, window)
        hi = _end(doc_end, tl.minimum(n + BLOCK_N, T) - 1, T, window)
        b = _end(doc_end, n, T, window)

    columns = _inside(n, T, BLOCK_N, D, BLOCK_D)
    ks = tl.load(_tile(k, k_strides, head, H, n, BLOCK_N, BLOCK_D), mask=columns, other=0.0)
    vs = tl.load(_tile(v, v_strides, head, H, n, BLOCK_N, BLOCK_D), mask=columns, other=0.0)
    q_tile = _tile(q, q_strides, head, H, lo, BLOCK_M, BLOCK_D)
    dy_tile = _tile(dy, dy_strides, head, H, lo, BLOCK_M, BLOCK_D)
    dks = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvs = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for m in range(lo, hi, BLOCK_M):
        inside = _inside(m, T, BLOCK_M, D, BLOCK_D)
        qs = tl.load(q_tile, mask=inside, other=0.0)
        dys = tl.load(dy_tile, mask=inside, other=0.0)
        i = m + tl.arange(0, BLOCK_M)
        lses = tl.load(lse + i, mask=i < T, other=0.0)
        deltas = tl.load(delta + i, mask=i < T, other=0.0)
        s = tl.dot(ks, qs.T, input_precision="ieee")
        dp = tl.dot(vs, dys.T, input_precision="ieee")
        if LEFT:
            if (m < n + BLOCK_N) | (m + BLOCK_M > b):
                s = tl.where((j[:, None] <= i[None, :]) & (i[None, :] < end[:, None]), s, float("-inf"))
        else:
            if m < n + BLOCK_N:
                s = tl.where(j[:, None] <= i[None, :], s, float("-inf"))
        p = tl.exp2(s * scale - lses[None, :])
        kept = p
        if DROPPED:
            keep = _keep(seed, i[None, :], j[:, None], head, DROPPED)
            dp = tl.where(keep, dp * (2**32 / (2**32 - DROPPED)), 0.0)
            kept = tl.where(keep, p, 0.0)
        dvs = tl.dot(kept.to(dys.dtype), dys, dvs, input_precision="ieee")
        dks = tl.dot((p * (dp - deltas[None, :])).to(qs.dtype), qs, dks, input_precision="ieee")
        q_tile += tl.cast(BLOCK_M, tl.int64) * q_strides[1]
        dy_tile += tl.cast(BLOCK_M, tl.int64) * dy_strides[1]
    dks *= D**-0.5
    dvs *= 2**32 / (2**32 - DROPPED)
    tl.store(_tile(dk, dk_strides, head, H, n, BLOCK_N, BLOCK_D), dks.to(dk.dtype.element_ty), mask=columns)
    tl.store(_tile(dv, dv_strides, head, H, n, BLOCK_N, BLOCK_D), dvs.to(dv.dtype.element_ty), mask=columns)


# -- operators ----------------------------------------------------------------


def _views(qkv: list[Tensor]) -> list[Tensor]:
    return qkv if len(qkv) == 3 else list(qkv[0].unbind(2))


def _common(q: Tensor, doc_start: Tensor | None, window: int | None, dropout: float) -> dict:
    T, H, D = q.shape[1:]
    left = doc_start is not None or (window is not None and window < T)
    return dict(T=T, H=H, window=T if window is None else min(window, T), LEFT=left, DROPPED=int(dropout * 2**32), D=D,
                BLOCK_D=triton.next_power_of_2(D))


@torch.library.custom_op("ridge::attention_forward", mutates_args=())
def _forward_op(qkv: list[Tensor], doc_start: Tensor | None, seed: Tensor | None, window: int | None,
                dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _views(qkv)
    y, y_low, lse = _outputs(qkv, doc_start, seed, window, dropout)
    settings = launch.attention_forward(q.shape[-1], q.dtype, launch.capability(q.device))
    grid = (triton.cdiv(q.shape[1], settings["BLOCK_M"]) * q.shape[0] * q.shape[2],)
    with torch.cuda.device_of(q):
        _forward[grid](q, k, v, doc_start, seed, y, y_low if y_low.numel() else None, lse, q.stride(), k.stride(),
                       v.stride(), y.stride(), **_common(q, doc_start, window, dropout), **settings)
    return y, y_low, lse


@_forward_op.register_fake
def _outputs(qkv, doc_start, seed, window, dropout):
    q = _views(qkv)[0]
    B, T, H, D = q.shape
    y = q.new_empty(B, T, H, D)
    return y, q.new_empty(y.shape if q.dtype != torch.float32 else 0), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("ridge::attention_backward", mutates_args=())
def _backward_op(dy: Tensor, qkv: list[Tensor], y: Tensor, y_low: Tensor, lse: Tensor, doc_start: Tensor | None,
                 seed: Tensor | None, window: int | None, dropout: float) -> list[Tensor]:
    q, k, v = _views(qkv)
    B, T, H, D = q.shape
    grads = _gradients(dy, qkv, y, y_low, lse, doc_start, seed, window, dropout)
    dq, dk, dv = _views(grads)
    delta = torch.empty_like(lse)
    doc_end = None
    if doc_start is not None:  # for every key, the first query of a later document
        keys = torch.arange(T, dtype=torch.int32, device=q.device).repeat(B, 1)
        doc_end = torch.searchsorted(doc_start, keys, right=True, out_int32=True)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # the gradient of y.sum() has stride 0
    strides = q.stride(), k.stride(), v.stride()
    common = _common(q, doc_start, window, dropout)
    queries, keys = launch.attention_backward(D, q.dtype, launch.capability(q.device))
    with torch.cuda.device_of(q):
        _backward_q[(triton.cdiv(T, queries["BLOCK_M"]) * B * H,)](
            q, k, v, doc_start, seed, y, y_low if y_low.numel() else None, lse, dy, dq, delta, *strides, y.stride(),
            dy.stride(), dq.stride(), **common, **queries)
        _backward_kv[(triton.cdiv(T, keys["BLOCK_N"]) * B * H,)](
            q, k, v, doc_end, seed, lse, delta, dy, dk, dv, *strides, dy.stride(), dk.stride(), dv.stride(), **common,
            **keys)
    return grads


@_backward_op.register_fake
def _gradients(dy, qkv, y, y_low, lse, doc_start, seed, window, dropout):
    return [t.new_empty(t.shape) for t in qkv]


@register_flop_formula(torch.ops.ridge.attention_forward)
def _forward_flops(qkv, *_, out_shape=None, **__) -> int:
    """Two products of B H T^2 D multiply-adds, of which the causal mask keeps half."""
    (B, T), (H, D) = qkv[0][:2], qkv[0][-2:]
    return 2 * B * H * T * T * D


@register_flop_formula(torch.ops.ridge.attention_backward)
def _backward_flops(dy, qkv, *_, out_shape=None, **__) -> int:
    """Five products to the forward's two; the scores and dp, which are made twice, are counted once."""
    return _forward_flops(qkv) * 5 // 2


# -- autograd -----------------------------------------------------------------


def _save(ctx, inputs, output):
    qkv, doc_start, seed, ctx.window, ctx.dropout = inputs
    ctx.save_for_backward(*qkv, *output, doc_start, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    *qkv, y, y_low, lse, doc_start, seed = ctx.saved_tensors
    return _backward_op(dy, qkv, y, y_low, lse, doc_start, seed, ctx.window, ctx.dropout), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


# -- public -------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None, window: int | None = None,
              dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    for name, t in {"k": k, "v": v}.items():
        if t.shape != q.shape or t.dtype != q.dtype or t.device != q.device:
            raise ValueError("x")
    qkv = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]
    return _forward_op(qkv, doc_start, seed, window, dropout)[0]


def attention_qkv(qkv: Tensor, *, doc_start: Tensor | None = None, window: int | None = None, dropout: float = 0.0,
                  seed: Tensor | None = None) -> Tensor:
    """`attention` of the packed projection qkv (B, T, 3, H, D): (B, T, H, D)."""
    packed = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return _forward_op([packed], doc_start, seed, window, dropout)[0]
