"""Tokens/s, both MFUs, memory and compile time of training steps, ours beside the peers',
interleaved in one process.

    python bench/mfu.py                                   # what this machine has: a GPU's four sizes, or a CPU's small ones
    python bench/mfu.py --device=cpu --nanogpt=DIR        # against a nanoGPT checkout
    python bench/mfu.py --cases=124M --batch_size=auto    # the largest batch that fits
    python bench/mfu.py --suites=torch,triton,triton+attention=torch

A step is forward, backward, gradient clipping and the optimizer, on a fixed batch. The peers'
losses on the same weights and batch must agree before anything is timed. A suite is one of
kernels.load, with single families from another one after plus signs: what `triton+attention=torch`
takes longer than `triton` is the share of the attention kernel.

The cold start of a compiled variant is its first step with an empty compiler cache; the warm one is
the first step after forgetting the compiled code but not the cache. Triton kernels of our own stay
loaded, so only a variant that is the first to use one pays for it. Memory is that of the variant
alone: weights, optimizer state, and the most a step adds.
"""

import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from bench.ops.cases import GPT2
from bench.steps import peers
from bench.steps.peers import Peer
from bench.steps.profile_step import profile_all
from bench.timing import ROOT, environment, machine, measure, write_result
from common import cli, hardware
from common.bounds import Must, Positive
from gpt import GPT, GPTConfig
from gpt.flops import mfu
from kernels import FAMILIES, resolve

# name: (shape, batch). On a GPU GPT-2's sizes as nanoGPT trains them; on a CPU what people run
# there: the "macbook" command of nanoGPT's README, its shakespeare_char, of which its own code
# takes 12 to 16 s a step, and one sequence of GPT-2.
GPU_CASES = {
    name: (replace(shape, vocab_size=50304, bias=False, activation="gelu"), 16)
    for name, shape in GPT2.items()
}
CPU_CASES = {
    "macbook": (GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128), 12),
    "shakespeare_char": (GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384,
                                   dropout=0.2), 64),
    "124M_one": (GPU_CASES["124M"][0], 1),
}
CASES = GPU_CASES | CPU_CASES


BatchSize = Annotated[int | Literal["auto"],
                      Must("be auto or at least 0", lambda n: n == "auto" or n >= 0)]


@dataclass(frozen=True)
class Options:
    """Measure training steps."""

    device: str = "auto"
    dtype: str = "auto"
    """of our matrix multiplications; a peer is measured in this one, and in its own default where
    that differs"""
    cases: str = ""
    """names, with commas: 124M 350M 774M 1558M, macbook, shakespeare_char, 124M_one; empty: those
    for the device"""
    suites: str = ""
    """kernel suites of ours, with commas; empty: on a GPU torch, triton and each family's
    replacement, on a CPU torch"""
    peers: str = "transformers,liger"
    """what else is measured where it is installed, with commas; empty: nothing"""
    batch_size: BatchSize = 0
    """sequences in a step; 0: the case's own; auto: on a GPU the most that every eager variant can
    hold"""
    nanogpt: str = ""
    """folder of a nanoGPT checkout to measure against"""
    steps: Positive = 10
    """timed steps of each"""
    compile: bool = True
    """measure compiled variants, too"""
    profile: bool = False
    """also where a step of each goes, with Chrome traces beside the result"""
    out: str = ""
    """JSON file for the result; empty: bench/results/mfu-MACHINE.json"""


def main(options: Options) -> dict:
    """Measure every case, print a table, and write the JSON as each case ends."""
    device = hardware.resolve_device(options.device)
    if device.type == "cpu":
        hardware.keep_freed_memory()  # as the trainer does; the peers gain by it, too
    dtype = hardware.resolve_dtype(options.dtype, device)
    names = options.cases.split(",") if options.cases else list(GPU_CASES if device.type == "cuda"
                                                                else CPU_CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"--cases={options.cases}: no case {unknown[0]!r}; there are "
                         f"{', '.join(CASES)}")
    if options.batch_size == "auto" and device.type != "cuda":
        raise ValueError(f"--batch_size=auto needs a GPU's limit, this is {device.type}; give a "
                         "number")
    out = result_file(options, device)
    result: dict = {"benchmark": "mfu", "environment": environment(device), "cases": {}}
    for name in names:
        config, own = CASES[name]
        batch = options.batch_size if isinstance(options.batch_size,
                                                 int) and options.batch_size else own
        result["cases"][name] = measure_case(config, batch, device, dtype, options)
        result["environment"] = environment(device)
        write_result(out, result)
        show(name, result["cases"][name])
    print(f"written to {out}")
    return result


