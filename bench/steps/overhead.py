"""The time of a training step that is the trainer's own.

    python bench/steps/overhead.py [CONFIG] [--key=value ...] [--out=FILE]

Without CONFIG it is the quickstart's, always on a CPU. A step is one of the real loop, with
batches, learning rate, loss over ranks, report, progress line and metrics.jsonl. The time in
forward, backward, clipping, optimizer step and zero_grad is subtracted. Those calls are timed where
the loop makes them, which is right on a CPU, where they return when they are done; on a GPU the
loop runs ahead. --out is the JSON file, bench/results/overhead-cpu.json if not given.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from bench.timing import Timing, environment, result_path, write_result
from common.cli import exit_code
from train import loop, optim, parallel
from train.build import build
from train.command_line import parse
from train.config import Config
from train.report import Report
from train.state import Run

STEPS, WARMUP = 100, 10


class Stopwatch:
    """Seconds spent in the calls it wraps, since it was last read."""

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
    """Milliseconds of whole steps, and of the trainer's own part of them."""
    with tempfile.TemporaryDirectory() as folder:
        run_config = dataclasses.replace(config.run, out_dir=folder, init_from="scratch")
        run = build(dataclasses.replace(config, run=run_config))
        if run.device.type != "cpu":
            raise ValueError(f"--device={run.device.type}: calls return before their work is done "
                             "there; use --device=cpu")
        report = Report(run.config, run.world, run.device, run.stop_request)
        report.begin(run.step, run.evaluated)
        with timed_calls(run) as watch:
            steps = [one(run, report, watch) for _ in range(WARMUP + STEPS)][WARMUP:]
        report.finish()
    whole, inside = zip(*steps, strict=True)
    return Timing(whole), Timing(tuple(w - i for w, i in zip(whole, inside, strict=True))), run


@contextmanager
def timed_calls(run: Run) -> Iterator[Stopwatch]:
    """While the block runs, a Stopwatch times the calls that do the training."""
    watch = Stopwatch()
    calls = [(run.wrapped, "forward"), (torch.Tensor, "backward"), (run.optimizer, "step"),
             (run.optimizer, "zero_grad"), (parallel, "clip")]
    with ExitStack() as stack:
        for owner, name in calls:
            timed = watch.timed(getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        yield watch


def one(run: Run, report: Report, watch: Stopwatch) -> tuple[float, float]:
    """A step as the loop takes it: milliseconds of all of it, and of the timed calls in it."""
    start = time.perf_counter()
    lr = optim.learning_rate(run.step, run.config.optim)
    report.step(run.step, lr, loop.train_step(run, lr), run.batches)
    run.step += 1
    return 1e3 * (time.perf_counter() - start), 1e3 * watch.read()


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit code: 0, or 2 after one line on stderr."""
    return exit_code(lambda: overhead(sys.argv[1:] if argv is None else argv))


def overhead(given: list[str]) -> None:
    """Measure, print, and write the JSON."""
    out = next((word.partition("=")[2] for word in given if word.startswith("--out=")), "")
    given = [word for word in given if not word.startswith("--out=")]
    config = given if given and not given[0].startswith("-") else ["configs/quickstart.py", *given]
    whole, own, run = measure(parse([*config, "--device=cpu"]))
    fraction = sum(own.samples) / sum(whole.samples)
    print(f"step {whole}; the trainer's own part {own}: {100 * fraction:.2f} % of all time in "
          f"{STEPS} steps")
    result = {"benchmark": "overhead", "environment": environment("cpu"), "config": config[0],
              "batch_size": run.config.data.batch_size, "step": whole.as_json(),
              "trainer": own.as_json(), "fraction": fraction}
    write_result(result_path(out, "overhead-cpu"), result)


if __name__ == "__main__":
    sys.exit(main())
