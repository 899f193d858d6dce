"""Layer norm over the last axis, alone or with the residual addition before it.

    total = round(residual + x)       mu = mean(total)       rs = rsqrt(mean((total - mu)^2) + eps)
    y = (total - mu) * rs * w + b     (without a residual, total is x)

    xhat = (total - mu) * rs     g = dy * w
    dw = sum over rows of dy * xhat     db = sum over rows of dy
    d = dtotal + rs * (g - mean(g) - xhat * mean(g * xhat))     the gradient of both x and residual

Shapes: x, residual, total, y (M, N); w, b (N,); mu, rs (M,) fp32, saved as mean
and rstd. total is the residual stream after the addition; dtotal and dy are the gradients of the
two outputs. Saved for backward: total
(or x), w, mu, rs. All arithmetic is fp32, and a value is rounded once, where it is stored.

Every element moves once: M N elements times 2 forward, 4 with a residual; 3 backward, 4 with
dtotal, and 1 more for a residual wider than x, because the two gradients then differ in dtype.
Each of a fixed number of backward programs sums dw and db over its own rows in registers and writes
one partial row; a sum over the partial rows follows. There are no atomics and no locks, so one kind
of GPU gives the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.inputs import DTYPES, check_norm, with_dense_rows

# -- kernels -----------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def layernorm_forward(x, residual, w, b, total, y, mean, rstd, M, N, x_stride, residual_stride, eps,
                      CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """total, y, mean and rstd of ROWS rows, held in registers.

    residual and total may be None, and so may b. A chunk is as many columns as a warp loads at
    once: with the axes in this order a warp gets whole rows, and sums them without a barrier.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    cols = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    in_row = cols < N
    mask = (rows < M) & in_row

    xs = tl.load(x + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        xs += tl.load(residual + rows * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = xs.to(total.dtype.element_ty)
        tl.store(total + rows * N + cols, rounded, mask=mask)
        xs = rounded.to(tl.float32)

    mu = tl.sum(tl.sum(xs, 0, keep_dims=True), 2, keep_dims=True) / N
    centred = tl.where(in_row, xs - mu, 0.0)  # the padding must not count in the variance
    rs = tl.rsqrt(tl.sum(tl.sum(centred * centred, 0, keep_dims=True), 2, keep_dims=True) / N + eps)

    # w and b are loaded for every row, from L1: tiles of one shape need no exchange of threads
    each = cols + tl.zeros((CHUNKS, ROWS, LANES), tl.int32)
    ys = centred * rs * tl.load(w + each, mask=mask, other=0.0).to(tl.float32)
    if b is not None:
        ys += tl.load(b + each, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + rows * N + cols, ys, mask=mask)
    tl.store(mean + rows, mu, mask=rows < M)
    tl.store(rstd + rows, rs, mask=rows < M)


@triton.jit
def _over_rows(values, SUMS: tl.constexpr):
    """`values` (ROWS, LANES), or their sum (1, LANES) where that needs no other warp."""
    return tl.sum(values, 0, keep_dims=True) if SUMS == 1 else values


@triton.jit(do_not_specialize=["M"])
def layernorm_backward(dy, dtotal, total, w, mean, rstd, d, d_branch, partial, M, N, dy_stride,
                       dtotal_stride, total_stride, HAS_BIAS: tl.constexpr, CHUNKS: tl.constexpr,
                       ROWS: tl.constexpr, LANES: tl.constexpr):
    """d of every row, and partial sums (1 or 2, programs, N) of dw and, with a bias, db.

    Program p takes the tiles p, p + programs, ... of ROWS rows. d_branch is d in the dtype of x,
    or None where d has that dtype; dtotal may be None. A tile is CHUNKS (ROWS, LANES), not padded
    to a power of two. Warps with rows of their own sum dw and db of these until after the loop.
    """
    SUMS: tl.constexpr = ROWS if LANES < 1024 else 1  # four warps load 1024 columns at once
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, LANES)[None, :]
    each = cols + tl.zeros((ROWS, LANES), tl.int32)  # w is loaded as in the forward
    dws: tl.tuple = ()
    dbs: tl.tuple = ()
    for _ in tl.static_range(CHUNKS):
        dws = dws + (tl.zeros((SUMS, LANES), tl.float32),)
        dbs = dbs + (tl.zeros((SUMS, LANES), tl.float32),)
    for tile in range(pid, tl.cdiv(M, ROWS), programs):
        rows = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        exist = rows < M
        # all loads come before the first sum, so that they are in flight together
        xs: tl.tuple = ()
        dys: tl.tuple = ()
        dts: tl.tuple = ()
        for c in tl.static_range(CHUNKS):
            at = c * LANES + cols
            mask = exist & (at < N)
            xs = xs + (tl.load(total + rows * total_stride + at, mask=mask, other=0.0),)
            dys = dys + (tl.load(dy + rows * dy_stride + at, mask=mask, other=0.0),)
            if dtotal is not None:
                dts = dts + (tl.load(dtotal + rows * dtotal_stride + at, mask=mask, other=0.0),)
        mu = tl.load(mean + rows, mask=exist, other=0.0)
        rs = tl.load(rstd + rows, mask=exist, other=0.0)

        sum_g, sum_gx = tl.zeros((ROWS, LANES), tl.float32), tl.zeros((ROWS, LANES), tl.float32)
        new_dws: tl.tuple = ()
        new_dbs: tl.tuple = ()
        for c in tl.static_range(CHUNKS):
            at = c * LANES + cols
            xhat = (xs[c].to(tl.float32) - mu) * rs  # not zero in the padding, but all it meets is
            ws = tl.load(w + c * LANES + each, mask=c * LANES + each < N, other=0.0).to(tl.float32)
            g = dys[c].to(tl.float32) * ws
            sum_g += g
            sum_gx += g * xhat
            new_dws = new_dws + (dws[c] + _over_rows(dys[c].to(tl.float32) * xhat, SUMS),)
            new_dbs = new_dbs + (dbs[c] + _over_rows(dys[c].to(tl.float32), SUMS),)
        dws, dbs = new_dws, new_dbs
        mean_g = tl.sum(sum_g, 1, keep_dims=True) / N
        mean_gx = tl.sum(sum_gx, 1, keep_dims=True) / N
        for c in tl.static_range(CHUNKS):
            at = c * LANES + cols
            mask = exist & (at < N)
            xhat = (xs[c].to(tl.float32) - mu) * rs
            ws = tl.load(w + c * LANES + each, mask=c * LANES + each < N, other=0.0).to(tl.float32)
            g = dys[c].to(tl.float32) * ws
            ds = (g - mean_g - xhat * mean_gx) * rs
            if dtotal is not None:
                ds += dts[c].to(tl.float32)
            tl.store(d + rows * N + at, ds, mask=mask)
            if d_branch is not None:
                tl.store(d_branch + rows * N + at, ds, mask=mask)
    for c in tl.static_range(CHUNKS):
        at = c * LANES + cols
        tl.store(partial + pid * N + at, tl.sum(dws[c], 0, keep_dims=True), mask=at < N)
        if HAS_BIAS:
            tl.store(partial + (programs + pid) * N + at, tl.sum(dbs[c], 0, keep_dims=True),
                     mask=at < N)


# -- operators ---------------------------------------------------------------


@torch.library.custom_op("ridge::layernorm", mutates_args=())
def _layernorm_op(x: Tensor, w: Tensor, b: Tensor | None,
                  eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _layernorm_outputs(x, w, b, eps)
    _launch_forward(x, None, w, b, None, y, mean, rstd, eps)
    return y, mean, rstd


@_layernorm_op.register_fake
def _layernorm_outputs(x, w, b, eps):
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@torch.library.custom_op("ridge::add_layernorm", mutates_args=())
def _add_layernorm_op(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None,
                      eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, y, mean, rstd = _add_layernorm_outputs(x, residual, w, b, eps)
    _launch_forward(x, residual, w, b, total, y, mean, rstd, eps)
    return total, y, mean, rstd


@_add_layernorm_op.register_fake
def _add_layernorm_outputs(x, residual, w, b, eps):
    return residual.new_empty(residual.shape), *_layernorm_outputs(x, w, b, eps)


def _launch_forward(x, residual, w, b, total, y, mean, rstd, eps) -> None:
    M, N = x.shape
    x = with_dense_rows(x)
    residual = None if residual is None else with_dense_rows(residual)
    stream = x if residual is None else residual
    settings = launch.layernorm_forward(N, min(x.element_size(), stream.element_size()))
    # autograd's thread may have another current device; does nothing on a CPU
    with torch.cuda.device_of(x):
        layernorm_forward[(triton.cdiv(M, settings["ROWS"]),)](
            x, residual, w.contiguous(), None if b is None else b.contiguous(), total, y, mean,
            rstd, M, N, x.stride(0), stream.stride(0), eps, **settings)


@torch.library.custom_op("ridge::layernorm_backward", mutates_args=())
def _backward_op(dy: Tensor, dtotal: Tensor | None, total: Tensor, w: Tensor, mean: Tensor,
                 rstd: Tensor, has_bias: bool,
                 branch: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """d, d in the dtype `branch` (no rows for None), and (dw,) or (dw, db) as (1 or 2, N) fp32."""
    M, N = total.shape
    d, d_branch, _ = _backward_outputs(dy, dtotal, total, w, mean, rstd, has_bias, branch)
    dy, total = with_dense_rows(dy), with_dense_rows(total)
    dtotal = None if dtotal is None else with_dense_rows(dtotal)
    settings = launch.layernorm_backward(N)
    resident = launch.layernorm_programs(N, total.element_size(),
                                         launch.multiprocessors(total.device))
    programs = min(triton.cdiv(M, settings["ROWS"]), resident)
    partial = total.new_empty((1 + has_bias, programs, N), dtype=torch.float32)
    with torch.cuda.device_of(total):
        layernorm_backward[(programs,)](
            dy, dtotal, total, w.contiguous(), mean, rstd, d, None if branch is None else d_branch,
            partial, M, N, dy.stride(0), 0 if dtotal is None else dtotal.stride(0),
            total.stride(0), HAS_BIAS=has_bias, **settings)
    return d, d_branch, partial.sum(1)


@_backward_op.register_fake
def _backward_outputs(dy, dtotal, total, w, mean, rstd, has_bias, branch):
    M, N = total.shape
    d_branch = total.new_empty((0 if branch is None else M, N), dtype=branch)
    sums = total.new_empty((1 + has_bias, N), dtype=torch.float32)
    return total.new_empty(total.shape), d_branch, sums


# -- autograd ----------------------------------------------------------------


def _save_layernorm(ctx, inputs, output):
    x, w, b, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, w, mean, rstd)
    ctx.bias_dtype = None if b is None else b.dtype
    ctx.set_materialize_grads(False)


def _differentiate_layernorm(ctx, dy, _dmean, _drstd):
    x, w, mean, rstd = ctx.saved_tensors
    d, _, sums = _backward_op(dy, None, x, w, mean, rstd, ctx.bias_dtype is not None, None)
    return d, *_weight_gradients(ctx, w, sums), None


def _save_add_layernorm(ctx, inputs, output):
    x, _, w, b, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, w, mean, rstd)
    ctx.bias_dtype = None if b is None else b.dtype
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)


def _differentiate_add_layernorm(ctx, dtotal, dy, _dmean, _drstd):
    total, w, mean, rstd = ctx.saved_tensors
    if dy is None:  # only the new residual was used
        return dtotal.to(ctx.x_dtype), dtotal, None, None, None
    branch = None if ctx.x_dtype == total.dtype else ctx.x_dtype
    d, d_branch, sums = _backward_op(dy, dtotal, total, w, mean, rstd, ctx.bias_dtype is not None,
                                     branch)
    return d if branch is None else d_branch, d, *_weight_gradients(ctx, w, sums), None


def _weight_gradients(ctx, w, sums):
    return sums[0].to(w.dtype), None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)


