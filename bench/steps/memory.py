"""Peak memory of a training step by batch size, on each kernel suite, up to the largest power of
two that fits.

    python bench/steps/memory.py                     # GPT-2 124M, torch and triton
    python bench/steps/memory.py --case=1558M

A step is that of bench/mfu.py, uncompiled, so that no size waits for a compiler. What counts is the
most that PyTorch had allocated at once: weights, optimizer and activations; the CUDA context is not
in it.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.mfu import GPU_CASES
from bench.steps import peers
from bench.timing import ROOT, environment, write_result
from common import cli, hardware
from gpt import GPT, GPTConfig

MOST = 1024  # sequences: no GPU of today holds more of the smallest size


@dataclass(frozen=True)
class Options:
    """Measure peak memory by batch size."""

    case: str = "124M"
    """124M, 350M, 774M or 1558M"""
    suites: str = "torch,triton"
    """with commas"""
    out: str = ""
    """JSON file for the result; empty: bench/results/memory-cuda.json"""


def main(options: Options) -> None:
    """Measure, print, and write the JSON as each suite ends. Raises ValueError without a GPU, which
    alone keeps such a count."""
    device = hardware.resolve_device("auto")
    if device.type != "cuda":
        raise ValueError("bench/steps/memory.py needs a CUDA device, whose allocator counts; this is "
                         f"{device.type}")
    if options.case not in GPU_CASES:
        raise ValueError(f"--case={options.case}: there are {', '.join(GPU_CASES)}")
    config, _ = GPU_CASES[options.case]
    out = Path(options.out) if options.out else ROOT / "bench" / "results" / "memory-cuda.json"
    result: dict = {"benchmark": "memory", "case": options.case, "config": config, "suites": {}}
    for suite in options.suites.split(","):
        peaks = sweep(partial(peak_bytes, config, suite, device))
        result["suites"][suite] = {"peak_bytes": peaks, "largest_batch": max(peaks, default=0)}
        result["environment"] = environment(device)
        write_result(out, result)
        for batch, peak in peaks.items():
            print(f"{options.case} {suite:10} batch {batch:5}: {peak / 2**30:7.2f} GiB")
    print(f"written to {out}")


def sweep(peak: Callable[[int], int | None]) -> dict[int, int]:
    """Batch size -> peak bytes, doubling until `peak` says None: it does not fit."""
    found: dict[int, int] = {}
    batch = 1
    while batch <= MOST and (measured := peak(batch)) is not None:
        found[batch] = measured
        batch *= 2
    return found


def peak_bytes(config: GPTConfig, suite: str, device: torch.device, batch: int) -> int | None:
    """The most allocated in the second of two steps, when the optimizer has its state; None where
    memory runs out."""
    torch.manual_seed(0)
    try:
        return _two_steps(config, suite, batch, device)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _two_steps(config: GPTConfig, suite: str, batch: int, device: torch.device) -> int:
    weights = GPT(config).state_dict()
    peer = peers.ours(config, weights, device, torch.bfloat16, kernels=suite)
    idx, targets = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
    peer.step(idx, targets)
    torch.cuda.reset_peak_memory_stats(device)
    peer.step(idx, targets).item()
    return torch.cuda.max_memory_allocated(device)


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
