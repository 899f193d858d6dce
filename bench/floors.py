"""The least time a training step can take: operations over the matrix rate, bytes over copy rate.

    rates = Rates(matmul_tflops=790.0, copy_gbs=4300.0)  # measured, see bench/operators.py
    ns_per_token(config, rates)                          # the floor in ns per token

Letters: L layers, d width, T sequence length, V vocabulary; for one operator B batch, H heads, D
head dimension, M rows, N features. All is arithmetic; nothing here is measured.

The floor of a step assumes: residual stream and activations are bf16; each tensor is read once and
written once; residual add, activation function and biases are fused into a matrix product, the norm
and rotation of queries and keys into attention, a cap into the loss; the gradient of the logits
overwrites the logits. The optimizer is AdamW.
"""

from dataclasses import dataclass

from gpt.config import GPTConfig
from gpt.flops import count_params

# fp32 AdamW, per parameter: weight, gradient and two moments read, all but the gradient written
# (28); the gradient read once more for the norm to clip by (4)
OPTIMIZER_BYTES = 32
# per element of the stream where it starts, bf16: a row of the embedding read, x written, its
# gradient read; nanochat norms the row, and so reads it again in backward
EMBEDDING_BYTES = {"gpt2": 6, "nanochat": 8}
CATEGORIES = ("matmul", "attention", "norm", "cross-entropy", "embedding", "optimizer")


@dataclass(frozen=True)
class Rates:
    """The two ceilings of a device, as measured: matrix products, and a copy (reads and writes).

    Raises ValueError for a rate that is not above 0.
    """

    matmul_tflops: float
    copy_gbs: float

    def __post_init__(self) -> None:
        for name, rate in vars(self).items():
            if not rate > 0:
                raise ValueError(f"{name}={rate}: a rate is more than 0; measure it with "
                                 "bench/operators.py")


@dataclass(frozen=True)
class Work:
    """The least work of something: operations of matrix products, bytes from and to memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def ns(self, rates: Rates) -> float:
        """The floor in nanoseconds: the longer of the two times."""
        return max(self.flops / rates.matmul_tflops * 1e-3, self.bytes / rates.copy_gbs)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Part:
    """A part of a training step, per token; `category` is one of CATEGORIES."""

    name: str
    category: str
    work: Work

    def ns(self, rates: Rates) -> float:
        return self.work.ns(rates)


def parameters(c: GPTConfig) -> int:
    """The number of parameters of the model; a shared one counts once."""
    _, but_untied_embedding = count_params(c)
    return but_untied_embedding + (0 if c.tied else c.vocab_size * c.n_embd)


def step_parts(c: GPTConfig, tokens_per_step: int = 2**19) -> list[Part]:
    """The work per token of forward, backward and optimizer, in the waterfall picture's order.

    The optimizer's cost is divided by the `tokens_per_step` of an optimizer step; 2^19 is the
    number of nanoGPT and llm.c. Raises ValueError for an architecture whose work is not known.
    """
    if c.architecture not in EMBEDDING_BYTES:
        raise ValueError(f"no floor of architecture={c.architecture}, only of "
                         f"{' and '.join(EMBEDDING_BYTES)}: say its work in bench/floors.py")
    L, d, V, T = c.n_layer, c.n_embd, c.vocab_size, c.block_size
    return [
        Part("matmuls of the blocks", "matmul", Work(flops=6 * 12 * L * d**2)),
        Part("head", "matmul", Work(flops=6 * V * d)),
        Part("attention forward", "attention", Work(flops=2 * L * d * T)),
        Part("attention backward", "attention", Work(flops=5 * L * d * T)),
        # 2 L + 1 norms, each with 6 bf16 tensors of width d: x and y forward; backward dy, x, and
        # the residual stream's gradient read and written; the weights are too few to count
        Part("norms and residual", "norm", Work(bytes=12 * d * (2 * L + 1))),
        # bf16: logits read, their gradient written
        Part("cross-entropy", "cross-entropy", Work(bytes=4 * V)),
        Part("embedding", "embedding", Work(bytes=EMBEDDING_BYTES[c.architecture] * d)),
        Part("optimizer", "optimizer",
             Work(bytes=OPTIMIZER_BYTES * parameters(c) / tokens_per_step)),
    ]


def ns_per_token(c: GPTConfig, rates: Rates, tokens_per_step: int = 2**19) -> float:
    """The floor of a training step in ns per token: the sum of its parts; none overlaps another."""
    return sum(part.ns(rates) for part in step_parts(c, tokens_per_step))


# -- single operators ----------------------------------------------------------


def attention(B: int, T: int, H: int, D: int, itemsize: int = 2) -> dict[str, Work]:
    """Causal attention: two products forward, five backward, over the scores that are used.

    A rotation of q and k adds nothing: it could be done where they are read and written.
    """
    scores, tensor = B * H * T * T / 2, B * T * H * D * itemsize
    return {"forward": Work(2 * 2 * scores * D, 4 * tensor),
            "backward": Work(5 * 2 * scores * D, 8 * tensor)}


def linear_cross_entropy(M: int, N: int, V: int, itemsize: int = 2) -> dict[str, Work]:
    """The head (fp32 weights) and its loss: one product forward, two backward.

    The logits need never reach memory, so their bytes do not count.
    """
    x, w = M * N * itemsize, V * N * 4
    return {"forward": Work(2 * M * N * V, x + w), "backward": Work(4 * M * N * V, 2 * (x + w))}
