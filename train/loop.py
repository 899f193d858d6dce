"""Training, from start to end. bench/ and the tests import these functions; nobody copies them."""

import math
import signal
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from common import hardware
from data.loader import eval_batches
from train import checkpoint, memory, optim, parallel, signals, watchdog
from train.build import Run, build, describe
from train.config import Config, flatten
from train.report import Report


def train(config: Config) -> None:
    """The run that `config` describes: start or resume, then evaluate, save and step until
    max_iters or a signal.

    Raises KeyboardInterrupt after Ctrl-C, once all is saved.
    """
    try:
        with ExitStack() as held:
            run = build(config, held)
            report = Report(run.config, run.world, run.device, run.stop_request)
            report.say(describe(run))
            if run.config.run.eval_only:
                report.evaluation(run.step, 0.0, evaluate(run))
                return parallel.stop()
            with (signals.listen(run.stop_request),
                  watchdog.watchdog(run.progress, run.store, run.world,
                                  run.config.parallel.hang_timeout)):
                train_until_done(run, report, writer(run))
    except (ValueError, OSError, FloatingPointError):  # these are raised on all ranks together
        parallel.stop()
        raise
    except torch.OutOfMemoryError as error:
        raise ValueError(memory.advice(config, parallel.world(), error)) from error
    parallel.stop()
    if run.stop_request.reason == signal.SIGINT.name:
        raise KeyboardInterrupt
    if run.stop_request.reason.endswith(signals.CLOSED):
        raise OSError(f"{run.stop_request.reason}, so the run saved and ended at step {run.step}; go on with "
                      "--init_from=resume")


def writer(run: Run) -> checkpoint.Writer:
    """What writes the run's checkpoints. One that fails ends the run, on all ranks after the same
    step."""
    c = run.config.run

    def failed() -> None:
        run.stop_request.reason = "a checkpoint that was not written"

    return checkpoint.Writer(Path(c.out_dir), run.world, c.keep_last, c.keep_every, failed)


def train_until_done(run: Run, report: Report, checkpoints: checkpoint.Writer) -> None:
    """Train in the run's folder: set aside what is later than its step, open its log, train, draw.

    However it ends, the checkpoint that is being written becomes whole first.
    """
    out_dir = Path(run.config.run.out_dir)
    aside = parallel.broadcast_from_rank_0(lambda: checkpoint.roll_back(out_dir, run.step), run.world)
    if aside is not None:
        report.say(f"moved to {aside}: checkpoints later than step {run.step}, with their metrics")
    parallel.gather_or_raise(lambda: report.begin(run.step, run.evaluated), run.world)
    try:
        step_until_done(run, report, checkpoints)
    finally:
        run.progress.begins("save, the last")
        checkpoints.wait()
    report.finish()


def step_until_done(run: Run, report: Report, checkpoints: checkpoint.Writer) -> None:
    """Evaluate and save when due, else step; asked to stop, on any rank, save after the step."""
    c = run.config
    while True:
        lr = optim.learning_rate(run.step, c.optim)
        last = run.step >= c.optim.max_iters
        if report.stop_requested and not last:
            report.say(f"asked to stop ({run.stop_request.reason or 'another rank was'}), at step {run.step}")
            save(run, None, report, checkpoints)
            break
        if (last or run.step % c.run.eval_interval == 0) and not run.evaluated:
            report.pause()
            losses = evaluate(run)
            report.evaluation(run.step, lr, losses)
            save(run, losses["val"], report, checkpoints)
            report.resume_clock()
        if last:
            break
        report.step(run.step, lr, train_step(run, lr), run.batches)
        run.step, run.evaluated = run.step + 1, False