def result_file(options: Options, device: torch.device) -> Path:
    """Where the result goes."""
    return Path(
        options.out) if options.out else ROOT / "bench" / "results" / f"mfu-{machine(device)}.json"


def measure_case(config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype,
                 options: Options) -> dict:
    """One shape: all variants built on the same weights, checked against each other, then timed in
    turns."""
    torch.manual_seed(0)
    weights = {k: v.detach().clone() for k, v in GPT(config).state_dict().items()}
    runners = variants(config, weights, device, dtype, options)
    del weights
    if options.batch_size == "auto":
        batch = largest_batch(partial(fits, runners, config), limit=512)
    idx, targets = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
    # Dynamo counts the variants of all modules of one class together, and runs those above its
    # limit uncompiled.
    with fresh_cache(), torch._dynamo.config.patch(recompile_limit=256,
                                                   fail_on_recompile_limit_hit=True):
        cold = first_steps(runners, idx, targets)
        torch._dynamo.reset()
        warm = first_steps([peer for peer in runners if peer.compiled], idx, targets)
        losses = peers.agree(runners, idx, targets)
        memory = {peer.name: peak_memory_bytes(peer, idx, targets) for peer in runners}
        steps = {peer.name: (lambda peer=peer: peer.step(idx, targets).item()) for peer in runners}
        timings = measure(steps, device=device, warmup=1, repeats=options.steps)
        profiled = profile_all(runners, config, idx, targets,
                               result_file(options, device).parent) if options.profile else None
    rows = {}
    for peer in runners:
        tokens_per_s = batch * config.block_size / timings[peer.name].median_ms * 1e3
        rows[peer.name] = {
            "dtype": str(peer.dtype).removeprefix("torch."), "compiled": peer.compiled,
            "suite": peer.suite,
            "loss": losses[peer.name], "step": timings[peer.name], "tokens_per_s": tokens_per_s,
            **mfu(config, tokens_per_s, hardware.device_name(device)),
            "peak_memory_bytes": memory[peer.name],
            "cold_start_s": cold[peer.name], "warm_start_s": warm.get(peer.name),
        }
    result = {"config": config, "batch_size": batch, "variants": rows, "shares": shares(rows),
              "profile": profiled}
    del runners, steps
    gc.collect()
    return result


def first_steps(runners: list[Peer], idx: Tensor, targets: Tensor) -> dict[str, float]:
    """Seconds of a rehearsed step of each, which compiles what is not compiled yet."""
    seconds = {}
    for peer in runners:
        start = time.perf_counter()
        peer.rehearse(idx, targets).item()
        seconds[peer.name] = time.perf_counter() - start
    return seconds


