"""How the tests compare an implementation with its definition."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.accuracy import in_fp64, inaccuracy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def grads(fn: Callable, args: tuple) -> list[Tensor]:
    """The outputs of `fn(*args)` and the gradient of each floating argument that wants one.

    The output's own gradient is a ramp from -1 to 1, so that no sum cancels and no two elements
    look alike.
    """
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    outputs = fn(*args)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    ramps = [torch.linspace(-1, 1, max(o.numel(), 2),
                            device=o.device)[: o.numel()].view_as(o).to(o.dtype) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, ramps)]


def assert_as_accurate(fn: Callable, definition: Callable, args: tuple,
                       yardstick: Callable | None = None,
                       slack: float = 2.0) -> None:
    """`fn` errs at most `slack` times as much as `yardstick` does in the same dtype, both against
    the definition in fp64.

    The yardstick is PyTorch's own operator where that rounds inside (attention in bf16), else the
    definition itself. One unit in the last place of the largest value is always allowed.
    """
    exact = grads(definition, tuple(map(in_fp64, args)))
    theirs = grads(yardstick or definition, args)
    got = grads(fn, args)
    for i, (one, ref) in enumerate(zip(got, theirs, strict=True)):
        assert (one.dtype, one.shape) == (ref.dtype, ref.shape), f"tensor {i}: {one.dtype}"
    fault = inaccuracy(got, theirs, exact, slack=slack)
    assert not fault, fault
