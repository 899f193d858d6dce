"""--kernels=auto: each family of operators by the backend that is fastest here, as measured.

The candidates of a family (train/candidates.py) compute the calls of one micro-step, forward and
backward, in turns; the clock is the host's, so the work of the host counts. A candidate is timed if
it agrees with the definition, and taken if it is faster than PyTorch's operators by MARGIN. What
was found is kept in the user's cache, for the same calls on the same machine, and in checkpoints;
if the time was too short for a candidate, the next run tries again.
"""

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch
from filelock import FileLock, Timeout

import kernels
from common import cli, hardware
from common.files import cache_folder, check_json, read_json, write_json
from gpt.flops import flops_per_token
from kernels import Choice, calls, launch
from train import parallel
from train.candidates import BASE, Asked, Candidate, asked_of, candidates, read_tuned, small
from train.config import Config
from train.parallel import World

MARGIN = 0.03  # less is within the noise from run to run
LIMIT_S = 15.0  # for all families
PREPARING = 0.7  # of it is for checks and compilers
ROUNDS, FEWEST = 20, 3  # of the timed candidates: all of them, and where the time is short
CALLS = 4  # of a case in a sample, at most
# A run on a CPU that takes less than five minutes at this rate does not measure.
WORTH_MEASURING_FLOPS = 300 * 2e11
NO_TIME = "no time left"
# What compilers, drivers and packages of others raise, besides `kernels.triton_errors`: a candidate
# that does is left out.
FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError)


