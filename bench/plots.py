"""Three pictures of the results; `python bench/plots.py` draws those that bench/results allows.

roofline-DEVICE.png    every operator of operators-DEVICE.json under the two measured ceilings
tokens-DEVICE.png      tokens/s by peer, of mfu-DEVICE.json
waterfall-DEVICE.png   a training step from its floor to its measured time, of profile-DEVICE.json
                       (bench/mfu.py --profile=True --out=...), or else of mfu-DEVICE.json

All figures come from the files; under each picture stands where they were measured.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from bench.operators import matmul_rate
from bench.report import where
from bench.timing import RESULTS
from common import cli
from common.plot import picture

# Forward operations per input element: of a norm two sums, centring, scaling, shifting (of an RMS
# norm a square, a sum, scaling); of a loss an exponential, its sum, a maximum. They only place a
# point along the axis; its distance to the roof is the measured one.
NOMINAL_OPERATIONS = {"layernorm": 8, "add_layernorm": 9, "rmsnorm": 3, "add_rmsnorm": 4,
                      "cross_entropy": 5}
NOMINAL_PASSES = {"forward": 1, "backward": 2, "both": 3}
MARKERS = {"attention": "o", "attention_qkv": "s", "layernorm": "^", "add_layernorm": "v",
           "rmsnorm": "<", "add_rmsnorm": ">", "cross_entropy": "D", "linear_cross_entropy": "P"}
COLORS = {"ours": "tab:red", "torch": "tab:blue", "torch, compiled": "tab:cyan",
          "reference": "tab:gray", "Liger": "tab:purple", "flash-attn": "tab:brown",
          "SDPA flash": "tab:olive", "SDPA cuDNN": "tab:green", "SDPA efficient": "tab:pink"}


@dataclass(frozen=True)
class Options:
    """Draw the results."""

    results: str = ""
    """folder of the JSON files; empty: bench/results"""
    out: str = ""
    """folder of the pictures; empty: the same"""


# -- roofline --------------------------------------------------------------------


def intensity_and_speed(case: dict[str, Any], phase: str, of_floor: float,
                        rates: dict[str, Any]) -> tuple[float, float]:
    """(operations per byte, TFLOP/s) of a phase; its share of the roof is that of its floor."""
    floor = case["floor"][phase]
    flops = floor["flops"]
    if not flops:
        elements = case["shape"][0] * case["shape"][1]
        flops = NOMINAL_PASSES[phase] * NOMINAL_OPERATIONS[case["operator"]] * elements
    intensity = flops / floor["bytes"]
    roof = min(rates["matmul_tflops"], intensity * rates["copy_gbs"] / 1e3)
    return intensity, of_floor * roof


def phases(case: dict[str, Any]) -> tuple[str, str]:
    """Forward and backward; of a loss, whose backward has no floor of its own, forward and both."""
    return "forward", "both" if case["floor"]["backward"] is None else "backward"


def roofline(result: dict[str, Any], figure: Any) -> None:
    """Operators under the roof: flat for matrix products, rising for what only moves bytes."""
    axes, rates = figure.add_subplot(), result["rates"]
    intensities = [rates["matmul_tflops"] * 1e3 / rates["copy_gbs"]]  # the ridge
    shown: dict[str, dict[str, Any]] = {}  # for the legend: the look of each implementation
    operators: dict[str, dict[str, Any]] = {}
    for case in result["cases"].values():
        for name, row in case["variants"].items():
            for phase, fill_style in zip(phases(case), ("full", "none")):
                if row[phase] is None:
                    continue
                x, y = intensity_and_speed(case, phase, row[phase]["of_floor"], rates)
                look = {"marker": MARKERS[case["operator"]], "color": COLORS[name],
                        "fillstyle": fill_style}
                axes.plot(x, y, linestyle="none", alpha=0.8, **look)
                intensities.append(x)
                shown[name] = {"marker": "o", "color": COLORS[name]}
                operators[case["operator"]] = {"marker": look["marker"], "color": "k"}
    ends = [min(intensities) / 2, intensities[0], max(intensities) * 2]
    roof = [min(rates["matmul_tflops"], x * rates["copy_gbs"] / 1e3) for x in ends]
    axes.plot(ends, roof, "k-", linewidth=1)
    title = (f"Operators under the roof of a copy, {rates['copy_gbs']:,.4g} GB/s, and a matrix "
             f"product, {matmul_rate(rates['matmul_tflops'])}\n"
             "filled: forward; hollow: backward, of a loss both together")
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s", title=title,
             xlabel="operations per byte (of norms and losses: nominal)")
    handles = [axes.plot([], [], linestyle="none", label=label, **look)[0]
               for label, look in (shown | operators).items()]
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")


# -- tokens per second -----------------------------------------------------------


def tokens(result: dict[str, Any], figure: Any) -> None:
    """One panel per case, one bar per variant, with quartiles."""
    cases = result["cases"]
    lines = -(-len(cases) // 2)  # of two panels each
    bars = max(len(found["variants"]) for found in cases.values())
    figure.set_size_inches(10, max(6.0, lines * (1 + 0.35 * bars)))
    for i, (case, found) in enumerate(cases.items()):
        axes = figure.add_subplot(lines, min(2, len(cases)), i + 1)
        rows = found["variants"]
        count = found["batch_size"] * found["config"]["block_size"]
        speeds = [row["tokens_per_s"] for row in rows.values()]
        spread = [[row["tokens_per_s"] - 1e3 * count / row["step"]["q3_ms"]
                   for row in rows.values()],
                  [1e3 * count / row["step"]["q1_ms"] - row["tokens_per_s"]
                   for row in rows.values()]]
        labels = [f"{name}\n{row['dtype']}" for name, row in rows.items()]
        colors = ["tab:red" if name.startswith("ours") else "tab:blue" for name in rows]
        axes.barh(labels, speeds, xerr=spread, capsize=3, color=colors)
        for bar, speed in enumerate(speeds):
            axes.text(0.02 * max(speeds), bar, f"{speed:,.0f}", va="center",
                      color="white", fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=5)
        axes.set(title=f"{case}, batch {found['batch_size']}", xlabel="tokens/s")


# -- waterfall -------------------------------------------------------------------


def waterfall(result: dict[str, Any], figure: Any) -> None:
    """Our fastest variant in the first profiled case: floors by category, then the times beyond."""
    case, variants = next((name, found["profile"]["variants"])
                          for name, found in result["cases"].items() if found.get("profile"))
    ours = {name: row for name, row in variants.items() if name.startswith("ours")} or variants
    name = min(ours, key=lambda n: ours[n]["step_ms"])
    step = ours[name]
    axes, reached = figure.add_subplot(), 0.0
    bars = [(f"floor: {c}", row["floor_ms"], "tab:gray") for c, row in step["categories"].items()
            if row["floor_ms"]]
    bars += [(f"beyond: {c}", row["ms"] - row["floor_ms"], "tab:red")
             for c, row in step["categories"].items()]
    for label, ms, color in bars:
        axes.barh(label, ms, left=reached, color=color if ms >= 0 else "tab:green")
        axes.text(max(reached, reached + ms) + 0.005 * step["step_ms"], label, f"{ms:.3g}",
                  va="center", fontsize=8)
        reached += ms
    axes.barh("measured", step["step_ms"], color="tab:blue")
    axes.text(step["step_ms"] * 1.005, "measured", f"{step['step_ms']:.4g}",
              va="center", fontsize=8)
    axes.axvline(step["floor_ms"], color="k", linewidth=0.5, linestyle=":")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    title = f"{case}, {name}: one step of {step['tokens']:,} tokens, under the profiler"
    axes.set(xlabel="ms", title=title)


# -- files -----------------------------------------------------------------------

PICTURES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], Any], None]]] = {
    "roofline": (("operators",), roofline), "tokens": (("mfu",), tokens),
    "waterfall": (("profile", "mfu"), waterfall)}


def source(name: str, device: str, results: Path) -> dict[str, Any] | None:
    """The result to draw a picture from, or None where it was not measured."""
    for benchmark in PICTURES[name][0]:
        path = results / f"{benchmark}-{device}.json"
        result = json.loads(path.read_text()) if path.exists() else {"cases": {}}
        if any(name != "waterfall" or case.get("profile") for case in result["cases"].values()):
            return result
    return None


def draw(name: str, result: dict[str, Any], path: Path) -> None:
    """One picture, with the machine, versions, commit and command under it."""
    told = where(result["environment"]).replace("`", "")
    with picture(path, 10, 6, dpi=110) as figure:
        PICTURES[name][1](result, figure)
        figure.supxlabel(fill(told, 150, break_on_hyphens=False), fontsize=7)


def main(options: Options) -> list[Path]:
    """Draw what there are results for; the pictures' paths. Raises ValueError if there are none."""
    results = Path(options.results) if options.results else RESULTS
    out = Path(options.out) if options.out else results
    drawn = []
    for name in PICTURES:
        for device in ("cpu", "cpu-bf16", "cuda"):
            if (result := source(name, device, results)) is not None:
                drawn.append(out / f"{name}-{device}.png")
                draw(name, result, drawn[-1])
                print(drawn[-1])
    if not drawn:
        raise ValueError(f"{results}: no results to draw; run `python bench/suite.py "
                         f"--out={results}` first")
    return drawn


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
