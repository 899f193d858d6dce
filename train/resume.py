"""Puts a run back to where a checkpoint was written. Every rank must call these functions."""

from dataclasses import asdict
from pathlib import Path

import torch

from gpt import nanogpt
from gpt.checkpoint_files import read_state
from gpt.tensors import about
from train import checkpoint, optim, parallel
from train.config import flatten
from train.state import Run


def from_checkpoint(folder: Path, skipped: str, run: Run) -> None:
    """Resume from one of our checkpoints: bit-equal on as many ranks as saved it.

    `skipped` ends the line that says what was resumed.
    """
    state, now = read_state(folder), dict(flatten(run.config))
    before = state["config"]
    if before.get("optimizer") != now["optimizer"]:
        raise ValueError(f"{folder} was trained with --optimizer={before.get('optimizer')}, "
                         f"whose state {now['optimizer']} cannot take over")
    same_ranks = checkpoint.restore(folder, run.model, run.optimizer, run.world)
    if not same_ranks:  # random numbers, other than those that the run began with
        torch.manual_seed(run.config.run.seed + 7919 * state["step"] + run.world.rank)
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    same_data = all(before.get(key) == now[key] for key in ("dataset", "data_dir"))
    run.step, run.best_val_loss = state["step"], state["best_val_loss"]
    run.batches.position = state["position"] if same_data else 0
    run.evaluated = state["val_loss"] is not None
    run.resumed_from = f"{folder}, step {state['step']}"
    for key, value in now.items():
        if key in before and before[key] != value and key != "init_from":
            run.resumed_from += f"; {key} was {before[key]}, is {value}"
    if not same_ranks:
        run.resumed_from += (f"; saved by {state['world_size']} rank(s), so dropout draws new "
                             "random numbers")
    run.resumed_from += skipped


def from_nanogpt(path: Path, theirs: nanogpt.NanoGPT, run: Run) -> None:
    """Resume from nanoGPT's ckpt.pt, whose weights the model has: optimizer state and step."""
    config, parameters = run.config, dict(run.model.named_parameters())
    shapes = {name: p.shape for name, p in parameters.items()}
    state = theirs.content.get("optimizer")
    remedy = f"--init_from={path} starts from its weights alone, with a fresh optimizer"
    with about(f"{path / nanogpt.FILE} cannot be resumed", remedy):
        run.step, run.best_val_loss = nanogpt.progress(theirs.content)
        names = optim.parameter_names(run.model, run.optimizer)
        moments = nanogpt.moments(state, shapes, names, config.optim.optimizer)
        for name, of_parameter in moments.items():
            moments[name] = {key: parallel.shard_like(tensor, parameters[name])
                             for key, tensor in of_parameter.items()}
        optim.load_moments(moments, run.model, run.optimizer)
    sequences = config.optim.gradient_accumulation_steps * config.data.batch_size
    run.batches.position, run.evaluated = run.step * sequences, True
    run.resumed_from = (f"{path / nanogpt.FILE}, nanoGPT's, step {run.step}; its data order is not "
                        "in it")
    before, now = theirs.settings, asdict(config.optim) | {"batch_size": config.data.batch_size}
    for key, value in now.items():
        if type(before.get(key)) is type(value) and before[key] != value:
            run.resumed_from += f"; {key} was {before[key]}, is {value}"
    if config.optim.weight_decay and nanogpt.by_module(state, shapes):
        run.resumed_from += "; the embeddings, which did not decay there, do here"
