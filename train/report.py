"""What a run says: nanoGPT's lines and a progress bar on the terminal, metrics.jsonl and loss.png
in its folder.

Only rank 0 speaks. metrics.jsonl has one JSON object a line: after a step `iter`, `loss`, `lr`,
`grad_norm`, `tokens_per_s`, `time_ms`, `mfu`, `mfu_causal`, `tokens`, `skipped` (steps so far whose
loss or gradient was not finite: theirs is null), `position` (windows read), `epoch`, `memory_bytes`
(a GPU's peak); after an evaluation `iter`, `train/loss`, `val/loss`, `lr`, `mfu` (nanoGPT's wandb
keys, mfu in percent by PaLM's formula, null where the device's peak is not known).
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common import hardware
from common.files import atomic_write, parse_json, write_json
from data.loader import Loader
from gpt.flops import mfu
from train.checkpoint import METRICS
from train.config import Config, flatten, to_json
from train.parallel import World
from train.signals import CLOSED, StopRequest, detach_closed

REMEDY = "remove that line"


class Report:
    """The run's voice. Numbers of a step are read one step later, so that the device never waits
    for the host."""

    def __init__(self, config: Config, world: World, device: torch.device, asked: StopRequest):
        """`asked` is asked to stop where the terminal, or what reads this run's output, is gone."""
        self.config, self.speaks, self.stop_request = config, world.rank == 0, asked
        self.device_name, self.world_size = hardware.device_name(device), world.size
        self.out_dir, self.defers = Path(config.run.out_dir), device.type == "cuda"
        self.mfu: float | None = None
        self.pending: tuple[int, float, dict[str, float], Callable[[], list[float]]] | None = None
        self.stop_requested, self.skipped = False, 0
        # the steps skipped since the last one that was not
        self.in_a_row: list[dict[str, float]] = []
        self.device = device
        self.bar: tqdm | None = None
        self.sinks: list[Callable[[dict[str, Any]], None]] = []
        self.clock = time.perf_counter()

    def say(self, line: str) -> None:
        if self.speaks:
            with self._terminal():
                tqdm.write(line)
                sys.stdout.flush()

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """Around what is written to the terminal: where that is gone, ask the run to stop."""
        try:
            yield
        except OSError:
            if not (gone := detach_closed()):
                raise
            self.stop_request.reason = self.stop_request.reason or gone + CLOSED

    def begin(self, step: int, evaluated: bool) -> None:
        """Open the run's folder: config.json, and metrics.jsonl cut back to the `step` that the run
        goes on from; its evaluation stays where it was `evaluated` and so is not made again."""
        if self.speaks:
            write_json(self.out_dir / "config.json", dict(flatten(self.config)))
            log = self.out_dir / METRICS
            before = [e for e in read_metrics(log) if e["iter"] < step
                      or (evaluated and "val/loss" in e and e["iter"] == step)]
            with atomic_write(log) as file:
                file.writelines(json.dumps(entry).encode() + b"\n" for entry in before)
            self.bar = tqdm(total=self.config.optim.max_iters, initial=step, unit="step",
                            disable=None,
                            dynamic_ncols=True, smoothing=0.05)
            self.sinks = open_sinks(self.config, self.say)
        self.clock = time.perf_counter()

    def step(self, step: int, lr: float, numbers: Tensor, batches: Loader) -> None:
        """Take note of a step just launched (`train_step`'s numbers); write down the one before it,
        which is done where this one has begun. A CPU has done this one, too, and its time ends
        here.
        """
        self._write_pending()
        data = {"position": batches.position, "epoch": batches.epoch}
        self.pending = (step, lr, data, hardware.read_later(numbers))
        if not self.defers:
            self._write_pending()

    def _write_pending(self) -> None:
        if self.pending is None:
            return
        step, lr, data, read = self.pending
        self.pending = None
        loss, grad_norm, skipped, asked = read()
        self.stop_requested |= asked > 0
        self._count_skipped(skipped > 0,
                            {"iter": step, "loss": loss, "grad_norm": grad_norm, "lr": lr} | data)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        tokens = self.config.tokens_per_iter
        used = mfu(self.config.model, tokens / seconds / self.world_size, self.device_name)
        self.mfu = used["mfu_palm"] and 100 * used["mfu_palm"]
        if not self.speaks:
            return
        if self.bar is not None:
            with self._terminal():
                self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens / seconds:,.0f} tok/s",
                                         refresh=False)
                self.bar.update(1)
        if step % self.config.run.log_interval == 0:
            percent = "n/a" if self.mfu is None else f"{self.mfu:.2f}%"
            self.say(f"iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, mfu {percent}")
            causal = used["mfu_causal"] and 100 * used["mfu_causal"]
            self._log(iter=step, loss=loss, lr=lr, grad_norm=grad_norm,
                      tokens_per_s=tokens / seconds, time_ms=1000 * seconds,
                      mfu=self.mfu, mfu_causal=causal, tokens=(step + 1) * tokens,
                      skipped=self.skipped, **data,
                      memory_bytes=hardware.peak_memory_bytes(self.device))

    def _count_skipped(self, skipped: bool, numbers: dict[str, float]) -> None:
        """Raises FloatingPointError, on all ranks at the same step, after max_skipped of them in a
        row."""
        if not skipped:
            self.in_a_row.clear()
            return
        self.skipped += 1
        self.in_a_row.append(numbers)
        self.say(f"iter {numbers['iter']}: skipped, loss {numbers['loss']}, gradient norm "
                 f"{numbers['grad_norm']}")
        if len(self.in_a_row) < self.config.run.max_skipped:
            return
        dump = self.out_dir / "not-finite.json"
        if self.speaks:
            dump.write_text(json.dumps(self.in_a_row, indent=1))
        raise FloatingPointError(
            f"{len(self.in_a_row)} steps in a row without a finite loss and gradient, up to step "
            f"{numbers['iter']}; they are in {dump}. Go back to the last checkpoint with "
            "--init_from=resume and a lower --learning_rate, or --dtype=float32"
        )

    def evaluation(self, step: int, lr: float, losses: dict[str, float]) -> None:
        """nanoGPT's line after an evaluation; its time does not count as the next step's."""
        self.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if self.speaks and not self.config.run.eval_only:
            self._log(**{"iter": step, "train/loss": losses["train"], "val/loss": losses["val"],
                         "lr": lr, "mfu": self.mfu})

    def pause(self) -> None:
        """Write what is pending before something else than a step begins."""
        self._write_pending()

    def resume_clock(self) -> None:
        self.clock = time.perf_counter()

    def _log(self, **values: Any) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v
                  for k, v in values.items()}
        with (self.out_dir / METRICS).open("a") as log:
            log.write(json.dumps(finite) + "\n")
        for sink in self.sinks:
            sink(finite)

    def finish(self) -> None:
        """Close the bar and draw loss.png."""
        self._write_pending()
        if self.bar is not None:
            with self._terminal():
                self.bar.close()
        if self.speaks:
            draw(self.out_dir)


