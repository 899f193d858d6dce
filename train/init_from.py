"""Where a run begins: scratch, a checkpoint, weights of others, or two models joined."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from common import hardware
from data.loader import eval_batches
from data.tokenizer import load_tokenizer
from data.tokens import check_vocabulary, in_reading_order, open_split
from gpt import SIZES, GPTConfig, nanogpt
from gpt.checkpoint_files import DONE, read_config, read_state
from gpt.config import FIXED_BY_WEIGHTS, resolved
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
from train import parallel, resume
from train.config import Config
from train.parallel import World
from train.state import Run

GPT2_PADDED_VOCAB = 50304  # GPT-2's 50,257 ids, padded to a multiple of 64, as in nanoGPT


@dataclass
class InitFrom:
    """Where a run begins."""

    name: str
    """for messages"""
    model: GPTConfig | None = None
    """the shape of its weights; None from scratch"""
    weights: dict[str, Tensor] | None = None
    """None from scratch, and where `resume` reads them"""
    trained: Trained | None = None
    """the model whose vocabulary the data must have"""
    resume: Callable[[Run], None] | None = None
    """put weights, optimizer state and position back into a run; all ranks must call it"""
    compiled: bool | None = None
    """whether the run to resume was compiled"""
    measured: dict[str, Any] | None = None
    """what --kernels=auto measured in the run to resume; None for a new run"""


class Source(NamedTuple):
    """What `choose` decides on, before anything is read."""

    kind: str
    """scratch, resume, join or pretrained"""
    path: str = ""
    """the checkpoint to resume, or the pretrained weights"""
    skipped: str = ""
    """which newer checkpoints are not resumed from, and why, for the line `resumed from`"""


def resolve_init_from(config: Config, w: World) -> InitFrom:
    """Read what the run begins with. Rank 0 chooses it, so that all ranks begin at the same place.

    After a restart by torchrun a run resumes, whatever --init_from says. Every rank must call it.
    Raises ValueError, on all ranks, for what is not there, and for a start that would overwrite a
    run.
    """
    restarted = w.restarts > 0
    source = parallel.broadcast_from_rank_0(lambda: choose(config, restarted), w)
    if source.kind == "resume":
        return open_resumed(Path(source.path), source.skipped, config.model, w)
    if source.kind == "join":
        return join_models(config)
    if source.kind == "scratch":
        return InitFrom("scratch")
    trained = read_pretrained(source.path, config.model)
    return InitFrom(trained.name, trained.config, trained.weights, trained)


def choose(config: Config, restarted: bool) -> Source:
    """Decide from --init_from and what the run's folder holds."""
    run, out_dir = config.run, Path(config.run.out_dir)
    existing = complete_checkpoints(out_dir)
    if existing and (restarted or run.init_from == "auto"):
        return newest(out_dir)
    if run.init_from == "resume":
        source = resumable(Path(run.resume_dir or out_dir))
        elsewhere = Path(source.path).resolve().parent != out_dir.resolve()
        if existing and elsewhere and not run.eval_only:
            raise ValueError(f"{out_dir} already holds a run ({existing[-1].name}), and "
                             f"{source.path} is not one of its checkpoints; give another --out_dir")
        return source
    if existing and not run.eval_only:
        raise ValueError(f"{out_dir} already holds a run ({existing[-1].name}); continue it with "
                         "--init_from=resume, or start another with --out_dir=DIR (or remove that "
                         "one)")
    if run.init_from in ("merge", "stitch"):
        return Source("join")
    if run.init_from in ("scratch", "auto"):
        return Source("scratch")
    if run.init_from not in SIZES and not Path(run.init_from).is_dir():
        known = ", ".join(("scratch", "resume", "auto", "merge", "stitch", *SIZES))
        raise ValueError(f"--init_from={run.init_from}: choose {known}, or a folder with a model")
    return Source("pretrained", run.init_from)


def resumable(path: Path) -> Source:
    """The checkpoint to resume at `path`: nanoGPT's ckpt.pt, or else our newest sound one."""
    if (path / nanogpt.FILE).exists() and not complete_checkpoints(path):
        return Source("resume", str(path))
    return newest(path)


def newest(path: Path) -> Source:
    """Our newest sound checkpoint at `path`."""
    folder, faults = newest_sound(path)
    return Source("resume", str(folder), "".join(f"; not from {fault}" for fault in faults))


# -- reading ---------------------------------------------------------------------------


