"""What decides how attention and dropout run on a CPU: each form's error, then its time, forward
and backward, in turns.

    python bench/ops/cpu_forms.py

Attention of packed qkv: PyTorch's fused operator, its unfused one (which it takes where there is
dropout), and our blocks (kernels/cpu_attention.py), with dropout and without. Errors are against
the definition in fp64, of the output and of the gradient, as norms. Dropout: PyTorch's, and our
masks of few random words (kernels/cpu_dropout.py).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import ROOT, environment, machine, measure, write_result
from common import cli, hardware
from common.bounds import Positive
from kernels import dropout, reference
from kernels.cpu_attention import attention_qkv

CPU = torch.device("cpu")
# B, T, H, D
SHAPES = [(12, 64, 4, 32), (16, 256, 6, 64), (64, 256, 6, 64), (1, 1024, 12, 64), (1, 4096, 12, 64)]
P = 0.2


@dataclass(frozen=True)
class Options:
    """Measure the forms of attention and dropout on a CPU."""

    repeats: Positive = 9
    out: str = ""
    """JSON file for the result; empty: bench/results/forms-MACHINE.json"""


def fused(qkv: Tensor, dropout: float = 0.0) -> Tensor:
    """PyTorch's own choice: fused, but where there is dropout."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                          dropout_p=dropout).transpose(1, 2)


def unfused(qkv: Tensor) -> Tensor:
    """PyTorch's products and softmax, in fp32."""
    with sdpa_kernel(SDPBackend.MATH):
        return fused(qkv)


def drawn(qkv: Tensor) -> Tensor:
    """Ours with dropout, with a seed of its own each time, as in the model."""
    return attention_qkv(qkv, dropout=P, seed=torch.randint(2**62, ()))


def step(form: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient."""
    y = form(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def errors(form: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> dict[str, float]:
    """Of one sequence, relative to the definition's norm in fp64."""
    x, dy = x.detach()[:1].requires_grad_(), dy[:1]
    exact = step(reference.attention_qkv, x.detach().double().requires_grad_(), dy.double())
    found = zip(("output", "gradient"), step(form, x, dy), exact, strict=True)
    return {name: ((got - true).norm() / true.norm()).item() for name, got, true in found}


def main(options: Options) -> dict:
    """Print and write."""
    hardware.keep_freed_memory()
    torch.manual_seed(0)
    attention, dropouts = [], []
    for B, T, H, D in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, dy = torch.randn(B, T, 3, H, D, dtype=dtype,
                                requires_grad=True), torch.randn(B, T, H, D, dtype=dtype)
            forms = {"fused": fused, "unfused": unfused, "blocks": attention_qkv}
            wrong = {name: errors(form, x, dy) for name, form in forms.items()} if T <= 1024 else {}
            forms |= {f"PyTorch's, dropout {P}": partial(fused, dropout=P),
                      f"blocks, dropout {P}": drawn}
            times = measure({name: partial(step, form, x, dy) for name, form in forms.items()},
                            device=CPU, warmup=1,
                            repeats=options.repeats)
            attention.append({"B": B, "T": T, "H": H, "D": D, "dtype": dtype, "times": times,
                              "errors": wrong})
            print(f"{B} x {T} x {H} x {D} {dtype}: "
                  + ", ".join(f"{name} {t.median_ms:.2f} ms" for name, t in times.items()))
            print("    errors " + ", ".join(f"{name} {e['output']:.1e} {e['gradient']:.1e}"
                                            for name, e in wrong.items()))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 256, 384, dtype=dtype, requires_grad=True)
        forms = {"PyTorch's": partial(F.dropout, p=P), "ours": partial(dropout, p=P)}
        times = measure({name: partial(step, form, x, torch.ones_like(x))
                         for name, form in forms.items()}, device=CPU,
                        repeats=options.repeats)
        dropouts.append({"elements": x.numel(), "dtype": dtype, "times": times})
        print(f"dropout of {x.numel():,} {dtype}: "
              + ", ".join(f"{name} {t.median_ms:.2f} ms" for name, t in times.items()))
    result = {"benchmark": "cpu_forms", "environment": environment(CPU), "attention": attention,
              "dropout": dropouts}
    write_result(options.out or ROOT / "bench" / "results" / f"forms-{machine(CPU)}.json", result)
    return result


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
