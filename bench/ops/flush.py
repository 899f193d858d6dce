"""Whether a cache is flushed by reading or by writing, and what that adds to a time.

    python bench/ops/flush.py    # needs a CUDA device

An operator is timed after other data was read into the L2 cache, as in all measurements here, and
after the cache was overwritten, so that the changed lines must go to memory while the operator
runs. Both are medians of the same function, in turns.
"""

import sys
from dataclasses import dataclass

import torch

from bench.ops import cases
from bench.timing import Timing, environment, measure, result_path, write_result
from common import cli, hardware
from common.bounds import Positive
from kernels import calls
from kernels.calls import Case

CASES = (Case("rmsnorm", (1024, 768)), Case("add_layernorm", (cases.ROWS, 768)),
         Case("cross_entropy", (cases.ROWS, cases.VOCABULARY)))


@dataclass(frozen=True)
class Options:
    """Compare two ways to flush the cache."""

    repeats: Positive = 50
    """samples of each"""
    out: str = ""
    """JSON file for the result; empty: bench/results/flush-cuda.json"""


def main(options: Options) -> None:
    """Measure, print and write. Raises ValueError without a GPU."""
    device = hardware.resolve_device("auto")
    if device.type != "cuda":
        raise ValueError(f"bench/ops/flush.py needs a CUDA device, this is {device.type}, whose "
                         "caches are not flushed")
    found = {str(case): compare(case, device, options.repeats) for case in CASES}
    for name, times in found.items():
        more = times["write"].median_ms - times["read"].median_ms
        print(f"{name}, forward: {times['read']} after reading, {times['write']} after writing, "
              f"{1e3 * more:+.1f} us")
    write_result(result_path(options.out, "flush-cuda"),
                 {"benchmark": "flush", "environment": environment(device), "cases": found})


def compare(case: Case, device: torch.device, repeats: int) -> dict[str, Timing]:
    """The forward of PyTorch's operator, timed in both ways; two rounds of each, in turns."""
    torch.manual_seed(0)
    args, options = calls.arguments(case, device), calls.options(case, device)
    fn = calls.operator(case, "torch")
    samples: dict[str, tuple[float, ...]] = {"read": (), "write": ()}
    for way in (*samples, *samples):
        times = measure({"": lambda: fn(*args, **options)}, device=device, repeats=repeats,
                        flush=way)
        samples[way] += times[""].samples
    return {way: Timing(found) for way, found in samples.items()}


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
