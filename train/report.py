"""What a run reports: lines on the terminal, and metrics.jsonl and loss.png in its folder.

Only rank 0 writes. metrics.jsonl has one JSON object a line:
- after a step: iter, loss, lr, grad_norm, tokens_per_s, time_ms, mfu, mfu_causal, tokens (so far),
  skipped (steps so far whose loss or gradient was not finite), position (windows read), epoch,
  memory_bytes (a GPU's peak);
- after an evaluation, with nanoGPT's wandb keys: iter, train/loss, val/loss, lr, mfu.
mfu is in percent by PaLM's formula, null where the device's peak is unknown (--peak_tflops).
Numbers that are not finite are null, too.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common import hardware
from common.files import atomic_write, parse_json, write_json
from common.plot import picture
from data.loader import Loader
from gpt.flops import mfu
from gpt.peaks import peak_tflops
from train.checkpoint import METRICS
from train.config import Config, flatten
from train.parallel import World
from train.signals import CLOSED, StopRequest, detach_closed

REMEDY = "remove that line"


class Pending(NamedTuple):
    """A step that was launched, and whose numbers may still be on their way to the host."""

    step: int
    lr: float
    data: dict[str, float]
    read: Callable[[], tuple[list[float], hardware.Moment]]
    """waits for train_step's numbers; returns them and the moment when the step ended"""


