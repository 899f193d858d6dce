"""The config of a GPT, and the four published sizes. No torch here: config errors are instant."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from common.bounds import BelowOne, Must, NonNegative, check

# Limits far beyond any model: --n_embd=1000000000000 must fail at once, not loop without end.
Width = Annotated[int, Must("be from 1 to 1048576", lambda n: 1 <= n <= 1 << 20)]
Depth = Annotated[int, Must("be from 1 to 10000", lambda n: 1 <= n <= 10_000)]
BlockNumber = Annotated[int, Must("be the number of a block, or -1 for none", lambda n: n >= -1)]


@dataclass(frozen=True)
class GPTConfig:
    """A GPT-2: pre-norm transformer decoder with learned positions."""

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
    """bias in linear layers and norms, as in GPT-2; False is a little better and faster"""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """gelu (erf) as in nanoGPT; gelu_tanh for GPT-2's published weights"""
    tie_weights: bool = True
    """the head is the token embedding, as in GPT-2; False: it has weights of its own"""
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

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


# The fields that weights fix: a checkpoint says them, and a run cannot change them.
ARCHITECTURE = tuple(field.name for field in fields(GPTConfig) if field.name != "dropout")


@dataclass(frozen=True)
class StitchedConfig(GPTConfig):
    """Two GPT-2s joined by a linear layer, the seam; only the seam is trained."""

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
