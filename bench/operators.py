"""Each operator against its peers and the floor: checked first, then timed in turns.

    python bench/operators.py     # GPT-2's sizes, attention from T = 512 to 16384; small on a CPU
    python bench/operators.py --sizes=124M --sweep=False

Forward and backward are timed apart and together. The floor is operations over the rate of a large
matrix product, or bytes over that of a large copy, both measured in this run; attention's
operations count only the scores that are used. Every implementation first runs at the full shape,
and the part that `wrong` names is compared with kernels/reference.py in fp64. A wrong one is
refused, with its value and the right one, and is not timed. Peers that are not installed, or cannot
run here, are named, and so is ours where it fails; the others are timed all the same.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from bench import floors
from bench.aot import traffic
from bench.floors import Rates, Work
from bench.ops import cases
from bench.ops.check import again, failures, wrong
from bench.ops.peers import OURS, implementations
from bench.options import named
from bench.timing import Timing, environment, measure, result_path, write_result
from common import cli, hardware
from common.bounds import NonNegativeFloat, Positive
from kernels import FAMILIES, calls
from kernels.calls import Case

# sequence lengths, with cases.ROWS tokens in each batch
SWEEP = (512, 1024, 2048, 4096, 8192, 16384)
# Reads alone may run a little faster than a copy (data sheets are about 12 % above one). Anything
# faster shows that the clock or the floor is wrong.
IMPOSSIBLE = 1.15
PHASES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Options:
    """Measure each operator against its peers and the floor."""

    device: str = "auto"
    sizes: str = ",".join(cases.GPT2)
    """of GPT-2, with commas; on a CPU one small shape stands for all"""
    families: str = ""
    """of operators, with commas: attention, layernorm, cross_entropy; empty: all"""
    sweep: bool = True
    """attention over sequence lengths, too"""
    batch_size: Positive = 16
    """sequences of 1024 tokens"""
    repeats: Positive = 20
    """samples of each implementation"""
    minutes: NonNegativeFloat = 0.0
    """begin no further case after so many; 0: no limit"""
    out: str = ""
    """JSON file for the result; empty: bench/results/operators-DEVICE.json"""


def main(options: Options) -> int:
    """Measure and print; write the JSON after each case. Raises ValueError for bad input.

    1 if ours is wrong or fails, or a time is impossible.
    """
    began = time.perf_counter()
    device = hardware.resolve_device(options.device)
    chosen = chosen_cases(options, device)
    out = result_path(options.out, f"operators-{device.type}")
    rates, ceilings = measure_rates(device)
    result: dict = {"benchmark": "operators", "environment": environment(device),
                    "rates": ceilings, "cases": {}, "left_out": []}
    for case in chosen:
        if options.minutes and time.perf_counter() - began > 60 * options.minutes:
            result["left_out"].append(str(case))
            continue
        result["cases"][str(case)] = measure_case(case, rates, device, options.repeats)
        result["environment"] = environment(device)
        write_result(out, result)
        show(case, result["cases"][str(case)])
    write_result(out, result)
    if result["left_out"]:
        print(f"\nleft out after {options.minutes} minutes: {'; '.join(result['left_out'])}")
    print(f"written to {out}")
    return int(any(case["impossible"] or OURS in case["refused"] | case["failed"]
                   for case in result["cases"].values()))


def chosen_cases(options: Options, device: torch.device) -> list[Case]:
    """The cases, the most important first. Raises ValueError for an unknown size or family."""
    families = named("families", options.families, FAMILIES) if options.families else [*FAMILIES]
    return [case for case in all_cases(options, device) if case.family in families]


def all_cases(options: Options, device: torch.device) -> list[Case]:
    """Those of all families."""
    if device.type == "cpu":
        return small_cases(options.sweep)
    names = named("sizes", options.sizes, cases.GPT2)
    first, *others = (cases.models(name, options.batch_size) for name in names)
    swept = [Case("attention", (max(1, cases.ROWS // T), T, 768 // D, D))
             for D in (64, 128) for T in SWEEP] if options.sweep else []
    return list(dict.fromkeys([*first, *swept, *(case for size in others for case in size)]))


def small_cases(sweep: bool) -> list[Case]:
    """What a CPU measures, in fp32."""
    variants = {"attention_qkv": "rotary", "linear_cross_entropy": "capped"}
    shapes = {"attention_qkv": (2, 128, 4, 64), "add_layernorm": (256, 256),
              "layernorm": (256, 256), "add_rmsnorm": (256, 256), "rmsnorm": (256, 256),
              "cross_entropy": (128, 1000),
              "linear_cross_entropy": (128, 64, 1000)}
    swept = [("attention", (1, T, 4, 64)) for T in SWEEP[:2]] if sweep else []
    return [*(Case(operator, shape, torch.float32) for operator, shape in shapes.items()),
            *(Case(operator, shapes[operator], torch.float32, variant)
              for operator, variant in variants.items()),
            *(Case(operator, shape, torch.float32) for operator, shape in swept)]


# -- the floor -------------------------------------------------------------------


def measure_rates(device: torch.device) -> tuple[Rates, dict]:
    """The ceilings of this device, and a row for the JSON with their timings.

    On random data: a copy far larger than the cache, and a large matrix product in the dtype of the
    cases.
    """
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    source = torch.randn(2**28 if cuda else 2**23, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device=device,
                    repeats=20 if cuda else 5)
    copied = 2 * source.numel() * source.element_size()
    rates = Rates(matmul_tflops=2 * n**3 / times["matmul"].median_ms * 1e-9,
                  copy_gbs=copied / times["copy"].median_ms * 1e-6)
    return rates, {"matmul_tflops": rates.matmul_tflops, "copy_gbs": rates.copy_gbs,
                   "matmul": times["matmul"], "matmul_shape": [n, n, n], "dtype": dtype,
                   "copy": times["copy"], "copied_bytes": copied}


def work(case: Case) -> dict[str, Work | None]:
    """The least work of each phase; None for the backward of a loss.

    A loss may write its gradient in its forward, while it reads the logits: then its backward has
    no work left, and only both together have a floor.
    """
    size, shape = case.dtype.itemsize, case.shape
    if case.family == "attention":
        apart = floors.attention(shape[0], shape[1], shape[2], shape[3], size)
    elif case.operator == "linear_cross_entropy":
        apart = floors.linear_cross_entropy(shape[0], shape[1], shape[2], size)
    else:
        apart = {phase: Work(bytes=n) for phase, n in traffic.floor_bytes(case).items()}
    both = apart["forward"] + apart["backward"]
    if case.operator == "cross_entropy":
        # the logits are read once
        both = Work(bytes=both.bytes - case.shape[0] * case.shape[1] * size)
    backward = None if case.family == "cross_entropy" else apart["backward"]
    return {"forward": apart["forward"], "backward": backward, "both": both}


def speed(timing: Timing, least: Work | None, rates: Rates) -> dict:
    """A timing with its speed, in TFLOP/s or GB/s, and the fraction of the floor it reaches."""
    row: dict = {"timing": timing, "tflops": None, "gbs": None, "of_floor": None}
    if least is None:
        return row
    row["of_floor"] = least.ns(rates) * 1e-6 / timing.median_ms
    if least.flops:
        row["tflops"] = least.flops / timing.median_ms * 1e-9
    else:
        row["gbs"] = least.bytes / timing.median_ms * 1e-6
    return row


def impossible(name: str, phase: str, row: dict) -> str:
    """Why a time cannot be true, or ""."""
    if row["of_floor"] is None or row["of_floor"] <= IMPOSSIBLE:
        return ""
    return (f"{name}, {phase}: {row['timing'].median_ms:.4g} ms is {100 * row['of_floor']:.0f} % "
            f"of what this device can do; nothing is reported above {100 * IMPOSSIBLE:.0f} %")


# -- then time -------------------------------------------------------------------


def phases(fn: Callable, args: list[Tensor], options: dict) -> dict[str, Callable[[], object]]:
    """What is timed: forward as in training, backward on a graph that is kept, and both."""
    kept = dict(calls.run(fn, args, options))  # also warms up what compiles
    gradients = kept["gradients"]
    outputs = fn(*args, **options)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    leaves = calls.leaves(args)
    return {"forward": lambda: fn(*args, **options),
            "backward": lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True),
            "both": lambda: dict(calls.run(fn, args, options, gradients))}


class Admitted(NamedTuple):
    """The implementations of a case: those to time, and why the others are not timed."""

    right: dict[str, Callable]
    skipped: dict[str, str]  # not installed, or no kernel here
    failed: dict[str, str]  # ours, which has a kernel
    refused: dict[str, str]  # wrong


def admit(case: Case, device: torch.device) -> Admitted:
    """Check every implementation of a case. Raises ValueError where memory runs out."""
    found = Admitted({}, {}, {}, {})
    for name, fn in implementations(case, device).items():
        if isinstance(fn, str):
            found.skipped[name] = fn
            continue
        try:
            fault = wrong(fn, case, device)
        except failures() as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise ValueError(f"{case}, {name}: {str(error).splitlines()[0]}; give a smaller "
                                 "--batch_size") from error
            (found.failed if name == OURS else found.skipped)[name] = cli.reason(error)
            continue
        if fault:
            found.refused[name] = fault
        else:
            found.right[name] = fn
    return found


def measure_case(case: Case, rates: Rates, device: torch.device, repeats: int) -> dict:
    """All implementations of one case: checked, then timed in turns, phase by phase."""
    # A compiled backward otherwise reuses its saved tensors' memory, and then it runs only once.
    with functorch_config.patch(donated_buffer=False):
        right, skipped, failed, refused = admit(case, device)
        args, options = calls.arguments(case, device), calls.options(case, device)
        runs = {name: phases(fn, again(args), options) for name, fn in right.items()}
        times = {phase: measure({name: run[phase] for name, run in runs.items()}, device=device,
                                repeats=repeats, min_time_ms=1.0) for phase in PHASES}
    least = work(case)
    variants: dict[str, dict] = {name: {} for name in right}
    too_fast = []
    for phase in PHASES:
        for name, timing in times[phase].items():
            variants[name][phase] = row = speed(timing, least[phase], rates)
            # a CPU's caches are not flushed, and may well be faster than its memory
            if device.type == "cuda" and (why := impossible(name, phase, row)):
                too_fast.append(why)
                variants[name][phase] = None
    floor = {phase: w and {"flops": w.flops, "bytes": w.bytes, "ms": w.ns(rates) * 1e-6}
             for phase, w in least.items()}
    return {"operator": case.operator, "shape": case.shape, "dtype": case.dtype, "floor": floor,
            "variants": variants, "skipped": skipped, "failed": failed, "refused": refused,
            "impossible": too_fast}


def show(case: Case, found: dict) -> None:
    """Print a table of one case."""
    heads = (f"{phase + ' ms':>14}{'rate':>14}{'of floor':>10}" for phase in PHASES)
    print(f"\n{case}\n{'':18}" + "".join(heads))
    for name, row in found["variants"].items():
        print(f"{name:18}" + "".join(_cells(row[phase]) for phase in PHASES))
    for what in ("skipped", "failed", "refused"):
        for name, why in found[what].items():
            print(f"{name:18}  {what}: {why}")
    for why in found["impossible"]:
        print(f"  impossible: {why}")


def _cells(row: dict | None) -> str:
    if row is None:
        return f"{'refused':>14}{'':24}"
    share = f"{100 * row['of_floor']:.0f}%" if row["of_floor"] is not None else ""
    return f"{row['timing'].median_ms:14.4g}{rate(row):>14}{share:>10}"


def rate(row: dict) -> str:
    """The speed of a row with its unit."""
    if row["tflops"]:
        return matmul_rate(row["tflops"])
    return f"{row['gbs']:.4g} GB/s" if row["gbs"] else ""


def matmul_rate(tflops: float) -> str:
    """A rate of matrix products with its unit."""
    return f"{tflops:,.0f} TFLOP/s" if tflops >= 10 else f"{1e3 * tflops:,.0f} GFLOP/s"


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
