"""A projection, not a measurement: the time of an optimizer step on 1 to 1024 GPUs.

    python bench/steps/project.py --case=124M --node_gbs=300 --network_gbs=40 \\
        --matmul_fraction=0.86 --attention_fraction=0.7

Compute: the parts of a step in bench/floors.py, each divided by the fraction of its floor that was
measured for its kind (1: the floor itself).

Communication: rings over nodes of `gpus_per_node` GPUs. A reduce-scatter or an all-gather of G
bytes moves (g - 1) / g G over the link inside a node of g GPUs, then (m - 1) / m G / g over the
network between m nodes; an all-reduce is both. Bandwidths are those of one GPU, in one direction.

ddp all-reduces the gradients in the last micro-step of a step, behind its backward pass. fsdp
gathers the weights in bf16 in each micro-step, for the forward and the backward pass, and
reduce-scatters the gradients, behind both passes; it shards the optimizer. `overlap` is the
fraction of those passes that can hide communication; the backward pass is two thirds of both.

Not in the model: latencies, stragglers, the data loader, slower matrix products on small batches,
contention for memory.

The row of one GPU has the measurement beside it where bench/results/mfu-cuda.json has one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.floors import Rates, parameters, step_parts
from bench.ops.cases import GPT2
from bench.timing import result_path
from common import cli
from common.bounds import AboveZeroToOne, Positive, PositiveFloat, ZeroToOne, check
from common.files import read_json
from gpt.config import GPTConfig

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Options:
    """Project a training step onto many GPUs."""

    node_gbs: PositiveFloat
    """GB/s of one GPU to the others of its node, in one direction"""
    network_gbs: PositiveFloat
    """GB/s of one GPU to other nodes, in one direction"""
    case: Literal["124M", "350M", "774M", "1558M"] = "124M"
    matmul_tflops: PositiveFloat = 790.0
    """rate of bf16 matrix products on the GPU; the default is computed for an H200, not measured"""
    copy_gbs: PositiveFloat = 4300.0
    """rate of a copy, reads and writes counted; the default is computed, too"""
    matmul_fraction: AboveZeroToOne = 1.0
    """the fraction of the matrix rate that matrix products reach"""
    attention_fraction: AboveZeroToOne = 1.0
    """the fraction of the matrix rate that attention reaches"""
    memory_fraction: AboveZeroToOne = 1.0
    """the fraction of the copy rate that everything else reaches"""
    overlap: ZeroToOne = 1.0
    """the fraction of the passes that can hide communication"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    gpus_per_node: Positive = 8
    tokens_per_step: Positive = 2**19
    """of all GPUs together"""
    batch_size: Positive = 16
    """most sequences in a micro-batch"""
    grad_bytes: Positive = 4
    """of one gradient while it is reduced"""
    results: str = ""
    """JSON file of bench/mfu.py; empty: bench/results/mfu-cuda.json"""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Step:
    """A projected optimizer step of one GPU, in milliseconds."""

    passes_ms: float
    optimizer_ms: float
    communication_ms: float
    exposed_ms: float

    @property
    def total_ms(self) -> float:
        return self.passes_ms + self.optimizer_ms + self.exposed_ms


def model(case: str) -> GPTConfig:
    """A published size with this trainer's vocabulary and no biases."""
    c = GPT2[case]
    return GPTConfig(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)


def ring_ms(gigabytes: float, gpus: int, o: Options) -> float:
    """Milliseconds of one reduce-scatter or all-gather: inside the nodes, then between them."""
    g = min(gpus, o.gpus_per_node)
    nodes = gpus / g
    return 1e3 * gigabytes * ((g - 1) / g / o.node_gbs + (nodes - 1) / nodes / g / o.network_gbs)


def project(c: GPTConfig, gpus: int, o: Options) -> Step | None:
    """The step on `gpus` GPUs; None where they cannot all have the same number of sequences."""
    sequences, rest = divmod(o.tokens_per_step, c.block_size * gpus)
    if rest or sequences == 0 or (gpus > o.gpus_per_node and gpus % o.gpus_per_node):
        return None
    rates = Rates(o.matmul_tflops, o.copy_gbs)
    reached = {"matmul": o.matmul_fraction, "attention": o.attention_fraction}
    tokens = sequences * c.block_size
    ms = {part.name: part.ns(rates) * tokens * 1e-6 / reached.get(part.category, o.memory_fraction)
          for part in step_parts(c, tokens)}
    optimizer = ms.pop("optimizer")
    passes, micro_steps = sum(ms.values()), -(-sequences // o.batch_size)
    gradients = ring_ms(parameters(c) * o.grad_bytes * 1e-9, gpus, o)
    if o.parallel == "ddp":
        communication, hidden = 2 * gradients, o.overlap * passes / micro_steps * 2 / 3
    else:
        optimizer /= gpus
        communication = micro_steps * (2 * ring_ms(parameters(c) * 2e-9, gpus, o) + gradients)
        hidden = o.overlap * passes
    return Step(passes, optimizer, communication, max(0.0, communication - hidden))


def measured(case: str, results: Path) -> tuple[str, float] | None:
    """Our fastest variant and its tokens/s on one GPU, from a result of bench/mfu.py, if any."""
    if not results.is_file():
        return None
    result = read_json(results, dict[str, Any], "name a result of bench/mfu.py")
    variants = result.get("cases", {}).get(case, {}).get("variants", {})
    ours = {name: row["tokens_per_s"] for name, row in variants.items() if name.startswith("ours")}
    return max(ours.items(), key=lambda item: item[1]) if ours else None


def table(o: Options) -> str:
    """The projection as Markdown; each column says what it is."""
    c = model(o.case)
    return "\n".join([
        f"PROJECTION, not a measurement: {o.case}, {o.parallel}, {o.tokens_per_step:,} tokens a "
        f"step, T = {c.block_size}; given {o.matmul_tflops:g} TFLOP/s and {o.copy_gbs:g} GB/s per "
        f"GPU, of which matrix products reach {o.matmul_fraction:g}, attention "
        f"{o.attention_fraction:g}, the rest {o.memory_fraction:g}; {o.node_gbs:g} GB/s in nodes "
        f"of {o.gpus_per_node}, {o.network_gbs:g} GB/s between; overlap {o.overlap:g}.", "",
        "| GPUs | projected ms/step | projected tokens/s | projected scaling | "
        "projected communication, ms | measured tokens/s |",
        "|---|---|---|---|---|---|", *(_row(c, gpus, o) for gpus in GPUS),
    ])


def _row(c: GPTConfig, gpus: int, o: Options) -> str:
    step, single = project(c, gpus, o), project(c, 1, o)
    if step is None:
        return f"| {gpus} | n/a: {o.tokens_per_step} tokens are not shared out equally | | | | |"
    rate = o.tokens_per_step / step.total_ms * 1e3
    scaling = f"{single.total_ms / step.total_ms / gpus:.0%}" if single else "n/a"
    told = "not measured"
    if gpus == 1 and (found := measured(o.case, result_path(o.results, "mfu-cuda"))):
        name, speed = found
        told = f"{speed:,.0f} ({name}), {speed / rate:.0%} of the projection"
    return (f"| {gpus} | {step.total_ms:.1f} | {rate:,.0f} | {scaling} | "
            f"{step.communication_ms:.1f}, {step.exposed_ms:.1f} exposed | {told} |")


def main(options: Options) -> None:
    """Print the projection."""
    print(table(options))


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
