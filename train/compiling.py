"""Decide whether to compile the model: by a trial, and on a CPU by timing one block."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from common import hardware
from gpt import GPT
from kernels import Kernels
from train.config import Config

# The base classes of what torch.compile raises where a compiler, a header or a driver is missing.
COMPILE_ERRORS = (RuntimeError, OSError, ImportError)
# A shorter run is not measured: measuring takes about ten seconds, compiling all layers a minute.
WORTH_TRYING_S = 300.0


def should_compile(config: Config, kernels: Kernels, device: torch.device, dtype: torch.dtype,
                   before: bool | None = None) -> tuple[bool, str]:
    """Return whether to compile the model, and why, in a line.

    auto: what the resumed run did (`before`), so that its bits stay the same; in a new run yes on a
    GPU, and on a CPU where one block gains more time in the run than compiling takes. Measuring
    draws random numbers. Raises ValueError where --compile=True cannot work.
    """
    wanted, why = config.run.compile, f"--compile={config.run.compile}"
    try:
        if wanted == "auto":
            wanted, why = _automatic(config, kernels, device, dtype, before)
        if not wanted:
            return False, f"no ({why})"
        seconds = probe(device)
    except COMPILE_ERRORS as error:
        line = str(error).strip().partition("\n")[0][:200]
        fault = f"torch.compile cannot work here: {type(error).__name__}: {line}"
        if config.run.compile == "auto":
            return False, f"no ({fault})"
        raise ValueError(f"{fault}; it needs a C++ compiler, Python's headers, on a GPU Triton; or "
                         "--compile=False") from error
    return True, f"yes ({why}; tried in {seconds:.1f} s)"


def _automatic(config: Config, kernels: Kernels, device: torch.device, dtype: torch.dtype,
               before: bool | None) -> tuple[bool, str]:
    if before is not None:
        return before, "auto: as before"
    if device.type == "cuda":
        return True, "auto: worth its time on cuda"
    if device.type != "cpu":
        return False, f"auto: not worth its time on {device.type}"
    steps = config.optim.gradient_accumulation_steps * config.optim.max_iters
    n_layer, step = config.model.n_layer, step_of_a_block(config, kernels, dtype)
    eager_s, _ = timed(step())
    measured = f"a block takes {1e3 * eager_s:.3g} ms"
    if eager_s * n_layer * steps < WORTH_TRYING_S:
        return False, f"auto: {measured}, so the run is too short to try"
    compiled_s, first_s = timed(step(torch.compile))
    torch._dynamo.reset()  # this block must not count as a variant of the model's
    measured += f", compiled {1e3 * compiled_s:.3g} ms after {first_s:.0f} s"
    saved_s = (eager_s - compiled_s) * n_layer * steps - first_s * n_layer
    return saved_s > 0, f"auto: {measured}"


def step_of_a_block(config: Config, kernels: Kernels,
                    dtype: torch.dtype) -> Callable[..., Callable[[], None]]:
    """A function that makes forward and backward of one block, on the CPU at this run's shape.

    Its argument, such as torch.compile, is applied to the block's forward.
    """
    model = GPT(replace(config.model, n_layer=1, vocab_size=1), kernels)
    (block,) = model.transformer.h
    idx = torch.zeros(config.data.batch_size, config.model.block_size, dtype=torch.int64)
    doc_start = torch.zeros_like(idx, dtype=torch.int32) if config.data.document_mask else None
    with hardware.autocast(torch.device("cpu"), dtype), torch.no_grad():
        stream, context = model.embed(idx, doc_start)
    x = torch.randn_like(stream, requires_grad=True)

    def make(transform: Callable = lambda forward: forward) -> Callable[[], None]:
        forward = transform(block.forward)

        def step() -> None:
            with hardware.autocast(torch.device("cpu"), dtype):
                branch, residual = forward(x, x, context)
            torch.autograd.backward([branch, residual], [branch.detach(), residual.detach()])
            block.zero_grad(set_to_none=True)

        return step

    return make


def timed(step: Callable[[], None], repeats: int = 5) -> tuple[float, float]:
    """Seconds of a step: the median of `repeats`, and the first one, which came before them."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:]), seconds[0]


def probe(device: torch.device) -> float:
    """Compile a small function and its backward, check them, and return the seconds it took.

    Raises one of COMPILE_ERRORS where torch.compile does not work; a run would else find that out
    at its first step.
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
