"""Three pictures from the results: `python bench/plots.py` draws those that bench/results has the figures for.

roofline-DEVICE.png   every operator of operators-DEVICE.json under the two measured ceilings
tokens-DEVICE.png     tokens/s by peer, of mfu-DEVICE.json
waterfall-DEVICE.png  a training step from its floor to what was measured, of profile-DEVICE.json (made by bench/mfu.py
                      --profile=True --out=...) or, where there is none, of mfu-DEVICE.json

Nothing here is typed by hand; under each picture stands where it was measured.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from bench.report import RESULTS, where

# What one element of a norm's or a loss's input takes, forward: two sums, centring, scaling, shifting; an exponential, its sum,
# a maximum. They only place these points along the axis, where their distance to the roof is the measured one.
NOMINAL_OPERATIONS = {"layernorm": 8, "add_layernorm": 9, "cross_entropy": 5}
PHASES = {"forward": "o", "backward": "s", "both": "D"}
COLORS = {"ours": "tab:red", "torch": "tab:blue", "torch, compiled": "tab:cyan", "reference": "tab:gray"}


@dataclass(frozen=True)
class Options:
    """Draw the results."""

    results: str = ""
    """folder of the JSON files; empty: bench/results"""
    out: str = ""
    """folder of the pictures; empty: the same"""


# -- roofline --------------------------------------------------------------------


def intensity_and_speed(case: dict[str, Any], phase: str, of_floor: float, rates: dict[str, Any]) -> tuple[float, float]:
    """(operations per byte, TFLOP/s) of a measured phase: as far below the roof as it is from its floor."""
    floor = case["floor"][phase]
    flops = floor["flops"] or NOMINAL_OPERATIONS[case["operator"]] * case["shape"][0] * case["shape"][1]
    intensity = flops / floor["bytes"]
    roof = min(rates["matmul_tflops"], intensity * rates["copy_gbs"] / 1e3)
    return intensity, of_floor * roof


def roofline(result: dict[str, Any], figure: Any) -> None:
    """Operators under the roof: matrix products where it is flat, what only moves bytes where it rises."""
    axes, rates = figure.add_subplot(), result["rates"]
    ridge = rates["matmul_tflops"] * 1e3 / rates["copy_gbs"]
    placed = []
    for case in result["cases"].values():
        for name, row in case["variants"].items():
            for phase, marker in PHASES.items():
                if not (measured := row[phase]) or measured["of_floor"] is None:
                    continue
                x, y = intensity_and_speed(case, phase, measured["of_floor"], rates)
                axes.plot(x, y, marker, color=COLORS.get(name, "tab:olive"), markersize=6, alpha=0.7, markeredgewidth=0)
                placed.append((x, y, case["operator"], name))
    lowest, highest = min(x for x, *_ in placed), max(ridge, *(x for x, *_ in placed))
    ends = lowest / 2, ridge, highest * 2
    axes.plot(ends, [min(rates["matmul_tflops"], x * rates["copy_gbs"] / 1e3) for x in ends], "k-", linewidth=1)
    axes.text(ends[2], rates["matmul_tflops"] * 1.07, f"matrix product {_rate(rates['matmul_tflops'])}", ha="right")
    axes.text(ends[0] * 1.1, ends[0] * rates["copy_gbs"] / 1e3 * 1.5, f"copy {rates['copy_gbs']:,.3g} GB/s", rotation=0)
    for operator in dict.fromkeys(p[2] for p in placed):
        mine = [p for p in placed if p[2] == operator]
        axes.annotate(operator, (mine[0][0], min(p[1] for p in mine)), xytext=(0, -14), textcoords="offset points", ha="center",
                      fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte (norms and losses: nominal)", ylabel="TFLOP/s",
             title="Operators under the measured roof")
    names = list(dict.fromkeys(p[3] for p in placed))
    handles = [axes.plot([], [], "o", color=COLORS.get(name, "tab:olive"), label=name)[0] for name in names]
    handles += [axes.plot([], [], marker, color="k", fillstyle="none", label=phase)[0] for phase, marker in PHASES.items()]
    axes.legend(handles=handles, fontsize=8, loc="lower right")


def _rate(tflops: float) -> str:
    return f"{tflops:,.0f} TFLOP/s" if tflops >= 10 else f"{1e3 * tflops:,.0f} GFLOP/s"


# -- tokens per second -----------------------------------------------------------


def tokens(result: dict[str, Any], figure: Any) -> None:
    """One panel per case, one bar per variant, with quartiles."""
    panels = figure.subplots(1, len(result["cases"]), squeeze=False)[0]
    for axes, (case, found) in zip(panels, result["cases"].items()):
        rows = found["variants"]
        count = found["batch_size"] * found["config"]["block_size"]
        speeds = [row["tokens_per_s"] for row in rows.values()]
        spread = [[row["tokens_per_s"] - 1e3 * count / row["step"]["q3_ms"] for row in rows.values()],
                  [1e3 * count / row["step"]["q1_ms"] - row["tokens_per_s"] for row in rows.values()]]
        labels = [f"{name}\n{row['dtype']}" for name, row in rows.items()]
        axes.barh(labels, speeds, xerr=spread, capsize=3, color=["tab:red" if n.startswith("ours") else "tab:blue" for n in rows])
        for i, speed in enumerate(speeds):
            axes.text(0.02 * max(speeds), i, f"{speed:,.0f}", va="center", color="white", fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.set(title=f"{case}, batch {found['batch_size']}", xlabel="tokens/s")


# -- waterfall -------------------------------------------------------------------


def waterfall(result: dict[str, Any], figure: Any) -> None:
    """The first profiled case's fastest variant of ours: the floor by category, then what each took beyond its floor."""
    case, variants = next((name, found["profile"]["variants"]) for name, found in result["cases"].items() if found.get("profile"))
    ours = {name: row for name, row in variants.items() if name.startswith("ours")} or variants
    name = min(ours, key=lambda n: ours[n]["step_ms"])
    step = ours[name]
    axes, reached = figure.add_subplot(), 0.0
    bars = [(f"floor: {c}", row["floor_ms"], "tab:gray") for c, row in step["categories"].items() if row["floor_ms"]]
    bars += [(f"beyond: {c}", row["ms"] - row["floor_ms"], "tab:red") for c, row in step["categories"].items()]
    for label, ms, color in bars:
        axes.barh(label, ms, left=reached, color=color if ms >= 0 else "tab:green")
        axes.text(max(reached, reached + ms) + 0.005 * step["step_ms"], label, f"{ms:.3g}", va="center", fontsize=8)
        reached += ms
    axes.barh("measured", step["step_ms"], color="tab:blue")
    axes.text(step["step_ms"] * 1.005, "measured", f"{step['step_ms']:.4g}", va="center", fontsize=8)
    axes.axvline(step["floor_ms"], color="k", linewidth=0.5, linestyle=":")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set(xlabel="ms", title=f"{case}, {name}: one step of {step['tokens']:,} tokens, under the profiler")


