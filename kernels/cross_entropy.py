"""Cross-entropy of logits, and of a linear layer whose logits never exist all at once.

    top = max_v logit_v                   total = sum_v exp(logit_v - top)
    loss = top - logit_target + log(total)     dlogit_v = exp(logit_v - top) / total - [v = target]

Letters: M rows (tokens), N features, V vocabulary. Logits (M, V); targets (M,) int64; x (M, N);
weight (V, N). Losses, top and total (M,) are fp32, as is all arithmetic on logits; a row whose
target is `ignore_index` has loss and gradient 0.

`cross_entropy` reads the logits once forward (an online softmax) and saves top and total (not their
logarithm, whose rounding would enter every probability); its backward reads the logits once more
and writes the gradient: three passes over (M, V). To write the gradient forward, before its scale
is known, would take four.

`linear_cross_entropy` takes the rows in chunks: logits into a private buffer, which a kernel
overwrites with their gradient (DRAM sees one read and one write: a row is read twice, but rows
being worked on fit in L2), then its products dx = dlogits @ weight, and dweight, summed over chunks
in fp32. Both are computed forward, for a gradient of 1 of the summed loss, and are what backward
scales: the range of fp16 suffices, and 1 / (number of tokens) is not rounded to bf16.

A target outside of [0, V) that is not ignore_index: ValueError on a CPU. On a GPU, where looking
would stall the host, nothing is read out of bounds, and the loss and the gradients are NaN;
TRITON_DEBUG=1 stops at the row instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2(e)), and exp2 is one instruction

# -- kernels -----------------------------------------------------------------


@triton.jit
def _top_and_total(row, width, BLOCK_V: tl.constexpr):
    # One read of the logits at `row`. A maximum and a sum for every 8 neighbours, which one thread
    # loads at once: they are combined only at the end, so the loop has no barrier.
    cols = tl.arange(0, BLOCK_V // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tops = tl.full((BLOCK_V // 8,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK_V // 8,), tl.float32)
    for start in range(0, width, BLOCK_V):
        xs = tl.load(row + start + cols, mask=start + cols < width,
                     other=float("-inf")).to(tl.float32)
        higher = tl.maximum(tops, tl.max(xs, 1))
        # where all is -inf so far: adds 0, and not exp(inf - inf)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        totals = totals * tl.exp2((tops - base)
                                  * LOG2E) + tl.sum(tl.exp2((xs - base[:, None]) * LOG2E), 1)
        tops = higher
    top = tl.max(tops)
    return top, tl.sum(totals * tl.exp2((tops - tl.where(top == float("-inf"), 0.0, top)) * LOG2E))


@triton.jit
def _target_logit(row, target, V):
    # The logit of the target, and whether there is such a target.
    inside = (target >= 0) & (target < V)
    tl.device_assert(inside, "cross_entropy: a target is outside of the vocabulary")
    return tl.load(row + target, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _losses(logits, targets, losses, stats, M, stride, V, width, ignore_index,
            BLOCK_V: tl.constexpr):
    # One program per row. stats (2, M) receives top and total. Columns from V to width are padding
    # with -inf.
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    loss, top, total = 0.0, 0.0, 1.0
    if target != ignore_index:
        logit, inside = _target_logit(logits + i * stride, target, V)
        top, total = _top_and_total(logits + i * stride, width, BLOCK_V)
        total = tl.where(inside, total, float("nan"))
        loss = top - logit + tl.log(total)
    tl.store(losses + i, loss)
    tl.store(stats + i, top)
    tl.store(stats + M + i, total)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _gradient(logits, targets, stats, dlosses, dlogits, M, stride, dlosses_stride, V, ignore_index,
              BLOCK_V: tl.constexpr):
    # Program (i, j) writes the j-th block of row i.
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
def _losses_and_gradient(logits, targets, losses, M, V, width, ignore_index, BLOCK_V: tl.constexpr):
    # Overwrites logits (M, width), of which columns from V on are padding with -inf, with their
    # gradient. Each program takes every so-many-th row, so that the number of rows being worked on
    # is the number of programs.
    cols = tl.arange(0, BLOCK_V)
    blocks = tl.cdiv(width, BLOCK_V)
    for i in range(tl.program_id(0).to(tl.int64), M, tl.num_programs(0)):
        row = logits + i * width
        target = tl.load(targets + i)
        if target == ignore_index:
            for k in range(blocks):
                tl.store(row + k * BLOCK_V + cols, tl.zeros((BLOCK_V,), tl.float32),
                         mask=k * BLOCK_V + cols < width)
            tl.store(losses + i, 0.0)
        else:
            # before anything of the row is overwritten
            logit, inside = _target_logit(row, target, V)
            top, total = _top_and_total(row, width, BLOCK_V)
            total = tl.where(inside, total, float("nan"))
            tl.store(losses + i, top - logit + tl.log(total))
            for k in range(blocks):
                # from the end: what was read last is the likeliest to be in L1 or L2
                start = (blocks - 1 - k) * BLOCK_V
                xs = tl.load(row + start + cols, mask=start + cols < width,
                             other=0.0).to(tl.float32)
                ds = tl.exp2((xs - top) * LOG2E) * (1.0 / total)
                if start // BLOCK_V == target // BLOCK_V:  # only there is a target looked for
                    ds -= tl.where(start + cols == target, 1.0, 0.0)
                tl.store(row + start + cols, ds, mask=start + cols < width)


# -- operators ---------------------------------------------------------------


@torch.library.custom_op("ridge::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Losses (M,), and top and total as (2, M)."""
    M, V = logits.shape
    _check_targets(targets, V, ignore_index)
    losses, stats = _cross_entropy_outputs(logits, targets, ignore_index)
    logits = _rows(logits)
    # the autograd thread's device need not be this one; does nothing on a CPU
    with torch.cuda.device_of(logits):
        _losses[(M,)](logits, targets.contiguous(), losses, stats, M, logits.stride(0), V, V,
                      ignore_index,
                      **launch.cross_entropy_forward(V))
    return losses, stats


