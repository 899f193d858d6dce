"""What a run is made of, and where it starts: data, model and optimizer, from nothing or from a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data.loader import Loader
from data.manifest import verify
from data.tokenizer import read_meta
from data.tokens import Tokens, check_vocabulary, check_window, open_split
from gpt import GPT, hardware
from gpt.flops import flops_per_token
from gpt.pretrained import fill
from gpt.stitch import freeze
from kernels import Choice, load, resolve
from train import optim, parallel
from train.config import Config, changed
from train.faults import Asked, Progress
from train.origin import complete, directed, find_origin
from train.parallel import World

GPT2 = {"kind": "gpt2", "vocab_size": 50257}  # the tokenizer of data without a meta file, as in nanoGPT


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
    compiled: str
    store: dist.Store | None
    asked: Asked = field(default_factory=Asked)
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    best_val_loss: float = float("inf")
    started: str = "scratch"
    evaluated: bool = False
    resumed: str = ""


def build(config: Config) -> Run:
    """Everything a run needs, on this rank's device: data, model, optimizer; resumed where that is asked for."""
    world = parallel.world()
    device = hardware.resolve_device(config.run.device, world.local_rank)
    choice = resolve(config.kernel.kernels, device, attention=config.kernel.attention,
                     layernorm=config.kernel.layernorm, cross_entropy=config.kernel.cross_entropy)
    parallel.accumulation_per_rank(config.optim.gradient_accumulation_steps, world)
    store = parallel.start(world, device, config.parallel)
    parallel.first_rank_decides(lambda: verify(config.data_dir), world)
    tokens = {split: open_split(config.data_dir, split) for split in ("train", "val")}
    meta = read_meta(config.data_dir)
    origin = find_origin(config, world)
    config = complete(config, origin, meta)
    tokens = {split: directed(part, config.model) for split, part in tokens.items()}
    for part in tokens.values():
        check_window(part, config.model.block_size)
        check_vocabulary(part, config.model.vocab_size)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, load(**choice.suites)).to(device)
    if origin.weights is not None:
        fill(model, origin.weights)
    if config.model.seam >= 0:
        freeze(model)
    dtype = hardware.resolve_dtype(config.run.dtype, device)
    compiled, why = decide_compile(config, device, dtype)
    torch.manual_seed(config.run.seed + world.rank)
    run = Run(
        config=config, world=world, device=device, dtype=dtype, choice=choice, model=model,
        wrapped=parallel.place(model, config.parallel, world, device, dtype, compiled),
        optimizer=optim.build(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), tokens=tokens,
        batches=Loader(
            tokens["train"], block_size=config.model.block_size, batch_size=config.data.batch_size, seed=config.run.seed,
            device=device, rank=world.rank, world_size=world.size,
        ),
        tokenizer=meta or GPT2, compiled=why, store=store, started=origin.name,
    )
    if origin.resume is not None:
        begun = origin.resume(config, model, run.optimizer, run.scaler, world)
        run.step, run.best_val_loss, run.batches.position, run.evaluated, run.resumed = begun
    return run


def decide_compile(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether to compile the model: where it is asked for or pays; and why, in a line.

    auto on a CPU: measured on two AVX2 cores, a step gets 14 % faster without dropout and no faster with it, and
    compiling takes about 40 s. So a run that would take under ten minutes, or has dropout, stays as it is.
    """
    wanted, why = config.run.compile, f"--compile={config.run.compile}"
    if wanted == "auto":
        flops = flops_per_token(config.model)["palm"] * config.tokens_per_iter * config.optim.max_iters
        minutes = flops / hardware.matmul_rate(device, dtype) / 60 if device.type == "cpu" else float("inf")
        wanted = device.type == "cuda" or (device.type == "cpu" and minutes > 10 and config.model.dropout == 0)
        why = f"auto: {'' if wanted else 'not '}worth its time on {device.type}"
        if device.type == "cpu":
            why += f", about {minutes:,.0f} min of matrix multiplications, dropout {config.model.dropout}"
    return bool(wanted), f"{'yes' if wanted else 'no'} ({why})"


def describe(run: Run) -> str:
    """The first lines of a run: what was decided, and what differs from the defaults."""
    c, trained = run.config, sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lines = {
        "device": f"{hardware.device_name(run.device)}, {str(run.dtype).removeprefix('torch.')}",
        "kernels": run.choice,
        "compile": run.compiled,
        "parallel": parallel.describe(run.wrapped, run.world, c.parallel),
        "model": f"{run.model.num_params():,} parameters" + (f", {trained:,} trained" if c.model.seam >= 0 else ""),
        "data": f"{c.data_dir}, {len(run.tokens['train']):,} tokens to train on, {len(run.tokens['val']):,} to validate",
        "tokens per iteration will be": f"{c.tokens_per_iter:,}",
        "settings": ", ".join(f"{k}={v}" for k, (_, v) in changed(c).items()) or "all defaults",
    } | ({"resumed from": run.resumed} if run.resumed else {"starts from": run.started})
    return "\n".join(f"{k}: {v}" for k, v in lines.items())
