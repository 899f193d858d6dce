"""Training steps of ours and of peers: tokens/s, both MFUs, memory, compile time.

    python bench/mfu.py                                 # a GPU's four sizes, or a CPU's small ones
    python bench/mfu.py --device=cpu --nanogpt=DIR      # against a nanoGPT checkout
    python bench/mfu.py --cases=124M --batch_size=auto  # the largest batch that fits
    python bench/mfu.py --backends=torch,triton,triton+attention=torch

A step is forward, backward, gradient clipping and the optimizer, on a fixed batch. All variants run
in one process, in turns; on a GPU a turn is 0.2 s of steps, between which the host does not wait.
A variant that fails, or whose loss on the same weights and batch is another, is not timed. In a
step of one micro-batch the optimizer weighs more than in training: --accumulated_tokens=524288 also
times steps of 0.5 million tokens, as nanoGPT and llm.c train GPT-2.

A backend is a name that kernels.load takes, or one with families replaced: `triton+attention=torch`
is triton with PyTorch's attention. Its difference from `triton` is the share of the attention.

The cold start of a compiled variant is its first step with an empty compiler cache; the warm start
is the first step after forgetting the compiled code but not the cache. Our own Triton kernels stay
loaded, so only the first variant to use one pays for it. Memory is that of the variant alone:
weights, optimizer state, and the most a step adds.
"""

import gc
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from bench.ops.check import failures
from bench.options import named
from bench.steps import peers
from bench.steps.peers import Variant
from bench.steps.profile_step import profile_all
from bench.steps.variants import CASES, CPU_CASES, GPU_CASES, PEERS, backends, build_variants
from bench.timing import Timing, environment, machine, measure, result_path, write_result
from common import cli, hardware
from common.bounds import Must, NonNegative, NonNegativeFloat, Positive
from gpt import GPT, GPTConfig
from gpt.flops import mfu
from gpt.peaks import peak_tflops

BURST_MS = 200.0  # of steps on a GPU, after which the host waits for it
ACCUMULATED_REPEATS = 3  # of a step with many micro-steps, which is itself a mean

BatchSize = Annotated[int | Literal["auto"],
                      Must("be auto or at least 0", lambda n: n == "auto" or n >= 0)]


@dataclass(frozen=True)
class Options:
    """Measure training steps."""

    device: str = "auto"
    dtype: str = "auto"
    """of our matrix products; a peer is measured in this one, and also in its own default"""
    cases: str = ""
    """names, with commas: 124M 350M 774M 1558M, macbook, shakespeare_char, 124M_one; empty: those
    for the device"""
    backends: str = ""
    """ours, with commas; empty: torch, and on a GPU also triton, whole and with each family
    replaced by PyTorch's"""
    peers: str = "transformers,liger"
    """others to measure where they are installed, with commas; empty: none"""
    batch_size: BatchSize = 0
    """sequences in a step; 0: the case's own; auto: on a GPU the most that every eager variant can
    hold"""
    nanogpt: str = ""
    """folder of a nanoGPT checkout to measure against"""
    steps: Positive = 10
    """timed steps of each"""
    accumulated_tokens: NonNegative = 0
    """also time optimizer steps of about so many tokens, in micro-steps of the batch; 0: no"""
    compile: bool = True
    """measure compiled variants, too"""
    warm_start: bool = True
    """measure their warm starts, too, for which all compile once more"""
    peak_tflops: NonNegativeFloat = 0.0
    """of the GPU in dense bf16, for the MFU; 0: that of its name, where known (gpt/peaks.py)"""
    profile: bool = False
    """also measure where a step of each goes; writes Chrome traces beside the result"""
    out: str = ""
    """JSON file for the result; empty: bench/results/mfu-MACHINE.json"""


def main(options: Options) -> int:
    """Measure every case and print a table; write the JSON after each case.

    1 if a variant failed, or was refused for its loss; the others are measured all the same.
    """
    device = hardware.resolve_device(options.device)
    if device.type == "cpu":
        hardware.keep_freed_memory()  # as the trainer does; the peers gain by it, too
    dtype = hardware.resolve_dtype(options.dtype, device)
    default = GPU_CASES if device.type == "cuda" else CPU_CASES
    names = named("cases", options.cases, CASES) if options.cases else list(default)
    if options.batch_size == "auto" and device.type != "cuda":
        raise ValueError(f"--batch_size=auto needs a GPU's limit, this is {device.type}; "
                         "give a number")
    out = result_file(options, device)
    result: dict = {"benchmark": "mfu", "environment": environment(device), "cases": {}}
    for name in names:
        config, own = CASES[name]
        batch = own if options.batch_size in ("auto", 0) else int(options.batch_size)
        result["cases"][name] = measure_case(config, batch, device, dtype, options)
        result["environment"] = environment(device)
        write_result(out, result)
        show(name, result["cases"][name])
    print(f"written to {out}")
    return int(any(case["failed"] for case in result["cases"].values()))


