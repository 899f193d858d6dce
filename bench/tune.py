"""Find launch settings by measuring on this machine's GPU, and say which backend is fastest there.

    python bench/tune.py                         # GPT-2's four sizes, all operators
    python bench/tune.py --sizes=124M --family=layernorm

Each function of kernels/launch.py is tuned in turn; the others keep the settings they have or got.
The outputs and gradients of every candidate are checked, those that are right are timed in turns,
and the fastest by median is taken if it beats today's setting by more than MARGIN. Then the
operators are timed against PyTorch's fused ones under torch.compile. It prints rows for launch.py,
and writes everything as JSON to the user's cache, where --kernels=auto finds the settings (and to
--out). Most of the time goes into
compiling the candidates; Triton caches them, so a second run is faster.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.ops import cases, peers
from bench.options import named
from bench.timing import Timing, environment, measure, write_result
from common import cli
from common.bounds import Positive
from kernels import FAMILIES, calls, launch
from kernels.calls import Case
from kernels.launch import Call, Settings
from train.candidates import tuned_file

MARGIN = 0.01  # a setting is changed for at least 1 %: less is within the noise from run to run


@dataclass(frozen=True)
class Options:
    """Find launch settings by measuring on this machine's GPU."""

    sizes: str = ",".join(cases.GPT2)
    """of GPT-2, with commas"""
    family: str = ""
    """only these families of operators, with commas: attention, layernorm, cross_entropy"""
    batch: Positive = 16
    """sequences of 1024 tokens"""
    repeats: Positive = 20
    """samples of each candidate"""
    out: str = ""
    """a second place for the JSON"""


# -- what to try -----------------------------------------------------------------


def product(**knobs: tuple) -> Callable[[Call, dict], Iterator[dict]]:
    """Every combination of these settings (None: not set); other settings stay as they are."""
    def settings(call: Call, current: dict) -> Iterator[dict]:
        for values in itertools.product(*knobs.values()):
            combined = current | dict(zip(knobs, values, strict=True))
            yield {name: value for name, value in combined.items() if value is not None}
    return settings


def per_multiprocessor(*counts: int) -> Callable[[Call, int], Iterator[int]]:
    """So many programs for each multiprocessor; the call's last argument is their count."""
    return lambda call, current: (n * call.arguments[-1] for n in counts)


def rows_of_norm(call: Call, current: dict) -> Iterator[dict]:
    """Tiles of 8 to 64 elements per thread, in 1 to 8 chunks; of layernorm_backward any number."""
    N, any_number = call.arguments[0], call.function == "layernorm_backward"
    block = 1 << (N - 1).bit_length()
    for rows, warps, chunks in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if 8 <= rows * block // (32 * warps) <= 64:
            lanes = block // chunks
            yield current | {"CHUNKS": -(-N // lanes) if any_number else chunks, "ROWS": rows,
                             "LANES": lanes, "num_warps": warps}


# For each function of launch.py: the phase its kernel runs in, and the settings to try. chunk_rows
# is not among them: it trades speed for memory, and a clock measures speed alone.
_tiles = {"num_warps": (4, 8), "num_stages": (2, 3), "maxnreg": (None, 128)}
_blocks = product(BLOCK_V=(1024, 2048, 4096, 8192, 16384), num_warps=(4, 8, 16, 32))
KNOBS: dict[str, tuple[str, Callable]] = {
    "attention_forward": ("forward", product(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), **_tiles)),
    "attention_backward_q": ("step", product(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), **_tiles)),
    "attention_backward_kv": ("step", product(BLOCK_M=(32, 64, 128), BLOCK_N=(64, 128), **_tiles)),
    "rotary": ("step", product(ROWS=(4, 8, 16, 32, 64), num_warps=(2, 4, 8))),
    "layernorm_forward": ("forward", rows_of_norm),
    "layernorm_backward": ("step", rows_of_norm),
    "layernorm_programs": ("step", per_multiprocessor(1, 2, 3, 4, 6, 8)),
    "rmsnorm_forward": ("forward", rows_of_norm),
    "rmsnorm_backward": ("step", rows_of_norm),
    "cross_entropy_forward": ("forward", _blocks),
    "cross_entropy_backward": ("step", _blocks),
    "cross_entropy_in_place": ("step", _blocks),
    "cross_entropy_programs": ("step", per_multiprocessor(1, 2, 3, 4)),
}


def candidates(call: Call, current: Settings) -> dict[str, Settings]:
    """The settings to try, by their text: today's first, then the others."""
    _, generate = KNOBS[call.function]
    return {str(settings): settings for settings in (current, *generate(call, current))}


# -- what to conclude ------------------------------------------------------------


def choose(times: Mapping[str, Timing], current: str) -> str:
    """The fastest by median; the current one unless it is slower by MARGIN, or was not timed."""
    best = min(times, key=lambda name: times[name].median_ms)
    if current in times and times[best].median_ms > (1 - MARGIN) * times[current].median_ms:
        return current
    return best


def fastest(compared: list[dict]) -> dict[str, str]:
    """The backend for each family: triton where its operators' steps sum to less at every size."""
    totals: dict[tuple[str, str], dict[str, float]] = {}
    for row in compared:
        total = totals.setdefault((row["family"], row["size"]), {"triton": 0.0, "torch": 0.0})
        for backend in total:
            total[backend] += row["step"][backend].median_ms
    wins: dict[str, bool] = {}
    for (family, _), total in totals.items():
        wins[family] = wins.get(family, True) and total["triton"] < total["torch"]
    return {family: "triton" if won else "torch" for family, won in wins.items()}


# -- measuring -------------------------------------------------------------------


