"""Whether to compile the model, tried before it is promised."""

import statistics
import time
from collections.abc import Callable

import torch

from common import hardware
from gpt.gpt2 import Block
from kernels import Kernels
from train.config import Config

# What torch.compile raises where a compiler, a header or a driver is missing: all of it derives
# from these.
UNABLE = (RuntimeError, OSError, ImportError)
# of training; trying takes about ten seconds, compiling all layers up to a minute
WORTH_TRYING_S = 300.0


def should_compile(config: Config, kernels: Kernels, device: torch.device, dtype: torch.dtype,
           before: bool | None = None) -> tuple[bool, str]:
    """Whether to compile the model: where it is asked for or pays; and why, in a line.

    auto: as `before`, which is what a resumed run did, so that its bits stay the same; else always
    on a GPU, and on a CPU where a measurement says that it pays. Draws random numbers.
    """
    wanted, why = config.run.compile, f"--compile={config.run.compile}"
    try:
        if wanted == "auto":
            wanted, why = _automatic(config, kernels, device, dtype, before)
        if not wanted:
            return False, f"no ({why})"
        seconds = probe(device)
    except UNABLE as error:
        line = str(error).strip().partition("\n")[0][:200]
        said = f"torch.compile cannot work here: {type(error).__name__}: {line}"
        if config.run.compile == "auto":
            return False, f"no ({said})"
        raise ValueError(f"{said}; it needs a C++ compiler, Python's headers, on a GPU Triton; or "
                         "--compile=False") from error
    return True, f"yes ({why}; tried in {seconds:.1f} s)"


def _automatic(config: Config, kernels: Kernels, device: torch.device, dtype: torch.dtype,
               before: bool | None) -> tuple[bool, str]:
    if before is not None:
        return before, "auto: as before"
    if device.type != "cpu":
        return device.type == "cuda", f"auto: {'' if device.type == 'cuda' else 'not '}worth its time on {device.type}"
    step = step_of_a_block(config, kernels, dtype)
    eager_s, _ = timed(step())
    blocks = config.model.n_layer * config.optim.gradient_accumulation_steps * config.optim.max_iters
    told = f"a block takes {1e3 * eager_s:.3g} ms"
    if eager_s * blocks < WORTH_TRYING_S:
        return False, f"auto: {told}, so the run is too short to try"
    compiled_s, first_s = timed(step(torch.compile))
    # the block that was tried must not count as a variant of those of the model
    torch._dynamo.reset()
    saved_s = (eager_s - compiled_s) * blocks - first_s * config.model.n_layer
    return saved_s > 0, f"auto: {told}, compiled {1e3 * compiled_s:.3g} ms after {first_s:.0f} s"


def step_of_a_block(config: Config, kernels: Kernels,
                    dtype: torch.dtype) -> Callable[..., Callable[[], None]]:
    """On the CPU: forward and backward of one block at this run's shape, its forward passed through
    a function first."""
    c = config.model
    block = Block(c, kernels)
    x = torch.randn(config.data.batch_size, c.block_size, c.n_embd, requires_grad=True)

    def make(through: Callable = lambda forward: forward) -> Callable[[], None]:
        forward = through(block.forward)

        def step() -> None:
            with hardware.autocast(torch.device("cpu"), dtype):
                branch, residual = forward(x, x)
            torch.autograd.backward([branch, residual], [branch.detach(), residual.detach()])
            block.zero_grad(set_to_none=True)

        return step

    return make


def timed(step: Callable[[], None], repeats: int = 5) -> tuple[float, float]:
    """Seconds of a step, the median of five, and of the first one before them."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:]), seconds[0]


def probe(device: torch.device) -> float:
    """Compile a function and its backward, and compare with what they are without; the seconds that
    took.

    Raises one of UNABLE where torch.compile does not work: at the first call, which in a run is
    long after the start.
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
