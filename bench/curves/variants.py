"""Variants of the two architectures for bench/ablation.py: an ingredient less, or one more.

They are built in the bench's processes alone, between `registered(NAME)` and its end; the trainer
has no option for them. They train and are evaluated; generation with a cache is not theirs.
Letters: B batch, T sequence, C = n_embd, H heads, D = C / H.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import gpt2, nanochat
from gpt.config import ARCHITECTURES, GPTConfig
from gpt.layers import MLP
from kernels import Kernels, dropout


class LearnedPositions(nanochat.Transformer):
    """nanochat with GPT-2's table of positions, as large as the tokens', and no rotation."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__(config, kernels)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Every position is rotated as the first one, by 0: q and k are still normalised."""
        T = idx.shape[1]
        x = self.kernels.rmsnorm(self.wte(idx) + self.wpe.weight[start : start + T])
        first = nanochat.rotation(self.config, 0, 1, idx.device)
        return dropout(x, self.config.dropout, self.training), first.expand(T, -1).contiguous()

    def initial_std(self, name: str) -> float:
        return super().initial_std(name.replace(".wpe.", ".wte."))


class PlainQueries(nanochat.Transformer):
    """nanochat whose queries and keys are rotated, but not normalised."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__(config, rotating_only(kernels))


class LayerNorms(nanochat.Transformer):
    """nanochat with GPT-2's layer norms, which have weights, at the embedding and in the blocks."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__(config, kernels)
        self.ln_e = gpt2.LayerNorm(config, kernels)
        self.add_module("ln_f", gpt2.LayerNorm(config, kernels))
        for block in self.h:
            block.ln_1, block.ln_2 = (gpt2.LayerNorm(config, kernels) for _ in range(2))

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, Tensor]:
        x = dropout(self.ln_e(self.wte(idx))[1], self.config.dropout, self.training)
        return x, nanochat.rotation(self.config, start, idx.shape[1], idx.device)


class Gelu(nanochat.Transformer):
    """nanochat with GELU."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__(config, kernels)
        for module in self.modules():
            if isinstance(module, MLP):
                module.activation = F.gelu


class RandomStarts(nanochat.Transformer):
    """nanochat whose projections into the residual stream start as GPT-2's, not at 0."""

    def initial_std(self, name: str) -> float:
        if name.endswith("c_proj.weight"):
            return 0.02 / math.sqrt(2 * self.config.n_layer)
        return super().initial_std(name)


class PlainEmbedding(nanochat.Transformer):
    """nanochat without the norm after the embedding."""

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, Tensor]:
        x = dropout(self.wte(idx), self.config.dropout, self.training)
        return x, nanochat.rotation(self.config, start, idx.shape[1], idx.device)


class RotaryPositions(gpt2.Transformer):
    """GPT-2 with rotary positions, and no table of them."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__(config, rotating_only(kernels))
        del self.wpe

    def embed(self, idx: Tensor, start: int) -> tuple[Tensor, Any]:
        x = dropout(self.wte(idx), self.config.dropout, self.training)
        return x, nanochat.rotation(self.config, start, idx.shape[1], idx.device)


def rotating_only(kernels: Kernels) -> Kernels:
    """The kernels with an attention_qkv that rotates q and k and does not normalise them."""
    def attention_qkv(qkv: Tensor, *, rotation: Tensor, **options: Any) -> Tensor:
        return kernels.attention_qkv(rotated(qkv, rotation), **options)

    return kernels._replace(attention_qkv=attention_qkv)


def rotated(qkv: Tensor, rotation: Tensor) -> Tensor:
    """qkv (B, T, 3, H, D) with q and k rotated as by `rotated_qkv` of kernels/reference.py."""
    cos, sin = rotation[:, None, None].chunk(2, -1)
    a, b = qkv[:, :, :2].float().chunk(2, -1)
    qk = torch.cat([a * cos + b * sin, b * cos - a * sin], -1)
    return torch.cat([qk.to(qkv.dtype), qkv[:, :, 2:]], 2)


# -- the registry --------------------------------------------------------------


class Variant(NamedTuple):
    """A Transformer that stands in for that of an architecture."""

    architecture: str
    transformer: type[nn.Module]


VARIANTS = {
    "learned-positions": Variant("nanochat", LearnedPositions),
    "plain-queries": Variant("nanochat", PlainQueries),
    "layer-norms": Variant("nanochat", LayerNorms),
    "gelu": Variant("nanochat", Gelu),
    "random-starts": Variant("nanochat", RandomStarts),
    "plain-embedding": Variant("nanochat", PlainEmbedding),
    "rotary-positions": Variant("gpt2", RotaryPositions),
}


@contextmanager
def registered(name: str) -> Iterator[None]:
    """Build the variant wherever its architecture is asked for; "" changes nothing.

    Raises ValueError for an unknown name.
    """
    if not name:
        yield
        return
    if name not in VARIANTS:
        raise ValueError(f"no variant {name!r}; choose from {', '.join(VARIANTS)}")
    architecture, transformer = VARIANTS[name]
    module, row = ModuleType(f"{__name__}.{name}"), ARCHITECTURES[architecture]
    vars(module)["Transformer"] = transformer
    sys.modules[module.__name__] = module
    ARCHITECTURES[architecture] = row._replace(module=module.__name__)
    try:
        yield
    finally:
        ARCHITECTURES[architecture] = row
        del sys.modules[module.__name__]