def peak_memory_bytes(peer: Peer, idx: Tensor, targets: Tensor) -> int | None:
    """What the peer holds and the most that a step adds; None where the device does not count."""
    if peer.device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(peer.device)
    torch.cuda.reset_peak_memory_stats(peer.device)
    peer.rehearse(idx, targets).item()
    return peer.bytes_held() + torch.cuda.max_memory_allocated(peer.device) - before


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch up to `limit` that fits: doubled until one does not, then bisected. Raises
    ValueError if 1 does not."""
    if not fits(1):
        raise ValueError("--batch_size=auto: not even one sequence fits; choose a smaller --cases, "
                         "or fewer --suites and --peers")
    good, bad = 1, 2
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def fits(runners: list[Peer], config: GPTConfig, batch: int) -> bool:
    """Whether every eager variant can take a step of `batch` sequences with all the others' weights
    in memory."""
    try:
        idx, targets = torch.randint(config.vocab_size, (2, batch, config.block_size),
                                     device=runners[0].device)
        for peer in runners:
            if not peer.compiled:
                peer.rehearse(idx, targets).item()
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    for peer in runners:  # out of the handler, whose traceback would keep the step's tensors alive
        peer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return False


def shares(rows: dict[str, dict]) -> list[dict]:
    """For every suite that replaces single families of another one measured alike: the milliseconds
    a step takes more."""
    found = []
    for name, row in rows.items():
        base, plus, change = (row["suite"] or "").partition("+")
        for other in rows.values():
            if plus and other["suite"] == base and (other["compiled"],
                                                    other["dtype"]) == (row["compiled"],
                                                                        row["dtype"]):
                more = row["step"].median_ms - other["step"].median_ms
                found.append({"variant": name, "suite": base, "change": change, "more_ms": more,
                              "more_of_step": more / other["step"].median_ms})
    return found


def suites(options: Options, device: torch.device) -> list[tuple[str, str, dict[str, str]]]:
    """(name, suite, families from elsewhere) of each of --suites. Raises ValueError for one that is
    none, or cannot run here."""
    every = ["torch", "triton",
             *(f"triton+{family}=torch"
               for family in FAMILIES)] if device.type == "cuda" else ["torch"]
    found = []
    for name in options.suites.split(",") if options.suites else every:
        suite, *changes = name.split("+")
        families = dict(change.partition("=")[::2] for change in changes)
        if unknown := families.keys() - FAMILIES.keys():
            raise ValueError(f"--suites={name}: no family {min(unknown)!r}; write "
                             f"SUITE+FAMILY=SUITE with {', '.join(FAMILIES)}")
        resolve(suite, device, **families)
        found.append((name, suite, families))
    return found


def variants(config: GPTConfig, weights: dict, device: torch.device, dtype: torch.dtype,
             options: Options) -> list[Peer]:
    """Ours first, on each suite; then whatever peer is at hand, in our dtype and, where it differs,
    as it comes by default.

    A suite with a replacement is measured compiled only, unless nothing is compiled.
    """
    here, chosen = (config, weights, device), suites(options, device)
    ways = [False, True] if options.compile else [False]
    found: list[Peer] = []

    def add(make: Callable[..., Peer], name: str, dtype: torch.dtype, compiled: bool,
            like: Peer | None, **more: Any) -> Peer:
        found.append(make(*here, dtype, name=name + ", compiled" * compiled, compiled=compiled,
                          like=like, **more))
        found[-1].compiled = compiled
        return found[-1]

    def both(make: Callable[..., Peer], name: str, dtype: torch.dtype, like: Peer | None = None,
             **more: Any) -> None:
        for compiled in ways:
            like = add(make, name, dtype, compiled, like, **more)

    for name, suite, families in chosen:
        for compiled in ways[-1:] if families else ways:
            label = "ours" if len(chosen) == 1 else f"ours, {name}"
            add(peers.ours, label, dtype, compiled, found[0] if found else None, kernels=suite,
                **families).suite = name
    wanted = [name for name in options.peers.split(",") if name]
    if strangers := set(wanted) - {"transformers", "liger"}:
        raise ValueError(f"--peers={options.peers}: no peer {min(strangers)!r}; there are "
                         "transformers, liger, and --nanogpt=DIR")
    if options.nanogpt:
        default = dtype if device.type == "cuda" else torch.float32  # it has no autocast on a CPU
        make = partial(peers.nanogpt, options.nanogpt)
        if dtype != default:
            add(make, f"nanoGPT, {str(dtype).removeprefix('torch.')}", dtype, False, None)
        both(make, "nanoGPT", default)
    if "transformers" in wanted and importlib.util.find_spec("transformers"):
        both(peers.transformers_gpt2, "transformers", dtype)
    if "liger" in wanted and device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        both(peers.ours, "Liger's kernels in ours", dtype, found[0], kernels=peers.liger_kernels())
    return found


def show(name: str, case: dict) -> None:
    """A table of one case, each variant's speed as a multiple of the last-named peer's default."""
    rows = case["variants"]
    base = rows.get("nanoGPT") or rows.get("transformers") or next(iter(rows.values()))
    against = next(k for k, v in rows.items() if v is base)
    print(f"\n{name}: batch {case['batch_size']} x {case['config'].block_size} tokens")
    print(
        f"{'':40}{'tokens/s':>10}{'ms/step':>10}{'mfu palm':>10}{'causal':>8}{'GiB':>7}{'cold s':>8}{'warm s':>8}{'loss':>9}  "
          f"x {against}")
    for label, row in rows.items():
        used = [f"{100 * row[k]:.1f}%" if row[k] is not None else "n/a"
                for k in ("mfu_palm", "mfu_causal")]
        memory = "n/a" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}"
        starts = [f"{row[k]:.1f}" if row["compiled"] else ""
                  for k in ("cold_start_s", "warm_start_s")]
        print(
            f"{label + ', ' + row['dtype'] if row['dtype'] not in label else label:40}{row['tokens_per_s']:10,.0f}"
              f"{row['step'].median_ms:10.1f}{used[0]:>10}{used[1]:>8}{memory:>7}{starts[0]:>8}{starts[1]:>8}{row['loss']:9.4f}  "
              f"{base['step'].median_ms / row['step'].median_ms:.2f}")
    for share in case["shares"]:
        print(f"{share['suite']} with {share['change']}: {share['more_ms']:+.2f} ms a step, "
              f"{100 * share['more_of_step']:+.1f} %")


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
