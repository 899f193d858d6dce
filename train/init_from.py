"""Where a run begins: from nothing, its own checkpoint, weights that others trained, or two models
joined."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import hardware
from data.loader import eval_batches
from data.tokenizer import load_tokenizer
from data.tokens import Reversed, Tokens, check_vocabulary, open_split
from gpt import GPT, SIZES, GPTConfig, nanogpt
from gpt.checkpoint_files import DONE, read_config, read_state
from gpt.pretrained import (
    Trained,
    cropped,
    has_rows_for,
    nanogpt_meta,
    read_source,
    same_vocabulary,
)
from gpt.run_folder import complete_checkpoints, newest_sound, reading
from gpt.stitch import merge, stitch
from gpt.tensors import about
from train import checkpoint, optim, parallel
from train.config import Config, flatten
from train.parallel import World

ARCHITECTURE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "activation",
                "tie_weights", "direction")
GPT2_PADDED_VOCAB = 50304  # its 50,257 ids, up to a multiple of 64, as in nanoGPT

# step, best validation loss, data position, whether the step was evaluated, what to say
Begun = tuple[int, float, int, bool, str]
# all filled in place
Resume = Callable[[Config, GPT, torch.optim.Optimizer, torch.amp.GradScaler, World], Begun]


@dataclass
class InitFrom:
    """A beginning: the shape it dictates, the weights to start from, or the run to put back."""

    name: str
    model: GPTConfig | None = None
    weights: dict[str, Tensor] | None = None
    resume: Resume | None = None
    compiled: bool | None = None  # whether the run to put back was
    trained: Trained | None = None  # whose vocabulary the data must have


def resolve_init_from(config: Config, w: World) -> InitFrom:
    """What --init_from means here, and after a restart by torchrun. Rank 0 looks, so that all begin
    at the same place.

    Raises ValueError, on all ranks, for what is not there, or for a start that would lose a run.
    """
    kind, source, said = parallel.broadcast_from_rank_0(lambda: choose(config,
                                                                    restarted=w.restarts > 0), w)
    if kind == "resume":
        return continued(Path(source), said, config.model, w)
    if kind == "join":
        return joined(config)
    if kind == "scratch":
        return InitFrom("scratch")
    trained = pretrained(source, config.model)
    return InitFrom(trained.name, trained.config, trained.weights, trained=trained)


def choose(config: Config, restarted: bool) -> tuple[str, str, str]:
    """(scratch, resume, join or pretrained; from which folder or whose weights; what to say)."""
    run, out_dir = config.run, Path(config.run.out_dir)
    there = complete_checkpoints(out_dir)
    if there and (restarted or run.init_from == "auto"):
        return "resume", *newest(out_dir)
    if run.init_from == "resume":
        source, said = resumable(Path(run.resume_dir or out_dir))
        if there and not run.eval_only and Path(source).resolve().parent != out_dir.resolve():
            raise ValueError(f"{out_dir} already holds a run ({there[-1].name}), and {source} is "
                             "not one of its checkpoints; give another --out_dir")
        return "resume", source, said
    if there and not run.eval_only:
        raise ValueError(
            f"{out_dir} already holds a run ({there[-1].name}); continue it with "
            "--init_from=resume, or start another with --out_dir=DIR (or remove that one)"
        )
    if run.init_from in ("merge", "stitch"):
        return "join", "", ""
    if run.init_from in ("scratch", "auto"):
        return "scratch", "", ""
    if run.init_from not in SIZES and not Path(run.init_from).is_dir():
        known = ", ".join(("scratch", "resume", "auto", "merge", "stitch", *SIZES))
        raise ValueError(f"--init_from={run.init_from}: choose {known}, or a folder with a model")
    return "pretrained", run.init_from, ""


def resumable(path: Path) -> tuple[str, str]:
    """What at `path` can be resumed, nanoGPT's checkpoint or our newest sound one; what to say."""
    if (path / nanogpt.FILE).exists() and not complete_checkpoints(path):
        return str(path), ""
    return newest(path)


