"""The losses of given tokens, for predict.py and evaluate.py."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.decoder import Decoder


def perplexity(loss: float) -> float:
    """e to the power of the mean loss in nats; infinity if that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def spans(n: int, block_size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of inputs, of at most block_size, that predict tokens 1 to n - 1 once each."""
    for start in range(0, n - 1, block_size):
        yield start, min(start + block_size, n - 1)


@torch.no_grad()
def token_losses(model: Decoder, ids: Tensor) -> Tensor:
    """-log p of ids[1:] in nats, fp32 (n - 1,), for ids (n,), in separate windows of block_size."""
    losses = [torch.zeros(0, device=ids.device)]
    for start, end in spans(len(ids), model.config.block_size):
        logits = model.logits(ids[None, start:end])[0].float()
        losses.append(F.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def continuation_losses(model: Decoder, context: list[int],
                        endings: list[list[int]]) -> list[tuple[Tensor, bool]]:
    """For each ending of a context: its tokens' losses (n,), and whether greedy decoding gives it.

    The context loses its beginning if both do not fit the window. Raises ValueError for an ending
    that does not fit by itself.
    """
    device, size = model.lm_head.weight.device, model.config.block_size
    results = []
    for ending in endings:
        if len(ending) >= size:
            raise ValueError(f"an ending of {len(ending)} tokens does not fit a model with "
                             f"block_size={size}")
        ids = torch.tensor((context + ending)[-size - 1 :], device=device)
        logits = model.logits(ids[None, :-1])[0, -len(ending):].float()
        wanted = ids[-len(ending):]
        greedy = bool((logits.argmax(-1) == wanted).all())
        results.append((F.cross_entropy(logits, wanted, reduction="none"), greedy))
    return results
