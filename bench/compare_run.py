"""Is a training curve what it should be? A run against other runs, or a committed reference.

    python bench/compare_run.py out-quickstart --reference=quickstart
    python bench/compare_run.py out-mine out-theirs --plot=curves.png    # first against second
    python bench/compare_run.py out-mine seed-1 seed-2 seed-3    # against the band of three
    python bench/compare_run.py --write=bench/results/reference-NAME.json seed-1 seed-2 seed-3

A run is a folder with metrics.jsonl. A reference is a JSON file that --write made, and stands for
its runs; --reference=NAME is bench/results/reference-NAME.json. bench/curves/band.py says which
curves are judged, and how the band is found. Runs that are shorter, or log other steps, are
compared on the steps that all have. Exit code 0: in band; 1: out; 2: bad input.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.curves.band import (
    CURVES,
    SMOOTH_STEPS,
    WIDENING,
    Run,
    Verdict,
    band,
    judge,
    read,
    read_run,
)
from bench.timing import RESULTS, environment, write_result
from common import cli
from common.plot import picture
from gpt.config import StitchedConfig
from train.config import OptimConfig, changed, unflatten

# settings in which runs of one recipe may differ
PLACES = {"out_dir", "data_dir", "resume_dir", "merge_dir", "seed", "init_from", "wandb_run_name"}
SECTIONS = (StitchedConfig, OptimConfig)
RECIPE = {f.name for section in SECTIONS for f in fields(section)} | {"batch_size", "eval_iters"}


@dataclass(frozen=True)
class Options:
    """Compare a run's curves with others."""

    runs: tuple[str, ...]
    """folders of runs; the first is judged by the others and --reference; the others may also be
    JSON files of references"""
    reference: str = ""
    """a reference in bench/results: quickstart, quickstart_gpt2 or shakespeare"""
    plot: str = ""
    """PNG file to draw the curves and the band to"""
    write: str = ""
    """make a reference of the runs, into this JSON file, instead of comparing"""
    commit: str = ""
    """with --write: the commit at which the runs were trained, if it is not this checkout's"""


def differences(run: Run, other: Run) -> str:
    """The settings in which two runs' recipes differ, on one line; "" if in none."""
    # files from before there were others do not say that they are GPT-2's
    a, b = ({"architecture": "gpt2"} | r.config if r.config else {} for r in (run, other))
    found = [f"{k}={a[k]} (not {b[k]})" for k in sorted(a.keys() & b.keys() & RECIPE)
             if a[k] != b[k]]
    if run.data and other.data and run.data != other.data:
        theirs = [f"{k} {v} (not {other.data.get(k)})"
                  for k, v in run.data.items() if v != other.data.get(k)]
        found.append("data: " + ", ".join(theirs))
    return "; ".join(found)


def reference_of(runs: list[Run], names: list[str], commit: str = "") -> dict[str, Any]:
    """The content of a reference file.

    Raises ValueError for runs that differ in recipe or steps, or that share a seed.
    """
    first = runs[0]
    _check_alike(runs, names)
    seeds = [str(run.config["seed"]) for run in runs]
    if len(runs) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError("--write needs two runs or more, each with a seed of its own; these are "
                         f"{', '.join(seeds)}")
    where = environment("cpu") | ({"commit": commit, "dirty": None} if commit else {})
    config = {k: v for k, v in first.config.items() if k not in PLACES}
    # "seam" is no flag: --init_from=stitch sets it
    settings = {k: v for k, v in first.config.items() if k != "seam"}
    flags = [f"--{k}={v}" for k, (_, v) in changed(unflatten(settings)).items()
             if k not in PLACES]
    steps = {name: np.array(sorted(first.curves[name])) for name in CURVES}
    bands = {name: band(name, at, runs) for name, at in steps.items()}
    return {
        "benchmark": "reference curves", "environment": where,
        "training": " ".join(["train/run.py", *flags]), "config": config, "data": first.data,
        "rule": {"smooth_steps": SMOOTH_STEPS, "widening": WIDENING,
                 "told_in": "bench/curves/band.py"},
        "steps": {name: at.tolist() for name, at in steps.items()},
        "seeds": {seed: {n: [round(run.curves[n][s], 4) for s in steps[n].tolist()] for n in CURVES}
                  for seed, run in zip(seeds, runs, strict=True)},
        "band": {name: {"low": low.round(4).tolist(), "high": high.round(4).tolist()}
                 for name, (low, high) in bands.items()},
    }


def _check_alike(runs: list[Run], names: list[str]) -> None:
    for path, run in zip(names, runs, strict=True):
        if not run.config:
            raise ValueError(f"{path}: no config.json there")
        if unlike := differences(run, runs[0]):
            raise ValueError(f"{path} is another recipe than {names[0]}: {unlike}")
        if any(run.curves[name].keys() != runs[0].curves[name].keys() for name in CURVES):
            raise ValueError(f"{path} has not the same steps as {names[0]}; log and evaluate "
                             "alike, to the end")


def draw(path: Path, run: Run, verdicts: list[Verdict]) -> None:
    """The run's curves on their bands, one panel each."""
    with picture(path, 5 * len(verdicts), 4) as figure:
        for axes, v in zip(figure.subplots(1, len(verdicts), squeeze=False)[0], verdicts):
            axes.fill_between(v.steps, v.low, v.high, color="0.85", label="band")
            axes.plot(v.steps, v.run, marker="" if v.curve == "loss" else "o", markersize=3,
                      linewidth=1, label=f"{run.name}: {'in' if v.inside else 'OUT'}")
            smooth = f", mean of {SMOOTH_STEPS} steps" if v.curve == "loss" else ""
            axes.set(xlabel="step", ylabel="cross-entropy (nats per token)",
                     title=v.curve + smooth)
            axes.grid(alpha=0.3)
            axes.legend()


def main(options: Options) -> int:
    """Compare and print, or write a reference. 0 in band (or written), 1 out."""
    if options.write:
        runs = [read_run(Path(p)) for p in options.runs]
        write_result(options.write, reference_of(runs, list(options.runs), options.commit))
        print(f"written to {options.write}")
        return 0
    against = list(options.runs[1:])
    if options.reference:
        against.append(str(named_reference(options.reference)))
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


def named_reference(name: str) -> Path:
    """The file of a committed reference. Raises ValueError where there is none of this name."""
    path = RESULTS / f"reference-{name}.json"
    if not path.is_file():
        known = sorted(p.stem.removeprefix("reference-") for p in RESULTS.glob("reference-*.json"))
        raise ValueError(f"--reference={name}: there are {', '.join(known)}")
    return path


if __name__ == "__main__":
    from tyro.conf import PositionalRequiredArgs

    sys.exit(cli.run(main, Options, markers=(PositionalRequiredArgs,)))
