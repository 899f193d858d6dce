"""Cross-entropy of logits, and of a linear layer whose logits never exist all at once.

    row_max = max_v logit_v           sum_exp = sum_v exp(logit_v - row_max)
    loss = row_max - logit_target + log(sum_exp)
    dlogit_v = exp(logit_v - row_max) / sum_exp - [v = target]

With a cap, of linear_cross_entropy alone, these logits are cap * tanh(product / cap), where product
is that of the linear layer, and dproduct_v = dlogit_v * (1 - (logit_v / cap)^2).

Letters: M rows (tokens), N features, V vocabulary. Logits (M, V); targets (M,) int64; x (M, N);
weight (V, N). Losses, row_max and sum_exp (M,) are fp32, as is all arithmetic on logits. A row
whose target is `ignore_index` has loss and gradient 0.

`cross_entropy` reads the logits once in the forward (an online softmax) and saves row_max and
sum_exp, not log(sum_exp), whose rounding would enter every probability. Its backward reads the
logits again and writes the gradient. That is three passes over (M, V); writing the gradient in the
forward, where its scale is not known yet, would take four.

`linear_cross_entropy` takes the rows in chunks. The logits of a chunk go into a private buffer, and
a kernel overwrites them with their gradient. It reads each row twice, but DRAM sees one read and
one write, because the rows in work fit in L2. Two products follow: dx = dlogits @ weight, and
dweight, summed over chunks in fp32. Both are computed in the forward, for a gradient of 1 of the
summed loss; the backward only scales them. So the range of fp16 suffices, and 1 / (number of
tokens) is not rounded to bf16.

A target outside of [0, V) that is not ignore_index raises ValueError on a CPU. On a GPU, where the
check would stall the host, nothing is read out of bounds, and the loss and the gradients are NaN;
TRITON_DEBUG=1 stops at the row instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import launch
from kernels.inputs import check_head, check_loss, with_dense_rows
from kernels.primitives import LOG2E, tanh

# -- kernels -----------------------------------------------------------------


@triton.jit
def _logits(products, CAP: tl.constexpr):
    """The logits of what was loaded: with a CAP above 0, capped. The -inf of padding becomes -CAP.
    """
    xs = products.to(tl.float32)
    return CAP * tanh(xs * (1.0 / CAP)) if CAP > 0 else xs


@triton.jit
def _max_and_sum_exp(row, V, width, CAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """row_max and sum_exp of the `width` logits at `row`, which are read once.

    Each group of 8 neighbours, which one thread loads at once, has a maximum and a sum of its own.
    They are combined after the loop, so the loop has no barrier.
    """
    cols = tl.arange(0, BLOCK_V // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    maxima = tl.full((BLOCK_V // 8,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_V // 8,), tl.float32)
    for start in range(0, width, BLOCK_V):
        mask = start + cols < width
        xs = _logits(tl.load(row + start + cols, mask=mask, other=float("-inf")), CAP)
        if CAP > 0:
            xs = tl.where(start + cols < V, xs, float("-inf"))
        m_new = tl.maximum(maxima, tl.max(xs, 1))
        # where all is -inf so far, this adds exp(-inf) = 0, and not exp(inf - inf) = nan
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((maxima - base) * LOG2E)
        sums = sums * alpha + tl.sum(tl.exp2((xs - base[:, None]) * LOG2E), 1)
        maxima = m_new
    row_max = tl.max(maxima)
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    return row_max, tl.sum(sums * tl.exp2((maxima - base) * LOG2E))


@triton.jit
def _loss(row, target, V, width, CAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Loss, row_max and sum_exp of the logits at `row`; NaN where there is no such target."""
    inside = (target >= 0) & (target < V)
    tl.device_assert(inside, "cross_entropy: a target is outside of the vocabulary")
    logit = _logits(tl.load(row + target, mask=inside, other=0.0), CAP)
    row_max, sum_exp = _max_and_sum_exp(row, V, width, CAP, BLOCK_V)
    sum_exp = tl.where(inside, sum_exp, float("nan"))
    return row_max - logit + tl.log(sum_exp), row_max, sum_exp


