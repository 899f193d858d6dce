"""Layer norm over the last axis, alone or with the residual addition before it.

    total = round(residual + x)        mu = mean(total)        rs = rsqrt(mean((total - mu)^2) + eps)
    y = (total - mu) * rs * w + b      (without a residual, total is x)

    xhat = (total - mu) * rs      g = dy * w      dw = sum over rows of dy * xhat      db = sum over rows of dy
    d = dtotal + rs * (g - mean(g) - xhat * mean(g * xhat))        the gradient of both x and residual

Shapes: x, residual, total, y (M, N); w, b (N,); mu, rs (M,) fp32. dtotal and dy are the gradients of the two outputs.
Saved for backward: total, w, mu, rs. All arithmetic is fp32, and each value is rounded once, where it is stored.

Each element is read once and written once: forward 2 tensors of (M, N) (4 with a residual), backward 3 (4 with dtotal).
A fixed number of backward programs each sum their own rows of dw and db in fp32 registers and write one partial row;
one sum over the partial rows follows. No atomics and no locks: the same bits on every run of one kind of GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch

# -- kernels -----------------------------------------------------------------


@triton.jit
def _forward(x, residual, w, b, total, y, mean, rstd, M, N, x_stride, residual_stride, eps,
             ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    # One program per ROWS rows, which it holds in registers. residual (and with it total) and b may be None.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < N
    mask = (rows < M)[:, None] & in_row[None, :]

    xs = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        xs += tl.load(residual + rows[:, None] * residual_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = xs.to(total.dtype.element_ty)
        tl.store(total + rows[:, None] * N + cols[None, :], rounded, mask=mask)
        xs = rounded.to(tl.float32)

    mu = tl.sum(xs, 1) / N
    centred = tl.where(in_row[None, :], xs - mu[:, None], 0.0)  # padding must not count in the variance
    rs = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    ys = centred * rs[:, None] * tl.load(w + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if b is not None:
        ys += tl.load(b + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * N + cols[None, :], ys, mask=mask)
    tl.store(mean + rows, mu, mask=rows < M)
    tl.store(rstd + rows, rs, mask=rows < M)


@triton.jit
def _backward(dy, dtotal, total, w, mean, rstd, d, d_branch, partial, M, N, dy_stride, dtotal_stride, total_stride,
              HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    # Program p takes the tiles p, p + programs, ... of ROWS rows each. dtotal may be None; so may d_branch, the copy of
    # d in the dtype of x, where that is the residual's. partial (1 or 2, programs, N) receives dw and, with a bias, db.
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_N)
    in_row = cols < N
    ws = tl.load(w + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
    dws = tl.zeros((BLOCK_N,), tl.float32)
    dbs = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(pid, tl.cdiv(M, ROWS), programs):
        rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & in_row[None, :]
        # All loads before the first sum, so that they are in flight together.
        xs = tl.load(total + rows[:, None] * total_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dys = tl.load(dy + rows[:, None] * dy_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if dtotal is not None:
            dts = tl.load(dtotal + rows[:, None] * dtotal_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        mu = tl.load(mean + rows, mask=rows < M, other=0.0)
        rs = tl.load(rstd + rows, mask=rows < M, other=0.0)

        xhat = (xs - mu[:, None]) * rs[:, None]  # not zero in the padding, but everything it meets is
        g = dys * ws
        shift = tl.sum(g, 1) / N
        tilt = tl.sum(g * xhat, 1) / N
        ds = (g - shift[:, None] - xhat * tilt[:, None]) * rs[:, None]
        if dtotal is not None:
            ds += dts
        tl.store(d + rows[:, None] * N + cols[None, :], ds, mask=mask)
        if d_branch is not None:
            tl.store(d_branch + rows[:, None] * N + cols[None, :], ds, mask=mask)
        dws += tl.sum(dys * xhat, 0)
        if HAS_BIAS:
            dbs += tl.sum(dys, 0)
    tl.store(partial + pid * N + cols, dws, mask=in_row)
    if HAS_BIAS:
        tl.store(partial + (programs + pid) * N + cols, dbs, mask=in_row)
