"""Clocks, interleaved measurement, and what a result says about the machine it comes from.

    timings = measure({"ours": f, "theirs": g}, device="cuda")
    write_result("bench/results/x.json", {"environment": environment("cuda"), "timings": timings})

The variants of one call to `measure` take turns in one process, so that a GPU that warms up or a
machine that gets busy slows them all alike. Times are milliseconds. The caller checks first that
the variants agree.
"""

import json
import math
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

from common.files import atomic_write
from common.hardware import cpu_has_bf16_units, cpu_units

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
FLUSH_BYTES = 256 * 2**20  # read between samples: twice the largest L2 (B200, 126 MB)
# A GPU starts on a sample so much later than the host: twice the time in which the host enqueues
# the call, but not less than this, and not more.
HEAD_START_MS = (0.5, 20.0)
CYCLES_PER_MS = 3_000_000  # of a spinning kernel: no GPU's clock is above 3 GHz
# a list of numbers in indented JSON: samples and curves go on one line
NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")


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
    """Times calls: `prepare`, `start` and `stop` around each, then `elapsed_ms` for all at once."""

    def prepare(self, host_ms: float) -> None:
        """Put the machine in the state that every sample starts from.

        `host_ms`: what the host needs to enqueue the call.
        """

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def elapsed_ms(self) -> list[float]:
        """The samples since the last call, after waiting for the device."""


class HostClock:
    """perf_counter, from the end of all earlier work of the device to the end of the sample's.

    Caches are not flushed: on a CPU they are part of what is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._samples: list[float] = []

    def prepare(self, host_ms: float) -> None:
        self._wait()

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self._samples.append((time.perf_counter() - self._began) * 1e3)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def elapsed_ms(self) -> list[float]:
        samples, self._samples = self._samples, []
        return samples


class CudaClock:
    """Events on the device's current stream. They time the device's own work, without launch gaps.

    Before each sample other data is read into the L2 cache, and the device is kept busy while the
    host enqueues the call. Overwriting the cache (flush="write") would leave it full of changed
    lines, which the call must then write back. Events are read after a whole round, so that no
    sample waits for the host.
    """

    def __init__(self, device: torch.device, flush: str = "read") -> None:
        self.device, self._writes = device, flush == "write"
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._sum = torch.zeros((), device=device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def prepare(self, host_ms: float) -> None:
        if self._writes:
            self._flush.zero_()
        else:
            torch.sum(self._flush, 0, out=self._sum)
        least, most = HEAD_START_MS
        torch.cuda._sleep(int(CYCLES_PER_MS * min(max(least, 2 * host_ms), most)))

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


def clock(device: torch.device | str, end_to_end: bool = False, flush: str = "read") -> Clock:
    """The clock of a "cuda" or "cpu" device."""
    device = torch.device(device)
    if device.type == "cpu" or (device.type == "cuda" and end_to_end):
        return HostClock(device)
    if device.type == "cuda":
        return CudaClock(device, flush)
    raise ValueError(f"no clock for device {device}: benchmarks run on cuda or cpu")


# -- measuring -----------------------------------------------------------------


def measure(variants: Mapping[str, Callable[[], object]], *, device: torch.device | str,
            warmup: int = 3, repeats: int = 20, min_time_ms: float = 0.0,
            end_to_end: bool = False, flush: str = "read") -> dict[str, Timing]:
    """Time each callable `repeats` times, in rounds that call each once, after `warmup` rounds.

    The order rotates from round to round, so that no variant always runs after the same other one.
    On a CPU, and on a GPU `end_to_end`, a sample repeats its call until it lasts `min_time_ms`, and
    is divided by the number of calls; between them nothing waits for the device, as in training.
    Otherwise a sample on a GPU is one call, timed by `CudaClock`: events resolve half a
    microsecond, and a second call would find its data in the cache. Raises ValueError for
    repeats < 1 or warmup < 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"measure: repeats={repeats} must be at least 1, "
                         f"warmup={warmup} at least 0")
    device = torch.device(device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _measure(variants, clock(device, end_to_end, flush), warmup, repeats, min_time_ms)


def _measure(variants: Mapping[str, Callable[[], object]], stopwatch: Clock, warmup: int,
             repeats: int, min_time_ms: float) -> dict[str, Timing]:
    names = list(variants)
    host_ms = dict.fromkeys(names, math.inf if warmup else 0.0)
    for _ in range(warmup):
        for name in names:  # the least: the first call may compile
            host_ms[name] = min(host_ms[name], _host_ms(variants[name]))
    calls = dict.fromkeys(names, 1)
    if min_time_ms > 0 and not isinstance(stopwatch, CudaClock):
        calls = {name: math.ceil(min_time_ms / max(_once(stopwatch, variants[name]), 1e-4))
                 for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        order = names[i % len(names):] + names[:i % len(names)]
        for name in order:
            _sample(stopwatch, variants[name], calls[name], host_ms[name])
        for name, ms in zip(order, stopwatch.elapsed_ms(), strict=True):
            samples[name].append(ms / calls[name])
    return {name: Timing(tuple(samples[name])) for name in names}


def _host_ms(fn: Callable[[], object]) -> float:
    began = time.perf_counter()
    fn()
    return (time.perf_counter() - began) * 1e3


def _sample(stopwatch: Clock, fn: Callable[[], object], calls: int, host_ms: float) -> None:
    stopwatch.prepare(host_ms)
    stopwatch.start()
    for _ in range(calls):
        fn()
    stopwatch.stop()


def _once(stopwatch: Clock, fn: Callable[[], object]) -> float:
    _sample(stopwatch, fn, 1, 0.0)
    return stopwatch.elapsed_ms()[0]


# -- where it was measured -----------------------------------------------------


def environment(device: torch.device | str = "cpu") -> dict:
    """Hardware, clocks, power, versions, commit, command and date, to judge or repeat a result.

    What cannot be found out (no nvidia-smi, not a git checkout) is None. Call it right after
    measuring: clocks and power are those of that moment.
    """
    device = torch.device(device)
    status = _git("status", "--porcelain")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else status != "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": f"{_cpu_model()} ({cpu_units()})",
        "threads": torch.get_num_threads(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
    }


def machine(device: torch.device) -> str:
    """The machine in a result's file name: cuda, cpu, or cpu-bf16 (a CPU with bf16 units)."""
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
            "clocks.mem": "memory_clock_mhz", "power.limit": "power_limit_w",
            "power.draw": "power_draw_w", "temperature.gpu": "temperature_c",
            "driver_version": "driver"}
    answer = _run("nvidia-smi", "-i", f"GPU-{properties.uuid}", f"--query-gpu={','.join(keys)}",
                  "--format=csv,noheader,nounits")
    values: list[str | None] = [*answer.split(", ")] if answer else []
    if len(values) != len(keys):
        values = [None] * len(keys)
    return {"name": properties.name, "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory, "cuda": torch.version.cuda,
            **dict(zip(keys.values(), values, strict=True))}


# -- result files --------------------------------------------------------------


def result_path(given: str, name: str) -> Path:
    """Where a result goes: the file `given` as --out, or NAME.json in bench/results."""
    return Path(given) if given else RESULTS / f"{name}.json"


def write_result(path: str | Path, result: dict) -> None:
    """Write a result as JSON, whole or not at all, with each list of numbers on one line."""
    text = json.dumps(result, indent=1, default=_encode, allow_nan=False)
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), text)
    with atomic_write(Path(path)) as file:
        file.write(text.encode() + b"\n")


def _encode(value: object) -> object:
    if isinstance(value, Timing):
        return value.as_json()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}: {value!r}")
