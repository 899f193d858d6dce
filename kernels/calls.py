"""Calls of the public operators: their tensors, how to run them, and whether a result is right.

Letters: B batch, T sequence, H heads, D head dimension; M rows, N features, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import FAMILIES, load
from kernels.accuracy import in_fp64, inaccuracy

WINDOW, DROPOUT, CAP = 256, 0.1, 15.0  # the usual numbers; the cap is nanochat's
FAMILY = {operator: family for family, row in FAMILIES.items() for operator in row.operators}


@dataclass(frozen=True)
class Case:
    """One call of a public operator.

    `shape` is (B, T, H, D) for attention, (M, N) for the norms, (M, V) for cross_entropy, (M, N, V)
    for linear_cross_entropy. `variant` is "window", "documents", "dropout" or "rotary" for
    attention, "nobias" for layer norm, "fp32 residual" for the norms with a residual, "capped" for
    linear_cross_entropy; several with "+", and a number other than the usual one as "window=128".
    Parameters of norms and the head's weight are fp32, as under autocast.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    variant: str = ""

    @property
    def family(self) -> str:
        return FAMILY[self.operator]

    @property
    def variants(self) -> dict[str, str]:
        """Each part of `variant` and its number, "" where it is the usual one."""
        parts = (part.partition("=") for part in self.variant.split("+") if part)
        return {name: number for name, _, number in parts}

    def without(self, name: str) -> "Case":
        """The case without this part of its variant."""
        left = [part for part in self.variant.split("+") if part.partition("=")[0] != name]
        return replace(self, variant="+".join(left))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator} {'x'.join(map(str, self.shape))} {dtype} {self.variant}".rstrip()


# -- making and calling one ----------------------------------------------------


def arguments(case: Case, device: torch.device | str = "cpu") -> list[Tensor]:
    """The tensors of a case, drawn from a normal distribution; targets are random ids.

    Raises ValueError for an operator or a shape that has no case.
    """
    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    match case.operator, case.shape:
        case "attention_qkv", (B, T, H, D):
            return [normal(B, T, 3, H, D)]
        case "attention", (B, T, H, D):
            return [normal(B, T, H, D) for _ in range(3)]
        case "layernorm" | "add_layernorm" | "rmsnorm" | "add_rmsnorm" as operator, (M, N):
            stream = torch.float32 if "fp32 residual" in case.variants else case.dtype
            residual = [normal(M, N, dtype=stream)] if operator.startswith("add_") else []
            count = 0 if operator.endswith("rmsnorm") else 1 if "nobias" in case.variants else 2
            parameters = [normal(N, dtype=torch.float32) for _ in range(count)]
            return [normal(M, N), *residual, *parameters]
        case "cross_entropy", (M, V):
            return [normal(M, V), torch.randint(V, (M,), device=device)]
        case "linear_cross_entropy", (M, N, V):
            return [normal(M, N), normal(V, N, dtype=torch.float32),
                    torch.randint(V, (M,), device=device)]
    raise ValueError(f"no case for {case.operator} of shape {case.shape}; see kernels/calls.py")


def options(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The keyword arguments of a case."""
    found: dict[str, Any] = {}
    for name, number in case.variants.items():
        if name == "window":
            found["window"] = int(number or WINDOW)
        elif name == "documents":  # four documents of equal length in a row
            T = case.shape[1]
            length = max(1, T // 4)
            starts = torch.arange(T, device=device, dtype=torch.int32) // length * length
            found["doc_start"] = starts.expand(case.shape[:2]).contiguous()
        elif name == "dropout":
            found["dropout"] = float(number or DROPOUT)
            found["seed"] = torch.zeros((), dtype=torch.int64, device=device)
        elif name == "rotary":
            found["rotation"] = rotation(case.shape[1], case.shape[3], device)
        elif name == "capped":
            found["cap"] = float(number or CAP)
    return found


def rotation(T: int, D: int, device: torch.device | str = "cpu") -> Tensor:
    """The cosines and sines of angles of T positions, (T, D); of any angles: none is faster."""
    angles = torch.arange(T * (D // 2), dtype=torch.float32, device=device).view(T, D // 2)
    return torch.cat([angles.cos(), angles.sin()], 1)


def operator(case: Case, backend: str) -> Callable:
    """The backend's implementation of a case; imports that family of operators alone."""
    return getattr(load("torch", **{case.family: backend}), case.operator)


def leaves(args: list[Tensor]) -> list[Tensor]:
    """The arguments that get a gradient."""
    return [a for a in args if a.requires_grad]


def run(fn: Callable, args: list[Tensor], kwargs: dict,
        gradients: list[Tensor] | None = None) -> Iterator[tuple[str, list[Tensor]]]:
    """Call an operator, forward and backward.

    Yields ("forward", its outputs), ("gradients", those of the outputs) and ("backward", those of
    the leaves). Unless given, the gradient of a scalar output (a loss) is 1, any other is drawn
    from a normal distribution.
    """
    outputs = fn(*args, **kwargs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    yield "forward", outputs
    gradients = gradients or [torch.ones_like(o) if o.ndim == 0 else torch.randn_like(o)
                              for o in outputs]
    yield "gradients", gradients
    yield "backward", list(torch.autograd.grad(outputs, leaves(args), gradients))


def fault(fn: Callable, case: Case, device: torch.device | str) -> str:
    """Why `fn` is not accurate on a case, or ""; PyTorch's operator is the yardstick.

    PyTorch draws other dropout masks: its error with dropout is taken to be the one without,
    divided by the share that is kept.
    """
    args = arguments(case, device)
    ours = dict(run(fn, args, options(case, device)))
    exact_args = [in_fp64(a) for a in args]
    exact_gradients = [g.double() for g in ours["gradients"]]

    def exactly(asked: Case) -> dict[str, list[Tensor]]:
        return dict(run(operator(case, "reference"), exact_args, options(asked, device),
                        exact_gradients))

    exact, plain = exactly(case), case.without("dropout")
    theirs = dict(run(operator(case, "torch"), args, options(plain, device), ours["gradients"]))
    if plain != case:
        kept, undropped = 1 - options(case)["dropout"], exactly(plain)
        theirs = {phase: [e + (t.double() - u) / kept for e, t, u in zip(
            exact[phase], theirs[phase], undropped[phase], strict=True)] for phase in theirs}
    for phase in ("forward", "backward"):
        if found := inaccuracy(ours[phase], theirs[phase], exact[phase]):
            return f"{phase} {found}"
    return ""
