"""Peak memory of a training step by batch size and backend, up to the largest that fits.

    python bench/steps/memory.py                     # GPT-2 124M, torch and triton
    python bench/steps/memory.py --case=1558M

Batch sizes are powers of two. A step is that of bench/mfu.py, not compiled, so that no size waits
for a compiler. The peak is the most that PyTorch had allocated at once: weights, optimizer and
activations, without the CUDA context.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.steps import peers
from bench.steps.variants import GPU_CASES
from bench.timing import environment, result_path, write_result
from common import cli, hardware
from gpt import GPT, GPTConfig

MOST = 1024  # sequences: no GPU of today holds more of the smallest size


@dataclass(frozen=True)
class Options:
    """Measure peak memory by batch size."""

    case: str = "124M"
    """124M, 350M, 774M or 1558M"""
    backends: str = "torch,triton"
    """with commas"""
    out: str = ""
    """JSON file for the result; empty: bench/results/memory-cuda.json"""


def main(options: Options) -> None:
    """Measure and print; write the JSON after each backend. Raises ValueError without a GPU."""
    device = hardware.resolve_device("auto")
    if device.type != "cuda":
        raise ValueError("bench/steps/memory.py needs a CUDA device, whose allocator counts; this "
                         f"is {device.type}")
    if options.case not in GPU_CASES:
        raise ValueError(f"--case={options.case}: there are {', '.join(GPU_CASES)}")
    config, _ = GPU_CASES[options.case]
    out = result_path(options.out, "memory-cuda")
    result: dict = {"benchmark": "memory", "case": options.case, "config": config, "backends": {}}
    for backend in options.backends.split(","):
        peaks = sweep(partial(peak_bytes, config, backend, device))
        result["backends"][backend] = {"peak_bytes": peaks, "largest_batch": max(peaks, default=0)}
        result["environment"] = environment(device)
        write_result(out, result)
        for batch, peak in peaks.items():
            print(f"{options.case} {backend:10} batch {batch:5}: {peak / 2**30:7.2f} GiB")
    print(f"written to {out}")


def sweep(peak: Callable[[int], int | None]) -> dict[int, int]:
    """Peak bytes by batch size, doubled until `peak` returns None: it does not fit."""
    found: dict[int, int] = {}
    batch = 1
    while batch <= MOST and (measured := peak(batch)) is not None:
        found[batch] = measured
        batch *= 2
    return found


def peak_bytes(config: GPTConfig, backend: str, device: torch.device, batch: int) -> int | None:
    """The peak of the second step, when the optimizer has its state; None where memory runs out."""
    torch.manual_seed(0)
    try:
        return _two_steps(config, backend, batch, device)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _two_steps(config: GPTConfig, backend: str, batch: int, device: torch.device) -> int | None:
    weights = GPT(config).state_dict()
    variant = peers.ours(config, weights, device, torch.bfloat16, kernels=backend)
    idx, targets = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
    variant.step(idx, targets)
    hardware.reset_peak_memory(device)
    variant.step(idx, targets).item()
    return hardware.peak_memory_bytes(device)


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
