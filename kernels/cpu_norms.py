"""RMS norm and rotary positions on a CPU, in few passes over memory.

PyTorch has no fused operator for them on a CPU: it takes their parts one after the other, and
autograd keeps and reads the result of each. These forms take half of its time or less. They are
autograd functions and no custom operators, whose calls take 100 us longer. What is compiled does
not need them: the compiler fuses the parts.

Letters: N features, B batch, T sequence, H heads, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor


def _rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which stays with length 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gradient(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x where y = x * rstd: rstd * (dy - y * mean(dy * y)), in fp32 or wider."""
    share = (dy * x).sum(-1, keepdim=True).mul_(rstd**3).div_(-x.shape[-1])
    return (dy * rstd).addcmul_(x, share)


class RMSNorm(torch.autograd.Function):
    """`reference.rmsnorm` of x (..., N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        rstd = _rstd(wide, eps)
        ctx.save_for_backward(x, rstd)
        return torch.mul(wide, rstd, out=x.new_empty(x.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, rstd = ctx.saved_tensors
        return _gradient(_wide(dy), _wide(x), rstd).to(x.dtype), None


class AddRMSNorm(torch.autograd.Function):
    """`reference.add_rmsnorm` of x and residual (..., N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = (residual + x).to(residual.dtype)
        wide = _wide(total)
        rstd = _rstd(wide, eps)
        ctx.save_for_backward(total, rstd)
        ctx.dtype = x.dtype
        return total, torch.mul(wide, rstd, out=x.new_empty(x.shape))

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        total, rstd = ctx.saved_tensors
        d = _gradient(_wide(dy), _wide(total), rstd).add_(dtotal)
        return d.to(ctx.dtype), d.to(total.dtype), None


class RotatedQKV(torch.autograd.Function):
    """`reference.rotated_qkv` of qkv (B, T, 3, H, D) and rotation (T, D)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotation: Tensor, eps: float) -> Tensor:
        cos, sin = rotation[:, None, None].chunk(2, -1)
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)
        x = _wide(qkv[:, :, :2])
        rstd = _rstd(x, eps)
        y = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        torch.mul(_rotated(x, cos, sin), rstd, out=y[:, :, :2])
        y[:, :, 2] = qkv[:, :, 2]
        ctx.save_for_backward(qkv, rstd, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        qkv, rstd, cos, sin = ctx.saved_tensors
        g = _rotated(_wide(dy[:, :, :2]), cos, -sin)  # the inverse rotation
        dqkv = torch.empty_like(dy, memory_format=torch.contiguous_format)
        dqkv[:, :, :2] = _gradient(g, _wide(qkv[:, :, :2]), rstd)
        dqkv[:, :, 2] = dy[:, :, 2]
        return dqkv, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, last = x.chunk(2, -1)
    return torch.cat([last, first], -1).mul_(sin).addcmul_(x, cos)


def rmsnorm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMS norm of x (..., N); agrees with `reference.rmsnorm`. Has no second derivative."""
    return RMSNorm.apply(x, eps)


def add_rmsnorm(x: Tensor, residual: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(residual + x, RMS norm of it) for x and residual (..., N); as `reference.add_rmsnorm`."""
    return AddRMSNorm.apply(x, residual, eps)


def rotated_qkv(qkv: Tensor, rotation: Tensor, eps: float = 1e-6) -> Tensor:
    """qkv (B, T, 3, H, D) with q and k normalised and rotated; as `reference.rotated_qkv`."""
    return RotatedQKV.apply(qkv, rotation, eps)