def result_file(options: Options, device: torch.device) -> Path:
    """Where the result goes."""
    return result_path(options.out, f"mfu-{machine(device)}")


def measure_case(config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype,
                 options: Options) -> dict:
    """One shape: all variants, with the same weights, checked and then timed in turns."""
    torch.manual_seed(0)
    weights = {k: v.detach().clone() for k, v in GPT(config).state_dict().items()}
    variants = build_variants(
        config, weights, device, dtype, ours=backends(options.backends, device),
        others=named("peers", options.peers, PEERS) if options.peers else [],
        nanogpt=options.nanogpt, compile_ways=[False, True] if options.compile else [False])
    del weights
    if options.batch_size == "auto":
        batch = largest_batch(partial(fits, variants, config), limit=512)
    idx, targets = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
    profiled = None
    # Dynamo counts the variants of all modules of one class together, and runs those above its
    # limit uncompiled.
    limits = torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)
    # a fresh cache has none of our Triton kernels either: eager variants need not wait for them
    with fresh_cache() if options.compile else nullcontext(), limits:
        rows, failed = first_steps(variants, idx, targets)
        variants = [v for v in variants if v.name in rows]
        torch._dynamo.reset()
        warm = {v.name: rehearse_s(v, idx, targets)
                for v in variants if v.compiled and options.warm_start}
        memory = {v.name: peak_memory_bytes(v, idx, targets) for v in variants}
        found = time_steps(variants, config, idx, targets, options)
        many = accumulated(variants, config, idx, targets, options)
        if options.profile:
            folder = result_file(options, device).parent
            profiled = profile_all(variants, config, idx, targets, folder)
    for v in variants:
        rows[v.name] |= {
            "dtype": str(v.dtype).removeprefix("torch."), "compiled": v.compiled,
            "backend": v.backend, **found[v.name], "accumulated": many.get(v.name),
            "peak_memory_bytes": memory[v.name], "warm_start_s": warm.get(v.name)}
    del variants
    gc.collect()
    return {"config": config, "batch_size": batch, "variants": rows, "failed": failed,
            "shares": shares(rows), "profile": profiled}


def time_steps(variants: list[Variant], config: GPTConfig, idx: Tensor, targets: Tensor,
               options: Options, micro_steps: int = 1, repeats: int = 0) -> dict[str, dict]:
    """The time and speed of a step of each variant, by name."""
    device = idx.device
    timings = measure({v.name: partial(v.step, idx, targets, micro_steps) for v in variants},
                      device=device, warmup=1, repeats=repeats or options.steps, end_to_end=True,
                      min_time_ms=BURST_MS if device.type == "cuda" else 0.0)
    return {name: speed(config, micro_steps * idx.numel(), step, device, options)
            for name, step in timings.items()}


def accumulated(variants: list[Variant], config: GPTConfig, idx: Tensor, targets: Tensor,
                options: Options) -> dict[str, dict]:
    """`time_steps` of about --accumulated_tokens, where they are more than a batch; else {}."""
    micro_steps = round(options.accumulated_tokens / idx.numel())
    if micro_steps < 2:
        return {}
    found = time_steps(variants, config, idx, targets, options, micro_steps, ACCUMULATED_REPEATS)
    return {name: {"micro_steps": micro_steps, **row} for name, row in found.items()}


def speed(config: GPTConfig, tokens: int, step: Timing, device: torch.device,
          options: Options) -> dict:
    """The time, tokens/s and MFUs of a step of so many tokens.

    Raises ValueError for an MFU above 1.
    """
    name, tokens_per_s = hardware.device_name(device), tokens / step.median_ms * 1e3
    used = mfu(config, tokens_per_s, peak_tflops(name, options.peak_tflops))
    for formula, fraction in used.items():
        if fraction is not None and fraction > 1:
            raise ValueError(f"{formula} of {fraction:.2f} at {tokens_per_s:.0f} tokens/s on "
                             f"{name}: above 100 %, so the clock or --peak_tflops is wrong")
    return {"step": step, "tokens_per_s": tokens_per_s, **used}


def first_steps(variants: list[Variant], idx: Tensor,
                targets: Tensor) -> tuple[dict[str, dict], dict[str, str]]:
    """The cold start and the loss of each variant; and of those that cannot be timed, why.

    They fail, or their loss is not that of the first one that runs. Raises ValueError if all fail.
    """
    rows: dict[str, dict] = {}
    failed: dict[str, str] = {}
    for variant in variants:
        try:
            rows[variant.name] = {"cold_start_s": rehearse_s(variant, idx, targets),
                                  "loss": variant.evaluate(idx, targets)}
        except failures() as error:
            failed[variant.name] = cli.reason(error)
        print(f"{variant.name}: {failed.get(variant.name, 'runs')}", flush=True)
    if not rows:
        raise ValueError(f"no variant runs: {failed}")
    if failed:
        forget_gradients(variants)
    ran = [v for v in variants if v.name in rows]
    failed |= peers.unlike(ran, {name: row["loss"] for name, row in rows.items()})
    return {name: row for name, row in rows.items() if name not in failed}, failed