class Report:
    """Writes a run's lines and metrics.

    On a GPU it reads a step's numbers when the next step is launched, so that the device never
    waits for the host. A step's time is from the end of the one before to its own, by the device's
    clock.
    """

    def __init__(self, config: Config, world: World, device: torch.device,
                 stop_request: StopRequest):
        """`stop_request` is filled in where the terminal, or the reader of stdout, is gone."""
        self.config, self.device, self.world_size = config, device, world.size
        self.peak_tflops = peak_tflops(hardware.device_name(device), config.run.peak_tflops)
        self.out_dir = Path(config.run.out_dir)
        self.speaks = world.rank == 0
        self.stop_request, self.stop_requested = stop_request, False
        self.pending: Pending | None = None
        self.skipped = 0
        self.skipped_in_a_row: list[dict[str, float]] = []
        self.mfu: float | None = None
        self.bar: tqdm | None = None
        self.sinks: list[Callable[[dict[str, Any]], None]] = []
        self.clock = hardware.now(self.device)

    def say(self, line: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self.speaks:
            with self._terminal():
                tqdm.write(line)
                sys.stdout.flush()

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """Request a stop where the block cannot write to the terminal: its reader is gone."""
        try:
            yield
        except OSError:
            if not (gone := detach_closed()):
                raise
            self.stop_request.reason = self.stop_request.reason or gone + CLOSED

    def begin(self, step: int, evaluated: bool) -> None:
        """Write config.json and open the metrics, the progress bar and the sinks.

        Entries of metrics.jsonl from `step` on are cut off, since the run will write them again;
        but not the evaluation at `step` where it is done (`evaluated`).
        """
        if self.speaks:
            write_json(self.out_dir / "config.json", dict(flatten(self.config)))
            log = self.out_dir / METRICS
            before = [e for e in read_metrics(log) if e["iter"] < step
                      or (evaluated and "val/loss" in e and e["iter"] == step)]
            with atomic_write(log) as file:
                file.writelines(json.dumps(entry).encode() + b"\n" for entry in before)
            self.bar = tqdm(total=self.config.optim.max_iters, initial=step, unit="step",
                            disable=None, dynamic_ncols=True, smoothing=0.05)
            self.sinks = open_sinks(self.config, self.say)
        self.clock = hardware.now(self.device)

    def step(self, step: int, lr: float, numbers: Tensor, batches: Loader) -> None:
        """Report a step that was just launched, given train_step's numbers.

        On a GPU this writes the step before, which is done once this one has begun. Other devices
        have already done this step, and it is written at once.
        """
        self.write_pending()
        data = {"position": batches.position, "epoch": batches.epoch}
        self.pending = Pending(step, lr, data, hardware.read_later(numbers))
        if self.device.type != "cuda":
            self.write_pending()

    def write_pending(self) -> None:
        """Write the step that was launched last, if it is not written yet."""
        if self.pending is None:
            return
        (step, lr, data, read), self.pending = self.pending, None
        (loss, grad_norm, skipped, stops), ended = read()
        self.stop_requested |= stops > 0
        numbers = {"iter": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        self._count_skipped(skipped > 0, numbers | data)
        seconds, self.clock = hardware.seconds_between(self.clock, ended), ended
        tokens = self.config.tokens_per_iter
        used = mfu(self.config.model, tokens / seconds / self.world_size, self.peak_tflops)
        self.mfu = used["mfu_palm"] and 100 * used["mfu_palm"]
        if not self.speaks:
            return
        if self.bar is not None:
            with self._terminal():
                speed = f"loss {loss:.4f}, {tokens / seconds:,.0f} tok/s"
                self.bar.set_postfix_str(speed, refresh=False)
                self.bar.update(1)
        if step % self.config.run.log_interval == 0:
            percent = "" if self.mfu is None else f", mfu {self.mfu:.2f}%"
            self.say(f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, "
                     f"{tokens / seconds:,.0f} tok/s{percent}")
            self._log(numbers | {
                "tokens_per_s": tokens / seconds, "time_ms": 1000 * seconds, "mfu": self.mfu,
                "mfu_causal": used["mfu_causal"] and 100 * used["mfu_causal"],
                "tokens": (step + 1) * tokens, "skipped": self.skipped, **data,
                "memory_bytes": hardware.peak_memory_bytes(self.device)})

    def _count_skipped(self, skipped: bool, numbers: dict[str, float]) -> None:
        """Count a skipped step, or end the row of them.

        Raises FloatingPointError, on all ranks, after max_skipped in a row.
        """
        if not skipped:
            self.skipped_in_a_row.clear()
            return
        self.skipped += 1
        self.skipped_in_a_row.append(numbers)
        self.say(f"iter {numbers['iter']}: skipped, loss {numbers['loss']}, gradient norm "
                 f"{numbers['grad_norm']}")
        if len(self.skipped_in_a_row) < self.config.run.max_skipped:
            return
        dump = self.out_dir / "not-finite.json"
        if self.speaks:
            dump.write_text(json.dumps(self.skipped_in_a_row, indent=1))
        raise FloatingPointError(
            f"{len(self.skipped_in_a_row)} steps in a row without a finite loss and gradient, up "
            f"to step {numbers['iter']}; they are in {dump}. Go back to the last checkpoint with "
            "--init_from=resume and a lower --learning_rate, or --dtype=float32"
        )

    def evaluation(self, step: int, lr: float, losses: dict[str, float]) -> None:
        """Report an evaluation: nanoGPT's line, and an entry of the metrics."""
        self.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if self.speaks and not self.config.run.eval_only:
            self._log({"iter": step, "train/loss": losses["train"], "val/loss": losses["val"],
                       "lr": lr, "mfu": self.mfu})

    def restart_clock(self) -> None:
        """Time the next step from now, after an evaluation or a save."""
        self.clock = hardware.now(self.device)

    def _log(self, values: dict[str, Any]) -> None:
        """Append an entry to metrics.jsonl, with null for what is not finite, and to the sinks."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                  for k, v in values.items()}
        with (self.out_dir / METRICS).open("a") as log:
            log.write(json.dumps(finite) + "\n")
        for sink in self.sinks:
            sink(finite)

    def finish(self) -> None:
        """Write the last step, close the progress bar and draw loss.png."""
        self.write_pending()
        if self.bar is not None:
            with self._terminal():
                self.bar.close()
        if self.speaks:
            draw(self.out_dir)


def read_metrics(log: Path) -> list[dict[str, Any]]:
    """Read the entries of a metrics.jsonl; [] where there is no file.

    A last line that a kill cut short is left out. Raises ValueError, with the line's number, for
    any other line that is no entry.
    """
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    entries = list[dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n") or not line.strip():
            continue
        entry = parse_json(line, Any, f"{log}, line {number}", REMEDY)
        if not (isinstance(entry, dict) and isinstance(entry.get("iter"), int)
                and all(value is None or isinstance(value, int | float)
                        for value in entry.values())):
            raise ValueError(f"{log}, line {number}: no object of numbers with iter; {REMEDY}")
        entries.append(entry)
    return entries


def open_sinks(config: Config,
               say: Callable[[str], None]) -> list[Callable[[dict[str, Any]], None]]:
    """Return a function that takes an entry for each of wandb and TensorBoard that is asked for.

    One that is not installed gives a warning.
    """
    c, sinks = config.run, []
    if c.wandb_log:
        try:
            import wandb
        except ImportError:
            say("warning: --wandb_log=True, but wandb is not installed (pip install wandb); "
                "metrics.jsonl has all")
        else:
            wandb.init(project=c.wandb_project, name=c.wandb_run_name,
                       config=dict(flatten(config)))
            sinks.append(wandb.log)
    if c.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("warning: --tensorboard=True, but tensorboard is not installed (pip install "
                "tensorboard); metrics.jsonl has all")
        else:
            writer = SummaryWriter(c.out_dir)
            sinks.append(lambda values: _to_tensorboard(writer, values))
    return sinks


def _to_tensorboard(writer: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is not None and name != "iter":
            writer.add_scalar(name, value, values["iter"])
    writer.flush()


def draw(out_dir: Path) -> None:
    """Draw loss.png from metrics.jsonl: the loss of every step and of every evaluation."""
    entries = read_metrics(out_dir / METRICS)
    steps = [e for e in entries if "loss" in e]
    evaluations = [e for e in entries if "val/loss" in e]
    with picture(out_dir / "loss.png", width=8, height=4.5) as figure:
        axes = figure.subplots()
        axes.plot([e["iter"] for e in steps], [e["loss"] for e in steps], color="0.75",
                  linewidth=0.8, label="batch")
        evaluated_at = [e["iter"] for e in evaluations]
        for key, label in (("train/loss", "train"), ("val/loss", "validation")):
            axes.plot(evaluated_at, [e[key] for e in evaluations], "o-", markersize=4, label=label)
        axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=out_dir.name)
        axes.grid(alpha=0.3)
        axes.legend()
