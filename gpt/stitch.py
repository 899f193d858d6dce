"""Join two trained GPTs of one shape, A and B: directly (merge) or by a linear layer (stitch).

Blocks 0 to i - 1 are A's and i to n_layer - 1 are B's, 0 <= i <= n_layer. Letters: C = n_embd,
M tokens. A model's stream at i, (M, C), is the residual stream that its block i reads, or its last
norm for i = n_layer.

Model stitching: Lenc and Vedaldi, "Understanding image representations by measuring their
equivariance and equivalence", 2015; Bansal, Nakkiran and Barak, "Revisiting model stitching to
compare neural representations", 2021. The least-squares start: Csiszarik et al., "Similarity and
matching of neural network representations", 2021.
"""

from dataclasses import asdict, replace

import torch
from torch import Tensor

from gpt.config import FIXED_BY_WEIGHTS, GPTConfig, StitchedConfig
from gpt.decoder import Decoder
from gpt.pretrained import Trained, fill
from gpt.seam import residual_stream
from gpt.tensors import EMBEDDING, HEAD

MUST_EQUAL = [name for name in FIXED_BY_WEIGHTS if name != "tie_weights"]


def merge(a: Trained, b: Trained, i: int,
          original_head: bool = True) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights of a model with A's blocks below i and B's above; A's embeddings.

    `original_head`: the last norm and the head are A's, tied if they are there. Otherwise they are
    B's, and untied: a tied head would replace A's embedding. Raises ValueError if A and B differ in
    shape, or if one is itself stitched.
    """
    _check(a, b, i)
    weights = {name: (b if _is_from_b(name, i, original_head) else a).weights[name]
               for name in a.weights if name != HEAD}
    config = a.config if original_head else replace(a.config, tie_weights=False)
    if not config.tied:
        chosen = (a if original_head else b).weights
        weights[HEAD] = chosen.get(HEAD, chosen[EMBEDDING])
    return config, weights


def stitch(a: Trained, b: Trained, i: int, original_head: bool,
           idx: Tensor | None) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights of the merged model with a linear layer, the seam, before block i.

    With B's head the seam starts as the least-squares map from A's stream at i to B's, computed on
    the sequences idx (B, T) and on their device. With A's head it starts as the identity, and idx
    may be None.
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
    pairs = {key: (getattr(a.config, key), getattr(b.config, key)) for key in MUST_EQUAL}
    differ = [f"{key} is {in_a} in {a.name} and {in_b} in {b.name}"
              for key, (in_a, in_b) in pairs.items() if in_a != in_b]
    if differ:
        raise ValueError(f"two models of one architecture are needed: {', '.join(differ)}")
    for trained in (a, b):
        if isinstance(trained.config, StitchedConfig):
            raise ValueError(f"{trained.name} is stitched itself, at layer {trained.config.seam}; "
                             "take the two it was made of")
    if not 0 <= i <= a.config.n_layer:
        raise ValueError(f"stitch_layer_index={i}: choose 0 to n_layer={a.config.n_layer}, the "
                         f"first block of {b.name}")


def _is_from_b(name: str, i: int, original_head: bool) -> bool:
    """Whether a parameter is B's."""
    if name.startswith("transformer.h."):
        return int(name.split(".")[2]) >= i
    return name.startswith("transformer.ln_f.") and not original_head


@torch.no_grad()
def stream(trained: Trained, idx: Tensor, i: int) -> Tensor:
    """The model's stream at i on sequences idx (B, T): (B * T, C), fp32, on idx's device."""
    model = Decoder(trained.config).float()
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
    """W (C, C) and b (C,) with the least sum of (x W' + b - y)^2, for x and y (M, C).

    Solved in fp64 on the CPU. Raises ValueError if M tokens do not determine C + 1 unknowns.
    """
    M, C = x.shape
    if M <= C:
        raise ValueError(f"{M} tokens do not determine a linear layer of {C} + 1 inputs; raise "
                         "--batch_size_alignment")
    x1 = torch.cat([x, x.new_ones(M, 1)], dim=1).cpu().double()
    # gelsd, by SVD: a stream may not have full rank.
    solution = torch.linalg.lstsq(x1, y.cpu().double(), driver="gelsd").solution
    return solution[:C].T.float().contiguous(), solution[C].float()
