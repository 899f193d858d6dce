"""What the trainer itself costs: `python bench/steps/overhead.py` [CONFIG] [--key=value ...], the
quickstart on a CPU by default.

Of each step of the real loop (batches, learning rate, loss over ranks, report, progress line,
metrics.jsonl) the time that is not in forward, backward, clipping, optimizer step or zero_grad.
Those calls are timed where the loop makes them, so a CPU, where they return when they are done, is
what this measures; on a GPU the loop runs ahead and waits for nothing.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.timing import ROOT, Timing, environment, write_result
from common.cli import exit_code
from train import loop, optim, parallel
from train.build import Run, build
from train.command_line import parse
from train.config import Config
from train.report import Report

STEPS, WARMUP = 100, 10


class Stopwatch:
    """Seconds inside the calls it wraps, since it was last read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result
        return wrapped

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure(config: Config) -> tuple[Timing, Timing, Run]:
    """Milliseconds of whole steps, and of what in them is the trainer's own."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config,
                                     run=dataclasses.replace(config.run, out_dir=folder,
                                                             init_from="scratch"))
        run, watch = build(config), Stopwatch()
        if run.device.type != "cpu":
            raise ValueError(f"--device={run.device.type}: calls return before their work is done "
                             "there; use --device=cpu")
        report = Report(run.config, run.world, run.device, run.stop_request)
        report.begin(run.step, run.evaluated)
        run.wrapped.forward = watch.timed(run.wrapped.forward)
        before, timed = torch.Tensor.backward, watch.timed(torch.Tensor.backward)
        torch.Tensor.backward = timed  # type: ignore[method-assign]
        run.optimizer.step = watch.timed(run.optimizer.step)  # type: ignore[method-assign]
        zero_grad = watch.timed(run.optimizer.zero_grad)
        run.optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        clip, parallel.clip = parallel.clip, watch.timed(parallel.clip)
        try:
            steps = [one(run, report, watch) for _ in range(WARMUP + STEPS)][WARMUP:]
        finally:
            torch.Tensor.backward, parallel.clip = before, clip  # type: ignore[method-assign]
        report.finish()
    whole, inside = zip(*steps, strict=True)
    return Timing(whole), Timing(tuple(w - i for w, i in zip(whole, inside, strict=True))), run


def one(run: Run, report: Report, watch: Stopwatch) -> tuple[float, float]:
    """A step as train_until_done takes it: milliseconds of it all, and of what is not the
    trainer's."""
    start = time.perf_counter()
    lr = optim.learning_rate(run.step, run.config.optim)
    report.step(run.step, lr, loop.train_step(run, lr), run.batches)
    run.step += 1
    return 1e3 * (time.perf_counter() - start), 1e3 * watch.read()


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after one line on stderr for what the user can mend."""
    return exit_code(lambda: report(sys.argv[1:] if argv is None else argv))


def report(given: list[str]) -> None:
    """Measure, print, and write the JSON."""
    config = given if given and not given[0].startswith("-") else ["configs/quickstart.py", *given]
    whole, own, run = measure(parse([*config, "--device=cpu"]))
    fraction = sum(own.samples) / sum(whole.samples)
    print(f"step {whole}, of it the trainer {own}: {100 * fraction:.2f} % of all time over {STEPS} "
          "steps")
    result = {"benchmark": "overhead", "environment": environment("cpu"), "config": config[0],
              "batch_size": run.config.data.batch_size, "step": whole.as_json(),
              "trainer": own.as_json(), "fraction": fraction}
    write_result(Path(ROOT / "bench" / "results" / "overhead-cpu.json"), result)


if __name__ == "__main__":
    sys.exit(main())
