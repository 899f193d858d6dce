"""Causal flash attention: y = softmax(q k^T / sqrt(D)) v without the (T, T) matrices. Definition:
reference.attention.

Shapes: q, k, v, y, y_low, dy, dq, dk, dv (B, T, H, D), read and written by strides; lse, delta (B,
H, T) fp32; first, end (B, T) int32: query i sees the keys first[i] to i, key j is seen by the
queries j to end[j] - 1 (None: all). Letters: i a query, j a key, m and n the first of a block of
each; s scores, p probabilities, ds = p (dp - delta).

Sums are fp32; p and ds are rounded to the inputs' dtype for the matrix units, fp32 inputs are
multiplied as fp32. Scale and log2(e) sit in the exponent, so lse is in base 2. Saved: the inputs,
lse, y, and y_low, what rounding took from y. Each gradient is summed by one program, without
atomics: equal bits in every run, at the price of seven products for five.

Rows whose maximum is repeated (arXiv 2510.04212): rounding y is biased there, and delta = rowsum(dy
* y) hands the bias to every ds of the row. The paper shifts the maximum, so that no p is 1; here
delta is taken from y + y_low, the remedy at the source. Emulated in bf16 on rows with two equal
maxima, the rms error of delta is 0.021 with y alone, 0.087 with the shift (p = 1 is exact, a
shifted p is not; it also underflows for logits beyond 87) and 0.0002 with y_low. That costs 4 bytes
of traffic per element of y, about 0.6 % of a 124M step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import launch

# -- kernels ------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc=None):
    """a @ b + acc, summed in fp32. The interpreter would multiply the bits of bf16; widened, the
    products are the same."""
    if triton.knobs.runtime.interpret:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _tile(x, strides, head, H, start, ROWS: tl.constexpr, D: tl.constexpr):
    """Pointers (ROWS, D) to rows `start` and on of head `head` (of B * H) of x, whose strides are
    those of (B, T, H, D)."""
    row, col = start + tl.arange(0, ROWS)[:,
                                          None].to(tl.int64), tl.arange(0,
                                                                        triton.next_power_of_2(
                                                                            D))[None, :]
    return x + (head // H).to(tl.int64) * strides[0] + (head % H).to(
        tl.int64) * strides[2] + row * strides[1] + col


@triton.jit
def _inside(start, T, ROWS: tl.constexpr, D: tl.constexpr):
    """Which elements of the tile exist."""
    return (start + tl.arange(0, ROWS)[:, None]
            < T) & (tl.arange(0, triton.next_power_of_2(D))[None, :] < D)


@triton.jit
def _bound(bounds, b, position, T):
    """first or end of positions in sequence b; beyond T, of the last one."""
    return tl.load(bounds + b.to(tl.int64) * T + tl.minimum(position, T - 1))


@triton.jit
def _scores(qs, ks, m, n, firsts, unmasked, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """q k^T, -inf where query m + row may not see key n + column. The mask is a branch, which full
    blocks skip: with two loops, one masked and one not, ptxas may serialise the matrix units
    (C7515)."""
    s = _dot(qs, ks.T)
    if (n < unmasked) | (n + BLOCK_N > m + 1):
        i, j = m + tl.arange(0, BLOCK_M)[:, None], n + tl.arange(0, BLOCK_N)[None, :]
        seen = j <= i
        if firsts is not None:
            seen &= j >= firsts[:, None]
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _keep(seed, i, j, head, DROPPED: tl.constexpr):
    """Which probabilities survive dropout: all but DROPPED of 2**32 draws. See
    reference.philox_keep."""
    return tl.philox(tl.load(seed), i, j, head, 0)[0] >= DROPPED


@triton.jit
def _forward(q, k, v, first, seed, y, y_low, lse, q_strides, k_strides, v_strides, y_strides, T, H,
             DROPPED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # the longest rows of a head first
    i = m + tl.arange(0, BLOCK_M)
    firsts, lo, unmasked, hi = None, 0, 0, tl.minimum(m + BLOCK_M, T)
    if first is not None:
        firsts, unmasked = _bound(first, head // H, i, T), _bound(first, head // H,
                                                                  m + BLOCK_M - 1, T)
        lo = _bound(first, head // H, m, T) // BLOCK_N * BLOCK_N

    rows = _inside(m, T, BLOCK_M, D)
    qs = tl.load(_tile(q, q_strides, head, H, m, BLOCK_M, D), mask=rows, other=0.0)
    k_tile = _tile(k, k_strides, head, H, lo, BLOCK_N, D)
    v_tile = _tile(v, v_strides, head, H, lo, BLOCK_N, D)
    acc = tl.zeros((BLOCK_M, triton.next_power_of_2(D)), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # finite: where a block hides a whole row, inf - inf would be nan
    top = tl.full((BLOCK_M,), -1e38, tl.float32)
    for n in range(lo, hi, BLOCK_N):
        inside = _inside(n, T, BLOCK_N, D)
        ks = tl.load(k_tile, mask=inside, other=0.0)
        vs = tl.load(v_tile, mask=inside, other=0.0)
        s = _scores(qs, ks, m, n, firsts, unmasked, BLOCK_M, BLOCK_N)
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        if DROPPED:
            p = tl.where(_keep(seed, i[:, None], n + tl.arange(0, BLOCK_N)[None, :], head,
                               DROPPED), p, 0.0)
        acc = _dot(p.to(vs.dtype), vs, acc * shrink[:, None])
        top = higher
        k_tile += tl.cast(BLOCK_N, tl.int64) * k_strides[1]
        v_tile += tl.cast(BLOCK_N, tl.int64) * v_strides[1]
    acc *= (2**32 / (2**32 - DROPPED) / total)[:, None]
    ys = acc.to(y.dtype.element_ty)
    tl.store(_tile(y, y_strides, head, H, m, BLOCK_M, D), ys, mask=rows)
    if y_low is not None:
        low = (acc - ys.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(_tile(y_low, y_strides, head, H, m, BLOCK_M, D), low, mask=rows)
    tl.store(lse + head.to(tl.int64) * T + i, top + tl.log2(total), mask=i < T)


@triton.jit
def _backward_q(q, k, v, first, seed, y, y_low, lse, dy, dq, delta, q_strides, k_strides,
                v_strides, y_strides, dy_strides,
                dq_strides, T, H, DROPPED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr):
    """dq, and delta for _backward_kv."""
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    i = m + tl.arange(0, BLOCK_M)
    firsts, lo, unmasked, hi = None, 0, 0, tl.minimum(m + BLOCK_M, T)
    if first is not None:
        firsts, unmasked = _bound(first, head // H, i, T), _bound(first, head // H,
                                                                  m + BLOCK_M - 1, T)
        lo = _bound(first, head // H, m, T) // BLOCK_N * BLOCK_N

    rows = _inside(m, T, BLOCK_M, D)
    dys = tl.load(_tile(dy, dy_strides, head, H, m, BLOCK_M, D), mask=rows, other=0.0)
    ys = tl.load(_tile(y, y_strides, head, H, m, BLOCK_M, D), mask=rows, other=0.0).to(tl.float32)
    if y_low is not None:
        ys += tl.load(_tile(y_low, y_strides, head, H, m, BLOCK_M, D), mask=rows,
                      other=0.0).to(tl.float32)
    deltas = tl.sum(ys * dys.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * T + i, deltas, mask=i < T)
    lses = tl.load(lse + head.to(tl.int64) * T + i, mask=i < T, other=0.0)
    qs = tl.load(_tile(q, q_strides, head, H, m, BLOCK_M, D), mask=rows, other=0.0)
    k_tile = _tile(k, k_strides, head, H, lo, BLOCK_N, D)
    v_tile = _tile(v, v_strides, head, H, lo, BLOCK_N, D)
    acc = tl.zeros((BLOCK_M, triton.next_power_of_2(D)), tl.float32)
    for n in range(lo, hi, BLOCK_N):
        inside = _inside(n, T, BLOCK_N, D)
        ks = tl.load(k_tile, mask=inside, other=0.0)
        vs = tl.load(v_tile, mask=inside, other=0.0)
        s = _scores(qs, ks, m, n, firsts, unmasked, BLOCK_M, BLOCK_N)
        dp = _dot(dys, vs.T)
        if DROPPED:
            keep = _keep(seed, i[:, None], n + tl.arange(0, BLOCK_N)[None, :], head, DROPPED)
            dp = tl.where(keep, dp * (2**32 / (2**32 - DROPPED)), 0.0)
        p = tl.exp2(s * scale - lses[:, None])
        acc = _dot((p * (dp - deltas[:, None])).to(ks.dtype), ks, acc)
        k_tile += tl.cast(BLOCK_N, tl.int64) * k_strides[1]
        v_tile += tl.cast(BLOCK_N, tl.int64) * v_strides[1]
    tl.store(_tile(dq, dq_strides, head, H, m, BLOCK_M, D),
             (acc * D**-0.5).to(dq.dtype.element_ty), mask=rows)


@triton.jit
def _backward_kv(q, k, v, end, seed, lse, delta, dy, dk, dv, q_strides, k_strides, v_strides,
                 dy_strides, dk_strides,
                 T, H, DROPPED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):
    """dk and dv. All is transposed: p and ds leave the matrix units in the registers from which
    they enter them again."""
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    blocks = tl.cdiv(T, BLOCK_N)
    head = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_N  # the longest columns of a head first
    j = n + tl.arange(0, BLOCK_N)
    lse += head.to(tl.int64) * T
    delta += head.to(tl.int64) * T
    lo, unmasked, hi = n // BLOCK_M * BLOCK_M, T, T
    if end is not None:
        ends, unmasked = _bound(end, head // H, j, T), _bound(end, head // H, n, T)
        hi = _bound(end, head // H, n + BLOCK_N - 1, T)

    columns = _inside(n, T, BLOCK_N, D)
    ks = tl.load(_tile(k, k_strides, head, H, n, BLOCK_N, D), mask=columns, other=0.0)
    vs = tl.load(_tile(v, v_strides, head, H, n, BLOCK_N, D), mask=columns, other=0.0)
    q_tile = _tile(q, q_strides, head, H, lo, BLOCK_M, D)
    dy_tile = _tile(dy, dy_strides, head, H, lo, BLOCK_M, D)
    dks = tl.zeros((BLOCK_N, triton.next_power_of_2(D)), tl.float32)
    dvs = tl.zeros((BLOCK_N, triton.next_power_of_2(D)), tl.float32)
    for m in range(lo, hi, BLOCK_M):
        inside = _inside(m, T, BLOCK_M, D)
        qs = tl.load(q_tile, mask=inside, other=0.0)
        dys = tl.load(dy_tile, mask=inside, other=0.0)
        i = m + tl.arange(0, BLOCK_M)
        lses = tl.load(lse + i, mask=i < T, other=0.0)
        deltas = tl.load(delta + i, mask=i < T, other=0.0)
        s = _dot(ks, qs.T)
        dp = _dot(vs, dys.T)
        if (m + 1 < n + BLOCK_N) | (m + BLOCK_M > unmasked):
            seen = j[:, None] <= i[None, :]
            if end is not None:
                seen &= i[None, :] < ends[:, None]
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s * scale - lses[None, :])
        kept = p
        if DROPPED:
            keep = _keep(seed, i[None, :], j[:, None], head, DROPPED)
            dp = tl.where(keep, dp * (2**32 / (2**32 - DROPPED)), 0.0)
            kept = tl.where(keep, p, 0.0)
        dvs = _dot(kept.to(dys.dtype), dys, dvs)
        dks = _dot((p * (dp - deltas[None, :])).to(qs.dtype), qs, dks)
        q_tile += tl.cast(BLOCK_M, tl.int64) * q_strides[1]
        dy_tile += tl.cast(BLOCK_M, tl.int64) * dy_strides[1]
    dks, dvs = (dks * D**-0.5).to(dk.dtype.element_ty), (dvs
                                                         * (2**32 / (2**32 - DROPPED))).to(
                                                             dv.dtype.element_ty)
    tl.store(_tile(dk, dk_strides, head, H, n, BLOCK_N, D), dks, mask=columns)
    tl.store(_tile(dv, dk_strides, head, H, n, BLOCK_N, D), dvs, mask=columns)


# -- operators ----------------------------------------------------------------


def _views(packed: list[Tensor]) -> list[Tensor]:
    """q, k, v of [qkv (B, T, 3, H, D)], or of [q, k, v]: one operator serves both."""
    return packed if len(packed) == 3 else list(packed[0].unbind(2))


@torch.library.custom_op("ridge::attention_forward", mutates_args=())
def _forward_op(qkv: list[Tensor], first: Tensor | None, seed: Tensor | None,
                dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _views(qkv)
    B, T, H, D = q.shape
    y, y_low, lse = _outputs(qkv, first, seed, dropout)
    settings = launch.attention_forward(D, q.dtype, launch.capability(q.device))
    with torch.cuda.device_of(q):
        _forward[(triton.cdiv(T, settings["BLOCK_M"]) * B * H,)](
            q, k, v, first, seed, y, y_low if y_low.numel() else None, lse, q.stride(),
            k.stride(), v.stride(),
            y.stride(), T, H, int(dropout * 2**32), D, **settings)
    return y, y_low, lse


@_forward_op.register_fake
def _outputs(qkv, first, seed, dropout):
    q = _views(qkv)[0]
    B, T, H, D = q.shape
    y_low = q.new_empty((B, T, H, D) if q.dtype != torch.float32 else 0)  # fp32 loses nothing
    return q.new_empty(B, T, H, D), y_low, q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("ridge::attention_backward", mutates_args=())
def _backward_op(dy: Tensor, qkv: list[Tensor], y: Tensor, y_low: Tensor, lse: Tensor,
                 first: Tensor | None,
                 end: Tensor | None, seed: Tensor | None, dropout: float) -> list[Tensor]:
    q, k, v = _views(qkv)
    B, T, H, D = q.shape
    grads = _gradients(dy, qkv, y, y_low, lse, first, end, seed, dropout)
    (dq, dk, dv), delta = _views(grads), torch.empty_like(lse)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # from y.sum() it comes with strides of 0
    strides, sizes = (q.stride(), k.stride(), v.stride()), (T, H, int(dropout * 2**32), D)
    of_q = launch.attention_backward_q(D, q.dtype, launch.capability(q.device))
    of_kv = launch.attention_backward_kv(D, q.dtype, launch.capability(q.device))
    with torch.cuda.device_of(q):  # autograd's thread may have another current device
        _backward_q[(triton.cdiv(T, of_q["BLOCK_M"]) * B * H,)](
            q, k, v, first, seed, y, y_low if y_low.numel() else None, lse, dy, dq, delta,
            *strides, y.stride(),
            dy.stride(), dq.stride(), *sizes, **of_q)
        _backward_kv[(triton.cdiv(T, of_kv["BLOCK_N"]) * B * H,)](
            q, k, v, end, seed, lse, delta, dy, dk, dv, *strides, dy.stride(), dk.stride(),
            *sizes, **of_kv)
    return grads


@_backward_op.register_fake
def _gradients(dy, qkv, y, y_low, lse, first, end, seed, dropout):
    return [x.new_empty(x.shape) for x in qkv]


@register_flop_formula(torch.ops.ridge.attention_forward)
def _forward_flops(qkv, *_, **__) -> int:
    """Two products of B H T^2 D multiply-adds, of which the causal mask leaves half; windows and
    documents not counted."""
    B, T, *_, H, D = qkv[0]
    return 2 * B * H * T * T * D


@register_flop_formula(torch.ops.ridge.attention_backward)
def _backward_flops(dy, qkv, *_, **__) -> int:
    """Five products to the forward's two; what is computed a second time is not counted."""
    return _forward_flops(qkv) * 5 // 2