def newest(path: Path) -> tuple[str, str]:
    folder, faults = newest_sound(path)
    return str(folder), "".join(f"; not from {fault}" for fault in faults)


def pretrained(source: str, asked: GPTConfig) -> Trained:
    """Someone's weights, with fewer positions where fewer are asked for."""
    return cropped(told(read_source(source), asked), asked.block_size)


def told(trained: Trained, asked: GPTConfig) -> Trained:
    """The model with what its files do not say as it is asked for."""
    model = replace(trained.config, **{key: getattr(asked, key) for key in trained.untold})
    return trained._replace(config=model)


def joined(config: Config) -> InitFrom:
    """Two models as one, resume_dir's lower blocks under merge_dir's upper ones; a new run."""
    run, c = config.run, config.join
    if not c.merge_dir:
        raise ValueError(f"--init_from={run.init_from} joins two models; give the upper one, "
                         "--merge_dir=DIR, beside --resume_dir")
    sources = (run.resume_dir or run.out_dir, c.merge_dir)
    a, b = (pretrained(source, config.model) for source in sources)
    cut, head = c.stitch_layer_index, (a if c.use_original_head else b).name
    name = f"{a.name} below block {cut}, {b.name} from there on, the head of {head}"
    if run.init_from == "merge":
        return InitFrom(name, *merge(a, b, cut, c.use_original_head), trained=a)
    idx = None if c.use_original_head else alignment(config, a.config)
    return InitFrom(name, *stitch(a, b, cut, c.use_original_head, idx), trained=a)


def alignment(config: Config, model: GPTConfig) -> Tensor:
    """The training sequences a stitch is fitted on, at most (batch_size_alignment, block_size), on
    the run's device."""
    tokens = directed(open_split(config.data_dir, "train"), model)
    check_vocabulary(tokens, model.vocab_size)
    device = hardware.resolve_device(config.run.device, parallel.world().local_rank)
    return next(eval_batches(tokens, block_size=model.block_size,
                             batch_size=config.join.batch_size_alignment, count=1,
                             seed=config.run.seed, device=device))[0]


def directed(tokens: Tokens, model: GPTConfig) -> Tokens:
    """The tokens in the order the model reads them: a backward run is a run on reversed data, and
    nothing else."""
    return Reversed(tokens.paths) if model.direction == "backward" else tokens


def continued(path: Path, said: str, asked: GPTConfig, w: World) -> InitFrom:
    """A run of ours, or of nanoGPT's, put back to where this checkpoint was written."""
    if not (path / DONE).is_file():
        return _continued_nanogpt(path, asked)
    held = ExitStack()  # until all is read: another run may save, and prune, in --resume_dir

    def resume(*run: Any) -> Begun:
        with held:
            return _resume(path, said, *run)

    parallel.gather_or_raise(lambda: held.enter_context(reading(path)), w)
    return InitFrom(str(path), read_config(path), None, resume, read_state(path).get("compiled"))


def complete(config: Config, origin: InitFrom, meta: dict[str, Any] | None) -> Config:
    """The config with its model completed: by its origin, else by the data set's vocabulary.

    Raises ValueError where the config asks for another architecture than its origin has, or the
    data for another vocabulary. What the config leaves at the default is not asked for.
    """
    if origin.model is None:
        of_data = meta["vocab_size"] if meta and meta["kind"] != "gpt2" else GPT2_PADDED_VOCAB
        vocab = config.model.vocab_size or of_data
        return replace(config, model=replace(config.model, vocab_size=vocab))
    default = Config().model
    wrong = [
        f"{k} is {getattr(origin.model, k)} there and {getattr(config.model, k)} here"
        for k in ARCHITECTURE
        if getattr(config.model, k) not in (getattr(origin.model, k), getattr(default, k))
    ]
    if wrong:
        raise ValueError(f"{origin.name} is a checkpoint of another architecture: "
                         f"{', '.join(wrong)}")
    if origin.trained:
        _check_data(config, origin.trained, meta)
    return replace(config, model=replace(origin.model, dropout=config.model.dropout))


