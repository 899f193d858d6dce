"""Clocks, interleaved measurement, and what a result must say about where it was measured.

    timings = measure({"ours": f, "theirs": g}, device="cuda")
    write_result("bench/results/x.json", {"environment": environment("cuda"), "timings": timings})

The variants of one call to `measure` take turns in one process, so that a GPU that warms up or a
machine that gets busy slows them all alike. Times are milliseconds. Checking that the variants
agree comes before, and is the caller's.
"""

import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch

from common.hardware import cpu_has_bf16_units, cpu_units

ROOT = Path(__file__).resolve().parents[1]
FLUSH_BYTES = 256 * 2**20  # written between samples: twice the largest L2 (B200, 126 MB)
# a list of numbers in indented JSON: samples and curves go on one line
NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")
# about 0.5 ms at 2 GHz: longer than the host needs to enqueue an operator
HEAD_START_CYCLES = 1_000_000


@dataclass(frozen=True)
class Timing:
    """The samples of one variant, in milliseconds per call, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples)

    @property
    def q1_ms(self) -> float:
        return self._quartiles()[0]

    @property
    def q3_ms(self) -> float:
        return self._quartiles()[2]

    def _quartiles(self) -> list[float]:
        if len(self.samples) == 1:
            return [*self.samples] * 3
        return statistics.quantiles(self.samples, n=4, method="inclusive")

    def __str__(self) -> str:
        return f"{self.median_ms:.4g} ms [{self.q1_ms:.4g}, {self.q3_ms:.4g}]"

    def as_json(self) -> dict:
        return {"median_ms": self.median_ms, "q1_ms": self.q1_ms, "q3_ms": self.q3_ms,
                "samples_ms": list(self.samples)}


# -- clocks --------------------------------------------------------------------


class Clock(Protocol):
    """Times one call at a time: `start`, `stop` around it, then `elapsed_ms` for all of them at
    once."""

    def prepare(self) -> None:
        """Put the machine in the state that every sample starts from."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def elapsed_ms(self) -> list[float]:
        """The samples since the last call, after waiting for the device."""


class CpuClock:
    """perf_counter. Nothing is flushed: on a CPU the caches between two calls are part of what is
    measured."""

    def __init__(self) -> None:
        self._samples: list[float] = []

    def prepare(self) -> None:
        pass

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._samples.append((time.perf_counter() - self._began) * 1e3)

    def elapsed_ms(self) -> list[float]:
        samples, self._samples = self._samples, []
        return samples


class CudaClock:
    """Events on the device's current stream, read only after a whole round, so that no sample waits
    for the host.

    Before each sample the L2 cache is overwritten, and the device is kept busy while the host
    enqueues the call: what is timed is the device's own work without launch gaps. End-to-end speed,
    gaps included, is bench/mfu.py's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def prepare(self) -> None:
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)

    def start(self) -> None:
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._events.append(pair)
        pair[0].record()

    def stop(self) -> None:
        self._events[-1][1].record()

    def elapsed_ms(self) -> list[float]:
        torch.cuda.synchronize(self.device)
        events, self._events = self._events, []
        return [began.elapsed_time(ended) for began, ended in events]


def clock(device: torch.device | str) -> Clock:
    """The clock of a "cuda" or "cpu" device."""
    device = torch.device(device)
    if device.type == "cuda":
        return CudaClock(device)
    if device.type == "cpu":
        return CpuClock()
    raise ValueError(f"no clock for device {device}: benchmarks run on cuda or cpu")


# -- measuring -----------------------------------------------------------------


def measure(variants: Mapping[str, Callable[[], object]], *, device: torch.device | str,
            warmup: int = 3,
            repeats: int = 20, min_time_ms: float = 0.0) -> dict[str, Timing]:
    """Time each callable `repeats` times, in rounds in which each runs once, after `warmup` rounds
    untimed.

    The order rotates from round to round, so that no variant always runs after the same other one.
    On a CPU a sample calls its variant as often as it takes to last `min_time_ms`, and is divided
    by that number; on a GPU events resolve half a microsecond, and a second call would find its
    data in the cache, so a sample is one call.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"measure: repeats={repeats} must be at least 1, warmup={warmup} at least 0")
    device = torch.device(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _measure(variants, device, warmup, repeats, min_time_ms)


def _measure(variants: Mapping[str, Callable[[], object]], device: torch.device, warmup: int,
             repeats: int,
             min_time_ms: float) -> dict[str, Timing]:
    stopwatch = clock(device)
    names = list(variants)
    for _ in range(warmup):
        for name in names:
            variants[name]()
    calls = dict.fromkeys(names, 1)
    if device.type == "cpu" and min_time_ms > 0:
        calls = {name: math.ceil(min_time_ms / max(_once(stopwatch, variants[name]), 1e-4))
                 for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        order = names[i % len(names):] + names[:i % len(names)]
        for name in order:
            _sample(stopwatch, variants[name], calls[name])
        for name, ms in zip(order, stopwatch.elapsed_ms(), strict=True):
            samples[name].append(ms / calls[name])
    return {name: Timing(tuple(samples[name])) for name in names}


def _sample(stopwatch: Clock, fn: Callable[[], object], calls: int) -> None:
    stopwatch.prepare()
    stopwatch.start()
    for _ in range(calls):
        fn()
    stopwatch.stop()


def _once(stopwatch: Clock, fn: Callable[[], object]) -> float:
    _sample(stopwatch, fn, 1)
    return stopwatch.elapsed_ms()[0]


# -- where it was measured -----------------------------------------------------


def environment(device: torch.device | str = "cpu") -> dict:
    """What a reader needs to judge or repeat a result: hardware, clocks and power, versions,
    commit, command, date.

    What cannot be found out (no nvidia-smi, not a git checkout) is None. Ask right after measuring:
    clocks and power are those of that moment.
    """
    device = torch.device(device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else status != "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": f"{_cpu_model()} ({cpu_units()})",
        "threads": torch.get_num_threads(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
    }


def machine(device: torch.device) -> str:
    """What the files of a result are named after: cuda, cpu, or cpu-bf16, whose figures are those
    of another machine."""
    return "cpu-bf16" if device.type == "cpu" and cpu_has_bf16_units() else device.type


def _command() -> str:
    script, *arguments = sys.argv
    path = Path(script).resolve()
    return shlex.join([str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name,
                       *arguments])


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT,
                              timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # not installed, or it says no
        return None


def _git(*arguments: str) -> str | None:
    return _run("git", *arguments)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    keys = {"clocks.sm": "sm_clock_mhz", "clocks.max.sm": "max_sm_clock_mhz",
            "clocks.mem": "memory_clock_mhz",
            "power.limit": "power_limit_w", "power.draw": "power_draw_w",
            "temperature.gpu": "temperature_c",
            "driver_version": "driver"}
    answer = _run("nvidia-smi", "-i", f"GPU-{properties.uuid}", f"--query-gpu={','.join(keys)}",
                  "--format=csv,noheader,nounits")
    values = answer.split(", ") if answer else []
    smi = dict(zip(keys.values(), values,
                   strict=True)) if len(values) == len(keys) else dict.fromkeys(keys.values())
    return {"name": properties.name, "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda, **smi}


def write_result(path: str | Path, result: dict) -> None:
    """Write a result as JSON, whole or not at all: a killed benchmark leaves the last file as it
    was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w") as file:
            text = json.dumps(result, indent=1, default=_encode, allow_nan=False)
            file.write(NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(value: object) -> object:
    if isinstance(value, Timing):
        return value.as_json()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}: {value!r}")
