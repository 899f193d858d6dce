"""How the tests compare an implementation with its definition."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from kernels.accuracy import in_fp64, inaccuracy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The slack for tensors of one or two elements, whose error against the yardstick's is luck; and
# the interpreter truncates bf16 where a GPU rounds.
LUCK = 8.0


def needs_gpu(test):
    """A test of ring 3."""
    without = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
    return pytest.mark.gpu(without(test))


def tensor(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0, seed: int = 0,
           grad: bool = True) -> Tensor:
    """Normally distributed; the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype).requires_grad_(grad)


@torch.no_grad()
def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """The model with 0.1 times normal noise added to its weights: each then has its say.

    As they are drawn, some are 0, and attention may have next to none.
    """
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    return model


def grads(fn: Callable, args: tuple) -> list[Tensor]:
    """The outputs of `fn(*args)` and the gradient of each floating argument that wants one.

    The output's own gradient is a ramp from -1 to 1, so that no sum cancels and no two elements
    look alike.
    """
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    outputs = fn(*args)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return [*(o.detach() for o in outputs),
            *torch.autograd.grad(outputs, leaves, [_ramp(o) for o in outputs])]


def _ramp(like: Tensor) -> Tensor:
    ramp = torch.linspace(-1, 1, max(like.numel(), 2), device=like.device)
    return ramp[: like.numel()].view_as(like).to(like.dtype)


def assert_same_bits(got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Each tensor equals its counterpart exactly."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {i} differs"


def assert_as_accurate(fn: Callable, definition: Callable, args: tuple,
                       yardstick: Callable | None = None, slack: float = 2.0) -> None:
    """`fn` errs at most `slack` times as much as `yardstick`, both against `definition` in fp64.

    The yardstick is PyTorch's own operator where that rounds inside (attention in bf16), else the
    definition itself, in the same dtype as `fn`. One unit in the last place of the largest value is
    always allowed.
    """
    exact = grads(definition, tuple(map(in_fp64, args)))
    theirs = grads(yardstick or definition, args)
    got = grads(fn, args)
    for i, (one, ref) in enumerate(zip(got, theirs, strict=True)):
        assert (one.dtype, one.shape) == (ref.dtype, ref.shape), f"tensor {i}: {one.dtype}"
    fault = inaccuracy(got, theirs, exact, slack=slack)
    assert not fault, fault
