"""GPT-2 as published: layer norms, learned positions, GELU, a head that is the token embedding.

Parameters have nanoGPT's names (`transformer.h.0.attn.c_attn.weight`, ...). Source: Radford et al.,
"Language Models are Unsupervised Multitask Learners", 2019. Letters: B batch, T sequence,
C = n_embd.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import GPTConfig
from gpt.embedding import Embedding
from gpt.layers import MLP, Attention, Block
from kernels import Kernels, dropout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class LayerNorm(nn.Module):
    """Layer norm, alone or with the residual add before it."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream (residual + x, or x itself where it starts) and its norm."""
        if residual is None:
            return x, self.kernels.layernorm(x, self.weight, self.bias)
        return self.kernels.add_layernorm(x, residual, self.weight, self.bias)


class Transformer(nn.Module):
    """The embeddings, the blocks and the last norm: everything but the head."""

    logit_cap = 0.0

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(block(config, kernels) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config, kernels)

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, None]:
        """The residual stream (B, T, C) of ids (B, T) from position `start` on; no rotation."""
        positions = self.wpe.weight[start : start + idx.shape[1]]
        return dropout(self.wte(idx) + positions, self.config.dropout, self.training), None

    def initial_std(self, name: str) -> float:
        """The standard deviation of a matrix's initial weights: GPT-2's 0.02.

        The 2 * n_layer projections into the residual stream have 0.02 / sqrt(2 * n_layer).
        """
        if name.endswith("c_proj.weight"):
            return 0.02 / math.sqrt(2 * self.config.n_layer)
        return 0.02


def block(config: GPTConfig, kernels: Kernels) -> Block:
    """A block of GPT-2."""
    return Block(
        LayerNorm(config, kernels), Attention(config, kernels, config.bias),
        LayerNorm(config, kernels), MLP(config, ACTIVATIONS[config.activation], config.bias))