def rehearse_s(variant: Variant, idx: Tensor, targets: Tensor) -> float:
    """Seconds of a rehearsed step; it compiles what is not compiled yet."""
    start = time.perf_counter()
    variant.rehearse(idx, targets).item()
    return time.perf_counter() - start


def peak_memory_bytes(variant: Variant, idx: Tensor, targets: Tensor) -> int | None:
    """The bytes a variant holds, and the most that a step adds; None where they are not counted."""
    if variant.device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(variant.device)
    hardware.reset_peak_memory(variant.device)
    variant.rehearse(idx, targets).item()
    peak = hardware.peak_memory_bytes(variant.device)
    assert peak is not None, "a GPU counts its memory"
    return variant.bytes_held() + peak - before


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch up to `limit` that fits, by doubling, then bisection.

    Raises ValueError if not even 1 fits.
    """
    if not fits(1):
        raise ValueError("--batch_size=auto: not even one sequence fits; choose a smaller --cases, "
                         "or fewer --backends and --peers")
    good, bad = 1, 2
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def fits(variants: list[Variant], config: GPTConfig, batch: int) -> bool:
    """Whether every eager variant can take a step of `batch` sequences, with all of them loaded."""
    try:
        idx, targets = torch.randint(config.vocab_size, (2, batch, config.block_size),
                                     device=variants[0].device)
        for variant in variants:
            if not variant.compiled:
                variant.rehearse(idx, targets).item()
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    # out of the handler, whose traceback would keep the step's tensors alive
    forget_gradients(variants)
    return False


def forget_gradients(variants: list[Variant]) -> None:
    """Free what a step that failed has left."""
    for variant in variants:
        variant.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()


def shares(rows: dict[str, dict]) -> list[dict]:
    """What single families cost: how many milliseconds more a step takes when they are replaced.

    One row for each variant with replaced families whose base was measured compiled alike and in
    the same dtype.
    """
    found = []
    for name, row in rows.items():
        base, plus, change = (row["backend"] or "").partition("+")
        for other in rows.values():
            alike = all(other[key] == row[key] for key in ("compiled", "dtype"))
            if plus and other["backend"] == base and alike:
                more = row["step"].median_ms - other["step"].median_ms
                found.append({"variant": name, "backend": base, "change": change, "more_ms": more,
                              "more_of_step": more / other["step"].median_ms})
    return found


def show(name: str, case: dict) -> None:
    """Print a table of one case, with each speed as a multiple of nanoGPT's, where it is there."""
    rows = case["variants"]
    against = next((peer for peer in ("nanoGPT", "transformers") if peer in rows), next(iter(rows)))
    print(f"\n{name}: batch {case['batch_size']} x {case['config'].block_size} tokens\n"
          f"{'':40}{'tokens/s':>10}{'ms/step':>10}{'mfu palm':>10}{'causal':>8}{'GiB':>7}"
          f"{'cold s':>8}{'warm s':>8}{'loss':>9}  x {against}")
    for label, row in rows.items():
        title = label if row["dtype"] in label else f"{label}, {row['dtype']}"
        palm, causal = ("n/a" if row[k] is None else f"{100 * row[k]:.1f}%"
                        for k in ("mfu_palm", "mfu_causal"))
        peak = row["peak_memory_bytes"]
        memory = "n/a" if peak is None else f"{peak / 2**30:.1f}"
        cold, warm = (f"{row[k]:.1f}" if row["compiled"] and row[k] is not None else ""
                      for k in ("cold_start_s", "warm_start_s"))
        ms = row["step"].median_ms
        print(f"{title:40}{row['tokens_per_s']:10,.0f}{ms:10.1f}{palm:>10}{causal:>8}{memory:>7}"
              f"{cold:>8}{warm:>8}{row['loss']:9.4f}  {rows[against]['step'].median_ms / ms:.2f}")
    for label, row in rows.items():
        if many := row["accumulated"]:
            palm = "n/a" if many["mfu_palm"] is None else f"{100 * many['mfu_palm']:.1f}%"
            print(f"{label}, {many['micro_steps']} micro-steps a step: {many['tokens_per_s']:,.0f} "
                  f"tokens/s, mfu palm {palm}")
    for label, why in case["failed"].items():
        print(f"{label}: {why}")
    for share in case["shares"]:
        print(f"{share['backend']} with {share['change']}: {share['more_ms']:+.2f} ms a step, "
              f"{100 * share['more_of_step']:+.1f} %")


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