def _check_data(config: Config, trained: Trained, meta: dict[str, Any] | None) -> None:
    """Raise ValueError where the data's ids do not mean what they meant to the model."""
    tokenizer, kind = load_tokenizer(meta), meta["kind"] if meta else "gpt2"
    same = (same_vocabulary(trained.meta, meta or {"kind": "gpt2"}) if trained.meta
            else meta is None or has_rows_for(trained.config, tokenizer))
    if not same:
        was = f", of kind {trained.meta['kind']}" if trained.meta else ""
        raise ValueError(
            f"{config.data_dir} has another vocabulary ({tokenizer.vocab_size:,} ids, of kind "
            f"{kind}) than {trained.name} ({trained.config.vocab_size:,}{was}); prepare the data "
            "with that one"
        )


def _resume(folder: Path, damaged: str, config: Config, model: GPT,
            optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler, w: World) -> Begun:
    state = read_state(folder)
    before, now = state["config"], dict(flatten(config))
    if before.get("optimizer") != now["optimizer"]:
        raise ValueError(f"{folder} was trained with --optimizer={before.get('optimizer')}, "
                         f"whose state {now['optimizer']} cannot take over")
    same_ranks = checkpoint.restore(folder, model, optimizer, w)
    if not same_ranks:
        # not the numbers that the run began with
        torch.manual_seed(config.run.seed + 7919 * state["step"] + w.rank)
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    same_data = (before.get("dataset"), before.get("data_dir")) == (now["dataset"], now["data_dir"])
    said = f"{folder}, step {state['step']}" + "".join(
        f"; {k} was {before[k]}, is {v}" for k, v in now.items() if k in before and before[k] != v
        and k != "init_from"
    )
    if not same_ranks:
        said += f"; saved by {state['world_size']} rank(s), so dropout draws new random numbers"
    position = state["position"] if same_data else 0
    return state["step"], state["best_val_loss"], position, state["val_loss"] is not None, said + damaged


def _continued_nanogpt(path: Path, asked: GPTConfig) -> InitFrom:
    theirs = nanogpt.read(path)
    trained = told(Trained(str(path), theirs.config, theirs.weights, nanogpt_meta(path, theirs),
                           theirs.untold), asked)
    return InitFrom(trained.name, trained.config, trained.weights, trained=trained,
                  resume=lambda *run: _resume_nanogpt(path, theirs, *run))


def _resume_nanogpt(path: Path, theirs: nanogpt.NanoGPT, config: Config, model: GPT,
                    optimizer: torch.optim.Optimizer,
                    _scaler: torch.amp.GradScaler, _world: World) -> Begun:
    parameters, state = dict(model.named_parameters()), theirs.content.get("optimizer")
    shapes = {name: p.shape for name, p in parameters.items()}
    with about(f"{path / nanogpt.FILE} cannot be resumed", f"--init_from={path} starts from its "
               "weights alone, with a fresh optimizer"):
        step, best_val_loss = nanogpt.progress(theirs.content)
        moments = nanogpt.moments(state, shapes, optim.numbered(model, optimizer),
                                  config.optim.optimizer)
        for name, known in moments.items():
            moments[name] = {k: parallel.shard_like(t, parameters[name]) for k, t in known.items()}
        optim.place(moments, model, optimizer)
    windows = step * config.optim.gradient_accumulation_steps * config.data.batch_size
    said = f"{path / nanogpt.FILE}, nanoGPT's, step {step}; its data order is not in it"
    before, now = theirs.settings, asdict(config.optim) | {"batch_size": config.data.batch_size}
    said += "".join(f"; {key} was {before[key]}, is {value}" for key, value in now.items()
                    if type(before.get(key)) is type(value) and before[key] != value)
    if config.optim.weight_decay and nanogpt.by_module(state, shapes):
        said += "; the embeddings, which did not decay there, do here"
    return step, best_val_loss, windows, True, said
