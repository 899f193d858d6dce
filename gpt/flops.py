"""FLOPs per token in the two conventions in use, and the GPUs' peaks for the MFU.

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

# Dense bf16 peak of the tensor cores in TFLOP/s, by device name. Source: NVIDIA's data sheets of
# A100, H100 and H200, whose sparse figures are twice these. Any other GPU has no MFU.
PEAK_TFLOPS = {
    "NVIDIA H200": 989.5,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}


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


def mfu(c: GPTConfig, tokens_per_s: float, device_name: str) -> dict[str, float | None]:
    """Model FLOPs utilisation of one device: fractions "mfu_palm" and "mfu_causal".

    None for an unknown device. Raises ValueError above 1: the clock or the formula is wrong.
    """
    peak = PEAK_TFLOPS.get(device_name)
    result: dict[str, float | None] = {}
    for name, flops in flops_per_token(c).items():
        used = None if peak is None else flops * tokens_per_s / (peak * 1e12)
        if used is not None and used > 1:
            raise ValueError(f"mfu_{name} of {used:.2f} at {tokens_per_s:.0f} tokens/s on "
                             f"{device_name}: above 100 %")
        result[f"mfu_{name}"] = used
    return result
