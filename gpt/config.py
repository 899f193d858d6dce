"""The config of a GPT, and the four published sizes. No torch here: config errors are instant."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from common.bounds import BelowOne, Must, NonNegative, check

# Limits far beyond any model: --n_embd=1000000000000 must fail at once, not loop without end.
Width = Annotated[int, Must("be from 1 to 1048576", lambda n: 1 <= n <= 1 << 20)]
Depth = Annotated[int, Must("be from 1 to 10000", lambda n: 1 <= n <= 10_000)]
BlockNumber = Annotated[int, Must("be the number of a block, or -1 for none", lambda n: n >= -1)]
# Beyond these the angles, or cap * tanh(logits / cap), are NaN in fp32.
Theta = Annotated[float, Must("be from 1 to 1e12", lambda x: 1 <= x <= 1e12)]
Cap = Annotated[float, Must("be from 0 to 1e6", lambda x: 0 <= x <= 1e6)]


class Architecture(NamedTuple):
    """A kind of decoder."""

    module: str
    """the file with its Transformer"""
    own: tuple[str, ...]
    """the fields of GPTConfig that not every architecture has"""
    ties: bool
    """whether its head is the token embedding, unless --tie_weights says otherwise"""


# The registry. A new architecture is one row, and the file that it names.
ARCHITECTURES = {
    "gpt2": Architecture("gpt.gpt2", ("bias", "activation"), ties=True),
    "nanochat": Architecture("gpt.nanochat", ("rope_theta", "logit_cap"), ties=False),
}
if TYPE_CHECKING:
    ArchitectureName = str
else:  # choices from the registry, for --help and for check
    ArchitectureName = Literal[tuple(ARCHITECTURES)]


@dataclass(frozen=True)
class GPTConfig:
    """A GPT: a pre-norm transformer decoder of one of the ARCHITECTURES."""

    architecture: ArchitectureName = "gpt2"
    """gpt2; nanochat: rotary positions, RMS norms, normalised queries and keys, ReLU squared"""

    block_size: Width = 1024
    """longest sequence, in tokens"""
    vocab_size: NonNegative = 50304
    """rows of the token embedding; 50304 is GPT-2's 50257 rounded up to a multiple of 64. In a
    run's config 0 takes the vocabulary of the data set"""
    n_layer: Depth = 12
    """transformer blocks"""
    n_head: Width = 12
    """attention heads; divides n_embd"""
    n_embd: Width = 768
    """width of the residual stream"""
    dropout: BelowOne = 0.0
    """probability, for embeddings, attention, and what attention and MLP add; 0 for pretraining"""
    bias: bool = False
    """of gpt2: bias in linear layers and norms; False is a little better and faster"""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """of gpt2: gelu (erf) as in nanoGPT; gelu_tanh for GPT-2's published weights"""
    rope_theta: Theta = 10_000.0
    """of nanochat: base of the rotary angles; at position t they are t * rope_theta^(-2i / D)"""
    logit_cap: Cap = 15.0
    """of nanochat: logits are c * tanh(logits / c) with this c; 0: as they are"""
    tie_weights: bool | Literal["auto"] = "auto"
    """the head is the token embedding; False: it has weights of its own; auto: as the architecture
    is published, True for gpt2, False for nanochat"""
    direction: Literal["forward", "backward"] = "forward"
    """backward: the model reads a text from its end and predicts the previous token"""
    window: NonNegative = 0
    """each token attends to itself and the window - 1 tokens before it; 0: to all of them"""

    def __post_init__(self) -> None:
        check(self)
        if self.n_embd % self.n_head:
            fits = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            near = sorted(sorted(fits, key=lambda h: abs(h - self.n_head))[:3])
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}; "
                             f"nearest that do: {near}")
        self._check_architecture()

    def _check_architecture(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={self.architecture!r}: choose "
                             f"{' or '.join(ARCHITECTURES)}")
        own = ARCHITECTURES[self.architecture].own
        for other, row in ARCHITECTURES.items():
            for name in (name for name in row.own if name not in own):
                value, default = getattr(self, name), GPTConfig.__dataclass_fields__[name].default
                if value != default:
                    raise ValueError(f"{name}={value}: {self.architecture} has no such thing; "
                                     f"leave it at {default}, or take --architecture={other}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def tied(self) -> bool:
        """Whether the head is the token embedding."""
        if self.tie_weights == "auto":
            return ARCHITECTURES[self.architecture].ties
        return self.tie_weights


# The fields that weights fix: a checkpoint says them, and a run cannot change them.
FIXED_BY_WEIGHTS = tuple(field.name for field in fields(GPTConfig) if field.name != "dropout")


def resolved(config: GPTConfig) -> GPTConfig:
    """The config with a value for every "auto"."""
    return replace(config, tie_weights=config.tied)


@dataclass(frozen=True)
class StitchedConfig(GPTConfig):
    """Two GPTs joined by a linear layer, the seam; only the seam is trained."""

    seam: BlockNumber = 0
    """the block that the seam stands before; n_layer: before the last norm"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seam <= self.n_layer:
            raise ValueError(f"seam={self.seam}: must be from 0 to n_layer={self.n_layer}")


def make_config(seam: int = -1, **fields: Any) -> GPTConfig:
    """The config with these fields: a StitchedConfig unless `seam` is -1, as it is in old files."""
    return GPTConfig(**fields) if seam < 0 else StitchedConfig(**fields, seam=seam)


# As published: vocabulary 50257, 1024 positions, biases, tanh GELU. Source: Radford et al.,
# "Language Models are Unsupervised Multitask Learners", 2019, and OpenAI's release.
SIZES: dict[str, GPTConfig] = {
    name: GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257, bias=True,
                    activation="gelu_tanh")
    for name, n_layer, n_head, n_embd in (
        ("gpt2", 12, 12, 768),
        ("gpt2-medium", 24, 16, 1024),
        ("gpt2-large", 36, 20, 1280),
        ("gpt2-xl", 48, 25, 1600),
    )
}
