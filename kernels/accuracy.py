"""The one rule of accuracy: twice the error of PyTorch's own operator is allowed, not more.

Both errors are taken against the definition (kernels/reference.py) computed in fp64. bench/ times
nothing that breaks this rule, and the tests of the kernels (tests/numerics.py) use it, too.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def in_fp64(value: Any) -> Any:
    """A leaf with the same values in fp64; anything but a floating tensor is returned as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def inaccuracy(got: Iterable[Tensor], yardstick: Iterable[Tensor], exact: Iterable[Tensor], *,
               slack: float = 2.0, rounding: float | None = None, order: float = math.inf) -> str:
    """Why the tensors `got` are not accurate enough, or "" if all are.

    The error of each tensor may be `slack` times that of `yardstick`, plus `rounding` times the
    size of `exact`: by default one unit in the last place of its dtype. Sizes are vector norms of
    this `order`: by default the largest element. NaN is never accurate.
    """
    for i, (mine, theirs, true) in enumerate(zip(got, yardstick, exact, strict=True)):
        apart = mine.double() - true
        error = _norm(apart, order)
        allowed = slack * _norm(theirs.double() - true, order)
        unit = torch.finfo(mine.dtype).eps if rounding is None else rounding
        allowed += unit * _norm(true, order)
        if not error <= allowed:  # also when it is NaN
            at = apart.abs().nan_to_num(nan=math.inf).flatten().argmax()
            worst, right = (x.flatten()[at].item() for x in (mine, true))
            return (f"tensor {i}: error {error:.2e}, allowed {allowed:.2e}; its worst element is "
                    f"{worst:.6g} where {right:.6g} is right")
    return ""


def _norm(x: Tensor, order: float) -> float:
    return torch.linalg.vector_norm(x, order).item()
