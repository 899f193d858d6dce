"""What a run is made of, and where it starts: data, model and optimizer, from nothing or from a checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.loader import Loader
from data.tokenizer import read_meta
from data.tokens import Tokens, check_vocabulary, check_window, open_split
from gpt import GPT, hardware
from gpt.flops import flops_per_token
from gpt.pretrained import find_checkpoint, read_config, verify, whole_checkpoints
from kernels import Choice, load, resolve
from train import checkpoint, optim, parallel
from train.config import Config, changed, flatten
from train.parallel import World

ARCHITECTURE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "activation")
GPT2 = {"kind": "gpt2", "vocab_size": 50257}  # the tokenizer of data without a meta file, as in nanoGPT
GPT2_PADDED_VOCAB = 50304


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
    step: int = 0
    best_val_loss: float = float("inf")
    resumed: str = ""


def build(config: Config) -> Run:
    """Everything a run needs, on this rank's device: data, model, optimizer; resumed where that is asked for."""
    world = parallel.world()
    device = hardware.resolve_device(config.run.device, world.local_rank)
    choice = resolve(config.kernel.kernels, device, attention=config.kernel.attention,
                     layernorm=config.kernel.layernorm, cross_entropy=config.kernel.cross_entropy)
    parallel.accumulation_per_rank(config.optim.gradient_accumulation_steps, world)
    tokens = {split: open_split(config.data_dir, split) for split in ("train", "val")}
    meta = read_meta(config.data_dir)
    folder = starting_point(config)
    config = with_architecture(config, folder, meta)
    for part in tokens.values():
        check_window(part, config.model.block_size)
        check_vocabulary(part, config.model.vocab_size)
    parallel.start(world, device, config.run.backend)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, load(**{k: v for k, v in choice._asdict().items() if k != "why"})).to(device)
    dtype = hardware.resolve_dtype(config.run.dtype, device)
    compiled = compile_model(model, config, device, dtype)
    torch.manual_seed(config.run.seed + world.rank)
    run = Run(
        config=config, world=world, device=device, dtype=dtype, choice=choice, model=model,
        wrapped=parallel.wrap(model, world, device), optimizer=optim.build(model, config.optim),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), tokens=tokens,
        batches=Loader(
            tokens["train"], block_size=config.model.block_size, batch_size=config.data.batch_size, seed=config.run.seed,
            device=device, rank=world.rank, world_size=world.size,
        ),
        tokenizer=meta or GPT2, compiled=compiled,
    )
    if folder:
        resume(run, folder)
    return run


def compile_model(model: GPT, config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """Compile the model in place where it is asked for or pays; why, in a line.

    auto on a CPU: measured on two AVX2 cores, a step gets 14 % faster without dropout and no faster with it, and
    compiling takes about 40 s. So a run that would take under ten minutes, or has dropout, stays as it is.
    """
    wanted, why = config.run.compile, f"--compile={config.run.compile}"
    if wanted == "auto":
        flops = flops_per_token(config.model)["palm"] * config.tokens_per_iter * config.optim.max_iters
        minutes = flops / hardware.matmul_rate(device, dtype) / 60 if device.type == "cpu" else float("inf")
        wanted = device.type == "cuda" or (device.type == "cpu" and minutes > 10 and config.model.dropout == 0)
        why = f"auto: {'' if wanted else 'not '}worth its time on {device.type}" + (
            f", about {minutes:,.0f} min of matrix multiplications, dropout {config.model.dropout}" if device.type == "cpu" else ""
        )
    if wanted:
        model.compile()
    return f"{'yes' if wanted else 'no'} ({why})"


def starting_point(config: Config) -> Path | None:
    """The checkpoint to continue from, or None to start from nothing. Raises ValueError for a start that would lose one."""
    run, out_dir = config.run, Path(config.run.out_dir)
    if run.init_from == "resume":
        return find_checkpoint(run.resume_dir or out_dir)
    if run.init_from not in ("scratch", "auto"):
        raise ValueError(f"--init_from={run.init_from}: choose scratch, resume, or auto")
    there = whole_checkpoints(out_dir)
    if run.init_from == "auto" and there:
        return there[-1]
    if there and not run.eval_only:
        raise ValueError(
            f"{out_dir} already holds a run ({there[-1].name}); continue it with --init_from=resume, "
            "or start another with --out_dir=DIR (or remove that one)"
        )
    return None


def with_architecture(config: Config, folder: Path | None, meta: dict[str, Any] | None) -> Config:
    """The config with its model completed: by the checkpoint it continues, else by the data set's vocabulary.

    Raises ValueError where the config asks for something else than its checkpoint is.
    """
    if folder is None:
        vocab = config.model.vocab_size or (meta["vocab_size"] if meta else GPT2_PADDED_VOCAB)
        return replace(config, model=replace(config.model, vocab_size=vocab))
    saved, default = read_config(folder), Config().model
    asked = {k: getattr(config.model, k) for k in ARCHITECTURE}
    wrong = [
        f"{k} is {getattr(saved, k)} there and {v} here" for k, v in asked.items()
        if v not in (getattr(saved, k), getattr(default, k))
    ]
    if wrong:
        raise ValueError(f"{folder} is a checkpoint of another architecture: {', '.join(wrong)}")
    return replace(config, model=replace(saved, dropout=config.model.dropout))


def resume(run: Run, folder: Path) -> None:
    """Put the run back to where the checkpoint was written."""
    verify(folder)
    state = checkpoint.read_state(folder)
    before, now = state["config"], dict(flatten(run.config))
    if before["optimizer"] != now["optimizer"]:
        raise ValueError(f"{folder} was trained with --optimizer={before['optimizer']}, whose state {now['optimizer']} cannot take over")
    checkpoint.restore(folder, run.model, run.optimizer)
    run.scaler.load_state_dict(state["scaler"]) if run.scaler.is_enabled() and state["scaler"] else None
    run.step, run.best_val_loss = state["step"], state["best_val_loss"]
    if (before["dataset"], before["data_dir"]) == (now["dataset"], now["data_dir"]):
        run.batches.position = state["position"]
    run.resumed = f"{folder}, step {run.step}" + "".join(
        f"; {k} was {before[k]}, is {v}" for k, v in now.items() if k in before and before[k] != v and k != "init_from"
    )


def describe(run: Run) -> str:
    """The first lines of a run: what was decided, and what differs from the defaults."""
    c = run.config
    lines = {
        "device": f"{hardware.device_name(run.device)}, {str(run.dtype).removeprefix('torch.')}",
        "kernels": run.choice,
        "compile": run.compiled,
        "model": f"{run.model.num_params():,} parameters",
        "data": f"{c.data_dir}, {len(run.tokens['train']):,} tokens to train on, {len(run.tokens['val']):,} to validate",
        "tokens per iteration will be": f"{c.tokens_per_iter:,}",
        "settings": ", ".join(f"{k}={v}" for k, (_, v) in changed(c).items()) or "all defaults",
    } | ({"resumed from": run.resumed} if run.resumed else {})
    return "\n".join(f"{k}: {v}" for k, v in lines.items())
