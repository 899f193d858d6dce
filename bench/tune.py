"""Find launch settings by measuring, on the GPU of this machine, and say which suite is fastest there.

    python bench/tune.py                                 all four sizes of GPT-2, all families of operators
    python bench/tune.py --sizes=124M --family=layernorm

Each function of kernels/launch.py is tuned in turn, with the others as they are or as already chosen: every candidate's
outputs and gradients are checked first, then those that are right are timed interleaved, and the fastest by median is
taken, if it beats today's setting by more than MARGIN. Then the operators are timed against PyTorch's fused ones under
torch.compile. Rows ready for launch.py are printed; everything goes to the user's cache (and to --out), as JSON.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import tyro

from bench import cases
from bench.cases import Case
from bench.timing import Timing, environment, measure, write_result
from kernels import FAMILIES, launch

MARGIN = 0.01  # a setting is changed for at least 1 %: less is within the noise from run to run

# What to try: for each function of launch.py, the phase its kernel runs in, and the values of its settings.
KNOBS: dict[str, tuple[str, dict[str, tuple]]] = {
    "attention_forward": ("forward", {
        "BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}),
    "attention_backward_q": ("step", {
        "BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}),
    "attention_backward_kv": ("step", {
        "BLOCK_M": (32, 64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}),
}


@dataclass(frozen=True)
class Options:
    """Find launch settings by measuring on this machine's GPU, and compare with PyTorch's fused operators."""

    sizes: str = ",".join(cases.GPT2)  # which GPT-2 sizes, with commas between
    family: str = ""  # only this family of operators (attention, layernorm, cross_entropy)
    batch: int = 16  # sequences of 1024 tokens
    repeats: int = 20  # samples of each candidate
    out: str = ""  # a second place for the JSON


# -- pure parts ----------------------------------------------------------------


def candidates(knobs: Mapping[str, tuple], current: dict) -> list[dict]:
    """Today's settings first, then every other combination of the knobs' values; what is no knob stays as it is."""
    unknown = set(knobs) - set(current)
    assert not unknown, f"launch.py does not set {', '.join(sorted(unknown))}: {current}"
    product = (current | dict(zip(knobs, values)) for values in itertools.product(*knobs.values()))
    return [current, *(settings for settings in product if settings != current)]


def choose(times: Mapping[str, Timing], current: str) -> str:
    """The fastest by median; the current one unless beaten by more than MARGIN. A current one that could not be timed
    is beaten by any."""
    best = min(times, key=lambda name: times[name].median_ms)
    if current in times and times[best].median_ms > (1 - MARGIN) * times[current].median_ms:
        return current
    return best


def fastest(peers: list[dict]) -> dict[str, str]:
    """The suite each family should come from: triton only where the sum of its operators' steps is the smaller one at
    every size measured."""
    totals: dict[tuple[str, str], dict[str, float]] = {}
    for row in peers:
        total = totals.setdefault((row["family"], row["size"]), {"triton": 0.0, "torch": 0.0})
        for suite in total:
            total[suite] += row["step"][suite].median_ms
    families = dict.fromkeys(family for family, _ in totals)
    return {family: "triton" if all(t["triton"] < t["torch"] for (f, _), t in totals.items() if f == family) else "torch"
            for family in families}


def cache_file(gpu: str, environ: Mapping[str, str]) -> Path:
    """Where the results for a GPU of this name are kept for this user."""
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ridgegpt" / f"tune-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"


# -- steering launch.py ----------------------------------------------------------


class Call(NamedTuple):
    """A function of launch.py and what it was asked for."""

    function: str
    arguments: tuple

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(repr, self.arguments))})"


@contextmanager
def steered() -> Iterator[tuple[dict[Call, dict], dict[Call, dict]]]:
    """(today, chosen): the settings launch.py gave for each call since, and those that are to replace them."""
    today: dict[Call, dict] = {}
    chosen: dict[Call, dict] = {}

    def steer(name: str) -> Callable:
        original = getattr(launch, name)

        def settings(*arguments):
            call = Call(name, arguments)
            today.setdefault(call, original(*arguments))
            return chosen.get(call, today[call])
        return settings

    with ExitStack() as stack:
        for name in KNOBS:
            stack.enter_context(patch.object(launch, name, steer(name)))
        yield today, chosen


# -- measuring -------------------------------------------------------------------


def phases(fn: Callable, case: Case, device: torch.device | str) -> dict[str, Callable[[], object]]:
    """What is timed of an operator: the forward alone, and forward and backward together."""
    args, kwargs = cases.arguments(case, device), cases.options(case, device)
    gradients = dict(cases.run(fn, args, kwargs))["gradients"]
    return {"forward": lambda: fn(*args, **kwargs), "step": lambda: dict(cases.run(fn, args, kwargs, gradients))}


def tune_call(call: Call, current: dict, chosen: dict[Call, dict], fn: Callable, case: Case, small: Case,
              device: torch.device | str, repeats: int) -> dict:
    """Try all settings for one call of launch.py; leaves the best in `chosen` and returns the row for it."""
    import triton

    phase, knobs = KNOBS[call.function]
    trials = {str(settings): settings for settings in candidates(knobs, current)}
    run = phases(fn, case, device)[phase]

    def variant(settings: dict) -> Callable[[], object]:
        def go() -> object:
            chosen[call] = settings
            return run()
        return go

    failed, usable = {}, {}
    for label, settings in trials.items():
        chosen[call] = settings
        try:
            wrong = cases.inaccuracy(fn, small, device)
            wrong = wrong or (variant(settings)() and "")
        except triton.TritonError as error:  # too much shared memory, or no way to compile it: not a candidate here
            wrong = str(error).strip().splitlines()[0]
        if wrong:
            failed[label] = wrong
        else:
            usable[label] = variant(settings)
    if not usable:
        raise RuntimeError(f"{call}: none of {len(trials)} settings works on this GPU; the first: {failed[str(current)]}")
    times = measure(usable, device=device, repeats=repeats)
    best = choose(times, str(current))
    chosen[call] = trials[best]
    return {"function": call.function, "call": str(call), "case": str(case), "phase": phase, "settings": trials[best],
            "before": current, "times": times, "failed": failed}


def tune(chosen_cases: list[tuple[str, Case, Case]], device: torch.device | str, repeats: int,
         compiled: Callable[[Callable], Callable] = torch.compile) -> dict:
    """Rows for launch.py and times against PyTorch, for (size, case, small case of the same kind) each."""
    rows, peers = [], []
    with steered() as (today, chosen):
        for size, case, small in chosen_cases:
            fn = cases.operator(case, "triton")
            for run in phases(fn, case, device).values():
                run()
            for call, current in list(today.items()):
                if call not in chosen:
                    rows.append(tune_call(call, current, chosen, fn, case, small, device, repeats))
                    print(_line(rows[-1]), flush=True)
            peers.append(_peers(size, case, small, device, repeats, compiled))
            print(_peer_line(peers[-1]), flush=True)
    return {"environment": environment(device), "rows": rows, "peers": peers, "fastest": fastest(peers)}


def _peers(size: str, case: Case, small: Case, device: torch.device | str, repeats: int,
           compiled: Callable[[Callable], Callable]) -> dict:
    """Both suites on one case, interleaved, after a check of ours as it now is."""
    fn, peer = cases.operator(case, "triton"), cases.operator(case, "torch")
    if wrong := cases.inaccuracy(fn, small, device):
        raise RuntimeError(f"{small}: {wrong}; no speed is reported for a wrong result")
    suites = {"triton": phases(fn, case, device), "torch": phases(compiled(peer), case, device)}
    times = {phase: measure({suite: runs[phase] for suite, runs in suites.items()}, device=device, repeats=repeats)
             for phase in ("forward", "step")}
    return {"size": size, "family": case.family, "case": str(case), **times}


def _line(row: dict) -> str:
    times = row["times"]
    before, after = times.get(str(row["before"])), times[str(row["settings"])]
    return (f"{row['call']}: {row['settings']}  # {row['phase']} {after}"
            + (f", before {before.median_ms:.4g} ms" if before else ", before: did not run")
            + f"; {len(times)} settings timed, {len(row['failed'])} do not work")


def _peer_line(row: dict) -> str:
    return f"{row['case']}: " + "; ".join(
        f"{phase} triton {row[phase]['triton']}, torch {row[phase]['torch']}" for phase in ("forward", "step"))


def main(options: Options) -> None:
    if not torch.cuda.is_available():
        print("bench/tune.py measures on a GPU, and PyTorch finds no CUDA device here", file=sys.stderr)
        sys.exit(2)
    sizes = options.sizes.split(",")
    if unknown := [size for size in sizes if size not in cases.GPT2]:
        sys.exit(f"--sizes={options.sizes}: unknown {unknown[0]}; choose from {', '.join(cases.GPT2)}")
    if options.family not in ("", *FAMILIES):
        sys.exit(f"--family={options.family}: choose from {', '.join(FAMILIES)}")
    chosen = [(size, case, small) for size in sizes
              for case, small in zip(cases.gpt2(size, options.batch), cases.gpt2(size, 2), strict=True)
              if options.family in ("", case.family)]
    try:
        result = tune(chosen, "cuda", options.repeats)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{error}\n--batch={options.batch} does not fit on this GPU; try --batch={max(1, options.batch // 2)}")
    gpu = torch.cuda.get_device_name()
    for path in filter(None, [cache_file(gpu, os.environ), options.out]):
        write_result(path, result)
        print(f"written to {path}")
    print(f"fastest on {gpu}: {result['fastest']}")


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)))
