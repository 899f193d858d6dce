"""The seam of a stitched model: a linear layer between the blocks of two models.

gpt/stitch.py makes such models. gpt/decoder.py places a seam where the config is a StitchedConfig.
"""

from torch import Tensor, nn

from gpt.config import StitchedConfig
from gpt.linear import Linear


class Seam(Linear):
    """A linear layer that the residual stream passes on its way into `layer`."""

    def __init__(self, n_embd: int, layer: nn.Module):
        super().__init__(n_embd, n_embd)
        layer.register_forward_pre_hook(self.cross)

    def cross(self, _layer: nn.Module, args: tuple) -> tuple:
        """Return a layer's arguments with the residual stream replaced by the seam's output y.

        y has the stream's dtype: autocast rounds what the seam multiplies, not what follows it.
        """
        x = residual_stream(args)
        return self(x).to(x.dtype), None, *args[2:]


def residual_stream(args: tuple) -> Tensor:
    """The stream (B, T, C) that a block or the last norm is called with, as (x, residual, ...)."""
    x, residual = (*args, None)[:2]
    return x if residual is None else residual + x


def flops_per_token(c: StitchedConfig, N: int, palm: float, causal: float) -> dict[str, float]:
    """gpt/flops.py's figures for a stitched model of N parameters without positions.

    palm, causal: attention's in a plain one. Only the seam has a weight gradient, and the backward
    pass ends at the seam.
    """
    frozen_below = c.seam * 12 * c.n_embd**2
    work = 2.0 * N + 2.0 * (N - frozen_below) + 2.0 * c.n_embd**2
    share = (1 + 2 * (1 - c.seam / c.n_layer)) / 3
    return {"palm": work + share * palm, "causal": work + share * causal}
