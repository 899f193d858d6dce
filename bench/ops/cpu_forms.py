"""How attention and dropout run best on a CPU: the error of each form, then its time, in turns.

    python bench/ops/cpu_forms.py

Attention of packed qkv: PyTorch's fused operator, its unfused one (which it takes for dropout), and
our blocks (kernels/cpu_attention.py), with and without dropout. Errors are norms, of the output and
of the gradient, against the definition in fp64. Dropout: PyTorch's, and our masks of few random
words (kernels/cpu_dropout.py). Times are of forward and backward together.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import Timing, environment, machine, measure, result_path, write_result
from common import cli, hardware
from common.bounds import Positive
from kernels import dropout, reference
from kernels.cpu_attention import attention_qkv

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
# B, T, H, D
SHAPES = [(12, 64, 4, 32), (16, 256, 6, 64), (64, 256, 6, 64), (1, 1024, 12, 64), (1, 4096, 12, 64)]
P = 0.2  # of dropout


@dataclass(frozen=True)
class Options:
    """Measure the forms of attention and dropout on a CPU."""

    repeats: Positive = 9
    out: str = ""
    """JSON file for the result; empty: bench/results/forms-MACHINE.json"""


def fused(qkv: Tensor, dropout: float = 0.0) -> Tensor:
    """PyTorch's own choice: fused without dropout, unfused with it."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                          dropout_p=dropout).transpose(1, 2)


def unfused(qkv: Tensor) -> Tensor:
    """PyTorch's products and softmax, in fp32."""
    with sdpa_kernel(SDPBackend.MATH):
        return fused(qkv)


def drawn(qkv: Tensor) -> Tensor:
    """Our blocks with dropout; a new seed for each call, as in the model."""
    return attention_qkv(qkv, dropout=P, seed=torch.randint(2**62, ()))


def step(form: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of x."""
    y = form(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def errors(form: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> dict[str, float]:
    """Norms of the errors in the first sequence, relative to the definition's in fp64."""
    x, dy = x.detach()[:1].requires_grad_(), dy[:1]
    exact = step(reference.attention_qkv, x.detach().double().requires_grad_(), dy.double())
    found = zip(("output", "gradient"), step(form, x, dy), exact, strict=True)
    return {name: ((got - true).norm() / true.norm()).item() for name, got, true in found}


def attention_forms(shape: tuple[int, int, int, int], dtype: torch.dtype, repeats: int) -> dict:
    """The errors (up to T = 1024, as the definition is slow) and times of one shape."""
    B, T, H, D = shape
    x = torch.randn(B, T, 3, H, D, dtype=dtype, requires_grad=True)
    dy = torch.randn(B, T, H, D, dtype=dtype)
    forms = {"fused": fused, "unfused": unfused, "blocks": attention_qkv}
    wrong = {name: errors(form, x, dy) for name, form in forms.items()} if T <= 1024 else {}
    forms |= {f"PyTorch's, dropout {P}": partial(fused, dropout=P), f"blocks, dropout {P}": drawn}
    runs = {name: partial(step, form, x, dy) for name, form in forms.items()}
    times = measure(runs, device=CPU, warmup=1, repeats=repeats)
    print(f"{B} x {T} x {H} x {D} {dtype}: {_listed(times)}")
    print("    errors " + ", ".join(f"{name} {e['output']:.1e} {e['gradient']:.1e}"
                                    for name, e in wrong.items()))
    return {"B": B, "T": T, "H": H, "D": D, "dtype": dtype, "times": times, "errors": wrong}


def dropout_forms(dtype: torch.dtype, repeats: int) -> dict:
    """The times of dropout of 6.3 million elements."""
    x = torch.randn(64, 256, 384, dtype=dtype, requires_grad=True)
    forms = {"PyTorch's": partial(F.dropout, p=P), "ours": partial(dropout, p=P)}
    runs = {name: partial(step, form, x, torch.ones_like(x)) for name, form in forms.items()}
    times = measure(runs, device=CPU, repeats=repeats)
    print(f"dropout of {x.numel():,} {dtype}: {_listed(times)}")
    return {"elements": x.numel(), "dtype": dtype, "times": times}


def _listed(times: dict[str, Timing]) -> str:
    return ", ".join(f"{name} {t.median_ms:.2f} ms" for name, t in times.items())


def main(options: Options) -> dict:
    """Measure, print and write."""
    hardware.keep_freed_memory()
    torch.manual_seed(0)
    attention = [attention_forms(shape, dtype, options.repeats)
                 for shape in SHAPES for dtype in DTYPES]
    dropouts = [dropout_forms(dtype, options.repeats) for dtype in DTYPES]
    result = {"benchmark": "cpu_forms", "environment": environment(CPU), "attention": attention,
              "dropout": dropouts}
    write_result(result_path(options.out, f"forms-{machine(CPU)}"), result)
    return result


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
