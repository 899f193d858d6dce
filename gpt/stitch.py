"""Two trained GPTs of one shape joined at a layer, directly (merge) or through a linear layer at
the seam (stitch).

A is below the cut and B above it: blocks 0 to i - 1 are A's, i to n_layer - 1 are B's, 0 <= i <=
n_layer. Letters: C = n_embd, M tokens. A model's stream at i, (M, C), is its residual stream where
block i reads it, or where the last norm does for i = n_layer.

Model stitching: Lenc and Vedaldi, "Understanding image representations by measuring their
equivariance and equivalence", 2015; Bansal, Nakkiran and Barak, "Revisiting model stitching to
compare neural representations", 2021. The least-squares start: Csiszarik et al., "Similarity and
matching of neural network representations", 2021.
"""

from dataclasses import asdict, replace

import torch
from torch import Tensor

from gpt.config import GPTConfig, StitchedConfig
from gpt.gpt2 import GPT2
from gpt.pretrained import Trained, fill
from gpt.seam import residual_stream

SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "activation",
         "direction", "window")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def merge(a: Trained, b: Trained, i: int,
          original_head: bool = True) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The shape and the weights of A below block i and B from there on; the embeddings are A's.

    `original_head`: the last norm and the head are A's, tied as they are there. Else they are B's,
    and the head is a tensor of its own: tied, it would replace A's embedding. Raises ValueError
    where the two do not fit together.
    """
    _check(a, b, i)
    weights = {name: (b if _above(name, i, original_head) else a).weights[name]
               for name in a.weights if name != HEAD}
    tied = original_head and a.config.tie_weights
    if not tied:
        chosen = (a if original_head else b).weights
        weights[HEAD] = chosen.get(HEAD, chosen[EMBEDDING])
    return replace(a.config, tie_weights=tied), weights


def stitch(a: Trained, b: Trained, i: int, original_head: bool,
           idx: Tensor | None) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The same with a linear layer before block i.

    Where B's head reads the result, it starts as the least-squares map from A's stream at i to B's
    on the sequences idx (B, T), on whose device that is computed. Where A's head does, it starts as
    the identity, and idx is not read.
    """
    model, weights = merge(a, b, i, original_head)
    if original_head:
        weight, bias = torch.eye(model.n_embd), torch.zeros(model.n_embd)
    else:
        assert idx is not None
        weight, bias = least_squares(*(stream(trained, idx, i) for trained in (a, b)))
    config = StitchedConfig(**asdict(model), seam=i)
    return config, weights | {"seam.weight": weight, "seam.bias": bias}


def _check(a: Trained, b: Trained, i: int) -> None:
    differ = [f"{key} is {getattr(a.config, key)} in {a.name} and {getattr(b.config, key)} in "
              f"{b.name}"
              for key in SHAPE if getattr(a.config, key) != getattr(b.config, key)]
    if differ:
        raise ValueError(f"two models of one architecture are needed: {', '.join(differ)}")
    for trained in (a, b):
        if isinstance(trained.config, StitchedConfig):
            raise ValueError(f"{trained.name} is stitched itself, at layer {trained.config.seam}; "
                             "take the two it was made of")
    if not 0 <= i <= a.config.n_layer:
        raise ValueError(f"stitch_layer_index={i}: choose 0 to n_layer={a.config.n_layer}, the "
                         f"first block of {b.name}")


def _above(name: str, i: int, original_head: bool) -> bool:
    """Whether the parameter is B's."""
    if name.startswith("transformer.h."):
        return int(name.split(".")[2]) >= i
    return name.startswith("transformer.ln_f.") and not original_head


@torch.no_grad()
def stream(trained: Trained, idx: Tensor, i: int) -> Tensor:
    """The model's stream at i on sequences idx (B, T): (B * T, C), fp32, on idx's device."""
    model = GPT2(trained.config).float()
    fill(model, trained.weights)
    model.to(idx.device).eval()
    seen: list[Tensor] = []

    def look(_module: torch.nn.Module, args: tuple) -> None:
        seen.append(residual_stream(args))

    layer = [*model.transformer.h, model.transformer.ln_f][i]
    with layer.register_forward_pre_hook(look), torch.autocast(idx.device.type, enabled=False):
        model.features(idx)
    return seen[0].flatten(0, 1)


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """W (C, C) and b (C,) that make the sum of (x W' + b - y)^2 least, for x and y (M, C). Solved
    in fp64 on the CPU.

    Raises ValueError where M tokens cannot tell C + 1 unknowns apart.
    """
    M, C = x.shape
    if M <= C:
        raise ValueError(f"{M} tokens do not determine a linear layer of {C} + 1 inputs; raise "
                         "--batch_size_alignment")
    x1 = torch.cat([x, x.new_ones(M, 1)], dim=1).cpu().double()
    # by SVD: streams may lack rank
    solution = torch.linalg.lstsq(x1, y.cpu().double(), driver="gelsd").solution
    return solution[:C].T.float().contiguous(), solution[C].float()
