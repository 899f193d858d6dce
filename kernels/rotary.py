"""Attention with rotary positions: q and k are normalised and rotated, then attention reads them.

    rs = rsqrt(mean(x^2) + eps)      xhat = x * rs      for each row x of q and of k
    R: (a, b) -> (a cos + b sin, b cos - a sin)         of the halves of a row, by its position
    q', k' = R xhat

    dx = rs * R^-1 (g' - x' * mean(g' * x'))    where x' = q' or k' and g' = its gradient dq' or dk'

The mean is that of g * xhat before the rotation, which keeps products. Shapes: qkv, dqkv
(B, T, 3, H, D); qk (B, T, 2, H, D), which is q' and k', and dqk, its gradient; rotation (T, D)
fp32, D / 2 cosines and then D / 2 sines; rs (B, T, 2, H) fp32, saved as rstd. Letters: B batch, T
sequence, H heads, D head dimension; a row is the D elements of one position and head. Arithmetic is
fp32, and a value is rounded once, where it is stored.

The rotation and attention are one operator, so that nothing is copied: attention's kernels read q'
and k' from qk and v from qkv, and write dq' and dk' to dqk and dv to dqkv. The kernels here move
each element once: two thirds of qkv in and out in the forward; twice as much in and as much out in
the backward. Saved for backward: what attention saves, rotation, rstd and qk (two thirds of qkv).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import attention as plain
from kernels import inputs, launch
from kernels.inputs import strided, with_dense_rows

EPS = 1e-6  # of reference.rotated_qkv

# -- kernels ------------------------------------------------------------------


@triton.jit
def _rows(qkv, rotation, M, T, H, D: tl.constexpr, ROWS: tl.constexpr):
    """Of this program's ROWS of all M rows (B, T, 2, H): pointers to them in qkv, to their cosines,
    their offsets in a tensor of M rows; which elements exist; their numbers, and which exist.

    All point to first halves; the second halves are D / 2 further on.
    """
    pointer, strides = qkv
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # 2^31 rows would be 64 GB or more
    col = tl.arange(0, triton.next_power_of_2(D // 2))[None, :]
    position = row // (2 * H)
    pointer += (position // T).to(tl.int64) * strides[0] + (position % T).to(tl.int64) * strides[1]
    pointer += (row // H % 2).to(tl.int64) * strides[2] + (row % H).to(tl.int64) * strides[3]
    exists = row < M
    return (pointer + col, rotation + position % T * D + col, row.to(tl.int64) * D + col,
            exists & (col < D // 2), row, exists)


@triton.jit(do_not_specialize=["M", "T"])
def rotary_forward(qkv, rotation, qk, rstd, M, T, H, eps, D: tl.constexpr, ROWS: tl.constexpr):
    """qk and rstd of ROWS rows."""
    x, turn, out, mask, row, exists = _rows(qkv, rotation, M, T, H, D, ROWS)
    a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + D // 2, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(turn, mask=mask, other=0.0)
    sin = tl.load(turn + D // 2, mask=mask, other=0.0)
    rs = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / D + eps)
    tl.store(qk + out, (a * cos + b * sin) * rs, mask=mask)
    tl.store(qk + out + D // 2, (b * cos - a * sin) * rs, mask=mask)
    tl.store(rstd + row, rs, mask=exists)


@triton.jit(do_not_specialize=["M", "T"])
def rotary_backward(dqk, qk, rotation, rstd, dqkv, M, T, H, D: tl.constexpr, ROWS: tl.constexpr):
    """The gradient of ROWS rows of q and k, in dqkv."""
    dx, turn, at, mask, row, exists = _rows(dqkv, rotation, M, T, H, D, ROWS)
    a = tl.load(qk + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(qk + at + D // 2, mask=mask, other=0.0).to(tl.float32)
    ga = tl.load(dqk + at, mask=mask, other=0.0).to(tl.float32)
    gb = tl.load(dqk + at + D // 2, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(turn, mask=mask, other=0.0)
    sin = tl.load(turn + D // 2, mask=mask, other=0.0)
    rs = tl.load(rstd + row, mask=exists, other=0.0)
    along = tl.sum(ga * a + gb * b, 1, keep_dims=True) / D
    ga -= a * along
    gb -= b * along
    tl.store(dx, (ga * cos - gb * sin) * rs, mask=mask)
    tl.store(dx + D // 2, (gb * cos + ga * sin) * rs, mask=mask)


# -- operators ----------------------------------------------------------------


@torch.library.custom_op("ridge::rotary_attention_forward", mutates_args=())
def _forward_op(qkv: Tensor, rotation: Tensor, first: Tensor | None, seed: Tensor | None,
                dropout: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, y_low, lse, qk, rstd = _forward_outputs(qkv, rotation, first, seed, dropout)
    _, T, _, H, D = qk.shape
    M, settings = rstd.numel(), launch.rotary(D)
    with torch.cuda.device_of(qkv):
        rotary_forward[(triton.cdiv(M, settings["ROWS"]),)](
            strided(qkv), rotation.contiguous(), qk, rstd, M, T, H, EPS, D, **settings)
    plain.launch_forward([*qk.unbind(2), qkv[:, :, 2]], first, seed, y, y_low, lse, dropout)
    return y, y_low, lse, qk, rstd


@_forward_op.register_fake
def _forward_outputs(qkv, rotation, first, seed, dropout):
    B, T, _, H, D = qkv.shape
    rstd = qkv.new_empty((B, T, 2, H), dtype=torch.float32)
    return *plain.forward_outputs(qkv[:, :, 2]), qkv.new_empty(B, T, 2, H, D), rstd


@torch.library.custom_op("ridge::rotary_attention_backward", mutates_args=())
def _backward_op(dy: Tensor, qkv: Tensor, rotation: Tensor, y: Tensor, y_low: Tensor, lse: Tensor,
                 qk: Tensor, rstd: Tensor, first: Tensor | None, end: Tensor | None,
                 seed: Tensor | None, dropout: float) -> Tensor:
    dqkv, dqk = qkv.new_empty(qkv.shape), torch.empty_like(qk)
    plain.launch_backward(dy, [*qk.unbind(2), qkv[:, :, 2]], [*dqk.unbind(2), dqkv[:, :, 2]], y,
                          y_low, lse, first, end, seed, dropout)
    _, T, _, H, D = qk.shape
    M, settings = rstd.numel(), launch.rotary(D)
    with torch.cuda.device_of(qkv):
        rotary_backward[(triton.cdiv(M, settings["ROWS"]),)](
            dqk, qk, rotation.contiguous(), rstd, strided(dqkv), M, T, H, D, **settings)
    return dqkv


@_backward_op.register_fake
def _backward_outputs(dy, qkv, *_):
    return qkv.new_empty(qkv.shape)


@register_flop_formula(torch.ops.ridge.rotary_attention_forward)
def _forward_flops(qkv, *_, **__) -> int:
    """Attention's: two products of B H T^2 D multiply-adds, half of them masked."""
    B, T, _, H, D = qkv
    return 2 * B * H * T * T * D


