"""The key-value cache: generation computes only the new positions and reads the others here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.config import GPTConfig


class KVCache:
    """Keys and values of all positions so far, in two tensors (n_layer, B, H, block_size, D).

    They are allocated once. New positions come one at a time, or together into an empty cache.
    """

    def __init__(self, c: GPTConfig, batch_size: int, dtype: torch.dtype, device: torch.device):
        shape = (c.n_layer, batch_size, c.n_head, c.block_size, c.head_dim)
        self.k, self.v = torch.empty(2, *shape, dtype=dtype, device=device)
        self.length, self.layer, self.window = 0, 0, c.window or c.block_size

    def attend(self, qkv: Tensor) -> Tensor:
        """Store new positions qkv (B, T, 3, H, D) and return their causal attention (B, T, H, D).

        The layers must call it in their order; the last one's call makes the cache longer.
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
