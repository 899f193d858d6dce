"""The checks that tensors from others' files must pass before anything is computed with them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpt.config import GPTConfig
from gpt.decoder import Decoder

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EMBEDDING, POSITIONS, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"


@contextmanager
def about(source: object, remedy: str) -> Iterator[None]:
    """Put `source: ` before the message of a ValueError in the block, and `; remedy` after it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}; {remedy}") from None


def shown(value: Any) -> str:
    """A value from others' files for a message: one short line, whatever it is."""
    short = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**64)
    return f"{value!r:.80}" if short else f"a {type(value).__name__}"


def dtype_of(tensor: Tensor) -> str:
    """Its name without "torch.", as float32."""
    return str(tensor.dtype).removeprefix("torch.")


def shapes_of(config: GPTConfig) -> dict[str, torch.Size]:
    """The shape of each parameter in the model's order, from a meta device, without memory."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Decoder(config).named_parameters()}


def decay_groups(names: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The parameters that weight decay shrinks, matrices and embeddings, and the others.

    `names`: in the model's order, each with its shape or its tensor.
    """
    matrices = [name for name, of in names.items() if len(getattr(of, "shape", of)) >= 2]
    return matrices, [name for name in names if name not in matrices]


def floats(tensor: Any, name: str) -> Tensor:
    """`tensor`, detached. Raises ValueError if it is not a dense tensor of floats."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        what = "missing" if tensor is None else shown(tensor)
        raise ValueError(f"{name} is {what}; a tensor is needed")
    if tensor.is_nested or tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"{name} is a nested, meta or sparse tensor; a dense one is needed")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} holds {dtype_of(tensor)}; floats are needed")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} has elements that share memory; each needs its own")
    return tensor.detach()


def finite(tensor: Any, shape: torch.Size, name: str) -> Tensor:
    """`tensor` in fp32. Raises ValueError unless it has this shape and all elements are finite."""
    found = floats(tensor, name)
    if found.shape != shape:
        raise ValueError(f"{name} is {tuple(found.shape)}; {tuple(shape)} is needed")
    found = found.float()
    if not found.isfinite().all():
        raise ValueError(f"{name} is not finite everywhere")
    return found


def table_sizes(weights: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Rows and columns of a weight. Raises ValueError if it is no matrix of floats."""
    table = floats(weights.get(name), name)
    if table.dim() != 2:
        raise ValueError(f"{name} has {table.dim()} dimensions; 2 are needed")
    return table.shape[0], table.shape[1]


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow `prefix` in the names."""
    return len({m[1] for m in map(re.compile(re.escape(prefix) + r"(\d+)\.").match, names) if m})


def config_fields(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that a GPT-2's weights tell. Raises ValueError for other weights.

    The sizes come from tensors in memory, so a model made of them is no larger than the file.
    """
    vocab_size, n_embd = table_sizes(weights, EMBEDDING)
    block_size, _ = table_sizes(weights, POSITIONS)
    return {"vocab_size": vocab_size, "block_size": block_size, "n_embd": n_embd,
            "n_layer": count_blocks(weights, "transformer.h."),
            "bias": "transformer.ln_f.bias" in weights}


def is_embedding(head: Any, embedding: Tensor) -> bool:
    """Whether a head equals the token embedding. Raises ValueError if it is no tensor of floats."""
    return torch.equal(floats(head, HEAD).float(), embedding.float())


def checked_weights(config: GPTConfig, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in fp32, in the model's order; raises ValueError as `checked` does."""
    return checked(shapes_of(config), weights)


def checked(shapes: Mapping[str, torch.Size], weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in fp32, in the order of `shapes`.

    Raises ValueError if one is missing, unknown, of another shape, or not finite.
    """
    if odd := sorted(shapes.keys() ^ weights.keys()):
        what = "missing" if odd[0] in shapes else "no parameter of such a model"
        more = f" ({len(odd)} such names)" if len(odd) > 1 else ""
        raise ValueError(f"{shown(odd[0])} is {what}{more}")
    return {name: finite(weights[name], shape, name) for name, shape in shapes.items()}