def phases(fn: Callable, case: Case, device: torch.device | str) -> dict[str, Callable[[], object]]:
    """What is timed of an operator: "forward" alone, and "step", forward and backward together."""
    args, kwargs = calls.arguments(case, device), calls.options(case, device)
    gradients = dict(calls.run(fn, args, kwargs))["gradients"]
    return {"forward": lambda: fn(*args, **kwargs),
            "step": lambda: dict(calls.run(fn, args, kwargs, gradients))}


def tune_call(call: Call, current: Settings, chosen: dict[str, Settings], case: Case, small: Case,
              device: torch.device | str, repeats: int) -> dict:
    """Try all settings for one call of launch.py; leaves the best in `chosen`, returns its row.

    Raises RuntimeError where none works.
    """
    phase, _ = KNOBS[call.function]
    trials = candidates(call, current)
    fn = calls.operator(case, "triton")
    run = phases(fn, case, device)[phase]

    def variant(settings: Settings) -> Callable[[], object]:
        def go() -> object:
            launch.use(chosen | {str(call): settings})
            return run()
        return go

    usable, failed = {}, {}
    for label, settings in trials.items():
        go = variant(settings)
        launch.use(chosen | {str(call): settings})
        if wrong := _wrong(fn, small, go, device):
            failed[label] = wrong
        else:
            usable[label] = go
    if not usable:
        raise RuntimeError(f"{call}: none of {len(trials)} settings works on this GPU; the first: "
                           f"{failed[str(current)]}")
    times = measure(usable, device=device, repeats=repeats)
    chosen[str(call)] = trials[choose(times, str(current))]
    launch.use(chosen)
    return {"function": call.function, "call": str(call), "case": str(case), "phase": phase,
            "settings": chosen[str(call)], "before": current, "times": times, "failed": failed}


def _wrong(fn: Callable, small: Case, whole: Callable[[], object],
           device: torch.device | str) -> str:
    """Why the settings in force cannot be taken, or "": inaccurate, or they do not compile or run.

    The results are checked on a `small` case; `whole` runs the case that will be timed.
    """
    import triton

    try:
        if not (wrong := calls.fault(fn, small, device)):
            whole()
        return wrong
    except triton.TritonError as error:
        return cli.reason(error)


def tune(chosen_cases: list[tuple[str, Case, Case]], device: torch.device | str, repeats: int,
         compiled: Callable[[Callable], Callable] = peers.compiled) -> dict:
    """Rows for launch.py, and times against PyTorch; for (size, case, small case of the kind)."""
    rows, compared, chosen = [], [], dict[str, Settings]()
    for size, case, small in chosen_cases:
        launch.use(chosen)
        phases(calls.operator(case, "triton"), case, device)  # runs once, for `given`
        for call, current in launch.given().items():
            if call.function in KNOBS and str(call) not in chosen:
                rows.append(tune_call(call, current, chosen, case, small, device, repeats))
                print(_line(rows[-1]), flush=True)
        compared.append(_compare(size, case, small, device, repeats, compiled))
        print(_compared_line(compared[-1]), flush=True)
    launch.use({})
    return {"environment": environment(device), "rows": rows, "peers": compared,
            "fastest": fastest(compared)}


def _compare(size: str, case: Case, small: Case, device: torch.device | str, repeats: int,
             compiled: Callable[[Callable], Callable]) -> dict:
    """Triton's and PyTorch's times on one case, in turns. Raises RuntimeError if ours is wrong."""
    fn, peer = calls.operator(case, "triton"), calls.operator(case, "torch")
    if wrong := calls.fault(fn, small, device):
        raise RuntimeError(f"{small}: {wrong}; no speed is reported for a wrong result")
    backends = {"triton": phases(fn, case, device), "torch": phases(compiled(peer), case, device)}
    times = {phase: measure({backend: runs[phase] for backend, runs in backends.items()},
                            device=device, repeats=repeats)
             for phase in ("forward", "step")}
    return {"size": size, "family": case.family, "case": str(case), **times}


def _line(row: dict) -> str:
    times = row["times"]
    before, after = times.get(str(row["before"])), times[str(row["settings"])]
    return (f"{row['call']}: {row['settings']}  # {row['phase']} {after}"
            + (f", before {before.median_ms:.4g} ms" if before else ", before: did not run")
            + f"; {len(times)} settings timed, {len(row['failed'])} do not work")


def _compared_line(row: dict) -> str:
    return f"{row['case']}: " + "; ".join(
        f"{phase} triton {row[phase]['triton']}, torch {row[phase]['torch']}"
        for phase in ("forward", "step"))


def chosen_cases(options: Options) -> list[tuple[str, Case, Case]]:
    """(size, case, the same case with two sequences). Raises ValueError for unknown names."""
    sizes = named("sizes", options.sizes, cases.GPT2)
    families = named("family", options.family, FAMILIES) if options.family else list(FAMILIES)
    return [(size, case, small) for size in sizes
            for case, small in zip(cases.models(size, options.batch), cases.models(size, 2),
                                   strict=True)
            if case.family in families]


def main(options: Options) -> None:
    """Tune, print and write. Raises ValueError for bad input, or where there is no GPU."""
    if not torch.cuda.is_available():
        raise ValueError("bench/tune.py measures on a GPU, and PyTorch finds no CUDA device here")
    try:
        result = tune(chosen_cases(options), "cuda", options.repeats)
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--batch={options.batch} does not fit on this GPU; try "
                         f"--batch={max(1, options.batch // 2)}") from error
    gpu = torch.cuda.get_device_name()
    for path in [tuned_file(gpu), *([Path(options.out)] if options.out else [])]:
        write_result(path, result)
        print(f"written to {path}")
    print(f"fastest on {gpu}: {result['fastest']}")


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