# -- autograd -----------------------------------------------------------------


def _save(ctx, inputs, output):
    qkv, first, seed, ctx.dropout = inputs
    ctx.save_for_backward(*qkv, *output, first, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    *qkv, y, y_low, lse, first, seed = ctx.saved_tensors
    end = None
    if first is not None:
        keys = torch.arange(first.shape[1], dtype=torch.int32,
                            device=first.device).repeat(len(first), 1)
        # how many queries begin at or before the key
        end = torch.searchsorted(first, keys, right=True, out_int32=True)
    return _backward_op(dy, qkv, y, y_low, lse, first, end, seed, ctx.dropout), None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


# -- public -------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, *, doc_start: Tensor | None = None,
              window: int | None = None,
              dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Causal attention of q, k, v (B, T, H, D), D a multiple of 8 from 16 to 256; agrees with
    `reference.attention`.

    `doc_start` must not decrease along T, nor exceed its position: blocks are skipped by what their
    first and last rows see. Where it does, keys are missed or y is nan, and nothing is raised,
    since that would make the host wait.
    """
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"attention: {name} is {tuple(x.shape)} {x.dtype} on {x.device}, q is "
                             f"{tuple(q.shape)} {q.dtype} on {q.device}; make them alike")
    return _checked([q, k, v], doc_start, window, dropout, seed)


def attention_qkv(qkv: Tensor, **options) -> Tensor:
    """`attention` of the packed projection qkv (B, T, 3, H, D), which is read in place: (B, T, H,
    D)."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention_qkv: qkv has shape {tuple(qkv.shape)}; view the projection as "
                         "(B, T, 3, H, D)")
    return _checked([qkv], **options)


