"""What a GPT of any architecture is: a Transformer with a head; its loss, logits and weights.

The Transformer comes from the architecture's file. It has the modules `wte`, `h` (the blocks) and
`ln_f`, and `embed`, `initial_std` and `logit_cap`; gpt/gpt2.py is one to read.
Letters: B batch, T sequence, C = n_embd, V vocabulary.
"""

from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt.config import ARCHITECTURES, GPTConfig, StitchedConfig
from gpt.kv_cache import KVCache
from gpt.layers import Context
from gpt.linear import Linear
from gpt.seam import Seam
from kernels import Kernels, load


class Role(NamedTuple):
    """What a parameter is to the optimizer."""

    kind: str
    """matrix (of a linear layer), embedding, head (also where it is the embedding), or vector"""
    packed: int = 1
    """how many matrices it holds, one below the other"""


class Decoder(nn.Module):
    """A GPT: `forward` returns the loss, `logits` the logits."""

    def __init__(self, config: GPTConfig, kernels: Kernels | None = None):
        super().__init__()
        self.config, self.kernels = config, kernels or load("torch")
        architecture = import_module(ARCHITECTURES[config.architecture].module)
        self.transformer = architecture.Transformer(config, self.kernels)
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
        if self.config.tied:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights: normal, with the architecture's standard deviations; biases are 0."""
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
            elif p.dim() == 2:
                p.normal_(0.0, self.transformer.initial_std(name))

    def roles(self) -> dict[str, Role]:
        """The role of each parameter, in the order of `named_parameters`."""
        found: dict[str, Role] = {}
        for name, p in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            if p is self.lm_head.weight:
                found[name] = Role("head")
            elif isinstance(owner, nn.Embedding):
                found[name] = Role("embedding")
            elif isinstance(owner, Linear) and p is owner.weight:
                found[name] = Role("matrix", owner.packed)
            else:
                found[name] = Role("vector")
        return found

    def num_params(self, non_embedding: bool = False) -> int:
        """The number of parameters, a shared one counted once.

        `non_embedding` leaves out the positions, and the token embedding unless it is the head.
        """
        roles = self.roles()
        return sum(p.numel() for name, p in self.named_parameters()
                   if not (non_embedding and roles[name].kind == "embedding"))

    def features(self, idx: Tensor, doc_start: Tensor | None = None,
                 cache: KVCache | None = None) -> Tensor:
        """The last norm's output (B, T, C), which the head reads, for token ids idx (B, T)."""
        x, context = self.embed(idx, doc_start, cache)
        residual = None
        for block in self.transformer.h:
            x, residual = block(x, residual, context)
        return self.transformer.ln_f(x, residual)[1]

    def embed(self, idx: Tensor, doc_start: Tensor | None = None,
              cache: KVCache | None = None) -> tuple[Tensor, Context]:
        """What the first block is called with: the residual stream (B, T, C), and the context."""
        start = 0 if cache is None else cache.length
        if start + idx.shape[1] > self.config.block_size:
            raise ValueError(f"sequence of {start + idx.shape[1]} tokens, block_size is "
                             f"{self.config.block_size}: crop it")
        x, rotation = self.transformer.embed(idx, start)
        return x.to(stream_dtype(x)), Context(rotation, doc_start, cache)

    def forward(self, idx: Tensor, targets: Tensor, *, doc_start: Tensor | None = None,
                reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of targets (B, T) given idx (B, T); targets of -1 are ignored.

        Tokens come in the order the model reads them, here and in `features` and `logits`: a
        backward model gets the last token of a text first.

        `doc_start` (B, T) int32: for each position the first one of its document; attention does
        not look before it. `reduction`: "mean" over the targets, or "sum".
        """
        x, cap = self.features(idx, doc_start), self.transformer.logit_cap
        return self.kernels.linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), reduction=reduction,
            **({"cap": cap} if cap else {}))

    def head(self, x: Tensor) -> Tensor:
        """The logits (..., V) of features x (..., C); capped ones are fp32 or wider."""
        y, cap = self.lm_head(x), self.transformer.logit_cap
        if not cap:
            return y
        return cap * torch.tanh(y.to(torch.promote_types(y.dtype, torch.float32)) / cap)

    def logits(self, idx: Tensor, last_only: bool = False) -> Tensor:
        """Next-token logits of idx (B, T): (B, T, V), or the last position's alone, (B, 1, V)."""
        x = self.features(idx)
        return self.head(x[:, -1:] if last_only else x)


def stream_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the residual stream that begins as x: bf16 under bf16 autocast, else x's own.

    Autocast leaves embeddings wide, and a wide stream would move 56 bytes through the two norms of
    a block for each element, not 32. Under fp16 autocast it stays wide: fp16 ends at 65,504, and
    the stream grows with every layer.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.bfloat16 if torch.get_autocast_dtype(device) == torch.bfloat16 else x.dtype
