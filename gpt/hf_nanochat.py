"""nanochat as transformers has it: NanoChatConfig and NanoChatForCausalLM. See `Translation`."""

from typing import Any

from torch import Tensor

from gpt.config import GPTConfig
from gpt.tensors import EMBEDDING, HEAD, count_blocks, is_embedding, shown, table_sizes

NAME, PREFIX = "nanochat", "model."
NEEDS: dict[str, Any] = {}
EXPECTED: dict[str, Any] = {"hidden_act": "relu2", "rms_norm_eps": 1e-6, "attention_bias": False}
SIZES = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "vocab_size": "vocab_size"}
TRANSPOSED: tuple[str, ...] = ()
BUFFERS: tuple[str, ...] = ()
THEIR_EMBEDDING = "model.embed_tokens.weight"
IN_BLOCK = {
    "attn.c_attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight",
                           "self_attn.v_proj.weight"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.c_fc.weight": ("mlp.fc1.weight",),
    "mlp.c_proj.weight": ("mlp.fc2.weight",),
}
# NanoChatConfig's, for what a config.json leaves out.
INTS = {"hidden_size": 768, "num_attention_heads": 6, "intermediate_size": 8192,
        "max_position_embeddings": 2048}


def check(theirs: dict[str, Any]) -> None:
    """Raise ValueError if the config.json is not that of this trainer's nanochat."""
    for key, default in INTS.items():
        if type(theirs.get(key, default)) is not int:
            raise ValueError(f"{key}={shown(theirs[key])}; an int is needed")
    width, heads, inner, _ = (theirs.get(key, default) for key, default in INTS.items())
    if inner != 4 * width:
        raise ValueError(f"intermediate_size={shown(inner)}, this trainer's nanochat has "
                         "4 * hidden_size")
    key_heads, head_dim = theirs.get("num_key_value_heads"), theirs.get("head_dim")
    if key_heads not in (None, heads):
        raise ValueError(f"num_key_value_heads={shown(key_heads)}, this trainer's nanochat has as "
                         f"many as num_attention_heads={shown(heads)}")
    if head_dim is not None and not (type(head_dim) is int and head_dim * heads == width):
        raise ValueError(f"head_dim={shown(head_dim)}, this trainer's nanochat has hidden_size / "
                         "num_attention_heads")
    if type(theirs.get("tie_word_embeddings", False)) is not bool:
        raise ValueError(f"tie_word_embeddings={shown(theirs['tie_word_embeddings'])}; true or "
                         "false is needed")
    _rope_theta(theirs)
    _logit_cap(theirs)


def _rope_theta(theirs: dict[str, Any]) -> float:
    """The base of the rotary angles, in today's place or in the one before transformers 5."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={shown(rope)}; an object is needed")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type={shown(kind)}, this trainer's nanochat has default")
    return _positive("rope_theta", rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)))


def _logit_cap(theirs: dict[str, Any]) -> float:
    cap = theirs.get("final_logit_softcapping", 15.0)
    return 0.0 if cap is None else _positive("final_logit_softcapping", cap)


def _positive(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise ValueError(f"{key}={shown(value)}; a number above 0 is needed")
    return float(value)


def config(theirs: dict[str, Any], tensors: dict[str, Tensor]) -> GPTConfig:
    """Our config of a checked config.json and the folder's tensors."""
    vocab_size, n_embd = table_sizes(tensors, THEIR_EMBEDDING)
    tied = theirs.get("tie_word_embeddings", False)
    if tied and HEAD in tensors and not is_embedding(tensors[HEAD], tensors[THEIR_EMBEDDING]):
        raise ValueError(f"{HEAD} is not the embedding, and config.json says "
                         "tie_word_embeddings=True")
    return GPTConfig(
        architecture="nanochat", vocab_size=vocab_size, n_embd=n_embd, tie_weights=tied,
        n_layer=count_blocks(tensors, "model.layers."),
        n_head=theirs.get("num_attention_heads", INTS["num_attention_heads"]),
        block_size=theirs.get("max_position_embeddings", INTS["max_position_embeddings"]),
        rope_theta=_rope_theta(theirs), logit_cap=_logit_cap(theirs),
    )


def fields(c: GPTConfig) -> dict[str, Any]:
    """The arguments of NanoChatConfig for our config."""
    return {
        "max_position_embeddings": c.block_size, "hidden_size": c.n_embd,
        "intermediate_size": 4 * c.n_embd, "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_head,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "final_logit_softcapping": c.logit_cap or None, "tie_word_embeddings": c.tied,
        "attention_dropout": c.dropout, **EXPECTED,
    }


def parts(name: str) -> tuple[str, ...]:
    """Queries, keys and values have a matrix each; the norms have no weights."""
    if name in (EMBEDDING, HEAD):
        return (THEIR_EMBEDDING if name == EMBEDDING else HEAD,)
    _, _, number, rest = name.split(".", 3)
    return tuple(f"model.layers.{number}.{part}" for part in IN_BLOCK[rest])