def _checked(packed: list[Tensor], doc_start: Tensor | None = None, window: int | None = None,
             dropout: float = 0.0,
             seed: Tensor | None = None) -> Tensor:
    """Validates, turns documents and window into `first`, and calls."""
    q = packed[0] if len(packed) == 3 else packed[0][:, :, 0]
    if q.ndim != 4 or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"attention: q is {tuple(q.shape)} {q.dtype}; give (B, T, H, D) in "
                         "float32, bfloat16 or float16")
    if q.shape[-1] % 8 or not 16 <= q.shape[-1] <= 256:
        raise ValueError(f"attention: head dimension {q.shape[-1]}; choose n_embd / n_head as a "
                         "multiple of 8 from 16 to 256, or take --attention=torch")
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; a query sees at least itself: give 1 or "
                         "more, or None")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout={dropout}; give a probability of at least 0 and "
                         "below 1")
    if dropout > 0 and (seed is None or seed.ndim or seed.dtype != torch.int64
                        or seed.device != q.device):
        raise ValueError(f"attention: dropout={dropout} needs seed=, an int64 tensor without axes "
                         f"on {q.device}")
    B, T = q.shape[:2]
    if doc_start is not None and (doc_start.shape, doc_start.dtype,
                                  doc_start.device) != ((B, T), torch.int32, q.device):
        raise ValueError(f"attention: doc_start is {tuple(doc_start.shape)} {doc_start.dtype} on "
                         f"{doc_start.device}; give {(B, T)} torch.int32 on {q.device}")
    first = None if doc_start is None else doc_start.contiguous()
    if window is not None and window < T:
        reach = (torch.arange(T, dtype=torch.int32, device=q.device)
                 - (window - 1)).clamp(min=0).repeat(B, 1)
        first = reach if first is None else torch.maximum(first, reach)
    return _forward_op([x if x.stride(-1) == 1 else x.contiguous() for x in packed], first,
                       seed, dropout)[0]
