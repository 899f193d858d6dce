"""All settings of a run, with nanoGPT's names. No torch here: --help and config errors are instant.

A config file is an ordinary module with `config = Config(...)`. train/command_line.py reads it, and
the flags that override it: `--batch_size=32`.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from common import cli
from common.bounds import (
    AboveZeroToOne,
    BelowOne,
    Must,
    NonNegative,
    NonNegativeFloat,
    NotEmpty,
    Positive,
    check,
)
from gpt.config import ARCHITECTURES, BlockNumber, GPTConfig
from kernels import BACKENDS, FAMILIES

ROOT = Path(__file__).resolve().parent.parent
if TYPE_CHECKING:
    Backend = str
    AttentionBackend = str
    LayernormBackend = str
    CrossEntropyBackend = str
else:  # choices from the registry, for --help and for check
    Backend = Literal[("auto", *BACKENDS)]
    AttentionBackend, LayernormBackend, CrossEntropyBackend = (
        Literal[("", *family.modules)] for family in FAMILIES.values())
Seconds = Annotated[int, Must("be from 1 to 1000000000", lambda n: 1 <= n <= 10**9)]


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    dataset: NotEmpty = "openwebtext"
    """folder under data/ with train.bin and val.bin"""
    data_dir: str = ""
    """any other folder with train.bin and val.bin; replaces dataset"""
    batch_size: Positive = 12
    """sequences in a micro-batch, on each rank; auto: as fit_batch"""
    fit_batch: bool = False
    """micro-batches as large as the GPU's memory allows, with the tokens per step of batch_size
    times gradient_accumulation_steps; what --batch_size=auto sets"""
    document_mask: bool = False
    """attention stays within the document a token is in; for data with end-of-text tokens"""


@dataclass(frozen=True)
class OptimConfig:
    """How it is trained."""

    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """adam: without weight decay; sgd: with momentum; muon: Muon for the matrices of the blocks,
    adamw for the rest"""
    learning_rate: NonNegativeFloat = 6e-4
    """its peak, after warm-up"""
    muon_lr: NonNegativeFloat = 0.02
    """muon's peak rate for the matrices; follows the schedule of learning_rate, scaled"""
    muon_momentum: BelowOne = 0.95
    """reached from 0.1 below in 300 steps, or in a third of lr_decay_iters"""
    embedding_lr: NonNegativeFloat = 0.0
    """peak rate of embeddings that are not also the head, scaled likewise; 0: learning_rate"""
    max_iters: NonNegative = 600_000
    """optimizer steps of the whole run"""
    gradient_accumulation_steps: Positive = 40
    """micro-batches of an optimizer step, on all ranks together"""
    weight_decay: NonNegativeFloat = 0.1
    """for matrices and embeddings; never for norms and biases"""
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    momentum: BelowOne = 0.9
    """of sgd"""
    grad_clip: NonNegativeFloat = 1.0
    """largest norm of the gradient; 0 for none"""
    decay_lr: bool = True
    """by `schedule` from learning_rate to min_lr; else constant"""
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    """after warm-up; trapezoid: constant, then a straight line down to min_lr"""
    decay_fraction: AboveZeroToOne = 0.6
    """of trapezoid: the last part of lr_decay_iters, in which the rate goes down"""
    warmup_iters: NonNegative = 2000
    """steps of linear warm-up"""
    lr_decay_iters: NonNegative = 600_000
    """step at which the schedule ends; about max_iters"""
    min_lr: NonNegativeFloat = 6e-5
    """about learning_rate / 10"""


@dataclass(frozen=True)
class JoinConfig:
    """Two trained models as one, for --init_from=merge and stitch (docs/stitching.md)."""

    merge_dir: str = ""
    """the model of the upper blocks; that of the lower ones is resume_dir"""
    stitch_layer_index: BlockNumber = -1
    """the first block taken from merge_dir, 0 to n_layer"""
    use_original_head: bool = True
    """keep the last norm and the head of resume_dir; else take those of merge_dir"""
    batch_size_alignment: Positive = 8
    """sequences on which stitch fits its layer to the two models"""


@dataclass(frozen=True)
class KernelConfig:
    """Which backend runs each family of operators (kernels/__init__.py)."""

    kernels: Backend = "auto"
    """of all families; auto: the fastest, measured at the start; on a CPU only in long runs"""
    attention: AttentionBackend = ""
    """of attention alone; empty: as --kernels says"""
    layernorm: LayernormBackend = ""
    """of the norms alone"""
    cross_entropy: CrossEntropyBackend = ""
    """of the loss alone"""

    @property
    def families(self) -> dict[str, str]:
        """What `kernels.resolve` takes: family -> backend, or "" for that of --kernels."""
        return {family: getattr(self, family) for family in FAMILIES}


