"""The training loop, from start to end. The bench and the tests import these functions."""

import math
import signal
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from data.loader import eval_batches
from train import checkpoint, memory, optim, parallel, signals, watchdog
from train.build import build, describe
from train.config import Config, flatten
from train.report import Report
from train.state import Run


def train(config: Config) -> None:
    """Train from --init_from to max_iters, or until a stop is requested; or only evaluate.

    Raises KeyboardInterrupt after Ctrl-C, when the checkpoint is saved.
    """
    try:
        with ExitStack() as held:
            run = build(config, held)
            report = Report(run.config, run.world, run.device, run.stop_request)
            report.say(describe(run))
            if run.config.run.eval_only:
                report.evaluation(run.step, 0.0, evaluate(run))
                parallel.stop()
                return
            timeout_s = run.config.parallel.hang_timeout
            with (signals.listen(run.stop_request),
                  watchdog.watchdog(run.progress, run.store, run.world, timeout_s)):
                train_until_done(run, report, checkpoint_writer(run))
    except (ValueError, OSError, FloatingPointError):  # raised on all ranks together
        parallel.stop()
        raise
    except torch.OutOfMemoryError as error:
        raise ValueError(memory.advice(config, parallel.world(), error)) from error
    parallel.stop()
    reason = run.stop_request.reason
    if reason == signal.SIGINT.name:
        raise KeyboardInterrupt
    if reason.endswith(signals.CLOSED):
        raise OSError(f"{reason}, so the run saved and ended at step {run.step}; go on with "
                      "--init_from=resume")


def checkpoint_writer(run: Run) -> checkpoint.Writer:
    """The writer of the run's checkpoints. Where it fails, all ranks stop after the same step.

    Every rank must call it.
    """
    c = run.config.run

    def request_stop() -> None:
        run.stop_request.reason = "a checkpoint that was not written"

    return checkpoint.Writer(Path(c.out_dir), run.world, c.keep_last, c.keep_every, request_stop)


def train_until_done(run: Run, report: Report, checkpoints: checkpoint.Writer) -> None:
    """Prepare the run's folder, train, and draw loss.png.

    Checkpoints later than the run's step are set aside first. However training ends, the checkpoint
    that is being written is finished. Every rank must call it.
    """
    out_dir = Path(run.config.run.out_dir)
    aside = parallel.broadcast_from_rank_0(
        lambda: checkpoint.roll_back(out_dir, run.step), run.world)
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
    """The loop: evaluate and save when due, then step. A stop requested on any rank stops all.

    Every rank must call it.
    """
    c = run.config
    while True:
        lr = optim.learning_rate(run.step, c.optim)
        is_last = run.step >= c.optim.max_iters
        if report.stop_requested and not is_last:
            reason = run.stop_request.reason or "another rank was"
            report.say(f"asked to stop ({reason}), at step {run.step}")
            save(run, None, report, checkpoints)
            break
        if (is_last or run.step % c.run.eval_interval == 0) and not run.evaluated:
            report.write_pending()
            losses = evaluate(run)
            report.evaluation(run.step, lr, losses)
            save(run, losses["val"], report, checkpoints)
            report.restart_clock()
        if is_last:
            break
        numbers = train_step(run, lr)
        report.step(run.step, lr, numbers, run.batches)
        run.step, run.evaluated = run.step + 1, False


def train_step(run: Run, lr: float) -> Tensor:
    """One optimizer step. Return its numbers for Report, (4,) fp32, equal on all ranks.

    `lr`: the schedule's rate, which every group scales. The numbers, still on the device, are the
    mean loss over all ranks' tokens, the gradient's norm, 1 if either is not finite (weights and
    moments are then unchanged), and the number of ranks that request a stop. Every rank must call
    it.
    """
    run.progress.begins(f"step {run.step}")
    run.progress.steps += 1
    optim.set_rates(run.optimizer, run.step, lr, run.config.optim)
    loss = accumulate(run)
    run.scaler.unscale_(run.optimizer)
    grad_norm = parallel.clip(run.model, run.config.optim.grad_clip)
    stops = torch.full((), float(bool(run.stop_request.reason)), device=run.device)
    loss, stops = parallel.sum_over_ranks(torch.stack([loss, stops])).unbind()
    skip = ~(loss.isfinite() & grad_norm.isfinite())
    optim.step(run.optimizer, skip)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, grad_norm.float(), skip.float(), stops])


