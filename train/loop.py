"""Training, from start to end. bench/ and the tests import these functions; nobody copies them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from data.loader import eval_batches
from gpt import hardware
from train import checkpoint, optim, parallel
from train.config import Config, flatten
from train.report import Report
from train.start import Run, build, describe


def train(config: Config) -> None:
    """The run that `config` describes: start or resume, then evaluate, save and step until max_iters."""
    run = build(config)
    config, report = run.config, Report(run.config, run.world, run.device, run.step)
    report.say(describe(run))
    if config.run.eval_only:
        report.evaluation(run.step, 0.0, evaluate(run))
        return parallel.stop(run.world)
    report.begin()
    resumed_at = run.step if run.step > 0 else None
    while True:
        lr = optim.learning_rate(run.step, config.optim)
        last = run.step >= config.optim.max_iters
        if (last or run.step % config.run.eval_interval == 0) and run.step != resumed_at:
            report.pause()
            losses = evaluate(run)
            report.evaluation(run.step, lr, losses)
            save(run, losses["val"], report)
            report.resume_clock()
        if last:
            break
        loss, grad_norm = train_step(run, lr)
        report.step(run.step, lr, loss, grad_norm)
        run.step += 1
    report.finish()
    parallel.stop(run.world)


def train_step(run: Run, lr: float) -> tuple[Tensor, Tensor]:
    """One optimizer step; the mean loss over all ranks' tokens and the gradient's norm, both still on the device."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    loss = accumulate(run)
    run.scaler.unscale_(run.optimizer)
    limit = run.config.optim.grad_clip or float("inf")
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), limit)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return parallel.sum_over_ranks(loss), grad_norm


def accumulate(run: Run) -> Tensor:
    """Forward and backward of one optimizer step; this rank's share of the mean loss, still on the device.

    Each micro-batch gives a sum over tokens, divided by the tokens of the whole step on all ranks, so that every token
    weighs the same. The ranks' gradients are averaged later, hence the world size in the factor.
    """
    steps = parallel.accumulation_per_rank(run.config.optim.gradient_accumulation_steps, run.world)
    share = 1.0 / run.config.tokens_per_iter
    total = torch.zeros((), device=run.device)
    for i in range(steps):
        parallel.sync_gradients(run.wrapped, on=i == steps - 1)
        tokens, targets = next(run.batches)
        with hardware.autocast(run.device, run.dtype):
            loss = run.wrapped(tokens, targets, reduction="sum") * share
        run.scaler.scale(loss * run.world.size).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Mean loss per token of each split over eval_iters fixed batches, shared out among the ranks.

    The windows are the same every time and for every number of ranks; no random number of the training is drawn.
    """
    c, w, losses = run.config, run.world, {}
    run.model.eval()
    for split, tokens in run.tokens.items():
        total = torch.zeros(2, device=run.device, dtype=torch.float64)
        for inputs, targets in eval_batches(
            tokens, block_size=c.model.block_size, batch_size=c.data.batch_size, count=c.run.eval_iters, seed=c.run.seed,
            device=run.device, rank=w.rank, world_size=w.size,
        ):
            with hardware.autocast(run.device, run.dtype):
                total[0] += run.model(inputs, targets, reduction="sum")
            total[1] += (targets >= 0).sum()
        loss_sum, count = parallel.sum_over_ranks(total).tolist()
        losses[split] = loss_sum / count
    run.model.train()
    return losses


def save(run: Run, val_loss: float, report: Report) -> None:
    """Write a checkpoint if one is due after this evaluation, and remove those no longer kept."""
    c = run.config.run
    due = run.step > 0 and (c.always_save_checkpoint or val_loss < run.best_val_loss)
    run.best_val_loss = min(run.best_val_loss, val_loss)
    if not due or run.world.rank > 0:
        return
    report.say(f"saving checkpoint to {c.out_dir}")
    state = {
        "val_loss": val_loss, "best_val_loss": run.best_val_loss, "position": run.batches.position,
        "config": dict(flatten(run.config)), "kernels": run.choice._asdict(), "world_size": run.world.size,
        "scaler": run.scaler.state_dict(), "torch": torch.__version__,
    }
    checkpoint.save(Path(c.out_dir), run.step, run.model, run.optimizer, state, run.tokenizer)
    checkpoint.prune(Path(c.out_dir), c.keep_last, c.keep_every)