def train_step(run: Run, lr: float) -> Tensor:
    """One optimizer step. What Report reads of it, (4,) fp32, the same on all ranks and still on
    the device: the mean loss over all ranks' tokens, the gradient's norm, 1 if either is not finite
    (then nothing was changed), and how many ranks were asked to stop."""
    run.progress.begins(f"step {run.step}")
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    loss = accumulate(run)
    run.scaler.unscale_(run.optimizer)
    grad_norm = parallel.clip(run.model, run.config.optim.grad_clip)
    asked = torch.full((), float(bool(run.stop_request.reason)), device=run.device)
    loss, asked = parallel.sum_over_ranks(torch.stack([loss, asked])).unbind()
    skip = ~(loss.isfinite() & grad_norm.isfinite())
    optim.step(run.optimizer, skip)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, grad_norm.float(), skip.float(), asked])


def accumulate(run: Run) -> Tensor:
    """Forward and backward of one optimizer step; this rank's share of the mean loss, still on the
    device.

    Each micro-batch gives a sum over tokens, divided by the tokens of the whole step on all ranks,
    so that every token weighs the same. The ranks' gradients are averaged later, hence the world
    size in the factor.
    """
    steps = parallel.accumulation_per_rank(run.config.optim.gradient_accumulation_steps, run.world)
    share = 1.0 / run.config.tokens_per_iter
    total = torch.zeros((), device=run.device)
    for i in range(steps):
        parallel.sync_gradients(run.wrapped, on=i == steps - 1)
        tokens, targets = next(run.batches)
        run.progress.begins(f"step {run.step}, forward and backward {i + 1} of {steps}")
        with hardware.autocast(run.device, run.dtype):
            loss = run.wrapped(tokens, targets, reduction="sum", **run.mask(tokens)) * share
        run.progress.begins(f"step {run.step}, backward {i + 1} of {steps}")
        run.scaler.scale(loss * run.world.size).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Mean loss per token of each split over eval_iters fixed batches, shared out among the ranks.

    The windows are the same every time and for every number of ranks; no random number of the
    training is drawn.
    """
    c, w, losses = run.config, run.world, {}
    run.model.eval()
    for split, tokens in run.tokens.items():
        total = torch.zeros(2, device=run.device, dtype=torch.float64)
        for inputs, targets in eval_batches(
            tokens, block_size=c.model.block_size, batch_size=c.data.batch_size,
            count=c.run.eval_iters, seed=c.run.seed,
            device=run.device, rank=w.rank, world_size=w.size,
        ):
            run.progress.begins(f"evaluation after step {run.step}")
            with hardware.autocast(run.device, run.dtype):
                total[0] += run.model(inputs, targets, reduction="sum", **run.mask(inputs))
            total[1] += (targets >= 0).sum()
        loss_sum, count = parallel.sum_over_ranks(total).tolist()
        losses[split] = loss_sum / count
    run.model.train()
    parallel.reshard(run.model)
    return losses


def save(run: Run, val_loss: float | None, report: Report, checkpoints: checkpoint.Writer) -> None:
    """Begin to write a checkpoint if one is due after this evaluation (without one: it is); older
    ones may go then.

    Raises OSError, on all ranks, if the one before could not be written.
    """
    c = run.config.run
    due = run.step > 0 and (c.always_save_checkpoint or val_loss is None
                            or val_loss < run.best_val_loss)
    run.best_val_loss = min(run.best_val_loss, float("inf") if val_loss is None else val_loss)
    if not due:
        return
    known = val_loss is None or math.isfinite(val_loss)
    if not known or not checkpoint.finite(run.model, run.optimizer):
        report.say(f"not saved: at step {run.step} the validation loss or a weight is not finite")
        return
    run.progress.begins(f"save of step {run.step}")
    checkpoints.wait()
    report.say(f"saving checkpoint to {c.out_dir}")
    state = {
        "val_loss": val_loss, "best_val_loss": run.best_val_loss, "position": run.batches.position,
        "config": dict(flatten(run.config)), "kernels": run.choice.backends | {"why": run.choice.why},
        "world_size": run.world.size,
        "scaler": run.scaler.state_dict(), "torch": torch.__version__, "compiled": run.compiled,
    }
    tensors, sharded = checkpoint.copy_to_host(run.model, run.optimizer, run.world)
    checkpoints.begin(checkpoint.Snapshot(run.step, tensors, sharded, run.config.model, state,
                                          run.tokenizer))
