"""The least time that training can take: operations over the matmul rate, bytes over the copy rate.

    rates = Rates(matmul_tflops=790.0, copy_gbs=4300.0)        # measured in the same run, see bench/operators.py
    sum(part.ns(rates) for part in step_parts(config))         # ns per token of a whole optimizer step

Letters: L layers, d width, T sequence length, V vocabulary, P = 12 L d^2 + V d parameters of matrix
products; for one operator B batch, H heads, D head dimension, M rows, N features. Pure arithmetic:
nothing here is measured.

What the floor of a step takes for granted: the residual stream and all activations are bf16; each
tensor is read once and written once; the residual add, GELU and biases happen inside a matrix
product; the logits' gradient replaces the logits.
"""

from dataclasses import dataclass

from gpt.config import GPTConfig
from gpt.flops import matmul_params

# fp32 AdamW, per parameter: weight, gradient and moments read, three written (28); the norm to clip
# by (4)
OPTIMIZER_BYTES = 32
CATEGORIES = ("matmul", "attention", "norm", "cross-entropy", "embedding", "optimizer")


@dataclass(frozen=True)
class Rates:
    """The two ceilings of a device, as measured: bf16 matrix products on random data, and a copy
    counted in both directions."""

    matmul_tflops: float
    copy_gbs: float

    def __post_init__(self) -> None:
        for name in ("matmul_tflops", "copy_gbs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: a rate is more than 0; measure it "
                                 "with bench/operators.py")


@dataclass(frozen=True)
class Work:
    """What something must at least do: operations of matrix products, and bytes to and from
    memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def ns(self, rates: Rates) -> float:
        """The floor: whichever of the two takes longer."""
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
    """All parameters of the model, each shared one once."""
    return matmul_params(c) + c.block_size * c.n_embd + (0 if c.tie_weights
                                                         else c.vocab_size * c.n_embd)


def step_parts(c: GPTConfig, tokens_per_step: int = 2**19, T: int | None = None) -> list[Part]:
    """Forward, backward and optimizer of one token, in the order in which a waterfall shows them.

    `tokens_per_step` of a whole optimizer step share the cost of the optimizer; 2^19 is nanoGPT's
    and llm.c's.
    """
    L, d, V, T = c.n_layer, c.n_embd, c.vocab_size, T or c.block_size
    return [
        Part("matmuls of the blocks", "matmul", Work(flops=6 * 12 * L * d**2)),
        Part("head", "matmul", Work(flops=6 * V * d)),
        Part("attention forward", "attention", Work(flops=2 * L * d * T)),
        Part("attention backward", "attention", Work(flops=5 * L * d * T)),
        # 6 bf16 tensors of width d for each of the 2 L + 1: x and y forward; dy, x and the stream's
        # gradient, in and out
        Part("norms and residual", "norm", Work(bytes=12 * d * (2 * L + 1))),
        # bf16: logits read, their gradient written
        Part("cross-entropy", "cross-entropy", Work(bytes=4 * V)),
        # bf16: a row read, x written; its gradient read
        Part("embedding", "embedding", Work(bytes=6 * d)),
        Part("optimizer", "optimizer",
             Work(bytes=OPTIMIZER_BYTES * parameters(c) / tokens_per_step)),
    ]


def ns_per_token(c: GPTConfig, rates: Rates, tokens_per_step: int = 2**19,
                 T: int | None = None) -> float:
    """The floor of a training step, divided by its tokens: no part overlaps another."""
    return sum(part.ns(rates) for part in step_parts(c, tokens_per_step, T))


def tokens_per_s(c: GPTConfig, rates: Rates, tokens_per_step: int = 2**19,
                 T: int | None = None) -> float:
    """The ceiling of one device."""
    return 1e9 / ns_per_token(c, rates, tokens_per_step, T)


# -- single operators ----------------------------------------------------------


def attention(B: int, T: int, H: int, D: int, itemsize: int = 2,
              window: int | None = None) -> dict[str, Work]:
    """Causal attention, each score that is used counted once: two products forward, five
    backward."""
    scores = B * H * T * T / 2 if window is None or window >= T else B * H * (T * window
                                                                              - window**2 / 2)
    tensor = B * T * H * D * itemsize
    return {"forward": Work(2 * 2 * scores * D, 4 * tensor),
            "backward": Work(5 * 2 * scores * D, 8 * tensor)}


def linear_cross_entropy(M: int, N: int, V: int, itemsize: int = 2) -> dict[str, Work]:
    """The head and its loss: one product forward, two backward; the logits need never reach memory.
    fp32 weights."""
    x, w = M * N * itemsize, V * N * 4
    return {"forward": Work(2 * M * N * V, x + w), "backward": Work(4 * M * N * V, 2 * (x + w))}
