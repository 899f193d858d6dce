"""Sampling with a key-value cache that is allocated once."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.model import GPT


class KVCache:
    """Keys and values of all positions so far, for every layer: two tensors (L, B, H, block_size, D)."""

    def __init__(self, model: GPT, batch_size: int, dtype: torch.dtype, device: torch.device):
        c = model.config
        self.k, self.v = torch.empty(2, c.n_layer, batch_size, c.n_head, c.block_size, c.head_dim, dtype=dtype, device=device)
        self.length, self.layer = 0, 0

    def attend(self, qkv: Tensor) -> Tensor:
        """Causal attention of the new positions qkv (B, T, 3, H, D) over the cached and themselves: (B, T, H, D).

        The layers call it in their order; the length moves on after the last one. New positions come one at a time,
        or all at once into an empty cache.
        """
        T = qkv.shape[1]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        end = self.length + T
        self.k[self.layer, :, :, self.length : end] = k
        self.v[self.layer, :, :, self.length : end] = v
        keys, values = self.k[self.layer, :, :, :end], self.v[self.layer, :, :, :end]
        y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, is_causal=self.length == 0)
        self.layer += 1
        if self.layer == len(self.k):
            self.length, self.layer = end, 0
        return y.transpose(1, 2)


def sample_token(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One id per row of logits (B, V), as (B, 1). Temperature 0 or top_k 1 is greedy, without a draw."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all that rank higher
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1)


@torch.no_grad()
def generate(model: GPT, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, cached: bool = True, n_tokens: int | None = None) -> Iterator[Tensor]:
    """Yield max_new_tokens ids, (B, 1) each, that continue idx (B, T).

    The model sees the last block_size tokens. Beyond them positions shift at every step, so nothing cached stays true
    and the window is computed anew. `n_tokens`: ids from there on are padding of the vocabulary and are never sampled
    (default: 50257 where the model has GPT-2's padded vocabulary). `cached=False` is the slow definition.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature}, top_k={top_k}, top_p={top_p}: need at least 0, at least 1, within (0, 1]")
    if idx.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token")
    size, V = model.config.block_size, model.config.vocab_size
    n_tokens = n_tokens or (50257 if 50257 < V <= 50304 else V)
    window = idx[:, -size:]
    cache = KVCache(model, len(idx), _compute_dtype(model), idx.device) if cached else None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if cache is not None and cache.length < size:
                features = model.features(window[:, cache.length :], cache=cache)
            else:
                features = model.features(window)
            token = sample_token(model.lm_head(features[:, -1])[:, :n_tokens], temperature, top_k, top_p)
            window = torch.cat([window, token], dim=1)[:, -size:]
            yield token
    finally:
        model.train(was_training)


def _compute_dtype(model: GPT) -> torch.dtype:
    weight = model.lm_head.weight
    return torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else weight.dtype
