"""The key-value cache that generation reads instead of computing its text anew."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.config import GPTConfig


class KVCache:
    """Keys and values of all positions so far, for every layer: two tensors (L, B, H, block_size,
    D)."""

    def __init__(self, c: GPTConfig, batch_size: int, dtype: torch.dtype, device: torch.device):
        shape = (c.n_layer, batch_size, c.n_head, c.block_size, c.head_dim)
        self.k, self.v = torch.empty(2, *shape, dtype=dtype, device=device)
        self.length, self.layer, self.window = 0, 0, c.window or c.block_size

    def attend(self, qkv: Tensor) -> Tensor:
        """Causal attention of the new positions qkv (B, T, 3, H, D) over the cached and themselves:
        (B, T, H, D).

        The layers call it in their order; the length moves on after the last one. New positions
        come one at a time, or all at once into an empty cache.
        """
        T = qkv.shape[1]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        end = self.length + T
        self.k[self.layer, :, :, self.length : end] = k
        self.v[self.layer, :, :, self.length : end] = v
        begin = max(0, self.length + 1 - self.window)  # the first new position sees none before it
        keys, values = self.k[self.layer, :, :, begin:end], self.v[self.layer, :, :, begin:end]
        seen = None
        if T > self.window:
            seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
        y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=seen,
                                           is_causal=self.length == 0 and seen is None)
        self.layer += 1
        if self.layer == len(self.k):
            self.length, self.layer = end, 0
        return y.transpose(1, 2)
