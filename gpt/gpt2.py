"""GPT-2's architecture as published, on the operators of a kernel backend.

Parameters have nanoGPT's names (`transformer.h.0.attn.c_attn.weight`, ...); linear weights are
stored (out, in). Letters: B batch, T sequence, C = n_embd, H heads, D = C / H, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels as _kernels
from gpt.config import GPTConfig, StitchedConfig
from gpt.kv_cache import KVCache
from gpt.linear import Linear
from gpt.seam import Seam

if not hasattr(_kernels, "Kernels"):  # Hugging Face ships a package of this name, too
    raise ImportError(
        f"another package named 'kernels' comes first on the path ({_kernels.__file__}); "
        "run `pip install -e .` in the RidgeGPT checkout again, or `pip uninstall kernels`"
    )
from kernels import Kernels, dropout, load

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


class Attention(nn.Module):
    """Causal self-attention from one packed projection."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.config, self.kernels = config, kernels

    def forward(self, x: Tensor, doc_start: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.config.n_head, -1)
        options: dict[str, Any] = {"doc_start": doc_start}
        if 0 < self.config.window < T:  # a longer one hides nothing
            options["window"] = self.config.window
        if cache is not None:
            y = cache.attend(qkv)
        elif self.training and self.config.dropout > 0:
            # One draw from torch's generator; the kernels make the mask from it.
            seed = torch.randint(2**62, (), device=x.device)
            y = self.kernels.attention_qkv(qkv, dropout=self.config.dropout, seed=seed, **options)
        else:
            y = self.kernels.attention_qkv(qkv, **options)
        return dropout(self.c_proj(y.reshape(B, T, C)), self.config.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with an activation between them, four times as wide there."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        h = ACTIVATIONS[self.config.activation](self.c_fc(x))
        return dropout(self.c_proj(h), self.config.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP. The next norm adds the MLP's output to the residual stream: one kernel."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config, kernels), Attention(config, kernels)
        self.ln_2, self.mlp = LayerNorm(config, kernels), MLP(config)

    def forward(self, x: Tensor, residual: Tensor | None = None, doc_start: Tensor | None = None,
                cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """Return (branch, residual), each (B, T, C), whose sum is the residual stream.

        The arguments are that pair from the block before; residual is None at the first block.
        """
        residual, x = self.ln_1(x, residual)
        residual, x = self.ln_2(self.attn(x, doc_start, cache), residual)
        return self.mlp(x), residual


class Transformer(nn.Module):
    """The embeddings, the blocks and the last norm: everything but the head."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config, kernels)


class GPT2(nn.Module):
    """GPT-2: `forward` returns the loss, `logits` the logits."""

    def __init__(self, config: GPTConfig, kernels: Kernels | None = None):
        super().__init__()
        self.config, self.kernels = config, kernels or load("torch")
        self.transformer = Transformer(config, self.kernels)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        self.init_weights()
        if isinstance(config, StitchedConfig):
            self.requires_grad_(False)  # the seam alone is trained
            layers = [*self.transformer.h, self.transformer.ln_f]
            self.seam = Seam(config.n_embd, layers[config.seam])

    def tie(self) -> None:
        """Make the head share the token embedding if the config says so.

        Call it again after parameters were replaced, as `to_empty` does.
        """
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: normal with standard deviation 0.02, biases 0.

        The 2 * n_layer projections into the residual stream have 0.02 / sqrt(2 * n_layer).
        """
        into_the_stream = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
            elif p.dim() == 2:
                p.normal_(0.0, into_the_stream if name.endswith("c_proj.weight") else 0.02)

    def num_params(self, non_embedding: bool = False) -> int:
        """The number of parameters, a shared one counted once.

        `non_embedding` leaves out the positions, and the token embedding unless it is the head.
        """
        n = sum(p.numel() for p in self.parameters())
        if not non_embedding:
            return n
        tokens = 0 if self.config.tie_weights else self.transformer.wte.weight.numel()
        return n - self.transformer.wpe.weight.numel() - tokens

    def features(self, idx: Tensor, doc_start: Tensor | None = None,
                 cache: KVCache | None = None) -> Tensor:
        """The last norm's output (B, T, C), which the head reads, for token ids idx (B, T)."""
        start = 0 if cache is None else cache.length
        if start + idx.shape[1] > self.config.block_size:
            raise ValueError(f"sequence of {start + idx.shape[1]} tokens, block_size is "
                             f"{self.config.block_size}: crop it")
        positions = self.transformer.wpe.weight[start : start + idx.shape[1]]
        x = dropout(self.transformer.wte(idx) + positions, self.config.dropout, self.training)
        residual = None
        for block in self.transformer.h:
            x, residual = block(x, residual, doc_start, cache)
        return self.transformer.ln_f(x, residual)[1]

    def forward(self, idx: Tensor, targets: Tensor, *, doc_start: Tensor | None = None,
                reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of targets (B, T) given idx (B, T); targets of -1 are ignored.

        Tokens come in the order the model reads them, here and in `features` and `logits`: a
        backward model gets the last token of a text first.

        `doc_start` (B, T) int32: for each position the first one of its document; attention does
        not look before it. `reduction`: "mean" over the targets, or "sum".
        """
        x = self.features(idx, doc_start)
        return self.kernels.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight,
                                                 targets.flatten(), reduction=reduction)

    def logits(self, idx: Tensor, last_only: bool = False) -> Tensor:
        """Next-token logits of idx (B, T): (B, T, V), or the last position's alone, (B, 1, V)."""
        x = self.features(idx)
        return self.lm_head(x[:, -1:] if last_only else x)