@dataclass(frozen=True)
class RunConfig:
    """Where the run is, what it starts from, and what it keeps."""

    out_dir: NotEmpty = "out"
    """the run's folder: checkpoints, metrics.jsonl, config.json, loss.png"""
    init_from: NotEmpty = "scratch"
    """scratch; resume: from the last sound checkpoint; auto: resume where there is one, else
    scratch; gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder: start from those weights; merge,
    stitch: from two models"""
    resume_dir: str = ""
    """where to resume from, or the lower of two models; empty: out_dir"""
    seed: NonNegative = 1337
    """of the weights, the data order and dropout"""
    eval_interval: Positive = 2000
    """steps between evaluations; a checkpoint follows each"""
    eval_iters: Positive = 200
    """batches of each split in an evaluation"""
    eval_only: bool = False
    """evaluate once and exit"""
    log_interval: Positive = 1
    """steps between log lines"""
    always_save_checkpoint: bool = True
    """after every evaluation; False: only when the validation loss is the best so far"""
    keep_last: Positive = 2
    """latest checkpoints to keep, besides the best one; with 2, one is left if a disk damages the
    last"""
    keep_every: NonNegative = 0
    """also keep the checkpoints at multiples of this step; 0: none"""
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
    peak_tflops: NonNegativeFloat = 0.0
    """of the GPU in dense bf16, for the MFU; 0: that of its name, where known (gpt/peaks.py)"""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; auto: where it pays within the run"""
    max_skipped: Positive = 20
    """end the run after so many steps in a row whose loss or gradient is not finite (each of them
    is skipped)"""


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes share the work."""

    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: each rank holds the model; fsdp: sharded over all ranks; hsdp: sharded within a node,
    replicated over nodes; auto: ddp, or fsdp where the model's state would fill half of a GPU"""
    activation_checkpointing: bool = False
    """recompute the blocks in backward: about a third more time, far less memory"""
    backend: str = "auto"
    """of torch.distributed; auto: nccl for cuda, else gloo"""
    hang_timeout: Seconds = 600
    """seconds without progress after which the run names the rank that hangs, and ends"""


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
        check(self)
        if self.optim.decay_lr and self.optim.lr_decay_iters <= self.optim.warmup_iters:
            raise ValueError(f"lr_decay_iters={self.optim.lr_decay_iters} must be more than "
                             f"warmup_iters={self.optim.warmup_iters}")
        if not self.optim.learning_rate and (self.optim.optimizer == "muon"
                                             or self.optim.embedding_lr):
            raise ValueError("learning_rate=0.0: muon_lr and embedding_lr follow its schedule; "
                             "give it a rate above 0")

    @property
    def data_dir(self) -> Path:
        """The folder with train.bin and val.bin."""
        return Path(self.data.data_dir) if self.data.data_dir else ROOT / "data" / self.data.dataset

    @property
    def tokens_per_iter(self) -> int:
        """Tokens of an optimizer step, on all ranks together."""
        return self.optim.gradient_accumulation_steps * self.data.batch_size * self.model.block_size


def flatten(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield (leaf name, value) of all sections. Leaf names are unique over the sections."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value)
        else:
            yield f.name, value


def unflatten(leaves: dict[str, Any], origin: str = "") -> Config:
    """The Config with these leaves, and defaults elsewhere.

    An int may stand for a float, and so may a string that spells one, as YAML 1.1 reads 6e-4.
    Raises ValueError, beginning with `origin`, for an unknown name or a value of a wrong type.
    """
    default, types, sections, typed = Config(), cli.types_of(Config), {}, {}
    where = f"{origin}: " if origin else ""
    for name, value in leaves.items():
        if name not in types:
            raise ValueError(f"{where}unknown setting {name!r}{cli.suggestion(name, types)}")
        typed[name] = _as_type_of(types[name], value, f"{where}{name}={value!r}")
    for f in dataclasses.fields(default):
        section = getattr(default, f.name)
        names = {g.name for g in dataclasses.fields(section)}
        given = {name: value for name, value in typed.items() if name in names}
        sections[f.name] = dataclasses.replace(section, **given)
    return Config(**sections)


def _as_type_of(hint: Any, value: Any, setting: str) -> Any:
    """`value` as the type `hint`. Raises ValueError, beginning with `setting`, where it is not."""
    from typeguard import TypeCheckError, check_type

    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    try:
        if plain is float and isinstance(value, int | str) and not isinstance(value, bool):
            return float(value)
        return check_type(value, plain)
    except (ValueError, OverflowError):
        raise ValueError(f"{setting} is no number") from None
    except TypeCheckError:
        known = isinstance(plain, type)
        wanted = f"a {plain.__name__}" if known else str(plain).replace("typing.", "")
        raise ValueError(f"{setting} is a {type(value).__name__}; {wanted} is needed") from None


def changed(config: Config, base: Config | None = None) -> dict[str, tuple[Any, Any]]:
    """The leaves that differ from `base` (the defaults): name -> (value in base, in config)."""
    before = dict(flatten(base or Config()))
    if base is None and config.model.tie_weights != "auto":  # as in a run, where it is resolved
        before["tie_weights"] = ARCHITECTURES[config.model.architecture].ties
    return {k: (before.get(k), v) for k, v in flatten(config) if before.get(k) != v}
