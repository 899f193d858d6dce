"""Tokens/s of text generation, one sequence at a time: ours beside transformers' and a nanoGPT checkout's.

    python bench/generation.py --device=cpu --nanogpt=DIR

Greedy text must agree in fp32 before anything is timed.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench import peers
from bench.timing import ROOT, environment, measure, write_result
from gpt import GPT, SIZES, hardware
from gpt.sample import Sample, weights_dtype


@dataclass(frozen=True)
class Options:
    """Measure generation."""

    device: str = "auto"
    size: str = "gpt2"
    """gpt2, gpt2-medium, gpt2-large, gpt2-xl, with random weights"""
    new_tokens: int = 128
    nanogpt: str = ""
    """folder of a nanoGPT checkout to measure against"""
    repeats: int = 3
    out: str = ""
    """JSON file for the result; empty: bench/results/generation-DEVICE.json"""


def main(options: Options) -> dict:
    """Check, time in turns, print, write."""
    device = hardware.resolve_device(options.device)
    config = replace(SIZES[options.size], vocab_size=50304, activation="gelu")
    torch.manual_seed(0)
    model = GPT(config).eval()
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    idx = torch.randint(50257, (1, 4), device=device)
    model.to(device)

    def variants(n: int, **how: object) -> dict[str, Callable[[], Tensor]]:
        return makers(options, weights, model, idx, n, **how)

    greedy = {name: generate()[0].tolist() for name, generate in variants(16, temperature=1.0, top_k=1).items()}
    for name, text in greedy.items():
        if text != greedy["ours, float32"]:
            raise ValueError(f"{name} writes {text} where ours writes {greedy['ours, float32']}; not timed")
    best = GPT(config).eval()
    best.load_state_dict(weights)
    best.to(device, weights_dtype(Sample(max_new_tokens=options.new_tokens), best.to(device), idx.shape[1]))
    callables = {"ours": lambda: best.generate(idx, options.new_tokens), **variants(options.new_tokens)}
    timings = measure(callables, device=device, warmup=1, repeats=options.repeats)
    rows = {name: {"time": t, "tokens_per_s": options.new_tokens / t.median_ms * 1e3} for name, t in timings.items()}
    rows["ours"]["dtype"] = str(best.lm_head.weight.dtype).removeprefix("torch.")
    for name, row in rows.items():
        print(f"{name:20}{row['tokens_per_s']:8.1f} tokens/s   ours is {rows['ours']['tokens_per_s'] / row['tokens_per_s']:.2f} x this")
    result = {"benchmark": "generation", "environment": environment(device), "options": options, "variants": rows}
    out = Path(options.out) if options.out else ROOT / "bench" / "results" / f"generation-{device.type}.json"
    write_result(out, result)
    print(f"written to {out}")
    return result


def makers(options: Options, weights: dict[str, Tensor], model: GPT, idx: Tensor, n: int, temperature: float = 1.0,
           top_k: int | None = None) -> dict[str, Callable[[], Tensor]]:
    """What continues idx by n tokens, by name; all in fp32."""
    found: dict[str, Callable[[], Tensor]] = {"ours, float32": lambda: model.generate(idx, n, temperature, top_k)}
    here = (model.config, weights, idx.device, torch.float32)
    if importlib.util.find_spec("transformers"):
        theirs = peers.transformers_gpt2(*here).module.eval()
        theirs.generation_config.pad_token_id = theirs.generation_config.eos_token_id = None
        found["transformers"] = lambda: theirs.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=top_k != 1, top_k=top_k or 0, use_cache=True,
        )
    if options.nanogpt:
        nano = peers.nanogpt(options.nanogpt, *here).module.eval()
        found["nanoGPT"] = torch.no_grad()(lambda: nano.generate(idx, n, temperature, top_k))
    return found


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Options, prog="bench/generation.py", use_underscores=True, config=(tyro.conf.FlagConversionOff,)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
