"""Is a training curve what it should be? A run against others, or against a committed reference: in
or out of their band.

    python bench/compare_run.py out-quickstart --reference=quickstart      # bench/results/reference-quickstart.json
    python bench/compare_run.py out-mine out-theirs --plot=curves.png      # the first run against the second
    python bench/compare_run.py out-mine seed-1 seed-2 seed-3              # against the band of three
    python bench/compare_run.py --write=bench/results/reference-NAME.json seed-1 seed-2 seed-3

A run is a folder with metrics.jsonl; a reference made by --write is a JSON file and stands for its
runs. Exit code 0: in band; 1: out; 2: bad input. A run that is shorter, or logs other steps, is
compared on the steps that all have.

Three curves are judged: the evaluations, `train/loss` and `val/loss`, as they are; and `loss`, one
batch's, averaged over the 50 steps up to each (those of them that were compared, of every run
alike).

The band at a step is [min - 3 S, max + 3 S] over the reference's runs. S is the larger of two
figures. One is the spread of the
seeds: the standard deviation between the runs, as a root mean square over the n/2 - 5th to 2n + 5th
compared step around the nth. It pools because three runs say little at one step, and over a ratio
because the spread changes with the logarithm of the step. The other is the sampling noise of a mean
over m batches, s / sqrt(m): s from the differences of consecutive batch losses, m the batches of
the evaluation or of the 50 steps. Runs with unlike seeds cannot agree better than that, since the
seed draws the batches of training and of evaluations; three that seem to do so by chance.

A single reference run shows no spread: S is twice the noise, because between the seeds of the two
committed references the spread is 1.2 to 2.3 times that. With fewer than three runs 3 sqrt(2)
stands for the 3: there is too little to know S from. Two runs with the same seed, which read the
same batches, should differ much less than this band allows.

Tried: seed 1, which is not in them, stays in the bands of both committed references. Each of their
six runs against the other
two: five in band, one outside for 2 of 2000 steps, by 0.0025. That the noise bounds S, and the
sqrt(2), were put in after seeing these six; seed 1 was judged afterwards.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.timing import ROOT, environment, write_result
from common import cli
from gpt.config import StitchedConfig
from train.config import OptimConfig, changed, unflatten

SMOOTH_STEPS = 50
WIDENING = 3.0
CURVES = ("train/loss", "val/loss", "loss")
# not what a run is
PLACES = {"out_dir", "data_dir", "resume_dir", "merge_dir", "seed", "init_from", "wandb_run_name"}
RECIPE = {f.name for section in (StitchedConfig, OptimConfig)
          for f in fields(section)} | {"batch_size", "eval_iters"}


@dataclass(frozen=True)
class Options:
    """Compare a run's curves with others."""

    runs: tuple[str, ...]
    """folders of runs; the first is judged by the others (or by --reference); a reference's JSON
    file may stand among these"""
    reference: str = ""
    """quickstart, shakespeare: those of bench/results"""
    plot: str = ""
    """PNG file to draw the curves and the band to"""
    write: str = ""
    """make a reference of the runs, into this JSON file, instead of comparing"""
    commit: str = ""
    """with --write: the commit that the runs were trained at, if it is not the one of this
    checkout"""


@dataclass(frozen=True)
class Run:
    """What metrics.jsonl and config.json say: for each of CURVES its loss by step."""

    name: str
    curves: dict[str, dict[int, float]]
    config: dict[str, Any]
    data: dict[str, Any] | None


@dataclass(frozen=True)
class Verdict:
    """One curve of a run and its band, on the steps compared, each an array (S,)."""

    curve: str
    steps: np.ndarray
    run: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def beyond(self) -> np.ndarray:
        """How far outside of the band, in nats; above where positive, 0 inside, inf for a NaN."""
        by = np.maximum(self.run - self.high, 0) - np.maximum(self.low - self.run, 0)
        return np.where(np.isnan(self.run), np.inf, by)

    @property
    def inside(self) -> bool:
        return not self.beyond.any()

    def __str__(self) -> str:
        text = f"{self.curve:10} {len(self.steps)} steps from {self.steps[0]} to {self.steps[-1]}: "
        if self.inside:
            last = f"{self.run[-1]:.4f} in [{self.low[-1]:.4f}, {self.high[-1]:.4f}]"
            return text + f"in band; at the end {last}"
        first, worst = int(np.argmax(self.beyond != 0)), int(np.argmax(np.abs(self.beyond)))
        band = f"{self.run[first]:.4f}, band [{self.low[first]:.4f}, {self.high[first]:.4f}]"
        return text + (f"OUT from step {self.steps[first]}: {band}, {self._by(first)}; worst at "
                       f"step {self.steps[worst]}, {self._by(worst)}; "
                       f"{int((self.beyond != 0).sum())} steps outside")

    def _by(self, i: int) -> str:
        by = self.beyond[i]
        return f"{abs(by):.4f} {'above' if by > 0 else 'below'}" if np.isfinite(
            by) else "not a number"


