"""Whether an implementation of an operator is right: bench/operators.py times no other."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import calls, triton_errors
from kernels.accuracy import in_fp64, inaccuracy
from kernels.calls import Case

# a loss is checked in these rows; the targets of the others are ignored, so they have no gradient
CHECKED_ROWS = 64
# what a peer raises that has no kernel for a shape, dtype or device
PEERS_FAIL_WITH = (RuntimeError, TypeError, ValueError)


def failures() -> tuple[type[BaseException], ...]:
    """What an implementation raises that cannot run: PEERS_FAIL_WITH, and Triton's errors."""
    return (*PEERS_FAIL_WITH, *triton_errors())


def wrong(fn: Callable, case: Case, device: torch.device) -> str:
    """Why `fn` is not accurate at the full shape, or "".

    Attention is compared in its last sequence and head, norms everywhere, losses with all but
    CHECKED_ROWS rows ignored. Sizes are Euclidean norms, so that one unlucky rounding among
    millions of elements refuses no peer. Four units in the last place of x are allowed, because a
    loss is a single number, in which PyTorch's own error may be 0 by chance.
    """
    torch.manual_seed(0)
    args, options = calls.arguments(case, device), calls.options(case, device)
    kept = torch.arange(case.shape[0], device=device) % max(1, case.shape[0] // CHECKED_ROWS) == 0
    if case.family == "cross_entropy":
        args[-1] = args[-1].where(kept, -1)
    yardstick = calls.operator(case, "torch")
    gradients = dict(calls.run(yardstick, again(args), options))["gradients"]
    got, theirs = (_results(f, again(args), options, gradients) for f in (fn, yardstick))
    here = _slice(case, kept)
    exact = _results(calls.operator(case, "reference"), [in_fp64(here(a)) for a in args],
                     options, [here(g).double() for g in gradients])
    rounding = 4 * torch.finfo(case.dtype).eps
    return inaccuracy(map(here, got), map(here, theirs), exact, rounding=rounding, order=2)


def again(args: list[Tensor]) -> list[Tensor]:
    """Copies of arguments: some peers write over theirs."""
    return [a.detach().clone().requires_grad_(a.requires_grad) for a in args]


def _results(fn: Callable, args: list[Tensor], options: dict,
             gradients: list[Tensor]) -> list[Tensor]:
    phases = dict(calls.run(fn, args, options, gradients))
    return [t.detach() for t in phases["forward"] + phases["backward"]]


def _slice(case: Case, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """The part of a tensor that is compared.

    Of attention, the last sequence and head, which depend on no other; of a loss, the `kept` rows
    where a tensor has rows; of a norm, all.
    """
    def last(t: Tensor) -> Tensor:
        return t[-1:, ..., -1:, :].detach().requires_grad_(t.requires_grad)

    def counted(t: Tensor) -> Tensor:
        return t[kept].detach().requires_grad_(t.requires_grad) if t.shape[:1] == kept.shape else t

    if case.family == "cross_entropy":
        assert case.shape[0] != case.shape[-1], f"{case}: rows and columns cannot be told apart"
        return counted
    return last if case.family == "attention" else lambda t: t


