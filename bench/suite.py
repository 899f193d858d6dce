"""Every measurement of a machine, in one command and a fixed time: `bench/suite.py --minutes=9`.

The parts, the most important first: the tests that need a GPU; operators against peers and floor,
family by family; GPT-2 124M's step, eager and where it goes, then compiled; launch settings; the
other sizes; whether the kernels learn as PyTorch's do; memory by batch size. Each
part is a process with a share of the time that is left. A part that takes longer is killed, one
that fails is recorded, and the next one runs. Each part writes its JSON and log to --out as soon as
it ends, and as far as it came; suite-DEVICE.json has all of it in one file.

Exit code: 0; 1 if a part failed or was killed; 2 for bad input.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.options import named
from bench.timing import ROOT, environment, write_result
from common import cli, hardware
from common.bounds import PositiveFloat

LOG_LINES = 40  # the last lines of a part's output that go into the JSON


@dataclass(frozen=True)
class Options:
    """Measure everything."""

    device: str = "auto"
    minutes: PositiveFloat = 9.0
    """time for all parts together"""
    parts: str = ""
    """only these, with commas; empty: all that the device can run"""
    out: str = ""
    """folder for the results; README's tables are made of those in bench/results; empty:
    out-suite"""


@dataclass(frozen=True)
class Part:
    """A command, relative to the checkout.

    In the command, `{out}` is the part's JSON file, `{minutes}` the time in which it should end.
    """

    name: str
    command: tuple[str, ...]
    weight: float  # its share of the time, relative to the others'
    least_s: float  # with less time it is skipped
    skip: str = ""  # why it cannot run here
    merge_into: str = ""  # a result that collects the "cases" of several parts


@dataclass
class Outcome:
    """How a part ended; `status` is passed, failed, timed out or skipped."""

    status: str
    why: str = ""
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    result: dict | None = None


def parts(device: str) -> list[Part]:
    """All parts, the most important first; on a CPU those that run there, at a small size."""
    return parts_of_a_gpu() if device == "cuda" else parts_of_a_cpu(device)


def parts_of_a_gpu() -> list[Part]:
    """The parts on a CUDA device.

    The compiler takes most of the time of a compiled size, so that only the smallest is compiled,
    after it was measured eager. The JSON of the latter is replaced when the former is done.
    """
    def operators(family: str, weight: float) -> Part:
        return Part(f"operators-{family}", (
            "bench/operators.py", f"--families={family}", "--minutes={minutes}", "--out={out}"),
            weight, 20, merge_into="operators")

    def size(name: str, weight: float, *flags: str, part: str = "") -> Part:
        return Part(part or f"mfu-{name}", (
            "bench/mfu.py", f"--cases={name}", "--backends=torch,triton", *flags, "--out={out}"),
            weight, 30, merge_into="mfu")

    return [
        Part("ring3", ("-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--durations=20", "tests"),
             2.5, 20),
        operators("attention", 1.2), operators("layernorm", 1), operators("cross_entropy", 1),
        Part("flush", ("bench/ops/flush.py", "--out={out}"), 0.3, 15),
        size("124M", 1.5, "--compile=False", "--peers=liger", "--profile=True", part="step-124M"),
        size("124M", 3.5, "--peers=", "--warm_start=False", "--accumulated_tokens=524288",
             "--profile=True"),
        Part("tune", ("bench/tune.py", "--sizes=124M", "--family=layernorm,cross_entropy",
                      "--repeats=10", "--out={out}"), 1, 30),
        *(size(name, 0.6, "--compile=False", "--peers=", "--steps=5")
          for name in ("350M", "774M", "1558M")),
        Part("parity", ("bench/curves/parity.py", "--out={out}"), 1, 60),
        Part("memory", ("bench/steps/memory.py", "--out={out}"), 0.5, 15),
    ]


def parts_of_a_cpu(device: str) -> list[Part]:
    """The parts on any other device, at a small size; what needs CUDA is skipped."""
    none, here = f"needs a CUDA device, this is {device}", f"--device={device}"
    return [
        Part("ring3", (), 0, 0, skip=none),
        Part("operators", ("bench/operators.py", here, "--repeats=5", "--minutes={minutes}",
                           "--out={out}"), 1, 10),
        Part("flush", (), 0, 0, skip=none),
        Part("mfu-macbook", ("bench/mfu.py", here, "--cases=macbook", "--steps=5",
                             "--compile=False", "--profile=True", "--accumulated_tokens=3072",
                             "--out={out}"), 1, 10, merge_into="mfu"),
        Part("tune", (), 0, 0, skip=none),
        Part("parity", ("bench/curves/parity.py", here, "--out={out}"), 1, 10),
        Part("memory", (), 0, 0, skip=none),
    ]


def main(options: Options) -> int:
    """Run the parts and print how each ended."""
    ends = time.monotonic() + 60 * options.minutes
    device = hardware.resolve_device(options.device)
    chosen = choose(parts(device.type), options.parts)
    out = Path(options.out).resolve() if options.out else ROOT / "out-suite"
    out.mkdir(parents=True, exist_ok=True)
    result: dict = {"benchmark": "suite", "minutes": options.minutes,
                    "environment": environment(device), "parts": {}}
    for i, part in enumerate(chosen):
        share = part.weight / max(sum(p.weight for p in chosen[i:]), 1e-9)
        outcome = run(part, (ends - time.monotonic()) * share, out, device.type)
        result["parts"][part.name] = asdict(outcome)
        write_result(out / f"suite-{device.type}.json", result)
        print(f"{part.name:14}{outcome.status:10}{outcome.seconds:7.1f} s  {outcome.why}",
              flush=True)
    bad = [name for name, outcome in result["parts"].items()
           if outcome["status"] in ("failed", "timed out")]
    print(f"written to {out / f'suite-{device.type}.json'}"
          + (f"; not passed: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


def choose(known: list[Part], names: str) -> list[Part]:
    """The parts of these names, in the order of `known`. Raises ValueError for an unknown name."""
    if not names:
        return known
    wanted = named("parts", names, [part.name for part in known])
    return [part for part in known if part.name in wanted]


def run(part: Part, seconds: float, out: Path, device: str) -> Outcome:
    """Run one part, in at most so many seconds."""
    if part.skip:
        return Outcome("skipped", part.skip)
    if seconds < part.least_s:
        left = max(0.0, seconds)
        return Outcome("skipped", f"{left:.0f} s left for it, it needs at least {part.least_s:.0f}")
    file = out / (f"{part.name}.json" if part.merge_into else f"{part.name}-{device}.json")
    file.unlink(missing_ok=True)  # an old result must not be taken for this one
    # it ends by itself between two cases: a fifth of the time is for the last one
    minutes = f"{0.8 * seconds / 60:.3f}"
    words = [word.replace("{out}", str(file)).replace("{minutes}", minutes)
             for word in part.command]
    began = time.monotonic()
    code, text = launch([sys.executable, *words], out / f"{part.name}.log", seconds)
    outcome = Outcome("passed", seconds=time.monotonic() - began, command=["python", *words],
                      log=text[-LOG_LINES:])
    last = next((line for line in reversed(text) if line.strip()), "")
    if code is None:
        outcome.status = "timed out"
        outcome.why = f"ended after {seconds:.0f} s; what it had written is kept"
    elif code != 0:
        outcome.status, outcome.why = "failed", f"exit code {code}: {last}"
    elif not file.exists():
        outcome.why = last
    if file.exists():
        outcome.result = json.loads(file.read_text())
        if part.merge_into:
            merge(file, out / f"{part.merge_into}-{device}.json", outcome.result)
    return outcome


def launch(command: list[str], log: Path, seconds: float) -> tuple[int | None, list[str]]:
    """(exit code, lines of output); the code is None if it was killed with all it had started.

    The output is written to `log` as it comes.
    """
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True,
                                   env=os.environ | environ())
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        except KeyboardInterrupt:
            end(process)
            raise
    if code is None:
        end(process)
    return code, log.read_text(errors="replace").splitlines()


def environ() -> dict[str, str]:
    """What a part's process needs: the checkout on its path, where it may not be installed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def end(process: subprocess.Popen) -> None:
    """Kill a part and all processes of its session."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def merge(file: Path, into: Path, result: dict) -> None:
    """Add a part's cases to those in `into`, if they are of the same commit and machine.

    If not, `into` is written anew. `file` is removed.
    """
    same = ("commit", "dirty", "gpu_name", "cpu", "torch", "triton")

    def key(found: dict) -> list:
        where = found["environment"] | {"gpu_name": (found["environment"]["gpu"] or {}).get("name")}
        return [where[name] for name in same]

    before = json.loads(into.read_text()) if into.exists() else None
    if before and key(before) == key(result):
        result = result | {"cases": before["cases"] | result["cases"]}
    write_result(into, result)
    file.unlink()


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
