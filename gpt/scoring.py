"""How likely a model finds given tokens: the arithmetic under predict and evaluate."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.gpt2 import GPT2


def perplexity(loss: float) -> float:
    """e to the mean loss in nats; infinite where that is more than a float can be."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def spans(n: int, block_size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the inputs that predict tokens 1 to n - 1 of n, each once, block_size at most
    at a time."""
    for start in range(0, n - 1, block_size):
        yield start, min(start + block_size, n - 1)


@torch.no_grad()
def token_losses(model: GPT2, ids: Tensor) -> Tensor:
    """-log p of ids[1:] in nats, fp32, for ids (n,); nothing is seen beyond a block's beginning."""
    losses = [torch.zeros(0, device=ids.device)]
    for start, end in spans(len(ids), model.config.block_size):
        logits = model.logits(ids[None, start:end])[0].float()
        losses.append(F.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def continuation_losses(model: GPT2, context: list[int],
                        endings: list[list[int]]) -> list[tuple[Tensor, bool]]:
    """For each ending of a context its tokens' losses (n,), and whether greedy decoding would have
    written it.

    Where both are longer than the window, the beginning of the context is cut off.
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
        results.append((F.cross_entropy(logits, wanted, reduction="none"),
                        bool((logits.argmax(-1) == wanted).all())))
    return results