@triton.jit(do_not_specialize=["M", "ignore_index"])
def cross_entropy_forward(logits, targets, losses, stats, M, stride, V, width, ignore_index,
                          CAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """The loss and the stats, row_max and sum_exp, of one row. Columns V to width hold -inf."""
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    loss, row_max, sum_exp = 0.0, 0.0, 1.0
    if target != ignore_index:
        loss, row_max, sum_exp = _loss(logits + i * stride, target, V, width, CAP, BLOCK_V)
    tl.store(losses + i, loss)
    tl.store(stats + i, row_max)
    tl.store(stats + M + i, sum_exp)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def cross_entropy_backward(logits, targets, stats, dlosses, dlogits, M, stride, dlosses_stride, V,
                           ignore_index, BLOCK_V: tl.constexpr):
    """Block j of row i of dlogits, in program (i, j)."""
    i = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    target = tl.load(targets + i)
    ds = tl.zeros((BLOCK_V,), tl.float32)
    if target != ignore_index:
        xs = tl.load(logits + i * stride + cols, mask=mask, other=0.0).to(tl.float32)
        ps = tl.exp2((xs - tl.load(stats + i)) * LOG2E) * (1.0 / tl.load(stats + M + i))
        ds = (ps - tl.where(cols == target, 1.0, 0.0)) * tl.load(dlosses + i * dlosses_stride)
    tl.store(dlogits + i * V + cols, ds, mask=mask)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def cross_entropy_in_place(logits, targets, losses, M, V, width, ignore_index, CAP: tl.constexpr,
                           BLOCK_V: tl.constexpr):
    """Losses (M,), and the gradient of logits (M, width) over them. Columns V to width hold -inf.

    Program p takes the rows p, p + programs, ...: as many rows are in work as there are programs.
    """
    cols = tl.arange(0, BLOCK_V)
    blocks = tl.cdiv(width, BLOCK_V)
    for i in range(tl.program_id(0).to(tl.int64), M, tl.num_programs(0)):
        row = logits + i * width
        target = tl.load(targets + i)
        if target == ignore_index:
            for k in range(blocks):
                mask = k * BLOCK_V + cols < width
                tl.store(row + k * BLOCK_V + cols, tl.zeros((BLOCK_V,), tl.float32), mask=mask)
            tl.store(losses + i, 0.0)
        else:
            loss, row_max, sum_exp = _loss(row, target, V, width, CAP, BLOCK_V)
            tl.store(losses + i, loss)
            for k in range(blocks):
                # from the end: what was read last is the most likely to be in L1 or L2
                start = (blocks - 1 - k) * BLOCK_V
                mask = start + cols < width
                xs = _logits(tl.load(row + start + cols, mask=mask, other=0.0), CAP)
                ds = tl.exp2((xs - row_max) * LOG2E) * (1.0 / sum_exp)
                if start // BLOCK_V == target // BLOCK_V:  # only this block has the target
                    ds -= tl.where(start + cols == target, 1.0, 0.0)
                if CAP > 0:  # in the padding, where the logit is -CAP, this is 0
                    ds *= 1.0 - (xs * (1.0 / CAP)) * (xs * (1.0 / CAP))
                tl.store(row + start + cols, ds, mask=mask)


# -- operators ---------------------------------------------------------------


@torch.library.custom_op("ridge::cross_entropy", mutates_args=())
def _cross_entropy_op(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Losses (M,), and row_max and sum_exp as (2, M)."""
    M, V = logits.shape
    _check_targets(targets, V, ignore_index)
    losses, stats = _cross_entropy_outputs(logits, targets, ignore_index)
    logits = with_dense_rows(logits)
    # autograd's thread may have another current device; does nothing on a CPU
    with torch.cuda.device_of(logits):
        cross_entropy_forward[(M,)](
            logits, targets.contiguous(), losses, stats, M, logits.stride(0), V, V, ignore_index,
            CAP=0.0, **launch.cross_entropy_forward(V))
    return losses, stats


@_cross_entropy_op.register_fake
def _cross_entropy_outputs(logits, targets, ignore_index):
    stats = logits.new_empty((2, logits.shape[0]), dtype=torch.float32)
    return torch.empty_like(stats[0]), stats


@torch.library.custom_op("ridge::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward_op(logits: Tensor, targets: Tensor, stats: Tensor, dlosses: Tensor,
                               ignore_index: int) -> Tensor:
    M, V = logits.shape
    dlogits = _cross_entropy_backward_outputs(logits, targets, stats, dlosses, ignore_index)
    logits = with_dense_rows(logits)
    settings = launch.cross_entropy_backward(V)
    with torch.cuda.device_of(logits):
        cross_entropy_backward[(M, triton.cdiv(V, settings["BLOCK_V"]))](
            logits, targets.contiguous(), stats, dlosses, dlogits, M, logits.stride(0),
            dlosses.stride(0), V, ignore_index, **settings)
    return dlogits


@_cross_entropy_backward_op.register_fake
def _cross_entropy_backward_outputs(logits, targets, stats, dlosses, ignore_index):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("ridge::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
                             need_dx: bool, need_dweight: bool,
                             cap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss and its gradients, without elements where they are not needed.

    The products are in the dtype of x, and so is dx; dweight is fp32.
    """
    M, V = len(x), len(weight)
    _check_targets(targets, V, ignore_index)
    _, dx, dweight = _linear_cross_entropy_outputs(x, weight, targets, ignore_index, need_dx,
                                                   need_dweight)
    losses = x.new_empty(M, dtype=torch.float32)
    targets, w = targets.contiguous(), weight.to(x.dtype)
    rows = launch.chunk_rows(M, V, x.element_size())
    buffer = x.new_empty(min(rows, M), launch.padded_vocabulary(V))
    for start in range(0, M, rows):
        chunk = slice(start, start + rows)
        padded = buffer[: len(x[chunk])]
        dlogits = torch.mm(x[chunk], w.T, out=padded[:, :V])  # the logits, until they are replaced
        padded[:, V:] = float("-inf")
        _replace_logits(padded, targets[chunk], losses[chunk], V, ignore_index, cap,
                        need_dx or need_dweight)
        if need_dx:
            torch.mm(dlogits, w, out=dx[chunk])
        if need_dweight:
            _add_product(dweight, dlogits.T, x[chunk], first=start == 0)
    return losses.sum(), dx, dweight.zero_() if M == 0 else dweight


@_linear_cross_entropy_op.register_fake
def _linear_cross_entropy_outputs(x, weight, targets, ignore_index, need_dx, need_dweight, cap=0.0):
    dweight = weight.new_empty(weight.shape if need_dweight else (0,), dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape if need_dx else (0,)), dweight


def _replace_logits(padded: Tensor, targets: Tensor, losses: Tensor, V: int, ignore_index: int,
                    cap: float, by_gradient: bool) -> None:
    """Write the losses of `padded` logits and, `by_gradient`, the gradient over the logits."""
    M, width = padded.shape
    with torch.cuda.device_of(padded):
        if by_gradient:
            programs = min(M, launch.cross_entropy_programs(launch.multiprocessors(padded.device)))
            cross_entropy_in_place[(programs,)](padded, targets, losses, M, V, width, ignore_index,
                                                CAP=cap, **launch.cross_entropy_in_place(V))
        else:
            cross_entropy_forward[(M,)](
                padded, targets, losses, losses.new_empty(2, M), M, width, V, width, ignore_index,
                CAP=cap, **launch.cross_entropy_forward(V))


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (fp32) += a @ b, or total = a @ b for the first one; never rounded below fp32."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0 if first else 1, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), beta=0 if first else 1, out=total)


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    if targets.device.type == "cpu":
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= V))]
        if len(wrong):
            raise ValueError(f"cross_entropy: target {wrong[0].item()} is outside of the "
                             f"vocabulary of {V}; only ignore_index, {ignore_index}, may be")