# -- files -----------------------------------------------------------------------

PICTURES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], Any], None]]] = {
    "roofline": (("operators",), roofline), "tokens": (("mfu",), tokens), "waterfall": (("profile", "mfu"), waterfall)}


def source(picture: str, device: str, results: Path) -> dict[str, Any] | None:
    """The result that a picture is drawn from, or None where it was not measured."""
    for benchmark in PICTURES[picture][0]:
        path = results / f"{benchmark}-{device}.json"
        result = json.loads(path.read_text()) if path.exists() else {"cases": {}}
        if any(picture != "waterfall" or case.get("profile") for case in result["cases"].values()):
            return result
    return None


def draw(picture: str, result: dict[str, Any], path: Path) -> None:
    """One picture, with the machine, versions, commit and command under it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    PICTURES[picture][1](result, figure)
    figure.supxlabel(fill(where(result["environment"]).replace("`", ""), 150), fontsize=7)
    figure.savefig(path)


def main(options: Options) -> list[Path]:
    """Draw what there are results for; the pictures' paths. Raises ValueError where there are none."""
    results = Path(options.results) if options.results else RESULTS
    out = Path(options.out) if options.out else results
    drawn = []
    for picture in PICTURES:
        for device in ("cpu", "cuda"):
            if (result := source(picture, device, results)) is not None:
                drawn.append(out / f"{picture}-{device}.png")
                draw(picture, result, drawn[-1])
                print(drawn[-1])
    if not drawn:
        raise ValueError(f"{results}: no results to draw; run `python bench/suite.py --out={results}` first")
    return drawn


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Options, prog="bench/plots.py", config=(tyro.conf.FlagConversionOff,)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
