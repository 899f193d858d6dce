"""Where a run begins: from nothing, its own checkpoint, weights that others trained, or two models joined."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import eval_batches
from data.tokens import Reversed, Tokens, check_vocabulary, open_split
from gpt import GPT, SIZES, GPTConfig, hardware, nanogpt
from gpt.pretrained import read_config, read_weights
from gpt.run_folder import DONE, newest_sound, read_state, reading, whole_checkpoints
from gpt.stitch import Trained, merge, stitch
from train import checkpoint, parallel
from train.config import Config, flatten
from train.parallel import World

ARCHITECTURE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "activation", "tie_weights",
                "direction", "seam")
GPT2_PADDED_VOCAB = 50304

# step, best validation loss, data position, whether the step was evaluated, what to say
Begun = tuple[int, float, int, bool, str]
Resume = Callable[[Config, GPT, torch.optim.Optimizer, torch.amp.GradScaler, World], Begun]  # all filled in place


@dataclass
class Origin:
    """A beginning: the shape it dictates, the weights to start from, or the run to put back."""

    name: str
    model: GPTConfig | None = None
    weights: dict[str, Tensor] | None = None
    resume: Resume | None = None
    compiled: bool | None = None  # whether the run to put back was


def find_origin(config: Config, w: World) -> Origin:
    """What --init_from means here, and after a restart by torchrun. Rank 0 looks, so that all begin at the same place.

    Raises ValueError, on all ranks, for what is not there, or for a start that would lose a run.
    """
    kind, source, said = parallel.first_rank_decides(lambda: choose(config, restarted=w.restarts > 0), w)
    if kind == "resume":
        return continued(Path(source), said, w)
    if kind == "join":
        return joined(config)
    return Origin("scratch") if kind == "scratch" else Origin(*pretrained(source, config.model.block_size))


def choose(config: Config, restarted: bool) -> tuple[str, str, str]:
    """(scratch, resume, join or pretrained; from which folder or whose weights; what to say)."""
    run, out_dir = config.run, Path(config.run.out_dir)
    there = whole_checkpoints(out_dir)
    if there and (restarted or run.init_from == "auto"):
        return "resume", *newest(out_dir)
    if run.init_from == "resume":
        source, said = resumable(Path(run.resume_dir or out_dir))
        if there and not run.eval_only and Path(source).resolve().parent != out_dir.resolve():
            raise ValueError(f"{out_dir} already holds a run ({there[-1].name}), of which {source} is no checkpoint; "
                             "give another --out_dir")
        return "resume", source, said
    if there and not run.eval_only:
        raise ValueError(
            f"{out_dir} already holds a run ({there[-1].name}); continue it with --init_from=resume, "
            "or start another with --out_dir=DIR (or remove that one)"
        )
    if run.init_from in ("merge", "stitch"):
        return "join", "", ""
    if config.model.seam >= 0:
        raise ValueError(f"--seam={config.model.seam}: it is made by --init_from=stitch --stitch_layer_index=LAYER")
    if run.init_from in ("scratch", "auto"):
        return "scratch", "", ""
    if run.init_from not in SIZES and not Path(run.init_from).is_dir():
        known = ", ".join(("scratch", "resume", "auto", "merge", "stitch", *SIZES))
        raise ValueError(f"--init_from={run.init_from}: choose {known}, or a folder with a model")
    return "pretrained", run.init_from, ""


def resumable(path: Path) -> tuple[str, str]:
    """What at `path` a run can go on from: nanoGPT's checkpoint, or our newest sound one; what to say."""
    if (path / nanogpt.FILE).is_file() and not whole_checkpoints(path):
        return str(path), ""
    return newest(path)


def newest(path: Path) -> tuple[str, str]:
    folder, faults = newest_sound(path)
    return str(folder), "".join(f"; not from {fault}" for fault in faults)


def pretrained(source: str, block_size: int) -> Trained:
    """Someone's weights, with fewer positions where fewer are asked for."""
    model, weights = read_weights(source)
    if block_size < model.block_size:
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:block_size]
        model = replace(model, block_size=block_size)
    return Trained(source, model, weights)


def joined(config: Config) -> Origin:
    """Two models as one, resume_dir's lower blocks under merge_dir's upper ones; a new run."""
    run, c = config.run, config.join
    if not c.merge_dir:
        raise ValueError(f"--init_from={run.init_from} joins two models; give the upper one, --merge_dir=DIR, "
                         "beside --resume_dir")
    a, b = (pretrained(source, config.model.block_size) for source in (run.resume_dir or run.out_dir, c.merge_dir))
    cut, head = c.stitch_layer_index, (a if c.use_original_head else b).name
    name = f"{a.name} below block {cut}, {b.name} from there on, the head of {head}"
    if run.init_from == "merge":
        return Origin(name, *merge(a, b, cut, c.use_original_head))
    idx = None if c.use_original_head else alignment(config, a.config)
    return Origin(name, *stitch(a, b, cut, c.use_original_head, idx))


