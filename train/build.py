"""Builds a run from its config: process group, data, model, optimizer; resumed where asked for."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import hardware
from data import gpt2
from data.loader import Loader
from data.manifest import verify
from data.tokenizer import read_meta
from data.tokens import (
    Tokens,
    check_vocabulary,
    check_window,
    in_reading_order,
    open_split,
)
from gpt import GPT, GPTConfig, run_folder
from gpt.pretrained import fill
from kernels import Choice, load, resolve
from train import auto, compiling, memory, optim, parallel
from train.config import Config, changed
from train.documents import Documents, documents_of
from train.init_from import InitFrom, complete, resolve_init_from
from train.parallel import World
from train.state import Run

# The tokenizer of data without a meta file, as in nanoGPT.
GPT2_META = {"kind": "gpt2", "vocab_size": gpt2.VOCAB_SIZE}


class Inputs(NamedTuple):
    """What a run is built from, as read from disk."""

    config: Config
    """with the model's shape filled in"""
    init: InitFrom
    tokens: dict[str, Tokens]
    tokenizer: dict[str, Any]
    documents: Documents


def build(config: Config, held: ExitStack | None = None) -> Run:
    """The run on this rank's device. Every rank must call it.

    A run that will write gives `held`, which then holds the lock on its folder; the lock is taken
    before anything in the folder is read. Raises ValueError or OSError, on all ranks, for bad
    input.
    """
    world = parallel.world()
    device = hardware.resolve_device(config.run.device, world.local_rank)
    choice = resolve(config.kernel.kernels, device, **config.kernel.families)
    memory.check(config, world, device)
    hardware.prepare(device)
    store = parallel.start(world, device, config.parallel)
    if held is not None and not config.run.eval_only:
        lock = run_folder.lock(Path(config.run.out_dir))
        parallel.broadcast_from_rank_0(lambda: held.enter_context(lock), world)

    config, init, tokens, tokenizer, documents = read_inputs(config, choice, world)
    dtype = hardware.resolve_dtype(config.run.dtype, device)
    choice = auto.decide(config, choice, device, dtype, init.measured, world)
    model = new_model(config, init, choice, device)
    compiled, why_compiled = parallel.broadcast_from_rank_0(
        lambda: compiling.should_compile(config, model.kernels, device, dtype, init.compiled),
        world)
    wrapped = parallel.place(model, config.parallel, world, device, dtype, compiled)
    if config.data.fit_batch:
        config = memory.fit(config, wrapped, world, device, dtype, documents)
    torch.manual_seed(config.run.seed + world.rank)
    run = Run(
        config=config, world=world, device=device, dtype=dtype,
        autocast=hardware.autocast(device, dtype), choice=choice, model=model, wrapped=wrapped,
        optimizer=optim.build(model, config.optim, dtype),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), tokens=tokens,
        batches=loader(tokens["train"], config, world, device), documents=documents,
        tokenizer=tokenizer, compiled=compiled, why_compiled=why_compiled, store=store,
        starts_from=init.name)
    if init.resume is not None:
        init.resume(run)
    return run


def read_inputs(config: Config, choice: Choice, world: World) -> Inputs:
    """Open the data, and read what the run begins with. Every rank must call it."""
    parallel.broadcast_from_rank_0(lambda: verify(config.data_dir), world)
    splits = {split: open_split(config.data_dir, split) for split in ("train", "val")}
    meta = read_meta(config.data_dir)
    init = resolve_init_from(config, world)
    config = complete(config, init, meta)
    tokens = {split: tokens_for_model(part, config.model) for split, part in splits.items()}
    documents = documents_of(config, choice, meta, tokens["train"])
    return Inputs(config, init, tokens, meta or GPT2_META, documents)


def tokens_for_model(tokens: Tokens, model: GPTConfig) -> Tokens:
    """The tokens in the model's reading order. Raises ValueError where they do not fit it."""
    tokens = in_reading_order(tokens, model.direction)
    check_window(tokens, model.block_size)
    check_vocabulary(tokens, model.vocab_size)
    return tokens


def loader(tokens: Tokens, config: Config, world: World, device: torch.device) -> Loader:
    """This rank's batches, from the beginning."""
    return Loader(tokens, block_size=config.model.block_size, batch_size=config.data.batch_size,
                  seed=config.run.seed, device=device, rank=world.rank, world_size=world.size)


def new_model(config: Config, init: InitFrom, choice: Choice, device: torch.device) -> GPT:
    """The model on `device` with the weights it starts from, which are equal on all ranks."""
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, load(**choice.backends)).to(device)
    if init.weights is not None:
        fill(model, init.weights)
    return model


def describe(run: Run) -> str:
    """The first lines of a run: what was chosen, and what differs from the defaults."""
    c, n_params = run.config, run.model.num_params()
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines: dict[str, Any] = {
        "device": f"{hardware.device_name(run.device)}, {str(run.dtype).removeprefix('torch.')}",
        "kernels": run.choice,
        "compile": run.why_compiled,
        "parallel": parallel.describe(run.wrapped, run.world, c.parallel),
        "model": f"{n_params:,} parameters" + f", {trained:,} trained" * (trained < n_params),
        "data": (f"{c.data_dir}, {len(run.tokens['train']):,} tokens to train on, "
                 f"{len(run.tokens['val']):,} to validate"),
        "tokens per iteration will be": f"{c.tokens_per_iter:,}",
        "settings": ", ".join(f"{k}={v}" for k, (_, v) in changed(c).items()) or "all defaults",
    }
    if run.resumed_from:
        lines["resumed from"] = run.resumed_from
    else:
        lines["starts from"] = run.starts_from
    return "\n".join(f"{name}: {value}" for name, value in lines.items())