@_cross_entropy.register_fake
def _cross_entropy_outputs(logits, targets, ignore_index):
    stats = logits.new_empty((2, logits.shape[0]), dtype=torch.float32)
    return torch.empty_like(stats[0]), stats


@torch.library.custom_op("ridge::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(logits: Tensor, targets: Tensor, stats: Tensor, dlosses: Tensor,
                            ignore_index: int) -> Tensor:
    M, V = logits.shape
    dlogits = _cross_entropy_backward_outputs(logits, targets, stats, dlosses, ignore_index)
    logits = _rows(logits)
    settings = launch.cross_entropy_backward(V)
    with torch.cuda.device_of(logits):
        _gradient[(M, triton.cdiv(V, settings["BLOCK_V"]))](
            logits, targets.contiguous(), stats, dlosses, dlogits, M, logits.stride(0),
            dlosses.stride(0), V,
            ignore_index, **settings)
    return dlogits


@_cross_entropy_backward.register_fake
def _cross_entropy_backward_outputs(logits, targets, stats, dlosses, ignore_index):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("ridge::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
                          need_dx: bool,
                          need_dweight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, its gradients dx in the dtype of x, which is that of the matmuls, and
    dweight in fp32 (without elements where not needed)."""
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
        dlogits = torch.mm(x[chunk], w.T, out=padded[:, :V])  # so far, they are logits
        padded[:, V:] = float("-inf")
        _replace_logits(padded, targets[chunk], losses[chunk], V, ignore_index,
                        need_dx or need_dweight)
        if need_dx:
            torch.mm(dlogits, w, out=dx[chunk])
        if need_dweight:
            _add_product(dweight, dlogits.T, x[chunk], first=start == 0)
    return losses.sum(), dx, dweight.zero_() if M == 0 else dweight


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_outputs(x, weight, targets, ignore_index, need_dx, need_dweight):
    dweight = weight.new_empty(weight.shape if need_dweight else (0,), dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape if need_dx else (0,)), dweight


def _replace_logits(padded: Tensor, targets: Tensor, losses: Tensor, V: int, ignore_index: int,
                    by_gradient: bool) -> None:
    """Write losses of logits in the first V columns of a buffer that is all ours and,
    `by_gradient`, dlogits over them."""
    M, width = padded.shape
    with torch.cuda.device_of(padded):
        if by_gradient:
            programs = min(M, launch.cross_entropy_programs(launch.multiprocessors(padded.device)))
            _losses_and_gradient[(programs,)](padded, targets, losses, M, V, width, ignore_index,
                                              **launch.cross_entropy_in_place(V))
        else:
            _losses[(M,)](padded, targets, losses, losses.new_empty(2, M), M, width, V, width,
                          ignore_index,
                          **launch.cross_entropy_forward(V))


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (fp32) += a @ b, or = for the first; low-precision operands, fp32 sums that are never
    rounded to them."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0 if first else 1, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), beta=0 if first else 1, out=total)


def _rows(t: Tensor) -> Tensor:
    """Rows may lie any distance apart; within a row the elements must be neighbours."""
    return t if t.stride(1) == 1 else t.contiguous()


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    if targets.device.type == "cpu":
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= V))]
        if len(wrong):
            raise ValueError(f"cross_entropy: target {wrong[0].item()} is outside of the "
                             f"vocabulary of {V}; only ignore_index, {ignore_index}, may be")


@register_flop_formula(torch.ops.ridge.linear_cross_entropy)
def _flops(x_shape, weight_shape, targets_shape, ignore_index, need_dx, need_dweight, *,
           out_shape=None, **_) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1] * (1 + need_dx + need_dweight)


# -- autograd ----------------------------------------------------------------


def _save_cross_entropy(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.set_materialize_grads(False)


def _differentiate_cross_entropy(ctx, dlosses, _dstats):
    logits, targets, stats = ctx.saved_tensors
    return _cross_entropy_backward(logits, targets, stats, dlosses, ctx.ignore_index), None, None


def _save_linear_cross_entropy(ctx, inputs, output):
    _, weight, _, _, ctx.need_dx, ctx.need_dweight = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_linear_cross_entropy(ctx, dloss, _ddx, _ddweight):
    dx, dweight = ctx.saved_tensors
    return (_scaled(dx, dloss, dx.dtype) if ctx.need_dx else None,
            _scaled(dweight, dloss, ctx.weight_dtype) if ctx.need_dweight else None, None,
            None, None, None)


def _scaled(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """t times an fp32 scale, rounded once: as a tensor with an axis, scale is not rounded to the
    dtype of t first."""
    return torch.mul(t, scale.view(1), out=t.new_empty(t.shape, dtype=dtype))


_cross_entropy.register_autograd(_differentiate_cross_entropy, setup_context=_save_cross_entropy)
_linear_cross_entropy.register_autograd(_differentiate_linear_cross_entropy,
                                        setup_context=_save_linear_cross_entropy)


# -- public ------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean",
                  ignore_index: int = -1) -> Tensor:
    """-log softmax(logits)[target] of logits (M, V), fp16, bf16 or fp32, and targets (M,) int64;
    agrees with `reference.cross_entropy`. Neither is changed.

    Raises ValueError for other shapes, dtypes, devices and reductions; for targets out of range see
    the top of this file. Has no second derivative.
    """
    _check("cross_entropy", "logits", logits, targets, reduction)
    losses, _ = _cross_entropy(logits, targets, ignore_index)
    return _reduced(losses.sum(), targets, reduction, ignore_index)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean",
                         ignore_index: int = -1) -> Tensor:
    """cross_entropy(x @ weight^T, targets) of x (M, N) and weight (V, N); agrees with
    `reference.linear_cross_entropy`.

    The matmuls run in the dtype of x or, under autocast, in autocast's; the gradient of a wider
    weight is not rounded to it. Otherwise as `cross_entropy`.
    """
    _check("linear_cross_entropy", "x", x, targets, reduction)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype not in DTYPES or weight.device != x.device:
        raise ValueError(
            f"linear_cross_entropy: weight is {tuple(weight.shape)} {weight.dtype} on "
            f"{weight.device}, x is {tuple(x.shape)} on {x.device}; weight must be (V, "
            f"{x.shape[1]}) on the same device, in fp16, bf16 or fp32"
        )
    device = x.device.type
    # torch 2.11 cannot trace is_autocast_available
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    training = torch.is_grad_enabled()
    loss, _, _ = _linear_cross_entropy(x, weight, targets, ignore_index,
                                       training and x.requires_grad,
                                       training and weight.requires_grad)
    return _reduced(loss, targets, reduction, ignore_index)


def _reduced(total: Tensor, targets: Tensor, reduction: str, ignore_index: int) -> Tensor:
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


def _check(name: str, label: str, t: Tensor, targets: Tensor, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction is {reduction!r}; choose 'mean' or 'sum'")
    if t.dim() != 2 or t.shape[1] == 0 or t.dtype not in DTYPES:
        raise ValueError(f"{name}: {label} is {tuple(t.shape)} {t.dtype}; it must have two axes "
                         "and be fp16, bf16 or fp32")
    if targets.shape != t.shape[:1] or targets.dtype != torch.int64 or targets.device != t.device:
        raise ValueError(f"{name}: targets are {tuple(targets.shape)} {targets.dtype} on "
                         f"{targets.device}; for {label} of {tuple(t.shape)} on {t.device} they "
                         f"must be ({len(t)},) int64 there")
