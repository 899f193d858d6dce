"""FLOPs per token in the two conventions in use, and the GPUs' peaks for the MFU.

L layers, d width, T sequence length, w = min(T, window), or T without a window, N parameters.
palm (PaLM, appendix B; nanoGPT): 6 N + 12 L d w, N without positions; each token meets w others,
    also where fewer are before it.
causal (llm.c): 6 N + 12 L d (w - w^2 / 2T), N with positions; counts only the scores that are used.
Without a window these are 12 L d T and 6 L d T. A document mask is not counted: how much it hides
depends on the data.
"""

from gpt import seam
from gpt.config import GPTConfig, StitchedConfig

# Dense bf16 peak of the tensor cores in TFLOP/s, by device name. Source: NVIDIA's data sheets of
# A100, H100 and H200, whose sparse figures are twice these. Any other GPU has no MFU.
PEAK_TFLOPS = {
    "NVIDIA H200": 989.5,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}


def params_without_positions(c: GPTConfig) -> int:
    """The number of parameters without positions, and without the token embedding if untied."""
    norms = (2 * c.n_layer + 1) * c.n_embd * (2 if c.bias else 1)
    biases = c.n_layer * 9 * c.n_embd if c.bias else 0
    return c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd + norms + biases


def flops_per_token(c: GPTConfig) -> dict[str, float]:
    """FLOPs of forward and backward per token: {"palm": ..., "causal": ...}."""
    T = c.block_size
    N, w = params_without_positions(c), min(T, c.window or T)
    palm, causal = (12.0 * c.n_layer * c.n_embd * keys for keys in (w, w - w**2 / (2 * T)))
    if isinstance(c, StitchedConfig):
        return seam.flops_per_token(c, N, palm, causal)
    return {"palm": 6.0 * N + palm, "causal": 6.0 * (N + c.block_size * c.n_embd) + causal}


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
