"""FLOPs per token in the two conventions in use, and the MFU by each.

L layers, d width, T sequence length, w = min(T, window), or T without a window, N parameters.
palm (PaLM, appendix B; nanoGPT): 6 N + 12 L d w, N without positions; each token meets w others,
    also where fewer are before it.
causal (llm.c): 6 N + 12 L d (w - w^2 / 2T), N with positions; counts only the scores that are used.
Without a window these are 12 L d T and 6 L d T. A document mask is not counted: how much it hides
depends on the data.
"""

import functools

import torch

from gpt import seam
from gpt.config import GPTConfig, StitchedConfig
from gpt.decoder import Decoder
from gpt.tensors import EMBEDDING


@functools.cache
def count_params(c: GPTConfig) -> tuple[int, int]:
    """The number of parameters without positions and with them.

    Neither counts a token embedding that is not the head: reading a row of it is no product.
    """
    with torch.device("meta"):
        model = Decoder(c)
    roles = model.roles()
    positions = sum(p.numel() for name, p in model.named_parameters()
                    if roles[name].kind == "embedding" and name != EMBEDDING)
    without = model.num_params(non_embedding=True)
    return without, without + positions


def flops_per_token(c: GPTConfig) -> dict[str, float]:
    """FLOPs of forward and backward per token: {"palm": ..., "causal": ...}."""
    T = c.block_size
    N, with_positions = count_params(c)
    w = min(T, c.window or T)
    palm, causal = (12.0 * c.n_layer * c.n_embd * keys for keys in (w, w - w**2 / (2 * T)))
    if isinstance(c, StitchedConfig):
        return seam.flops_per_token(c, N, palm, causal)
    return {"palm": 6.0 * N + palm, "causal": 6.0 * with_positions + causal}


def mfu(c: GPTConfig, tokens_per_s: float, peak_tflops: float | None) -> dict[str, float | None]:
    """Model FLOPs utilisation of one device: fractions "mfu_palm" and "mfu_causal".

    None where the device's peak is not known (`peak_tflops` in gpt/peaks.py). Above 1 the clock or
    the peak is wrong.
    """
    return {f"mfu_{name}": None if peak_tflops is None else
            flops * tokens_per_s / (peak_tflops * 1e12)
            for name, flops in flops_per_token(c).items()}
