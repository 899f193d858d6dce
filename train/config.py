"""Everything a run can be told, with nanoGPT's names. No torch here: --help and config errors must be instant.

A config file is an ordinary module that says `config = Config(...)`. The command line overrides it: `--batch_size=32`.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpt.config import GPTConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    dataset: str = "openwebtext"
    """folder under data/ with train.bin and val.bin"""
    data_dir: str = ""
    """any other folder with train.bin and val.bin; replaces dataset"""
    batch_size: int = 12
    """sequences in a micro-batch, on each rank; auto: as fit_batch"""
    fit_batch: bool = False
    """micro-batches as large as the GPU's memory allows, with the tokens per step of batch_size times
    gradient_accumulation_steps; what --batch_size=auto sets"""


@dataclass(frozen=True)
class OptimConfig:
    """How it is trained."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """adam has no weight decay; sgd takes momentum"""
    learning_rate: float = 6e-4
    """the highest one"""
    max_iters: int = 600_000
    """optimizer steps of the whole run"""
    gradient_accumulation_steps: int = 40
    """micro-batches in an optimizer step, over all ranks together"""
    weight_decay: float = 0.1
    """for matrices and embeddings; never for norms and biases"""
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.9
    """of sgd"""
    grad_clip: float = 1.0
    """largest norm of the gradient; 0 for none"""
    decay_lr: bool = True
    """cosine from learning_rate to min_lr; else constant"""
    warmup_iters: int = 2000
    """steps of linear warm-up"""
    lr_decay_iters: int = 600_000
    """where the cosine ends; about max_iters"""
    min_lr: float = 6e-5
    """about learning_rate / 10"""


@dataclass(frozen=True)
class JoinConfig:
    """Two trained models as one, for --init_from=merge and stitch (docs/stitching.md)."""

    merge_dir: str = ""
    """the model of the upper blocks; that of the lower ones is resume_dir"""
    stitch_layer_index: int = -1
    """the first block taken from merge_dir, 0 to n_layer"""
    use_original_head: bool = True
    """keep the last norm and the head of resume_dir; else take those of merge_dir"""
    batch_size_alignment: int = 8
    """sequences on which stitch fits its layer to the two models"""


@dataclass(frozen=True)
class KernelConfig:
    """Which implementations run (see kernels/)."""

    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    """auto: the fastest by measurement on this device"""
    attention: Literal["", "reference", "torch", "triton", "flash_attn"] = ""
    """for attention alone; empty: as --kernels says"""
    layernorm: Literal["", "reference", "torch", "triton"] = ""
    """for the norms alone"""
    cross_entropy: Literal["", "reference", "torch", "triton"] = ""
    """for the loss alone"""


@dataclass(frozen=True)
class RunConfig:
    """Where, how long, and what is kept."""

    out_dir: str = "out"
    """the run's folder: checkpoints, metrics.jsonl, config.json, loss.png"""
    init_from: str = "scratch"
    """scratch; resume: go on from the last whole checkpoint; auto: resume where there is one, else scratch;
    gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder: start from those weights; merge, stitch: from two models"""
    resume_dir: str = ""
    """where to resume from, or the lower of two models; empty: out_dir"""
    seed: int = 1337
    """of the weights, the data order and dropout"""
    eval_interval: int = 2000
    """steps between evaluations; a checkpoint follows each"""
    eval_iters: int = 200
    """batches of each split in an evaluation"""
    eval_only: bool = False
    """evaluate once and exit"""
    log_interval: int = 1
    """steps between log lines"""
    always_save_checkpoint: bool = True
    """else only when the validation loss is the best so far"""
    keep_last: int = 2
    """checkpoints kept, besides the best one; of 2, one is there to go back to, should a disk damage the last"""
    keep_every: int = 0
    """also keep those at multiples of this many steps; 0: none"""
    wandb_log: bool = False
    """log to Weights & Biases, too"""
    wandb_project: str = "owt"
    wandb_run_name: str = "gpt2"
    tensorboard: bool = False
    """write TensorBoard's files into out_dir, too"""
    device: str = "auto"
    """cuda, cuda:1, mps, cpu; auto: the first of cuda, mps, cpu that is there"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the matrix multiplications; auto: bfloat16 where the device has units for it"""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; auto: where it pays within the run"""
    max_skipped: int = 20
    """steps in a row whose loss or gradient is not finite; each is skipped, and after so many the run ends"""


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes share the work."""

    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: each holds the model; fsdp: sharded over all; hsdp: sharded within a node, replicated over nodes;
    auto: ddp, or fsdp where the model's state would fill half of a GPU"""
    activation_checkpointing: bool = False
    """recompute the blocks in backward: about a third more time, far less memory"""
    backend: str = "auto"
    """of torch.distributed; auto: nccl for cuda, else gloo"""
    hang_timeout: int = 600
    """seconds without progress after which the rank that hangs is named and the run ends"""


@dataclass(frozen=True)
class Config:
    """A run."""

    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size=0))
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    join: JoinConfig = JoinConfig()
    kernel: KernelConfig = KernelConfig()
    run: RunConfig = RunConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        positive = ("batch_size", "batch_size_alignment", "gradient_accumulation_steps", "eval_interval", "eval_iters",
                    "log_interval", "keep_last", "max_skipped", "hang_timeout")
        leaves = dict(flatten(self))
        for name in positive:
            if leaves[name] < 1:
                raise ValueError(f"{name}={leaves[name]}: must be at least 1")
        for name in ("max_iters", "learning_rate", "grad_clip", "warmup_iters", "keep_every"):
            if leaves[name] < 0:
                raise ValueError(f"{name}={leaves[name]}: must be at least 0")
        if self.optim.decay_lr and self.optim.lr_decay_iters <= self.optim.warmup_iters:
            both = self.optim.lr_decay_iters, self.optim.warmup_iters
            raise ValueError("lr_decay_iters={} must be more than warmup_iters={}".format(*both))

    @property
    def data_dir(self) -> Path:
        return Path(self.data.data_dir) if self.data.data_dir else ROOT / "data" / self.data.dataset

    @property
    def tokens_per_iter(self) -> int:
        return self.optim.gradient_accumulation_steps * self.data.batch_size * self.model.block_size


