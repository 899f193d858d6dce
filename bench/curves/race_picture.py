"""The picture of a race (bench/race.py): validation loss over tokens, and over seconds."""

from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from bench.report import where
from common.plot import picture

RIVALS = ("tab:blue", "tab:green", "tab:purple", "tab:cyan", "tab:gray")
OURS = ("tab:red", "tab:orange", "tab:brown", "tab:pink", "tab:olive")
SHOWN = 0.4  # of the way from the best final loss up to the first loss: the rest is alike for all
PANELS = (("tokens", "tokens trained on", 1e6, " (millions)"),
          ("seconds", "seconds of training", 1.0, ""))


def draw(path: Path, result: dict[str, Any]) -> None:
    """Every seed's curve, a dot at each final loss, and a line at each loss to be reached."""
    colors = {name: palette[i % len(palette)]
              for names, palette in ((result["rivals"], RIVALS), (result["ours"], OURS))
              for i, name in enumerate(names)}
    with picture(path, 11, 6, dpi=110) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (key, label, scale, unit) in zip(panels, PANELS):
            for name, color in colors.items():
                for run in result["contestants"][name]["runs"].values():
                    curve = run["curve"]
                    at = [value / scale for value in curve[key]]
                    axes.plot(at, curve["val_loss"], color=color, linewidth=0.9, alpha=0.85)
                    axes.plot(at[-1], run["final_loss"], "o", color=color, markersize=5)
            for name, found in result["verdicts"].items():
                axes.axhline(found["target"], color=colors[name], linestyle="--", linewidth=0.9)
            axes.set(xlabel=label + unit, xlim=(0, None), ylim=limits(result))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("validation loss (nats per token)")
        contestants = [({"marker": "o", "color": colors[name]}, label_of(name, found))
                       for name, found in result["contestants"].items()]
        aims = [({"linestyle": "--", "color": colors[name]}, aim_of(name, found))
                for name, found in result["verdicts"].items()]
        for looks, side in ((contestants, "left"), (aims, "right")):
            handles = [panels[0].plot([], [], label=label, **look)[0] for look, label in looks]
            figure.legend(handles=handles, loc=f"outside upper {side}", fontsize=9, frameon=False)
        seeds = len(next(iter(result["contestants"].values()))["runs"])
        told = (f"{result['case']}: a thin line for each of {seeds} seeds, a dot at its loss on "
                f"the whole split. {where(result['environment'])}").replace("`", "")
        figure.supxlabel(fill(told, 165, break_on_hyphens=False), fontsize=7)


def limits(result: dict[str, Any]) -> tuple[float, float]:
    """The lowest and highest loss to show: the ends of the curves, not the fall from chance."""
    runs = [run for found in result["contestants"].values() for run in found["runs"].values()]
    best = min(run["final_loss"] for run in runs)
    fall = max(run["curve"]["val_loss"][0] for run in runs) - best
    return best - 0.06 * fall, max(best + SHOWN * fall, max(run["final_loss"] for run in runs))


def label_of(name: str, found: dict[str, Any]) -> str:
    """A contestant, with its steps and mean final loss."""
    loss = fmean(run["final_loss"] for run in found["runs"].values())
    steps = "" if "steps" in name else f", {found['steps']:,} steps"
    return f"{name}{steps}: {loss:.3f}"


def aim_of(rival: str, found: dict[str, Any]) -> str:
    """A loss to be reached, and what ours takes of the rival's tokens and seconds."""
    if not found["reached_by"]:
        return f"{rival} ends at {found['target']:.3f}: not reached by ours"
    return (f"{rival} ends at {found['target']:.3f}: ours takes 1/{found['tokens']:.1f} of its "
            f"tokens, 1/{found['training_s']:.1f} of its seconds")
