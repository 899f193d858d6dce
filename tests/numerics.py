"""How the tests compare an implementation with its definition."""

from collections.abc import Callable

import torch
from torch import Tensor

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
    def wide(a):
        return a.detach().double().requires_grad_(a.requires_grad) if isinstance(
            a, Tensor) and a.is_floating_point() else a

    exact = grads(definition, tuple(wide(a) for a in args))
    theirs = grads(yardstick or definition, args)
    for i, (got, ref, true) in enumerate(zip(grads(fn, args), theirs, exact, strict=True)):
        assert got.dtype == ref.dtype and got.shape == ref.shape, f"tensor {i}: {got.dtype} {tuple(got.shape)}"
        error, allowed = (got.double() - true).abs().max(), slack * (ref.double()
                                                                     - true).abs().max()
        rounding = torch.finfo(got.dtype).eps * true.abs().max()
        assert error <= allowed + rounding, f"tensor {i}: error {error:.2e}, allowed {allowed + rounding:.2e}"