_layernorm_op.register_autograd(_differentiate_layernorm, setup_context=_save_layernorm)
_add_layernorm_op.register_autograd(_differentiate_add_layernorm,
                                    setup_context=_save_add_layernorm)


# -- public ------------------------------------------------------------------


def layernorm(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm of x (..., N) with weight w and bias b (N,); agrees with `reference.layernorm`.

    x, w and b may be fp16, bf16 or fp32, and need not agree; N is at most 16,384. The rows of x may
    be any distance apart. Raises ValueError for other shapes, dtypes and devices. Has no second
    derivative.
    """
    check_norm("layernorm", x)
    _check_parameters("layernorm", x, w, b)
    y, _, _ = _layernorm_op(x.reshape(-1, x.shape[-1]), w, b, eps)
    return y.view(x.shape)


def add_layernorm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None = None,
                  eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(residual + x, layer norm of that sum) for x and residual (..., N), in one pass.

    Agrees with `reference.add_layernorm`. The sum has the dtype of the residual, the norm that of
    x. Otherwise as `layernorm`.
    """
    check_norm("add_layernorm", x, residual)
    _check_parameters("add_layernorm", x, w, b)
    N = x.shape[-1]
    total, y, _, _ = _add_layernorm_op(x.reshape(-1, N), residual.reshape(-1, N), w, b, eps)
    return total.view(x.shape), y.view(x.shape)


def _check_parameters(name: str, x: Tensor, w: Tensor, b: Tensor | None) -> None:
    N = x.shape[-1]
    for label, t in (("w", w), ("b", w if b is None else b)):
        if t.shape != (N,):
            raise ValueError(f"{name}: {label} has shape {tuple(t.shape)}, but x ends in {N}, so "
                             f"it must be ({N},)")
        if t.dtype not in DTYPES:
            raise ValueError(f"{name}: {label} is {t.dtype}; use fp16, bf16 or fp32, or "
                             "--layernorm=reference")
        if t.device != x.device:
            raise ValueError(f"{name}: {label} is on {t.device}, x on {x.device}; move them to one "
                             "device")
