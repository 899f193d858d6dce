"""The layers that architectures are built of: attention, MLP and block, on a kernel backend.

Linear weights are stored (out, in). Letters: B batch, T sequence, C = n_embd, H heads,
D = C / H.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernels as _kernels
from gpt.config import GPTConfig
from gpt.kv_cache import KVCache
from gpt.linear import Linear

if not hasattr(_kernels, "Kernels"):  # Hugging Face ships a package of this name, too
    raise ImportError(
        f"another package named 'kernels' comes first on the path ({_kernels.__file__}); "
        "run `pip install -e .` in the RidgeGPT checkout again, or `pip uninstall kernels`"
    )
from kernels import Kernels, dropout, rotated_qkv


class Context(NamedTuple):
    """What attention is told of the tokens in the stream; the same in every block."""

    rotation: Tensor | None = None
    """(T, D) fp32: how queries and keys are rotated (kernels/reference.py); None: not at all"""
    doc_start: Tensor | None = None
    """(B, T) int32: the first position of each position's document; None: one document"""
    cache: KVCache | None = None
    """the keys and values before, in generation"""


PLAIN = Context()


class Attention(nn.Module):
    """Causal self-attention from one packed projection."""

    def __init__(self, config: GPTConfig, kernels: Kernels, bias: bool = False):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=bias, packed=3)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=bias)
        self.config, self.kernels = config, kernels

    def forward(self, x: Tensor, context: Context = PLAIN) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.config.n_head, -1)
        y = self.attend(qkv, context).reshape(B, T, C)
        return dropout(self.c_proj(y), self.config.dropout, self.training)

    def attend(self, qkv: Tensor, context: Context) -> Tensor:
        """Attention of the packed projection qkv (B, T, 3, H, D): (B, T, H, D)."""
        rotation, doc_start, cache = context
        if cache is not None:
            return cache.attend(qkv if rotation is None else rotated_qkv(qkv, rotation))
        options: dict[str, Any] = {"doc_start": doc_start}
        if rotation is not None:
            options["rotation"] = rotation
        if 0 < self.config.window < qkv.shape[1]:  # a longer one hides nothing
            options["window"] = self.config.window
        if self.training and self.config.dropout > 0:
            # One draw from torch's generator; the kernels make the mask from it.
            seed = torch.randint(2**62, (), device=qkv.device)
            options |= {"dropout": self.config.dropout, "seed": seed}
        return self.kernels.attention_qkv(qkv, **options)


class MLP(nn.Module):
    """Two linear layers with an activation between them, four times as wide there."""

    def __init__(self, config: GPTConfig, activation: Callable[[Tensor], Tensor],
                 bias: bool = False):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=bias)
        self.activation, self.dropout = activation, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.c_fc(x))
        return dropout(self.c_proj(h), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP. The next norm adds the MLP's output to the residual stream: one kernel.

    A norm is called with (x, residual) and returns the stream and its norm: (residual + x, or x
    where residual is None, and the norm of that).
    """

    def __init__(self, ln_1: nn.Module, attn: Attention, ln_2: nn.Module, mlp: MLP):
        super().__init__()
        self.ln_1, self.attn = ln_1, attn
        self.ln_2, self.mlp = ln_2, mlp

    def forward(self, x: Tensor, residual: Tensor | None = None,
                context: Context = PLAIN) -> tuple[Tensor, Tensor]:
        """Return (branch, residual), each (B, T, C), whose sum is the residual stream.

        The arguments are that pair from the block before; residual is None at the first block.
        """
        residual, x = self.ln_1(x, residual)
        residual, x = self.ln_2(self.attn(x, context), residual)
        return self.mlp(x), residual
