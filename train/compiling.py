"""Whether to compile the model, tried before it is promised."""

import time

import torch

from gpt import hardware
from gpt.flops import flops_per_token
from train.config import Config

# What torch.compile raises where a compiler, a header or a driver is missing: all of it derives from these.
UNABLE = (RuntimeError, OSError, ImportError)


def decide(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether to compile the model: where it is asked for or pays; and why, in a line.

    auto on a CPU: measured on two AVX2 cores, a step gets 14 % faster without dropout and no faster with it, and
    compiling takes about 40 s. So a run that would take under ten minutes, or has dropout, stays as it is.
    """
    wanted, why = config.run.compile, f"--compile={config.run.compile}"
    if wanted == "auto":
        flops = flops_per_token(config.model)["palm"] * config.tokens_per_iter * config.optim.max_iters
        minutes = flops / hardware.matmul_rate(device, dtype) / 60 if device.type == "cpu" else float("inf")
        wanted = device.type == "cuda" or (device.type == "cpu" and minutes > 10 and config.model.dropout == 0)
        why = f"auto: {'' if wanted else 'not '}worth its time on {device.type}"
        if device.type == "cpu":
            why += f", about {minutes:,.0f} min of matrix multiplications, dropout {config.model.dropout}"
    if not wanted:
        return False, f"no ({why})"
    try:
        seconds = probe(device)
    except UNABLE as error:
        line = str(error).strip().partition("\n")[0][:200]
        said = f"torch.compile cannot work here: {type(error).__name__}: {line}"
        if config.run.compile == "auto":
            return False, f"no ({said})"
        raise ValueError(f"{said}; it needs a C++ compiler, Python's headers, on a GPU Triton; or --compile=False") from error
    return True, f"yes ({why}; tried in {seconds:.1f} s)"


def probe(device: torch.device) -> float:
    """Compile a function and its backward, and compare with what they are without; the seconds that took.

    Raises one of UNABLE where torch.compile does not work: at the first call, which in a run is long after the start.
    """
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x).sum()

    begun = time.perf_counter()
    gradients: list[torch.Tensor] = []
    for call in (function, torch.compile(function)):
        x = torch.linspace(0.0, 1.0, 64, device=device, requires_grad=True)
        gradients += torch.autograd.grad(call(x), x)
    if not torch.allclose(gradients[0], gradients[1], atol=1e-5):
        raise RuntimeError("the gradient of a compiled function is wrong")
    return time.perf_counter() - begun
