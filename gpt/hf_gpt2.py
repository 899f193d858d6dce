"""GPT-2 as transformers has it: GPT2Config and GPT2LMHeadModel. See `Translation`."""

from typing import Any

from torch import Tensor

from gpt.config import GPTConfig
from gpt.tensors import EMBEDDING, HEAD, config_fields, is_embedding, shown

NAME, PREFIX = "GPT-2", "transformer."
NEEDS: dict[str, Any] = {"tie_weights": True}
EXPECTED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
}
SIZES = {"n_layer": "n_layer", "n_embd": "n_embd", "n_positions": "block_size",
         "vocab_size": "vocab_size"}
TRANSPOSED: tuple[str, ...] = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight",
                               "mlp.c_proj.weight")
BUFFERS: tuple[str, ...] = (".attn.bias", ".attn.masked_bias")
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def check(theirs: dict[str, Any]) -> None:
    """Raise ValueError if the config.json is not that of this trainer's GPT-2."""
    if _activation(theirs) not in ACTIVATIONS:
        raise ValueError(f"activation {shown(_activation(theirs))}, this trainer's GPT-2 has one "
                         f"of {', '.join(ACTIVATIONS)}")
    inner, width, heads = theirs.get("n_inner"), theirs.get("n_embd", 768), theirs.get("n_head", 12)
    if inner is not None and not (type(width) is int and inner == 4 * width):
        raise ValueError(f"inner width {shown(inner)}, this trainer's GPT-2 has 4 * n_embd")
    if type(heads) is not int:
        raise ValueError(f"n_head={shown(heads)}; an int is needed")


def _activation(theirs: dict[str, Any]) -> str:
    return str(theirs.get("activation_function", "gelu_new"))


def config(theirs: dict[str, Any], tensors: dict[str, Tensor]) -> GPTConfig:
    """Our config of a checked config.json and the folder's tensors."""
    shape = config_fields(tensors)
    if HEAD in tensors and not is_embedding(tensors[HEAD], tensors[EMBEDDING]):
        raise ValueError(f"{HEAD} is not the embedding, which this trainer's GPT-2 has as its head")
    activation: Any = ACTIVATIONS[_activation(theirs)]
    return GPTConfig(**shape, n_head=theirs.get("n_head", 12), activation=activation)


def fields(c: GPTConfig) -> dict[str, Any]:
    """The arguments of GPT2Config for our config."""
    return {
        "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
        "activation_function": "gelu_new" if c.activation == "gelu_tanh" else "gelu",
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
    }


def parts(name: str) -> tuple[str, ...]:
    """The names are the same."""
    return (name,)