# -- reading -------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises ValueError where it has no metrics; a torn last line, of a run
    that goes on, is left out."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise ValueError(f"{folder}: no metrics.jsonl there; give the out_dir of a run")
    curves: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for number, line in enumerate(log.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            entry = json.loads(line)
            for name in CURVES:
                if name in entry:
                    value = entry[name]
                    curves[name][int(entry["iter"])] = float(
                        "nan") if value is None else float(value)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{log}, line {number}: no entry of metrics.jsonl ({error!r})") from None
    if not any(curves.values()):
        raise ValueError(f"{log}: no losses in it yet")
    config = folder / "config.json"
    leaves = json.loads(config.read_text()) if config.is_file() else {}
    return Run(folder.name, curves, leaves, _data_source(leaves))


def _data_source(leaves: dict[str, Any]) -> dict[str, Any] | None:
    folder = Path(leaves["data_dir"]) if leaves.get("data_dir") else ROOT / "data" / leaves.get(
        "dataset", "")
    manifest = folder / "manifest.json"
    return json.loads(manifest.read_text()).get("source") if manifest.is_file() else None


def read_reference(path: Path) -> list[Run]:
    """The runs of a reference file. Raises ValueError for a file that is none."""
    try:
        found = json.loads(path.read_text())
        steps, seeds = found["steps"], found["seeds"]
        return [Run(f"seed {seed}",
                    {name: dict(zip(steps[name], values[name], strict=True)) for name in CURVES},
                    found["config"], found["data"]) for seed, values in seeds.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no reference of curves ({error!r}); make one with --write") from None


def read(path: str) -> list[Run]:
    if path.endswith(".json"):
        return read_reference(Path(path))
    return [read_run(Path(path))]


# -- the band ------------------------------------------------------------------


def smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each of the steps (S,) the mean of values (runs, S) over those of the last SMOOTH_STEPS
    steps."""
    first = np.searchsorted(steps, steps - SMOOTH_STEPS, side="right")
    return np.stack([values[:, a : i + 1].mean(1) for i, a in enumerate(first)], axis=1)


def pooled(squares: np.ndarray) -> np.ndarray:
    """Root mean square of squares (S,) over the n/2 - 5th to 2n + 5th around each nth."""
    return np.sqrt([squares[max(0, n // 2 - 5) : 2 * n + 6].mean() for n in range(len(squares))])


def band(curve: str, steps: np.ndarray, runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value that is in band at each of the steps (S,), of runs that all have
    them."""
    values = np.array([[run.curves[curve][s] for s in steps] for run in runs])
    levels = smoothed(steps, values) if curve == "loss" else values
    noise = np.sqrt(np.mean([_sampling_noise(curve, steps, run) ** 2 for run in runs], axis=0))
    spread = np.maximum(pooled(levels.var(axis=0, ddof=1)), noise) if len(runs) > 1 else 2 * noise
    width = WIDENING * (1.0 if len(runs) > 2 else np.sqrt(2)) * spread
    return levels.min(0) - width, levels.max(0) + width


def _sampling_noise(curve: str, steps: np.ndarray, run: Run) -> np.ndarray:
    """The standard error of the mean over the batches behind each value of a run."""
    logged = np.array(sorted(run.curves["loss"]))
    if len(logged) < 3:
        raise ValueError(f"{run.name}: {len(logged)} steps logged, too few to see the noise of its "
                         "batches; log more often")
    change = pooled(np.diff([run.curves["loss"][s] for s in logged]) ** 2) / np.sqrt(2)
    at = np.minimum(np.searchsorted(logged, steps), len(change) - 1)
    if curve == "loss":
        batches = 1 + np.arange(len(steps)) - np.searchsorted(steps, steps - SMOOTH_STEPS,
                                                              side="right")
    else:  # an evaluation's batch is one micro-batch
        batches = np.full(len(steps),
                          run.config.get("eval_iters", 1)
                          / run.config.get("gradient_accumulation_steps", 1))
    return change[at] / np.sqrt(batches)


def judge(run: Run, reference: list[Run]) -> list[Verdict]:
    """Every curve that the run shares steps with all of the reference's. Raises ValueError if there
    is none."""
    found = []
    for curve in CURVES:
        shared = set(run.curves[curve]).intersection(*(other.curves[curve] for other in reference))
        if not shared:
            continue
        steps = np.array(sorted(shared))
        low, high = band(curve, steps, reference)
        values = np.array([[run.curves[curve][s] for s in steps]])
        found.append(Verdict(curve, steps,
                             (smoothed(steps, values) if curve == "loss" else values)[0], low,
                             high))
    if not found:
        raise ValueError(f"{run.name} has no step in common with "
                         f"{', '.join(r.name for r in reference)}; log more often")
    return found


# -- saying --------------------------------------------------------------------


def differences(run: Run, other: Run) -> str:
    """The settings in which two runs' recipes differ, as a line to print; empty if in none, or if
    one has no config."""
    both = run.config.keys() & other.config.keys() & RECIPE
    found = [f"{k}={run.config[k]} (not {other.config[k]})"
             for k in sorted(both) if run.config[k] != other.config[k]]
    if run.data and other.data and run.data != other.data:
        theirs = [f"{k} {v} (not {other.data.get(k)})"
                  for k, v in run.data.items() if v != other.data.get(k)]
        found.append("data: " + ", ".join(theirs))
    return "; ".join(found)


def reference_of(runs: list[Run], names: list[str], commit: str = "") -> dict[str, Any]:
    """The content of a reference file. Raises ValueError for runs of different recipes, of one
    seed, or of other steps."""
    first = runs[0]
    for path, run in zip(names, runs, strict=True):
        if not run.config:
            raise ValueError(f"{path}: no config.json there")
        if unlike := differences(run, first):
            raise ValueError(f"{path} is another recipe than {names[0]}: {unlike}")
        if any(run.curves[name].keys() != first.curves[name].keys() for name in CURVES):
            raise ValueError(f"{path} has not the same steps as {names[0]}; log and evaluate "
                             "alike, to the end")
    seeds = [str(run.config["seed"]) for run in runs]
    if len(runs) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError("--write needs two runs or more, each with a seed of its own; these are "
                         f"{', '.join(seeds)}")
    where = environment("cpu") | ({"commit": commit, "dirty": None} if commit else {})
    config = {k: v for k, v in first.config.items() if k not in PLACES}
    settings = {k: v for k, v in first.config.items() if k != "seam"}  # no flag; made by a stitch
    flags = [f"--{k}={v}" for k, (_, v) in changed(unflatten(settings)).items()
             if k not in PLACES]
    steps = {name: np.array(sorted(first.curves[name])) for name in CURVES}
    bands = {name: band(name, at, runs) for name, at in steps.items()}
    return {
        "benchmark": "reference curves", "environment": where,
        "training": " ".join(["train/run.py", *flags]),
        "config": config, "data": first.data,
        "rule": {"smooth_steps": SMOOTH_STEPS, "widening": WIDENING,
                 "told_in": "bench/compare_run.py"},
        "steps": {name: at.tolist() for name, at in steps.items()},
        "seeds": {seed: {n: [round(run.curves[n][s], 4) for s in steps[n].tolist()] for n in CURVES}
                  for seed, run in zip(seeds, runs, strict=True)},
        "band": {name: {"low": low.round(4).tolist(), "high": high.round(4).tolist()}
                 for name, (low, high) in bands.items()},
    }


def draw(path: Path, run: Run, verdicts: list[Verdict]) -> None:
    """The run's curves on their bands, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(verdicts), figsize=(5 * len(verdicts), 4),
                                  layout="constrained", squeeze=False)
    for axes, v in zip(panels[0], verdicts, strict=True):
        axes.fill_between(v.steps, v.low, v.high, color="0.85", label="band")
        label = f"{run.name}: {'in' if v.inside else 'OUT'}"
        axes.plot(v.steps, v.run, marker="" if v.curve == "loss" else "o", markersize=3,
                  linewidth=1, label=label)
        smooth = f", mean of {SMOOTH_STEPS} steps" if v.curve == "loss" else ""
        axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=v.curve + smooth)
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(options: Options) -> int:
    """Compare and print, or write a reference: 0 in band (or written), 1 out."""
    if options.write:
        write_result(options.write, reference_of([read_run(Path(p)) for p in options.runs],
                                                 list(options.runs), options.commit))
        print(f"written to {options.write}")
        return 0
    against = list(options.runs[1:])
    if options.reference:
        against.append(str(ROOT / "bench" / "results" / f"reference-{options.reference}.json"))
        if not Path(against[-1]).is_file():
            known = sorted(p.stem.removeprefix("reference-")
                           for p in (ROOT / "bench" / "results").glob("reference-*.json"))
            raise ValueError(f"--reference={options.reference}: there are {', '.join(known)}")
    if not options.runs or not against:
        raise ValueError("give the folder of a run, and what to compare it with: other runs, or "
                         "--reference=quickstart")
    run, reference = read_run(Path(options.runs[0])), [r for path in against for r in read(path)]
    print(f"{options.runs[0]} against "
          f"{', '.join([*options.runs[1:], options.reference]).strip(', ')}, {len(reference)} runs")
    if unlike := differences(run, reference[0]):
        print(f"settings that differ: {unlike}")
    verdicts = judge(run, reference)
    print(*verdicts, sep="\n")
    if options.plot:
        draw(Path(options.plot), run, verdicts)
    inside = all(v.inside for v in verdicts)
    print("in band" if inside else "OUT OF BAND")
    return int(not inside)


if __name__ == "__main__":
    from tyro.conf import PositionalRequiredArgs

    sys.exit(cli.run(main, Options, markers=(PositionalRequiredArgs,)))