def open_resumed(path: Path, skipped: str, asked: GPTConfig, w: World) -> InitFrom:
    """A run to resume from one of our checkpoints, or from nanoGPT's. Every rank must call it."""
    if not (path / DONE).is_file():
        checkpoint = nanogpt.read(path)
        meta = nanogpt_meta(path, checkpoint)
        guessed = checkpoint.guessed
        trained = Trained(str(path), checkpoint.config, checkpoint.weights, meta, guessed)
        trained = with_guesses_from(trained, asked)
        return InitFrom(trained.name, trained.config, trained.weights, trained,
                        partial(resume.from_nanogpt, path, checkpoint))
    lock = ExitStack()  # until all is read: another run may save, and prune, in --resume_dir
    parallel.gather_or_raise(lambda: lock.enter_context(reading(path)), w)

    def resume_run(run: Run) -> None:
        with lock:
            resume.from_checkpoint(path, skipped, run)

    state = read_state(path)
    return InitFrom(str(path), read_config(path), resume=resume_run,
                    compiled=state.get("compiled"), measured=state["kernels"].get("measured", {}))


def read_pretrained(source: str, asked: GPTConfig) -> Trained:
    """The weights at `source`, cropped to `asked.block_size` positions where they have more."""
    return cropped(with_guesses_from(read_source(source), asked), asked.block_size)


def with_guesses_from(trained: Trained, asked: GPTConfig) -> Trained:
    """The model with the fields that its files do not give (`guessed`) taken from `asked`."""
    model = replace(trained.config, **{key: getattr(asked, key) for key in trained.guessed})
    return trained._replace(config=model)


def join_models(config: Config) -> InitFrom:
    """A new run on two models joined: resume_dir's lower blocks under merge_dir's upper ones."""
    run, c = config.run, config.join
    if not c.merge_dir:
        raise ValueError(f"--init_from={run.init_from} joins two models; give the upper one, "
                         "--merge_dir=DIR, beside --resume_dir")
    sources = (run.resume_dir or run.out_dir, c.merge_dir)
    a, b = (read_pretrained(source, config.model) for source in sources)
    cut, head = c.stitch_layer_index, (a if c.use_original_head else b).name
    name = f"{a.name} below block {cut}, {b.name} from there on, the head of {head}"
    if run.init_from == "merge":
        return InitFrom(name, *merge(a, b, cut, c.use_original_head), trained=a)
    idx = None if c.use_original_head else alignment_batch(config, a.config)
    return InitFrom(name, *stitch(a, b, cut, c.use_original_head, idx), trained=a)


def alignment_batch(config: Config, model: GPTConfig) -> Tensor:
    """Training sequences on which `stitch` fits its layer, on the run's device.

    At most (batch_size_alignment, block_size), int64.
    """
    tokens = in_reading_order(open_split(config.data_dir, "train"), model.direction)
    check_vocabulary(tokens, model.vocab_size)
    device = hardware.resolve_device(config.run.device, parallel.world().local_rank)
    batches = eval_batches(tokens, block_size=model.block_size,
                           batch_size=config.join.batch_size_alignment, count=1,
                           seed=config.run.seed, device=device)
    return next(batches)[0]


# -- what the weights ask of the config ------------------------------------------------


def complete(config: Config, init: InitFrom, meta: dict[str, Any] | None) -> Config:
    """Fill in the model's shape: that of the weights, else the vocabulary of the data set.

    Fields of config.model that differ from their default must be those of the weights. Raises
    ValueError where they are not, or where the data has another vocabulary than the weights.
    """
    if init.model is None:
        of_data = meta["vocab_size"] if meta and meta["kind"] != "gpt2" else GPT2_PADDED_VOCAB
        vocab = config.model.vocab_size or of_data
        return replace(config, model=replace(resolved(config.model), vocab_size=vocab))
    default, model, wrong = Config().model, resolved(init.model), []
    for key in FIXED_BY_WEIGHTS:
        there, here = getattr(model, key), getattr(config.model, key)
        if here not in (there, getattr(default, key)):
            wrong.append(f"{key} is {there} there and {here} here")
    if wrong:
        raise ValueError(f"{init.name} is a checkpoint of another architecture: {', '.join(wrong)}")
    if init.trained:
        check_vocabulary_of_data(config, init.trained, meta)
    return replace(config, model=replace(model, dropout=config.model.dropout))


def check_vocabulary_of_data(config: Config, trained: Trained, meta: dict[str, Any] | None) -> None:
    """Raise ValueError where the data's ids do not mean what they meant to the model."""
    tokenizer, kind = load_tokenizer(meta), meta["kind"] if meta else "gpt2"
    if trained.meta:
        same = same_vocabulary(trained.meta, meta or {"kind": "gpt2"})
    else:
        same = meta is None or has_rows_for(trained.config, tokenizer)
    if not same:
        was = f", of kind {trained.meta['kind']}" if trained.meta else ""
        raise ValueError(
            f"{config.data_dir} has another vocabulary ({tokenizer.vocab_size:,} ids, of kind "
            f"{kind}) than {trained.name} ({trained.config.vocab_size:,}{was}); prepare the data "
            "with that one"
        )
