"""What a run is made of, and where it starts: data, model and optimizer, from nothing or from a
checkpoint."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from common import hardware
from data.loader import Loader
from data.manifest import verify
from data.tokenizer import read_meta
from data.tokens import Tokens, check_vocabulary, check_window, open_split
from gpt import GPT, run_folder
from gpt.pretrained import fill
from kernels import Choice, load, resolve
from train import compiling, memory, optim, parallel
from train.config import Config, changed
from train.init_from import InitFrom, complete, directed, resolve_init_from
from train.parallel import World
from train.signals import StopRequest
from train.watchdog import Progress

# the tokenizer of data without a meta file, as in nanoGPT
GPT2 = {"kind": "gpt2", "vocab_size": 50257}


@dataclass
class Run:
    """What one process holds of a run."""

    config: Config
    world: World
    device: torch.device
    dtype: torch.dtype
    choice: Choice
    model: GPT
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokens: dict[str, Tokens]
    batches: Loader
    tokenizer: dict[str, Any]
    compiled: bool
    why_compiled: str
    store: dist.Store | None
    stop_request: StopRequest = field(default_factory=StopRequest)
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    best_val_loss: float = float("inf")
    started: str = "scratch"
    evaluated: bool = False
    resumed: str = ""


def build(config: Config, held: ExitStack | None = None) -> Run:
    """Everything a run needs, on this rank's device: data, model, optimizer; resumed where that is
    asked for.

    A run that will write gives `held`: its folder is locked there before it is looked at.
    """
    world = parallel.world()
    device = hardware.resolve_device(config.run.device, world.local_rank)
    choice = resolve(config.kernel.kernels, device, **config.kernel.families)
    memory.check(config, world, device)
    if device.type == "cpu":
        hardware.keep_freed_memory()
    store = parallel.start(world, device, config.parallel)
    if held is not None and not config.run.eval_only:
        lock = run_folder.lock(Path(config.run.out_dir))
        parallel.broadcast_from_rank_0(lambda: held.enter_context(lock), world)
    parallel.broadcast_from_rank_0(lambda: verify(config.data_dir), world)
    tokens = {split: open_split(config.data_dir, split) for split in ("train", "val")}
    meta = read_meta(config.data_dir)
    origin = resolve_init_from(config, world)
    config = complete(config, origin, meta)
    tokens = {split: directed(part, config.model) for split, part in tokens.items()}
    for part in tokens.values():
        check_window(part, config.model.block_size)
        check_vocabulary(part, config.model.vocab_size)
    torch.set_float32_matmul_precision("high")
    model = new_model(config, origin, choice, device)
    dtype = hardware.resolve_dtype(config.run.dtype, device)
    compiled, why = parallel.broadcast_from_rank_0(
        lambda: compiling.should_compile(config, model.kernels, device, dtype, origin.compiled), world)
    wrapped = parallel.place(model, config.parallel, world, device, dtype, compiled)
    if config.data.fit_batch:
        config = memory.fit(config, wrapped, world, device, dtype)
    torch.manual_seed(config.run.seed + world.rank)
    run = Run(
        config=config, world=world, device=device, dtype=dtype, choice=choice, model=model,
        wrapped=wrapped,
        optimizer=optim.build(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), tokens=tokens,
        batches=Loader(
            tokens["train"], block_size=config.model.block_size, batch_size=config.data.batch_size,
            seed=config.run.seed,
            device=device, rank=world.rank, world_size=world.size,
        ),
        tokenizer=meta or GPT2, compiled=compiled, why_compiled=why, store=store,
        started=origin.name,
    )
    if origin.resume is not None:
        begun = origin.resume(config, model, run.optimizer, run.scaler, world)
        run.step, run.best_val_loss, run.batches.position, run.evaluated, run.resumed = begun
    return run


def new_model(config: Config, origin: InitFrom, choice: Choice, device: torch.device) -> GPT:
    """The model on its device, with the weights it starts from, the same on all ranks."""
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, load(**choice.backends)).to(device)
    if origin.weights is not None:
        fill(model, origin.weights)
    return model


def describe(run: Run) -> str:
    """The first lines of a run: what was decided, and what differs from the defaults."""
    c, trained = run.config, sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = {
        "device": f"{hardware.device_name(run.device)}, {str(run.dtype).removeprefix('torch.')}",
        "kernels": run.choice,
        "compile": run.why_compiled,
        "parallel": parallel.describe(run.wrapped, run.world, c.parallel),
        "model": f"{run.model.num_params():,} parameters"
        + (f", {trained:,} trained" if trained < run.model.num_params() else ""),
        "data": f"{c.data_dir}, {len(run.tokens['train']):,} tokens to train on, "
                f"{len(run.tokens['val']):,} to validate",
        "tokens per iteration will be": f"{c.tokens_per_iter:,}",
        "settings": ", ".join(f"{k}={v}" for k, (_, v) in changed(c).items()) or "all defaults",
    } | ({"resumed from": run.resumed} if run.resumed else {"starts from": run.started})
    return "\n".join(f"{k}: {v}" for k, v in lines.items())