@register_flop_formula(torch.ops.ridge.rotary_attention_backward)
def _backward_flops(dy, qkv, *_, **__) -> int:
    """Five products to the forward's two."""
    return _forward_flops(qkv) * 5 // 2


# -- autograd -----------------------------------------------------------------


def _save(ctx, inputs, output):
    qkv, rotation, first, seed, ctx.dropout = inputs
    ctx.save_for_backward(qkv, rotation, *output, first, seed)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    *saved, first, seed = ctx.saved_tensors
    dqkv = _backward_op(dy, *saved, first, inputs.last_queries(first), seed, ctx.dropout)
    return dqkv, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


# -- public -------------------------------------------------------------------


def attention_qkv(qkv: Tensor, *, rotation: Tensor | None = None, doc_start: Tensor | None = None,
                  window: int | None = None, dropout: float = 0.0,
                  seed: Tensor | None = None) -> Tensor:
    """Attention of the packed projection qkv (B, T, 3, H, D), with a rotation: (B, T, H, D).

    Agrees with `reference.attention_qkv`. `rotation` (T, D) fp32 gets no gradient; without one this
    is `attention.attention_qkv`, whose shapes, dtypes and errors it has.
    """
    if rotation is None:
        return plain.attention_qkv(qkv, doc_start=doc_start, window=window, dropout=dropout,
                                   seed=seed)
    inputs.check_packed(qkv)
    inputs.check_attention(list(qkv.unbind(2)), doc_start, window, dropout, seed)
    inputs.check_rotation(qkv, rotation)
    first = inputs.first_keys(qkv, doc_start, window)
    return _forward_op(with_dense_rows(qkv), rotation.detach(), first, seed, dropout)[0]