def flatten(config: Any) -> Iterator[tuple[str, Any]]:
    """(leaf name, value) of all sections; leaf names are unique."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value)
        else:
            yield f.name, value


def unflatten(leaves: dict[str, Any], origin: str = "") -> Config:
    """The Config with these leaves, defaults elsewhere. Raises ValueError for a name that is none or a value of a wrong type.

    An int is taken for a float, and so is a string that spells one (YAML 1.1 reads 6e-4 as a string).
    """
    default, sections = Config(), {}
    defaults, where = dict(flatten(default)), f"{origin}: " if origin else ""
    for name, value in leaves.items():
        if name not in defaults:
            raise ValueError(f"{where}unknown setting {name!r}{_nearest(name)}")
        leaves = leaves | {name: _as_type_of(defaults[name], value, f"{where}{name}")}
    for f in dataclasses.fields(default):
        section = getattr(default, f.name)
        names = {g.name for g in dataclasses.fields(section)}
        sections[f.name] = dataclasses.replace(section, **{k: v for k, v in leaves.items() if k in names})
    return Config(**sections)


def _as_type_of(default: Any, value: Any, name: str) -> Any:
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name}={value!r} is no number") from None
    if type(value) is not type(default) and default != "auto":
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; a {type(default).__name__} is needed")
    return value


def changed(config: Config, base: Config | None = None) -> dict[str, tuple[Any, Any]]:
    """What differs from base (the defaults): leaf -> (base's value, config's value)."""
    before = dict(flatten(base or Config()))
    return {k: (before[k], v) for k, v in flatten(config) if before[k] != v}


def to_json(config: Config) -> str:
    return json.dumps(dict(flatten(config)), indent=1)


def load_file(path: str) -> Config:
    """The `config` of a config file: a path, or the name of one in configs/."""
    found = next((p for p in (Path(path), ROOT / path, ROOT / "configs" / f"{path}.py") if p.is_file()), None)
    if found is None:
        known = ", ".join(sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__"))
        raise ValueError(f"no config file {path!r}; configs/ has {known}")
    spec = importlib.util.spec_from_file_location(f"_config_{found.stem}", found)
    if spec is None or spec.loader is None:
        raise ValueError(f"{found}: a config file is a Python module, NAME.py, with `config = Config(...)`")
    source = found.read_text(encoding="utf-8")
    if not any(isinstance(node, ast.Assign) and "config" in map(ast.unparse, node.targets) for node in ast.parse(source).body):
        from train.foreign import read_nanogpt

        return read_nanogpt(source, found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"{found}: its `config` is not a Config (train/config.py)")
    return config


def parse(argv: Sequence[str] | None = None) -> Config:
    """[CONFIG] [--key=value ...] -> Config. Raises ValueError, in one line, for what is wrong with it."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if any(a.startswith(("--config-name", "--config_name")) for a in argv):
        return _compose(argv)
    argv = ["--fit_batch=True" if a in ("--batch_size=auto", "--batch-size=auto") else a for a in argv]
    files = [a for i, a in enumerate(argv) if not a.startswith("-") and not _is_value(argv, i)]
    if len(files) > 1:
        raise ValueError(f"more than one config file: {', '.join(files)}")
    known = dict(flatten(Config()))
    for arg in argv:
        name = arg[2:].partition("=")[0].replace("-", "_")
        if arg.startswith("--") and name not in known and name != "help":
            raise ValueError(f"unknown flag --{name}{_nearest(name)}")
    base = load_file(files[0]) if files else Config()
    flags = [a for a in argv if a not in files]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                Config, default=base, args=flags, prog="train/run.py", use_underscores=True,
                config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        raise ValueError(_in_one_line(complaint.getvalue())) from None


def _compose(argv: list[str]) -> Config:
    """--config-path=DIR --config-name=NAME and hydra's overrides, group.key=value."""
    from train.foreign import compose_yaml

    named = dict(a[2:].partition("=")[::2] for a in argv if a.startswith("--"))
    if odd := named.keys() - {"config-path", "config_path", "config-name", "config_name"}:
        raise ValueError(f"--{sorted(odd)[0]} beside --config-name; override as in hydra, group.key=value")
    path, name = (named.get(f"config-{what}") or named.get(f"config_{what}") or "." for what in ("path", "name"))
    return compose_yaml(path, name, [a for a in argv if not a.startswith("--")])


def _in_one_line(box: str) -> str:
    """What tyro says in a box, without the box, its title and its advice."""
    lines = [line for raw in box.splitlines() if (line := raw.strip("│╭╮╰╯─ ")) and line.strip("-")]
    message = " ".join(itertools.takewhile(lambda line: "helptext" not in line, lines[1:]))
    return re.sub(r"^Error parsing \w+: (?=\w+=)", "", message)


def _is_value(argv: list[str], i: int) -> bool:
    return i > 0 and argv[i - 1].startswith("--") and "=" not in argv[i - 1]


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, dict(flatten(Config())), n=1)
    return f"; did you mean --{near[0]}?" if near else "; --help lists them all"
