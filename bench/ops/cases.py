"""The operator calls that the bench compiles, counts, tunes and times, and how to run them.

Letters: B batch, T sequence, H heads, D head dimension; M rows, N features, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.accuracy import in_fp64, inaccuracy
from gpt.config import SIZES
from kernels import FAMILIES, load

GPT2 = dict(zip(("124M", "350M", "774M", "1558M"), SIZES.values(), strict=True))  # by parameters
CONTEXT, VOCABULARY = 1024, 50304  # the vocabulary is padded
ROWS = 16 * 1024  # the tokens of one micro-batch
FAMILY = {operator: family for family, row in FAMILIES.items() for operator in row.operators}
WINDOW, DROPOUT, CAP = 256, 0.1, 15.0  # the cap is nanochat's


@dataclass(frozen=True)
class Case:
    """One call of a public operator.

    `shape` is (B, T, H, D) for attention, (M, N) for the norms, (M, V) for cross_entropy, (M, N, V)
    for linear_cross_entropy. `variant` is "window", "documents", "dropout" or "rotary" for
    attention, "nobias" for layer norm, "fp32 residual" for the norms with a residual, "capped" for
    linear_cross_entropy. Parameters of norms and the head's weight are fp32, as under autocast.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    variant: str = ""

    @property
    def family(self) -> str:
        return FAMILY[self.operator]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator} {'x'.join(map(str, self.shape))} {dtype} {self.variant}".rstrip()


def gpt2(size: str, batch: int = ROWS // CONTEXT) -> list[Case]:
    """The calls of the model of this size in one micro-batch, bf16."""
    heads, width = GPT2[size].n_head, GPT2[size].n_embd
    rows = batch * CONTEXT
    return [
        Case("attention_qkv", (batch, CONTEXT, heads, width // heads)),
        Case("add_layernorm", (rows, width)),
        Case("layernorm", (rows, width)),
        Case("cross_entropy", (rows, VOCABULARY)),
        Case("linear_cross_entropy", (rows, width, VOCABULARY)),
    ]


def nanochat(size: str, batch: int = ROWS // CONTEXT) -> list[Case]:
    """The calls that nanochat's architecture adds, at the width of a size of GPT-2, bf16."""
    shape = (batch * CONTEXT, (width := GPT2[size].n_embd))
    return [
        *(Case("attention_qkv", (batch, CONTEXT, width // D, D), variant="rotary")
          for D in (64, 128) if width % D == 0),
        Case("add_rmsnorm", shape),
        Case("rmsnorm", shape),
        Case("linear_cross_entropy", (*shape, VOCABULARY), variant="capped"),
    ]


def models(size: str, batch: int = ROWS // CONTEXT) -> list[Case]:
    """The calls of both architectures at a size of GPT-2."""
    return gpt2(size, batch) + nanochat(size, batch)


def quick() -> list[Case]:
    """Both architectures at GPT-2's four sizes."""
    return list(dict.fromkeys(case for size in GPT2 for case in models(size)))


def full() -> list[Case]:
    """GPT-2's sizes, and the head dimensions, widths, vocabularies, dtypes, variants around them.

    Every launch setting in launch.py is used by some case here (tests/test_ahead.py).
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    dims = (16, 32, 40, 80, 96, 128, 160, 192, 256)
    widths = (64, 128, 256, 384, 512, 1000, 2048, 3072, 4096, 5120, 8192, 12288, 16384)
    return quick() + [
        *(Case("attention_qkv", (16, CONTEXT, 12, D)) for D in dims),
        *(Case("attention_qkv", (16, CONTEXT, 12, D), dtype) for D in (64, 128, 256)
          for dtype in (fp16, fp32)),
        *(Case("attention_qkv", (16, CONTEXT, 12, D), bf16, variant)
          for D in (64, 128) for variant in ("window", "documents", "dropout")),
        *(Case(operator, (ROWS, N)) for operator in ("add_layernorm", "layernorm") for N in widths),
        *(Case("layernorm", (ROWS, N), fp32) for N in (768, *widths)),
        Case("layernorm", (ROWS, 768), fp16),
        *(Case(operator, (ROWS, 768), bf16, "nobias")
          for operator in ("add_layernorm", "layernorm")),
        *(Case(operator, (ROWS, 768), bf16, "fp32 residual")
          for operator in ("add_layernorm", "add_rmsnorm")),
        *(Case(operator, (ROWS, N)) for operator in ("add_rmsnorm", "rmsnorm") for N in widths),
        *(Case("rmsnorm", (ROWS, N), fp32) for N in (768, *widths)),
        *(Case("cross_entropy", (ROWS, V)) for V in (65, 50257, 131072)),
        *(Case("cross_entropy", (ROWS, VOCABULARY), dtype) for dtype in (fp16, fp32)),
        *(Case("linear_cross_entropy", (ROWS, 768, 65), bf16, variant)
          for variant in ("", "capped")),
    ]


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
            stream = torch.float32 if case.variant == "fp32 residual" else case.dtype
            residual = [normal(M, N, dtype=stream)] if operator.startswith("add_") else []
            count = 0 if operator.endswith("rmsnorm") else 1 if case.variant == "nobias" else 2
            parameters = [normal(N, dtype=torch.float32) for _ in range(count)]
            return [normal(M, N), *residual, *parameters]
        case "cross_entropy", (M, V):
            return [normal(M, V), torch.randint(V, (M,), device=device)]
        case "linear_cross_entropy", (M, N, V):
            return [normal(M, N), normal(V, N, dtype=torch.float32),
                    torch.randint(V, (M,), device=device)]
    raise ValueError(f"no case for {case.operator} of shape {case.shape}; see bench/ops/cases.py")


def options(case: Case, device: torch.device | str = "cpu") -> dict:
    """The keyword arguments of a case."""
    if case.variant == "window":
        return {"window": WINDOW}
    if case.variant == "documents":  # four documents of equal length in a row
        T = case.shape[1]
        length = max(1, T // 4)
        starts = torch.arange(T, device=device, dtype=torch.int32) // length * length
        return {"doc_start": starts.expand(case.shape[:2]).contiguous()}
    if case.variant == "dropout":
        return {"dropout": DROPOUT, "seed": torch.zeros((), dtype=torch.int64, device=device)}
    if case.variant == "rotary":
        return {"rotation": rotation(case.shape[1], case.shape[3], device)}
    return {"cap": CAP} if case.variant == "capped" else {}


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
    """Why `fn` is not accurate on a case, or ""; PyTorch's operator is the yardstick."""
    args, kwargs = arguments(case, device), options(case, device)
    ours = dict(run(fn, args, kwargs))
    theirs = dict(run(operator(case, "torch"), args, kwargs, ours["gradients"]))
    exact = dict(run(operator(case, "reference"), [in_fp64(a) for a in args], kwargs,
                     [g.double() for g in ours["gradients"]]))
    for phase in ("forward", "backward"):
        if found := inaccuracy(ours[phase], theirs[phase], exact[phase]):
            return f"{phase} {found}"
    return ""