def read_metrics(log: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, none where there is no file, without a last line cut short.

    Raises ValueError, with the line's number, for what is no entry.
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
    """Where else each entry of metrics.jsonl goes: wandb and TensorBoard, if asked for. One not
    installed is said once."""
    c, sinks = config.run, []
    if c.wandb_log:
        try:
            import wandb
        except ImportError:
            say("warning: --wandb_log=True, but wandb is not installed (pip install wandb); "
                "metrics.jsonl has all")
        else:
            wandb.init(project=c.wandb_project, name=c.wandb_run_name,
                       config=json.loads(to_json(config)))
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
    """loss.png from metrics.jsonl: every step's loss, and both splits' where they were
    evaluated."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = read_metrics(out_dir / METRICS)
    steps = [e for e in entries if "loss" in e]
    evaluations = [e for e in entries if "val/loss" in e]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([e["iter"] for e in steps], [e["loss"] for e in steps], color="0.75", linewidth=0.8,
              label="batch")
    axes.plot([e["iter"] for e in evaluations], [e["train/loss"] for e in evaluations], "o-",
              markersize=4, label="train")
    axes.plot([e["iter"] for e in evaluations], [e["val/loss"] for e in evaluations], "o-",
              markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=out_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out_dir / "loss.png", dpi=120)
    plt.close(figure)
