"""Find launch settings by measuring, on the GPU of this machine, and say which suite is fastest
there.

    python bench/tune.py                                 all four sizes of GPT-2, all families of operators
    python bench/tune.py --sizes=124M --family=layernorm

Each function of kernels/launch.py is tuned in turn, with the others as they are or as already
chosen: every candidate's outputs and gradients are checked first, then those that are right are
timed interleaved, and the fastest by median is taken, if it beats today's setting by more than
MARGIN. Then the operators are timed against PyTorch's fused ones under torch.compile. Rows ready
for launch.py are printed; everything goes to the user's cache (and to --out), as JSON. Most of the
time goes into compiling the candidates, which Triton caches: a second run is faster.
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

from bench.ops import cases
from bench.ops.cases import Case
from bench.timing import Timing, environment, measure, write_result
from common import cli
from common.bounds import Positive
from kernels import FAMILIES, launch

Settings = dict | int  # what a function of launch.py returns
MARGIN = 0.01  # a setting is changed for at least 1 %: less is within the noise from run to run

@dataclass(frozen=True)
class Options:
    """Find launch settings by measuring on this machine's GPU, and compare with PyTorch's fused
    operators."""

    sizes: str = ",".join(cases.GPT2)  # which GPT-2 sizes, with commas between
    family: str = ""  # only this family of operators (attention, layernorm, cross_entropy)
    batch: Positive = 16  # sequences of 1024 tokens
    repeats: Positive = 20  # samples of each candidate
    out: str = ""  # a second place for the JSON


# -- what to try -----------------------------------------------------------------


class Call(NamedTuple):
    """A function of launch.py and what it was asked for."""

    function: str
    arguments: tuple

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(repr, self.arguments))})"


def product(**knobs: tuple) -> Callable[[Call, dict], Iterator[dict]]:
    """Every combination of these settings (None: not set); others stay as they are."""
    def settings(call: Call, current: dict) -> Iterator[dict]:
        for values in itertools.product(*knobs.values()):
            combined = current | dict(zip(knobs, values, strict=True))
            yield {name: value for name, value in combined.items() if value is not None}
    return settings


def per_multiprocessor(*counts: int) -> Callable[[Call, int], Iterator[int]]:
    """These numbers of programs for each multiprocessor, whose count is the call's last
    argument."""
    return lambda call, current: (n * call.arguments[-1] for n in counts)


def rows_of_layernorm(call: Call, current: dict) -> Iterator[dict]:
    """Tiles of the same row length with 8 to 64 elements per thread; forward, in one to eight
    chunks."""
    block = current.get("BLOCK_N") or current["CHUNKS"] * current["LANES"]
    for rows, warps, chunks in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16),
                                                 (1, 2, 4, 8) if "CHUNKS" in current else (1,)):
        if 8 <= rows * block // (32 * warps) <= 64:
            chunked = {"CHUNKS": chunks, "LANES": block // chunks} if "CHUNKS" in current else {}
            yield current | {"ROWS": rows, "num_warps": warps} | chunked


# For each function of launch.py: the phase its kernel runs in, and the settings to try. chunk_rows
# is not among them: it trades speed for memory, which no clock can weigh.
_tiles = {"num_warps": (4, 8), "num_stages": (2, 3), "maxnreg": (None, 128)}
_blocks = product(BLOCK_V=(1024, 2048, 4096, 8192, 16384), num_warps=(4, 8, 16, 32))
KNOBS: dict[str, tuple[str, Callable]] = {
    "attention_forward": ("forward", product(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), **_tiles)),
    "attention_backward_q": ("step", product(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), **_tiles)),
    "attention_backward_kv": ("step", product(BLOCK_M=(32, 64, 128), BLOCK_N=(64, 128), **_tiles)),
    "layernorm_forward": ("forward", rows_of_layernorm),
    "layernorm_backward": ("step", rows_of_layernorm),
    "layernorm_programs": ("step", per_multiprocessor(1, 2, 3, 4, 6, 8)),
    "cross_entropy_forward": ("forward", _blocks),
    "cross_entropy_backward": ("step", _blocks),
    "cross_entropy_in_place": ("step", _blocks),
    "cross_entropy_programs": ("step", per_multiprocessor(1, 2, 3, 4)),
}


def candidates(call: Call, current: Settings) -> dict[str, Settings]:
    """The settings to try by their text: today's first, then the others."""
    _, generate = KNOBS[call.function]
    return {str(settings): settings for settings in (current, *generate(call, current))}


# -- what to conclude ------------------------------------------------------------


def choose(times: Mapping[str, Timing], current: str) -> str:
    """The fastest by median; the current one unless beaten by more than MARGIN. A current one that
    could not be timed is beaten by any."""
    best = min(times, key=lambda name: times[name].median_ms)
    if current in times and times[best].median_ms > (1 - MARGIN) * times[current].median_ms:
        return current
    return best


def fastest(peers: list[dict]) -> dict[str, str]:
    """The suite each family should come from: triton only where the sum of its operators' steps is
    the smaller one at every size measured."""
    totals: dict[tuple[str, str], dict[str, float]] = {}
    for row in peers:
        total = totals.setdefault((row["family"], row["size"]), {"triton": 0.0, "torch": 0.0})
        for suite in total:
            total[suite] += row["step"][suite].median_ms
    families = dict.fromkeys(family for family, _ in totals)
    return {family: "triton"
            if all(t["triton"] < t["torch"] for (f, _), t in totals.items() if f == family)
            else "torch"
            for family in families}