class Clock:
    """The host's time in seconds, after the device has done its work."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Decision(TypedDict):
    """What was measured: kept as JSON in the cache, and in state.json of a checkpoint."""

    machine: dict[str, str]
    asked: dict[str, str]
    backends: dict[str, str]
    settings: dict[str, Any]
    lines: dict[str, str]
    """one for each family that was measured"""
    complete: bool
    """whether the time sufficed for all candidates"""


# -- deciding ------------------------------------------------------------------


def decide(config: Config, choice: Choice, device: torch.device, dtype: torch.dtype,
           before: dict[str, Any] | None, w: World) -> Choice:
    """The choice with each family that is left to auto decided; all ranks take rank 0's.

    `choice`: `kernels.resolve`'s. `before`: `measured` of the run that is resumed, None for a new
    run. The launch settings are put in force. Every rank must call it. Measuring draws random
    numbers. Raises ValueError where `before` is damaged.
    """
    asked = {family: wanted for family, wanted in asked_of(config, dtype).items()
             if not config.kernel.families[family]}
    if config.kernel.kernels == "auto" and asked:
        compiled = device.type == "cuda" and config.run.compile is not False
        short = config.run.eval_only or (
            device.type == "cpu" and _flops(config) < WORTH_MEASURING_FLOPS)
        names = parallel.gather_or_raise(lambda: hardware.device_name(device), w)
        if device.type == "cpu" and before == {}:
            choice = choice._replace(why=f"{choice.why}, as before")
        elif short and not before:
            choice = choice._replace(why=f"{choice.why}, as the run is too short to measure")
        elif len(set(names)) > 1:
            choice = choice._replace(why=f"auto: PyTorch's, as the ranks' devices differ: "
                                         f"{', '.join(sorted(set(names)))}")
        else:
            decision, why = parallel.broadcast_from_rank_0(
                lambda: _decision(asked, device, compiled, before), w)
            choice = Choice(choice.backends | decision["backends"], why, decision)
    launch.use(choice.measured.get("settings", {}))
    return choice


def _flops(config: Config) -> float:
    """Of the whole run."""
    tokens = config.tokens_per_iter * config.optim.max_iters
    return flops_per_token(config.model)["palm"] * tokens


def _decision(asked: dict[str, Asked], device: torch.device, compiled: bool,
              before: dict[str, Any] | None) -> tuple[Decision, str]:
    """What the run that is resumed had, or the cache has, or is measured now; and which it was."""
    tuned, damaged = dict[str, Any](), ""
    try:
        tuned = read_tuned(device)
    except ValueError as error:
        damaged = f"; {error}"
    key = {"machine": machine(device), "asked": {f: str(a) for f, a in asked.items()}
           | {"compiled": str(compiled), "tuned": json.dumps(tuned)}}
    if before:
        had = check_json(before, Decision, "state.json of the checkpoint: measured",
                         "give --kernels=torch")
        if had["machine"] == key["machine"]:
            return had, "auto: as before"
    anew = "" if not before else ", anew on another machine or version, so bits may change"
    anew += damaged
    folder = cache_folder() / "auto"
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two runs that measure at once would slow each other.
        with FileLock(folder / f"{name}.lock", timeout=4 * LIMIT_S):
            return _kept_or_measured(folder / f"{name}.json", key, asked, device, compiled, anew)
    except (OSError, Timeout) as error:
        decision = measured(asked, device, compiled, key)
        return decision, f"auto: measured now{anew}; not kept: {error}"


def _kept_or_measured(file: Path, key: dict[str, Any], asked: dict[str, Asked],
                      device: torch.device, compiled: bool, anew: str) -> tuple[Decision, str]:
    damaged = ""
    if file.exists():
        try:
            kept = read_json(file, Decision, "it is written anew")
            # Otherwise compilers' own caches make the next attempt faster.
            same = key == {"machine": kept["machine"], "asked": kept["asked"]}
            if kept["complete"] and same:
                return kept, f"auto: measured before, kept in {file}{anew}"
        except ValueError as error:
            damaged = f"; {error}"
    decision, unkept = measured(asked, device, compiled, key), ""
    try:
        write_json(file, decision)
    except OSError as error:
        unkept = f"; not kept: {error}"
    return decision, f"auto: measured now{anew}{damaged}{unkept}"


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement depends on, besides the calls."""
    folder = Path(kernels.__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    driver = Path("/proc/driver/nvidia/version")
    return {"device": hardware.device_name(device), "torch": torch.__version__,
            "triton": _version("triton"), "flash_attn": _version("flash_attn"),
            "driver": driver.read_text() if device.type == "cuda" and driver.exists() else "",
            "kernels": hashlib.sha256(sources).hexdigest()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# -- measuring -----------------------------------------------------------------


@dataclass
class Trial:
    """A family whose candidates are measured."""

    asked: Asked
    among: list[Candidate]
    """BASE first"""
    ready: dict[Candidate, list[Callable[[], object]]] = field(default_factory=dict)
    """the checked ones; a step for each case"""
    ms: dict[Candidate, float] = field(default_factory=dict)
    """what the timed ones took for the calls of a micro-step"""
    left_out: dict[Candidate, str] = field(default_factory=dict)
    """the others, and why"""


def measured(asked: dict[str, Asked], device: torch.device, compiled: bool,
             key: dict[str, Any]) -> Decision:
    """Measure each family that has several candidates.

    Nothing is begun after LIMIT_S; what was begun before is finished.
    """
    clock, backends = Clock(device), dict.fromkeys(asked, BASE)
    tuned = json.loads(key["asked"]["tuned"])
    trials = {family: Trial(wanted, candidates(family, device, compiled, tuned))
              for family, wanted in asked.items()}
    trials = {family: trial for family, trial in trials.items() if len(trial.among) > 1}
    began = clock()
    prepare(list(trials.values()), clock, began + PREPARING * LIMIT_S)
    found = Decision(machine=key["machine"], asked=key["asked"], backends=backends, settings={},
                     lines={}, complete=True)
    for n, (family, trial) in enumerate(trials.items()):
        until = began + LIMIT_S * (1 - (1 - PREPARING) * (len(trials) - n - 1) / len(trials))
        time_ready(trial, clock, until)
        best = fastest(trial.ms)
        found["backends"][family] = best.backend
        found["settings"] |= best.settings
        found["lines"][family] = line(best, trial)
        found["complete"] &= NO_TIME not in trial.left_out.values()
    launch.use({})
    torch._dynamo.reset()  # these variants must not count as the model's
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def prepare(trials: list[Trial], clock: Clock, until: float) -> None:
    """Check and compile the first candidate of each family, then the second of each, and so on.

    What has not begun when the clock says `until` is left out.
    """
    in_turns = itertools.zip_longest(*([(trial, c) for c in trial.among] for trial in trials))
    for trial, candidate in filter(None, itertools.chain(*in_turns)):
        if clock() > until:
            trial.left_out[candidate] = NO_TIME
            continue
        try:
            trial.ready[candidate] = prepared(trial.asked, candidate, clock.device)
        except (*FAILURES, *kernels.triton_errors()) as error:
            trial.left_out[candidate] = cli.reason(error)


def time_ready(trial: Trial, clock: Clock, until: float) -> None:
    """Time the candidates that are ready in turns; too few turns by `until` do not count."""
    samples: dict[Candidate, list[list[float]]] = {candidate: [] for candidate in trial.ready}
    for n in range(ROUNDS):
        if clock() > until:
            if n < FEWEST:
                trial.left_out |= dict.fromkeys(trial.ready, NO_TIME)
                return
            break
        for candidate, steps in trial.ready.items():
            launch.use(candidate.settings)
            samples[candidate].append([_seconds(step, count, clock) for step, (_, count)
                                       in zip(steps, trial.asked.calls, strict=True)])
    trial.ms = {candidate: 1e3 * sum(statistics.median(case) for case in zip(*taken, strict=True))
                for candidate, taken in samples.items()}


def _seconds(step: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Of `count` calls of the step, measured on at most CALLS."""
    made, began = min(count, CALLS), clock()
    for _ in range(made):
        step()
    return (clock() - began) * count / made


def prepared(asked: Asked, candidate: Candidate,
             device: torch.device) -> list[Callable[[], object]]:
    """Check a candidate; a function for each case, forward and backward, that has run once.

    Raises ValueError where it is not accurate, and what it raises itself.
    """
    launch.use(candidate.settings)
    steps: list[Callable[[], object]] = []
    for case, _ in asked.calls:
        fn = calls.operator(case, candidate.backend)
        # Dropout masks of other backends are not the definition's.
        checked = small(case) if candidate.backend == "triton" else small(case).without("dropout")
        if candidate.backend != BASE and (wrong := calls.fault(fn, checked, device)):
            raise ValueError(wrong)
        if candidate.compiled:
            fn = torch.compile(fn, dynamic=False)
        args, options = calls.arguments(case, device), calls.options(case, device)
        gradients = dict(calls.run(fn, args, options))["gradients"]

        def step(fn=fn, args=args, options=options, gradients=gradients) -> object:
            return dict(calls.run(fn, args, options, gradients))

        steps.append(step)
    return steps


# -- concluding ----------------------------------------------------------------


def fastest(ms: dict[Candidate, float]) -> Candidate:
    """The fastest; the first one, which is BASE, unless another is faster by MARGIN."""
    base = next(iter(ms), Candidate(BASE))
    best = min(ms, key=ms.__getitem__, default=base)
    within_noise = base.backend == BASE and ms and ms[best] > (1 - MARGIN) * ms[base]
    return base if within_noise else best


def line(best: Candidate, trial: Trial) -> str:
    """What was chosen, by how much, and what was left out, for the first lines of a run."""
    told = f"{best}"
    others = sorted((ms, str(other)) for other, ms in trial.ms.items() if other != best)
    if others:
        ms, name = others[0]
        gain = ms / trial.ms[best]
        told += f", {gain:.2f} x as fast as {name}" if gain >= 1 else f", within noise of {name}"
        told += f" ({trial.ms[best]:.3g} ms a micro-step)"
    return told + "".join(f"; {other} left out: {why}" for other, why in trial.left_out.items())
