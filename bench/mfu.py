"""Tokens/s and MFU of training steps, ours beside the peers', interleaved in one process.

    python bench/mfu.py                                   # what this machine has: a GPU's four sizes, or a CPU's small ones
    python bench/mfu.py --device=cpu --nanogpt=DIR        # against a nanoGPT checkout
    python bench/mfu.py --cases=124M --batch_size=16

A step is forward, backward, gradient clipping and the optimizer, on a fixed batch. The peers' losses on the same weights
and batch must agree before anything is timed.
"""

import gc
import importlib.util
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import peers
from bench.peers import Peer
from bench.timing import ROOT, environment, measure, write_result
from gpt import GPT, SIZES, GPTConfig, hardware
from gpt.flops import mfu

# name: (shape, batch). On a GPU GPT-2's sizes as nanoGPT trains them; on a CPU what people run there:
# nanoGPT's README's "macbook" command, and its default shakespeare_char (a quarter of its batch of 64, which takes 16 s).
GPU_CASES = {
    name: (replace(SIZES[size], vocab_size=50304, bias=False, activation="gelu"), 16)
    for name, size in {"124M": "gpt2", "350M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}.items()
}
CPU_CASES = {
    "macbook": (GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128), 12),
    "shakespeare_char": (GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, dropout=0.2), 16),
}
CASES = GPU_CASES | CPU_CASES


@dataclass(frozen=True)
class Options:
    """Measure training steps."""

    device: str = "auto"
    dtype: str = "auto"
    """of our matrix multiplications; a peer is measured in this one, and in its own default where that differs"""
    cases: str = ""
    """names, with commas: 124M 350M 774M 1558M, macbook, shakespeare_char; empty: those for the device"""
    batch_size: int = 0
    """sequences in a step; 0: the case's own"""
    nanogpt: str = ""
    """folder of a nanoGPT checkout to measure against"""
    steps: int = 10
    """timed steps of each"""
    compile: bool = True
    """measure compiled variants, too"""
    out: str = ""
    """JSON file for the result; empty: bench/results/mfu-DEVICE.json"""


def main(options: Options) -> dict:
    """Measure every case, print a table, and write the JSON as each case ends."""
    device = hardware.resolve_device(options.device)
    dtype = hardware.resolve_dtype(options.dtype, device)
    names = options.cases.split(",") if options.cases else list(GPU_CASES if device.type == "cuda" else CPU_CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"--cases={options.cases}: no case {unknown[0]!r}; there are {', '.join(CASES)}")
    out = Path(options.out) if options.out else ROOT / "bench" / "results" / f"mfu-{device.type}.json"
    result: dict = {"benchmark": "mfu", "environment": environment(device), "cases": {}}
    for name in names:
        config, batch = CASES[name]
        result["cases"][name] = measure_case(name, config, options.batch_size or batch, device, dtype, options)
        result["environment"] = environment(device)
        write_result(out, result)
        show(name, result["cases"][name])
    print(f"written to {out}")
    return result


def measure_case(name: str, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype, options: Options) -> dict:
    """One shape: all variants built on the same weights, checked against each other, then timed in turns."""
    torch.manual_seed(0)
    weights = {k: v.detach().clone() for k, v in GPT(config).state_dict().items()}
    idx, targets = torch.randint(config.vocab_size, (2, batch, config.block_size), device=device)
    runners = variants(config, weights, device, dtype, options)
    losses = peers.agree(runners, idx, targets)
    first_step = {}
    for peer in runners:  # compiles what is compiled
        start = time.perf_counter()
        peer.step(idx, targets).item()
        first_step[peer.name] = time.perf_counter() - start
    steps = {peer.name: (lambda peer=peer: peer.step(idx, targets).item()) for peer in runners}
    timings = measure(steps, device=device, warmup=1, repeats=options.steps)
    tokens = batch * config.block_size
    rows = {}
    for peer in runners:
        timing = timings[peer.name]
        tokens_per_s = tokens / timing.median_ms * 1e3
        rows[peer.name] = {
            "dtype": str(peer.dtype).removeprefix("torch."), "loss": losses[peer.name], "step": timing,
            "tokens_per_s": tokens_per_s, **mfu(config, tokens_per_s, hardware.device_name(device)),
            "first_step_s": first_step[peer.name],
        }
    result = {"config": config, "batch_size": batch, "variants": rows}
    del runners, steps
    gc.collect()
    return result


def variants(config: GPTConfig, weights: dict, device: torch.device, dtype: torch.dtype, options: Options) -> list[Peer]:
    """Ours first; then whatever peer is at hand, in our dtype and, where it differs, as it comes by default."""
    here = (config, weights, device)
    found = [peers.ours(*here, dtype, name="ours")]
    if options.compile:
        found.append(peers.ours(*here, dtype, name="ours, compiled", compiled=True))
    if options.nanogpt:
        default = dtype if device.type == "cuda" else torch.float32  # it has no autocast on a CPU
        if dtype != default:
            found.append(peers.nanogpt(options.nanogpt, *here, dtype, name=f"nanoGPT, {str(dtype).removeprefix('torch.')}"))
        found.append(peers.nanogpt(options.nanogpt, *here, default, name="nanoGPT"))
        if options.compile:
            found.append(peers.nanogpt(options.nanogpt, *here, default, name="nanoGPT, compiled", compiled=True))
    if importlib.util.find_spec("transformers"):
        found.append(peers.transformers_gpt2(*here, dtype))
    return found


def show(name: str, case: dict) -> None:
    """A table of one case, each variant's speed as a multiple of the last-named peer's default."""
    rows = case["variants"]
    base = rows.get("nanoGPT") or rows.get("transformers") or next(iter(rows.values()))
    against = next(k for k, v in rows.items() if v is base)
    print(f"\n{name}: batch {case['batch_size']} x {case['config'].block_size} tokens")
    print(f"{'':28}{'tokens/s':>10}{'ms/step':>10}{'mfu palm':>10}{'causal':>8}{'loss':>9}  x {against}")
    for label, row in rows.items():
        used = [f"{100 * row[k]:.1f}%" if row[k] is not None else "n/a" for k in ("mfu_palm", "mfu_causal")]
        print(f"{label + ', ' + row['dtype'] if row['dtype'] not in label else label:28}{row['tokens_per_s']:10,.0f}"
              f"{row['step'].median_ms:10.1f}{used[0]:>10}{used[1]:>8}{row['loss']:9.4f}  "
              f"{base['step'].median_ms / row['step'].median_ms:.2f}")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Options, prog="bench/mfu.py", use_underscores=True, config=(tyro.conf.FlagConversionOff,)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
