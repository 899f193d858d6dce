"""Sampling text from a model, with a key-value cache."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gpt.decoder import Decoder
from gpt.kv_cache import KVCache


def sample_token(logits: Tensor, temperature: float, top_k: int | None,
                 top_p: float | None) -> Tensor:
    """Draw one id for each row of logits (B, V): (B, 1). Temperature 0 or top_k 1 is greedy."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1, keepdim=True)
    # The largest is subtracted first: near temperature 0 the others overflow to minus infinity,
    # which softmax can take. The divisor is at least 1e-30, which fp32 does not round to 0.
    logits, ids = logits.float(), None
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # sorted
    p = logits.softmax(-1)
    if top_p is not None:
        higher = p.cumsum(-1) - p  # of all ids that rank higher; 0 for the first, which stays
        p = p.masked_fill((higher >= top_p) & (higher > 0), 0)
    choice = torch.multinomial(p, 1)
    return choice if ids is None else ids.gather(-1, choice)


@torch.no_grad()
def generate(model: Decoder, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, cached: bool = True,
             n_tokens: int | None = None) -> Iterator[Tensor]:
    """Yield max_new_tokens ids, (B, 1) each, that continue idx (B, T), given in reading order.

    A backward model continues to the left: the first id yielded stands before idx, the next one
    before that. The model sees the nearest block_size tokens; in longer texts each step shifts
    all positions, so the cache is of no use and the window is computed anew.

    `n_tokens`: ids from there on pad the vocabulary and are never sampled; by default 50257 if
    the vocabulary is GPT-2's, padded. `cached=False` is the slow definition. Raises ValueError
    for settings out of range or an empty prompt.
    """
    if (not temperature >= 0 or (top_k is not None and top_k < 1)
            or (top_p is not None and not 0 < top_p <= 1)):
        raise ValueError(f"temperature={temperature} must be at least 0, top_k={top_k} at least 1, "
                         f"top_p={top_p} within (0, 1]")
    if idx.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token")
    size, V = model.config.block_size, model.config.vocab_size
    n_tokens = n_tokens or (50257 if 50257 < V <= 50304 else V)
    window = (idx.flip(1) if model.config.direction == "backward" else idx)[:, -size:]
    room = replace(model.config, block_size=min(size, window.shape[1] + max_new_tokens))
    cache = KVCache(room, len(idx), _compute_dtype(model), idx.device) if cached else None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if cache is not None and cache.length < size:
                features = model.features(window[:, cache.length :], cache=cache)
            else:
                features = model.features(window)
            token = sample_token(model.head(features[:, -1])[:, :n_tokens], temperature,
                                 top_k, top_p)
            window = torch.cat([window, token], dim=1)[:, -size:]
            yield token
    finally:
        model.train(was_training)


def _compute_dtype(model: Decoder) -> torch.dtype:
    weight = model.lm_head.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