def cache_file(gpu: str, environ: Mapping[str, str]) -> Path:
    """Where the results for a GPU of this name are kept for this user."""
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ridgegpt" / f"tune-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"


# -- steering launch.py ----------------------------------------------------------


@contextmanager
def steered() -> Iterator[tuple[dict[Call, Settings], dict[Call, Settings]]]:
    """(today, chosen): the settings launch.py gave for each call since, and those that are to
    replace them."""
    today: dict[Call, Settings] = {}
    chosen: dict[Call, Settings] = {}

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
    return {"forward": lambda: fn(*args, **kwargs),
            "step": lambda: dict(cases.run(fn, args, kwargs, gradients))}


def tune_call(call: Call, current: Settings, chosen: dict[Call, Settings], case: Case, small: Case,
              device: torch.device | str, repeats: int) -> dict:
    """Try all settings for one call of launch.py; leaves the best in `chosen` and returns the row
    for it."""
    phase, _ = KNOBS[call.function]
    trials = candidates(call, current)
    fn = cases.operator(case, "triton")
    run = phases(fn, case, device)[phase]

    def variant(settings: Settings) -> Callable[[], object]:
        def go() -> object:
            chosen[call] = settings
            return run()
        return go

    variants = {label: variant(settings) for label, settings in trials.items()}
    failed = {}
    for label, settings in trials.items():
        chosen[call] = settings
        if wrong := _wrong(fn, small, variants[label], device):
            failed[label] = wrong
    usable = {label: go for label, go in variants.items() if label not in failed}
    if not usable:
        raise RuntimeError(f"{call}: none of {len(trials)} settings works on this GPU; the first: "
                           f"{failed[str(current)]}")
    times = measure(usable, device=device, repeats=repeats)
    best = choose(times, str(current))
    chosen[call] = trials[best]
    return {"function": call.function, "call": str(call), "case": str(case), "phase": phase,
            "settings": trials[best],
            "before": current, "times": times, "failed": failed}


def _wrong(fn: Callable, small: Case, whole: Callable[[], object],
           device: torch.device | str) -> str:
    """Why the settings in force cannot be taken, or "": inaccurate, or no way to compile or launch
    them here."""
    import triton

    try:
        if not (wrong := cases.inaccuracy(fn, small, device)):
            whole()
        return wrong
    except triton.TritonError as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def compile_static(fn: Callable) -> Callable:
    """torch.compile for one set of shapes; earlier ones are forgotten, lest it generalise over them
    and lose speed."""
    torch.compiler.reset()
    return torch.compile(fn, dynamic=False)


def tune(chosen_cases: list[tuple[str, Case, Case]], device: torch.device | str, repeats: int,
         compiled: Callable[[Callable], Callable] = compile_static) -> dict:
    """Rows for launch.py and times against PyTorch, for (size, case, small case of the same kind)
    each."""
    rows, peers = [], []
    with steered() as (today, chosen):
        for size, case, small in chosen_cases:
            # runs once: `today` learns what this case asks for
            phases(cases.operator(case, "triton"), case, device)
            for call, current in list(today.items()):
                if call not in chosen:
                    rows.append(tune_call(call, current, chosen, case, small, device, repeats))
                    print(_line(rows[-1]), flush=True)
            peers.append(_peers(size, case, small, device, repeats, compiled))
            print(_peer_line(peers[-1]), flush=True)
    return {"environment": environment(device), "rows": rows, "peers": peers,
            "fastest": fastest(peers)}


def _peers(size: str, case: Case, small: Case, device: torch.device | str, repeats: int,
           compiled: Callable[[Callable], Callable]) -> dict:
    """Both suites on one case, interleaved, after a check of ours as it now is."""
    fn, peer = cases.operator(case, "triton"), cases.operator(case, "torch")
    if wrong := cases.inaccuracy(fn, small, device):
        raise RuntimeError(f"{small}: {wrong}; no speed is reported for a wrong result")
    suites = {"triton": phases(fn, case, device), "torch": phases(compiled(peer), case, device)}
    times = {phase: measure({suite: runs[phase] for suite, runs in suites.items()}, device=device,
                            repeats=repeats)
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
        f"{phase} triton {row[phase]['triton']}, torch {row[phase]['torch']}"
        for phase in ("forward", "step"))


def main(options: Options) -> None:
    if not torch.cuda.is_available():
        raise ValueError("bench/tune.py measures on a GPU, and PyTorch finds no CUDA device here")
    sizes = options.sizes.split(",")
    if unknown := [size for size in sizes if size not in cases.GPT2]:
        raise ValueError(f"--sizes={options.sizes}: unknown {unknown[0]}; choose from "
                         f"{', '.join(cases.GPT2)}")
    if options.family not in ("", *FAMILIES):
        raise ValueError(f"--family={options.family}: choose from {', '.join(FAMILIES)}")
    chosen = [(size, case, small) for size in sizes
              for case, small in zip(cases.gpt2(size, options.batch), cases.gpt2(size, 2),
                                     strict=True)
              if options.family in ("", case.family)]
    try:
        result = tune(chosen, "cuda", options.repeats)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--batch={options.batch} does not fit on this GPU; try "
                         f"--batch={max(1, options.batch // 2)}") from error
    gpu = torch.cuda.get_device_name()
    for path in [cache_file(gpu, os.environ), *([Path(options.out)] if options.out else [])]:
        write_result(path, result)
        print(f"written to {path}")
    print(f"fastest on {gpu}: {result['fastest']}")


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
