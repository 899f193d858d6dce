"""The curves of training runs, and the band in which a run of the same recipe must lie.

Three curves are judged: the evaluations, `train/loss` and `val/loss`, as they are, and `loss`, that
of one batch, averaged over the last 50 steps up to each (those of them that are compared, the same
for every run).

The band at a step is [min - 3 sigma, max + 3 sigma] over the reference's runs. sigma is the larger
of two figures:

- The spread of the seeds: the standard deviation between the runs. Three runs say little at one
  step, so at the nth compared step it is the root mean square over those from n/2 - 5 to 2n + 5: a
  ratio, because the spread changes with the logarithm of the step.
- The sampling noise of a mean over m batches, s / sqrt(m): s from the differences of consecutive
  batch losses, m the batches of the evaluation or of the 50 steps. The seed draws the batches, so
  runs of different seeds cannot agree better than that; three that seem to do so by chance.

A single reference run shows no spread: then sigma is twice the noise, since between the seeds of
the two committed references the spread is 1.2 to 2.3 times the noise. With fewer than three runs
3 sqrt(2) replaces the 3: sigma is not known well. Two runs with the same seed read the same
batches, and should differ much less than this band allows.

Tried: seed 1, which is in neither committed reference, stays in the bands of both. Each of their
six runs against the other two: five in band, one outside for 2 of 2000 steps, by 0.0025. The bound
by the noise, and the sqrt(2), were added after these six were seen; seed 1 was judged afterwards.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.timing import ROOT
from common.files import read_json

SMOOTH_STEPS = 50
WIDENING = 3.0
CURVES = ("train/loss", "val/loss", "loss")
REMEDY = "give the out_dir of a run"


@dataclass(frozen=True)
class Run:
    """What metrics.jsonl and config.json hold: for each of CURVES its loss by step."""

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
        """How far outside of the band, in nats: positive above, 0 inside, inf for NaN."""
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
        if not np.isfinite(by):
            return "not a number"
        return f"{abs(by):.4f} {'above' if by > 0 else 'below'}"


# -- reading -------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """The run in a folder, without a torn last line, which a run that goes on may have.

    Raises ValueError where there are no metrics.
    """
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise ValueError(f"{folder}: no metrics.jsonl there; {REMEDY}")
    curves: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for number, line in enumerate(log.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            entry = json.loads(line)
            for name in CURVES:
                if name in entry:
                    value = float("nan") if entry[name] is None else float(entry[name])
                    curves[name][int(entry["iter"])] = value
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{log}, line {number}: "
                             f"no entry of metrics.jsonl ({error!r})") from None
    if not any(curves.values()):
        raise ValueError(f"{log}: no losses in it yet")
    config = folder / "config.json"
    leaves = read_json(config, dict[str, Any], REMEDY) if config.is_file() else {}
    return Run(folder.name, curves, leaves, _data_source(leaves))


def _data_source(leaves: dict[str, Any]) -> dict[str, Any] | None:
    folder = Path(leaves.get("data_dir") or ROOT / "data" / leaves.get("dataset", ""))
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    return read_json(manifest, dict[str, Any], "prepare the data of the run anew").get("source")


def read_reference(path: Path) -> list[Run]:
    """The runs of a reference file. Raises ValueError for any other file."""
    try:
        found = json.loads(path.read_text())
        steps, seeds = found["steps"], found["seeds"]
        return [Run(f"seed {seed}",
                    {name: dict(zip(steps[name], values[name], strict=True)) for name in CURVES},
                    found["config"], found["data"]) for seed, values in seeds.items()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no reference of curves ({error!r}); "
                         "make one with --write") from None


def read(path: str) -> list[Run]:
    """The runs of a folder or of a reference file."""
    if path.endswith(".json"):
        return read_reference(Path(path))
    return [read_run(Path(path))]


# -- the band ------------------------------------------------------------------


def smoothed(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean of values (runs, S) at the steps (S,), over the last SMOOTH_STEPS steps of each."""
    first = np.searchsorted(steps, steps - SMOOTH_STEPS, side="right")
    return np.stack([values[:, a : i + 1].mean(1) for i, a in enumerate(first)], axis=1)


def pooled(squares: np.ndarray) -> np.ndarray:
    """Root mean square of the squares (n,) around each position k: from k // 2 - 5 to 2 k + 5."""
    return np.sqrt([squares[max(0, k // 2 - 5) : 2 * k + 6].mean() for k in range(len(squares))])


def band(curve: str, steps: np.ndarray, runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value in band at the steps (S,), which all the runs have."""
    values = np.array([[run.curves[curve][s] for s in steps] for run in runs])
    levels = smoothed(steps, values) if curve == "loss" else values
    noise = np.sqrt(np.mean([_sampling_noise(curve, steps, run) ** 2 for run in runs], axis=0))
    spread = np.maximum(pooled(levels.var(axis=0, ddof=1)), noise) if len(runs) > 1 else 2 * noise
    width = WIDENING * (1.0 if len(runs) > 2 else np.sqrt(2)) * spread
    return levels.min(0) - width, levels.max(0) + width


def _sampling_noise(curve: str, steps: np.ndarray, run: Run) -> np.ndarray:
    """The standard error of the mean over the batches behind each value of a run.

    Raises ValueError for fewer than three logged steps.
    """
    logged = np.array(sorted(run.curves["loss"]))
    if len(logged) < 3:
        raise ValueError(f"{run.name}: {len(logged)} steps logged, too few to see the noise of its "
                         "batches; log more often")
    change = pooled(np.diff([run.curves["loss"][s] for s in logged]) ** 2) / np.sqrt(2)
    at = np.minimum(np.searchsorted(logged, steps), len(change) - 1)
    if curve == "loss":
        first = np.searchsorted(steps, steps - SMOOTH_STEPS, side="right")
        batches = 1 + np.arange(len(steps)) - first
    else:  # an evaluation's batch is one micro-batch
        iters, per_step = (run.config.get(key, 1)
                           for key in ("eval_iters", "gradient_accumulation_steps"))
        batches = np.full(len(steps), iters / per_step)
    return change[at] / np.sqrt(batches)


def judge(run: Run, reference: list[Run]) -> list[Verdict]:
    """A verdict on every curve of which the run shares steps with all of the reference's runs.

    Raises ValueError if there is none.
    """
    found = []
    for curve in CURVES:
        shared = set(run.curves[curve]).intersection(*(other.curves[curve] for other in reference))
        if not shared:
            continue
        steps = np.array(sorted(shared))
        low, high = band(curve, steps, reference)
        values = np.array([[run.curves[curve][s] for s in steps]])
        levels = smoothed(steps, values) if curve == "loss" else values
        found.append(Verdict(curve, steps, levels[0], low, high))
    if not found:
        raise ValueError(f"{run.name} has no step in common with "
                         f"{', '.join(r.name for r in reference)}; log more often")
    return found