def accumulate(run: Run) -> Tensor:
    """Forward and backward of one optimizer step. Return this rank's part of the mean loss, ().

    Each micro-batch gives a sum over tokens, divided by the tokens of the whole step on all ranks,
    so that every token weighs the same. DDP and FSDP average gradients over ranks: hence the factor
    of the world size. The loss stays on the device.
    """
    steps = parallel.accumulation_per_rank(run.config.optim.gradient_accumulation_steps, run.world)
    share = 1.0 / run.config.tokens_per_iter
    total = torch.zeros((), device=run.device)
    for i in range(steps):
        parallel.sync_gradients(run.wrapped, on=i == steps - 1)
        run.progress.begins(f"step {run.step}, forward {i + 1} of {steps}")
        tokens, targets = next(run.batches)
        with run.autocast:
            loss = run.wrapped(tokens, targets, doc_start=run.documents(tokens),
                               reduction="sum") * share
        run.progress.begins(f"step {run.step}, backward {i + 1} of {steps}")
        run.scaler.scale(loss * run.world.size).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """The mean loss per token of each split, over eval_iters batches shared out among the ranks.

    The windows are the same at every evaluation and for every number of ranks, given batch_size and
    eval_iters. Evaluation draws none of the random numbers of training. Every rank must call it.
    """
    c, w, losses = run.config, run.world, {}
    run.model.eval()
    for split, tokens in run.tokens.items():
        total = torch.zeros(2, device=run.device, dtype=torch.float64)  # summed loss, tokens
        for inputs, targets in eval_batches(
            tokens, block_size=c.model.block_size, batch_size=c.data.batch_size,
            count=c.run.eval_iters, seed=c.run.seed, device=run.device, rank=w.rank,
            world_size=w.size,
        ):
            run.progress.begins(f"evaluation before step {run.step}")
            with run.autocast:
                total[0] += run.model(inputs, targets, doc_start=run.documents(inputs),
                                      reduction="sum")
            total[1] += (targets >= 0).sum()
        loss_sum, count = parallel.sum_over_ranks(total).tolist()
        losses[split] = loss_sum / count
    run.model.train()
    parallel.reshard(run.model)
    return losses


def save(run: Run, val_loss: float | None, report: Report, checkpoints: checkpoint.Writer) -> None:
    """Save a checkpoint in the background if one is due, then prune older ones.

    After an evaluation it is due by always_save_checkpoint, or where `val_loss` is the best yet;
    without an evaluation (`val_loss=None`) it always is. Nothing that is not finite is saved. Every
    rank must call it. Raises OSError, on all ranks, if the checkpoint before this one could not be
    written.
    """
    c = run.config.run
    due = val_loss is None or c.always_save_checkpoint or val_loss < run.best_val_loss
    run.best_val_loss = min(run.best_val_loss, float("inf") if val_loss is None else val_loss)
    if not due or run.step == 0:
        return
    known = val_loss is None or math.isfinite(val_loss)
    if not known or not checkpoint.all_ranks_finite(run.model, run.optimizer):
        report.say(f"not saved: at step {run.step} the validation loss or a weight is not finite")
        return
    run.progress.begins(f"save of step {run.step}")
    checkpoints.wait()
    report.say(f"saving checkpoint to {c.out_dir}")
    state = {
        "val_loss": val_loss, "best_val_loss": run.best_val_loss, "position": run.batches.position,
        "config": dict(flatten(run.config)), "world_size": run.world.size,
        "kernels": {**run.choice.backends, "why": run.choice.why, "measured": run.choice.measured},
        "scaler": run.scaler.state_dict(), "torch": torch.__version__, "compiled": run.compiled,
    }
    tensors, sharded = checkpoint.copy_to_host(run.model, run.optimizer, run.world)
    model, tokenizer = run.config.model, run.tokenizer
    checkpoints.begin(checkpoint.Snapshot(run.step, tensors, sharded, model, state, tokenizer))
