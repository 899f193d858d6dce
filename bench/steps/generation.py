"""Tokens/s of text generation, one sequence: ours beside transformers' and a nanoGPT checkout's.

    python bench/steps/generation.py --device=cpu --nanogpt=DIR

Greedy text must agree in fp32 before anything is timed.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bench.steps import peers
from bench.timing import environment, machine, measure, result_path, write_result
from common import cli, hardware
from common.bounds import Positive
from gpt import GPT, SIZES
from gpt.sample import Sample, weights_dtype


@dataclass(frozen=True)
class Options:
    """Measure generation."""

    device: str = "auto"
    size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """of the model, which has random weights"""
    new_tokens: Positive = 128
    nanogpt: str = ""
    """folder of a nanoGPT checkout to measure against"""
    repeats: Positive = 3
    out: str = ""
    """JSON file for the result; empty: bench/results/generation-MACHINE.json"""


def main(options: Options) -> dict:
    """Check, time in turns, print, write. Raises ValueError where greedy texts differ."""
    device = hardware.resolve_device(options.device)
    config = replace(SIZES[options.size], vocab_size=50304, activation="gelu")
    torch.manual_seed(0)
    model = GPT(config).eval()
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    idx = torch.randint(50257, (1, 4), device=device)
    model.to(device)
    check(makers(options, weights, model, idx, 16, top_k=1))
    best = GPT(config).eval().to(device)
    best.load_state_dict(weights)
    sample = Sample(max_new_tokens=options.new_tokens)
    best.to(weights_dtype(sample, best, idx.shape[1]))
    callables = {"ours": lambda: best.generate(idx, options.new_tokens),
                 **makers(options, weights, model, idx, options.new_tokens)}
    timings = measure(callables, device=device, warmup=1, repeats=options.repeats,
                      end_to_end=True)
    rate = {name: options.new_tokens / timing.median_ms * 1e3 for name, timing in timings.items()}
    rows: dict[str, dict] = {name: {"time": timings[name], "tokens_per_s": rate[name]}
                             for name in timings}
    rows["ours"]["dtype"] = str(best.lm_head.weight.dtype).removeprefix("torch.")
    for name in rows:
        ratio = rate["ours"] / rate[name]
        print(f"{name:20}{rate[name]:8.1f} tokens/s   ours is {ratio:.2f} x this")
    result = {"benchmark": "generation", "environment": environment(device), "options": options,
              "variants": rows}
    out = result_path(options.out, f"generation-{machine(device)}")
    write_result(out, result)
    print(f"written to {out}")
    return result


def check(generators: dict[str, Callable[[], Tensor]]) -> None:
    """Raise ValueError unless all write the text that ours writes in fp32."""
    texts = {name: generate()[0].tolist() for name, generate in generators.items()}
    expected = texts["ours, float32"]
    for name, text in texts.items():
        if text != expected:
            raise ValueError(f"{name} writes {text} where ours writes {expected}; not timed")


def makers(options: Options, weights: dict[str, Tensor], model: GPT, idx: Tensor, n: int,
           temperature: float = 1.0, top_k: int | None = None) -> dict[str, Callable[[], Tensor]]:
    """Callables by name that continue idx by n tokens, all in fp32."""
    found: dict[str, Callable[[], Tensor]] = {
        "ours, float32": lambda: model.generate(idx, n, temperature, top_k)}
    here = (model.config, weights, idx.device, torch.float32)
    if importlib.util.find_spec("transformers"):
        theirs: Any = peers.transformers_gpt2(*here).module.eval()
        theirs.generation_config.pad_token_id = theirs.generation_config.eos_token_id = None
        found["transformers"] = lambda: theirs.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=top_k != 1,
            top_k=top_k or 0, use_cache=True)
    if options.nanogpt:
        nano: Any = peers.nanogpt(options.nanogpt, *here).module.eval()
        found["nanoGPT"] = torch.no_grad()(lambda: nano.generate(idx, n, temperature, top_k))
    return found


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
