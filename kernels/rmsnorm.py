"""RMS norm over the last axis, without weights, alone or with the residual addition before it.

    total = round(residual + x)       rs = rsqrt(mean(total^2) + eps)
    y = total * rs                    (without a residual, total is x)

    xhat = total * rs
    d = dtotal + rs * (dy - xhat * mean(dy * xhat))     the gradient of both x and residual

Shapes: x, residual, total, y (M, N); rs (M,) fp32, saved as rstd. total is the residual stream
after the addition; dtotal and dy are the gradients of the two outputs. Saved for backward: total
(or x) and rs. All arithmetic is fp32, and a value is rounded once, where it is stored.

Every element moves once: M N elements times 2 forward, 4 with a residual; 3 backward, 4 with
dtotal, and 1 more for a residual wider than x, because the two gradients then differ in dtype. No
row depends on another one, so one kind of GPU gives the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.inputs import check_norm, with_dense_rows

# -- kernels -----------------------------------------------------------------


@triton.jit
def _mean(values, N):
    """The mean of each row of a tile (CHUNKS, ROWS, LANES) that is 0 beyond N columns."""
    return tl.sum(tl.sum(values, 0, keep_dims=True), 2, keep_dims=True) / N


@triton.jit(do_not_specialize=["M"])
def rmsnorm_forward(x, residual, total, y, rstd, M, N, x_stride, residual_stride, eps,
                    CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """total, y and rstd of ROWS rows, held in registers; residual and total may be None.

    A chunk is as many columns as a warp loads at once: with the axes in this order a warp gets
    whole rows, and sums them without a barrier.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    cols = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    mask = (rows < M) & (cols < N)

    xs = tl.load(x + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        xs += tl.load(residual + rows * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = xs.to(total.dtype.element_ty)
        tl.store(total + rows * N + cols, rounded, mask=mask)
        xs = rounded.to(tl.float32)
    rs = tl.rsqrt(_mean(xs * xs, N) + eps)
    tl.store(y + rows * N + cols, xs * rs, mask=mask)
    tl.store(rstd + rows, rs, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def rmsnorm_backward(dy, dtotal, total, rstd, d, d_branch, M, N, dy_stride, dtotal_stride,
                     total_stride, CHUNKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """d of ROWS rows. d_branch is d in the dtype of x, or None where d has it; dtotal may be None.

    All loads come before the first sum, so that they are in flight together.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    cols = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    mask = (rows < M) & (cols < N)
    xs = tl.load(total + rows * total_stride + cols, mask=mask, other=0.0).to(tl.float32)
    dys = tl.load(dy + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if dtotal is not None:
        dts = tl.load(dtotal + rows * dtotal_stride + cols, mask=mask, other=0.0).to(tl.float32)
    rs = tl.load(rstd + rows, mask=rows < M, other=0.0)

    xhat = xs * rs
    ds = (dys - xhat * _mean(dys * xhat, N)) * rs
    if dtotal is not None:
        ds += dts
    tl.store(d + rows * N + cols, ds, mask=mask)
    if d_branch is not None:
        tl.store(d_branch + rows * N + cols, ds, mask=mask)


# -- operators ---------------------------------------------------------------


@torch.library.custom_op("ridge::rmsnorm", mutates_args=())
def _rmsnorm_op(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = _rmsnorm_outputs(x, eps)
    _launch_forward(x, None, None, y, rstd, eps)
    return y, rstd


@_rmsnorm_op.register_fake
def _rmsnorm_outputs(x, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("ridge::add_rmsnorm", mutates_args=())
def _add_rmsnorm_op(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total, y, rstd = _add_rmsnorm_outputs(x, residual, eps)
    _launch_forward(x, residual, total, y, rstd, eps)
    return total, y, rstd


@_add_rmsnorm_op.register_fake
def _add_rmsnorm_outputs(x, residual, eps):
    return residual.new_empty(residual.shape), *_rmsnorm_outputs(x, eps)


def _launch_forward(x, residual, total, y, rstd, eps) -> None:
    M, N = x.shape
    x = with_dense_rows(x)
    residual = None if residual is None else with_dense_rows(residual)
    stream = x if residual is None else residual
    settings = launch.rmsnorm_forward(N, min(x.element_size(), stream.element_size()))
    # autograd's thread may have another current device; does nothing on a CPU
    with torch.cuda.device_of(x):
        rmsnorm_forward[(triton.cdiv(M, settings["ROWS"]),)](
            x, residual, total, y, rstd, M, N, x.stride(0), stream.stride(0), eps, **settings)


@torch.library.custom_op("ridge::rmsnorm_backward", mutates_args=())
def _backward_op(dy: Tensor, dtotal: Tensor | None, total: Tensor, rstd: Tensor,
                 branch: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """d, and d in the dtype `branch` (no rows for None)."""
    M, N = total.shape
    d, d_branch = _backward_outputs(dy, dtotal, total, rstd, branch)
    dy, total = with_dense_rows(dy), with_dense_rows(total)
    dtotal = None if dtotal is None else with_dense_rows(dtotal)
    settings = launch.rmsnorm_backward(N, min(dy.element_size(), total.element_size()))
    with torch.cuda.device_of(total):
        rmsnorm_backward[(triton.cdiv(M, settings["ROWS"]),)](
            dy, dtotal, total, rstd, d, None if branch is None else d_branch, M, N, dy.stride(0),
            0 if dtotal is None else dtotal.stride(0), total.stride(0), **settings)
    return d, d_branch


@_backward_op.register_fake
def _backward_outputs(dy, dtotal, total, rstd, branch):
    M, N = total.shape
    return total.new_empty(M, N), total.new_empty((0 if branch is None else M, N), dtype=branch)


# -- autograd ----------------------------------------------------------------


def _save_rmsnorm(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.set_materialize_grads(False)


def _differentiate_rmsnorm(ctx, dy, _drstd):
    x, rstd = ctx.saved_tensors
    return _backward_op(dy, None, x, rstd, None)[0], None


def _save_add_rmsnorm(ctx, inputs, output):
    total, _, rstd = output
    ctx.save_for_backward(total, rstd)
    ctx.x_dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _differentiate_add_rmsnorm(ctx, dtotal, dy, _drstd):
    total, rstd = ctx.saved_tensors
    if dy is None:  # only the new residual was used
        return dtotal.to(ctx.x_dtype), dtotal, None
    branch = None if ctx.x_dtype == total.dtype else ctx.x_dtype
    d, d_branch = _backward_op(dy, dtotal, total, rstd, branch)
    return d if branch is None else d_branch, d, None


_rmsnorm_op.register_autograd(_differentiate_rmsnorm, setup_context=_save_rmsnorm)
_add_rmsnorm_op.register_autograd(_differentiate_add_rmsnorm, setup_context=_save_add_rmsnorm)


# -- public ------------------------------------------------------------------


def rmsnorm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x (..., N) over the root of its mean square and eps; agrees with `reference.rmsnorm`.

    x is fp16, bf16 or fp32; N is at most 16,384. The rows of x may be any distance apart. Raises
    ValueError for other shapes, dtypes and devices. Has no second derivative.
    """
    check_norm("rmsnorm", x)
    y, _ = _rmsnorm_op(x.reshape(-1, x.shape[-1]), eps)
    return y.view(x.shape)


def add_rmsnorm(x: Tensor, residual: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(residual + x, RMS norm of that sum) for x and residual (..., N), in one pass.

    Agrees with `reference.add_rmsnorm`. The sum has the dtype of the residual, the norm that of x.
    Otherwise as `rmsnorm`.
    """
    check_norm("add_rmsnorm", x, residual)
    N = x.shape[-1]
    total, y, _ = _add_rmsnorm_op(x.reshape(-1, N), residual.reshape(-1, N), eps)
    return total.view(x.shape), y.view(x.shape)
