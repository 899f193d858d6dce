"""nanochat's architecture: rotary positions, RMS norms without weights, ReLU squared.

Queries and keys are normalised, so is the token embedding; there are no biases; the head is a
matrix of its own, and its logits are capped. It computes what `NanoChatForCausalLM` of transformers
does with as many key heads as query heads. Sources of the parts: docs/modern-recipe.md.
Letters: B batch, T sequence, C = n_embd, D = C / n_head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import GPTConfig
from gpt.embedding import Embedding
from gpt.layers import MLP, Attention, Block
from kernels import Kernels, dropout


class RMSNorm(nn.Module):
    """RMS norm without weights, alone or with the residual add before it."""

    def __init__(self, kernels: Kernels):
        super().__init__()
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream (residual + x, or x itself where it starts) and its norm."""
        if residual is None:
            return x, self.kernels.rmsnorm(x)
        return self.kernels.add_rmsnorm(x, residual)


class Transformer(nn.Module):
    """The embedding, the blocks and the last norm: everything but the head."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__()
        if config.head_dim % 2:
            raise ValueError(f"n_embd / n_head is {config.head_dim}; rotary positions take pairs "
                             "of elements: choose an even number")
        self.config, self.kernels, self.logit_cap = config, kernels, config.logit_cap
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(block(config, kernels) for _ in range(config.n_layer))
        self.ln_f = RMSNorm(kernels)

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The residual stream (B, T, C) of ids (B, T) from `start` on, and its rotation (T, D)."""
        x = dropout(self.kernels.rmsnorm(self.wte(idx)), self.config.dropout, self.training)
        return x, rotation(self.config, start, idx.shape[1], idx.device)

    def initial_std(self, name: str) -> float:
        """The standard deviation of a matrix's initial weights.

        Projections into the residual stream start at 0, and so, nearly, does the head: the first
        loss is log(vocab_size). The other matrices keep the variance of what they multiply.
        """
        if name.endswith("c_proj.weight"):
            return 0.0
        special = {"transformer.wte.weight": 0.02 if self.config.tied else 0.8,
                   "lm_head.weight": 0.001}
        return special.get(name, self.config.n_embd**-0.5)


def block(config: GPTConfig, kernels: Kernels) -> Block:
    """A block of nanochat."""
    return Block(RMSNorm(kernels), Attention(config, kernels), RMSNorm(kernels),
                 MLP(config, relu_squared))


class ReLUSquared(torch.autograd.Function):
    """Keeps x alone for backward, where autograd's own keeps two tensors and takes twice as long.

    Has no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(dy).mul_(2)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2. Source: So et al., "Primer", 2021."""
    return ReLUSquared.apply(x)


def rotation(config: GPTConfig, start: int, T: int, device: torch.device) -> Tensor:
    """Cosine and sine of the angles of positions start to start + T - 1: (T, D), fp32."""
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    t = torch.arange(start, start + T, dtype=torch.float32, device=device)
    angles = t[:, None] * config.rope_theta ** (-i / config.head_dim)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