@register_flop_formula(torch.ops.ridge.linear_cross_entropy)
def _flops(x_shape, weight_shape, targets_shape, ignore_index, need_dx, need_dweight, cap=0.0, *,
           out_shape=None, **_) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1] * (1 + need_dx + need_dweight)


# -- autograd ----------------------------------------------------------------


def _save_cross_entropy(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.set_materialize_grads(False)


def _differentiate_cross_entropy(ctx, dlosses, _dstats):
    logits, targets, stats = ctx.saved_tensors
    dlogits = _cross_entropy_backward_op(logits, targets, stats, dlosses, ctx.ignore_index)
    return dlogits, None, None


def _save_linear_cross_entropy(ctx, inputs, output):
    _, weight, _, _, ctx.need_dx, ctx.need_dweight, _ = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_linear_cross_entropy(ctx, dloss, _ddx, _ddweight):
    dx, dweight = ctx.saved_tensors
    dx = _scaled(dx, dloss, dx.dtype) if ctx.need_dx else None
    dweight = _scaled(dweight, dloss, ctx.weight_dtype) if ctx.need_dweight else None
    return dx, dweight, None, None, None, None, None


def _scaled(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """t times an fp32 scale, rounded once. A scale without axes would first be rounded as t is."""
    return torch.mul(t, scale.view(1), out=t.new_empty(t.shape, dtype=dtype))


_cross_entropy_op.register_autograd(_differentiate_cross_entropy, setup_context=_save_cross_entropy)
_linear_cross_entropy_op.register_autograd(_differentiate_linear_cross_entropy,
                                           setup_context=_save_linear_cross_entropy)


# -- public ------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean",
                  ignore_index: int = -1) -> Tensor:
    """-log softmax(logits)[target] for logits (M, V) and targets (M,) int64.

    Agrees with `reference.cross_entropy`. The logits are fp16, bf16 or fp32. Raises ValueError for
    other shapes, dtypes, devices and reductions; for targets out of range see the top of this file.
    Has no second derivative.
    """
    check_loss("cross_entropy", "logits", logits, targets, reduction)
    losses, _ = _cross_entropy_op(logits, targets, ignore_index)
    return _reduced(losses.sum(), targets, reduction, ignore_index)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, cap: float = 0.0,
                         reduction: str = "mean", ignore_index: int = -1) -> Tensor:
    """cross_entropy(x @ weight^T, targets) for x (M, N) and weight (V, N).

    Agrees with `reference.linear_cross_entropy`. The products are in the dtype of x or, under
    autocast, in autocast's; the gradient of a wider weight is not rounded to it. A kernel is
    compiled for each `cap`. Otherwise as `cross_entropy`.
    """
    check_loss("linear_cross_entropy", "x", x, targets, reduction)
    check_head(weight, x, cap)
    device = x.device.type
    # torch 2.11 cannot trace is_autocast_available
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    training = torch.is_grad_enabled()
    loss, _, _ = _linear_cross_entropy_op(x, weight, targets, ignore_index,
                                          training and x.requires_grad,
                                          training and weight.requires_grad, float(cap))
    return _reduced(loss, targets, reduction, ignore_index)


def _reduced(total: Tensor, targets: Tensor, reduction: str, ignore_index: int) -> Tensor:
    return total / (targets != ignore_index).sum() if reduction == "mean" else total