def alignment(config: Config, model: GPTConfig) -> Tensor:
    """The training sequences a stitch is fitted on, at most (batch_size_alignment, block_size), on the run's device."""
    tokens = directed(open_split(config.data_dir, "train"), model)
    check_vocabulary(tokens, model.vocab_size)
    device = hardware.resolve_device(config.run.device, parallel.world().local_rank)
    return next(eval_batches(tokens, block_size=model.block_size, batch_size=config.join.batch_size_alignment, count=1,
                             seed=config.run.seed, device=device))[0]


def directed(tokens: Tokens, model: GPTConfig) -> Tokens:
    """The tokens in the order the model reads them: a backward run is a run on reversed data, and nothing else."""
    return Reversed(tokens.paths) if model.direction == "backward" else tokens


def continued(path: Path, said: str, w: World) -> Origin:
    """A run of ours, or of nanoGPT's, put back to where this checkpoint was written."""
    if not (path / DONE).is_file():
        theirs = nanogpt.read(path)
        return Origin(str(path), theirs.config, theirs.weights, lambda *run: _resume_nanogpt(path, theirs, *run))
    held = ExitStack()  # until all is read: another run may be saving, and removing, where --resume_dir is

    def resume(*run: Any) -> Begun:
        with held:
            return _resume(path, said, *run)

    parallel.together(lambda: held.enter_context(reading(path)), w)
    return Origin(str(path), read_config(path), None, resume, read_state(path).get("compiled"))


def complete(config: Config, origin: Origin, meta: dict[str, Any] | None) -> Config:
    """The config with its model completed: by its origin, else by the data set's vocabulary.

    Raises ValueError where the config asks for another architecture than its origin has. What it leaves at the default
    is not asked for.
    """
    if origin.model is None:
        vocab = config.model.vocab_size or (meta["vocab_size"] if meta else GPT2_PADDED_VOCAB)
        return replace(config, model=replace(config.model, vocab_size=vocab))
    default = Config().model
    wrong = [
        f"{k} is {getattr(origin.model, k)} there and {getattr(config.model, k)} here" for k in ARCHITECTURE
        if getattr(config.model, k) not in (getattr(origin.model, k), getattr(default, k))
    ]
    if wrong:
        raise ValueError(f"{origin.name} is a checkpoint of another architecture: {', '.join(wrong)}")
    return replace(config, model=replace(origin.model, dropout=config.model.dropout))


def _resume(folder: Path, damaged: str, config: Config, model: GPT, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler, w: World) -> Begun:
    state = read_state(folder)
    before, now = state["config"], dict(flatten(config))
    if before.get("optimizer") != now["optimizer"]:
        raise ValueError(f"{folder} was trained with --optimizer={before.get('optimizer')}, "
                         f"whose state {now['optimizer']} cannot take over")
    same_ranks = checkpoint.restore(folder, model, optimizer, w)
    if not same_ranks:
        torch.manual_seed(config.run.seed + 7919 * state["step"] + w.rank)  # not the numbers that the run began with
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    same_data = (before.get("dataset"), before.get("data_dir")) == (now["dataset"], now["data_dir"])
    said = f"{folder}, step {state['step']}" + "".join(
        f"; {k} was {before[k]}, is {v}" for k, v in now.items() if k in before and before[k] != v and k != "init_from"
    )
    if not same_ranks:
        said += f"; saved by {state['world_size']} rank(s), so dropout draws new random numbers"
    position = state["position"] if same_data else 0
    return state["step"], state["best_val_loss"], position, state["val_loss"] is not None, said + damaged


def _resume_nanogpt(path: Path, theirs: nanogpt.NanoGPT, config: Config, model: GPT, optimizer: torch.optim.Optimizer,
                    _scaler: torch.amp.GradScaler, _world: World) -> Begun:
    if config.optim.optimizer != "adamw":
        raise ValueError(f"{path} was trained with AdamW, whose state {config.optim.optimizer} cannot take over")
    moments = theirs.optimizer.get("state", {})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {i: {k: parallel.shard_like(v, parameters[i]) for k, v in state.items()} for i, state in moments.items()}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": placed})
    windows = theirs.step * config.optim.gradient_accumulation_steps * config.data.batch_size
    said = f"{path / nanogpt.FILE}, nanoGPT's, step {theirs.step}; its data order is not in it"
    return theirs.step, theirs.best_val_loss, windows, True, said
