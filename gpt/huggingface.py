"""Hugging Face's GPT-2: read published sizes and folders of GPT2LMHeadModel, and write folders.

Folders are read here as JSON and safetensors. transformers would import, download or unpickle what
their config.json asks for (_attn_implementation, auto_map, quantization_config, ...).
"""

from pathlib import Path
from typing import Any, Required, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.files import read_json, regular_file
from gpt.config import GPTConfig
from gpt.decoder import Decoder
from gpt.tensors import EMBEDDING, HEAD, about, checked_weights, config_fields, floats, shown

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# transformers stores these as (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")
SIZE_KEYS = {"n_layer": "n_layer", "n_embd": "n_embd", "n_positions": "block_size",
             "vocab_size": "vocab_size"}
EXPECTED = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "model_type": "gpt2",
    "quantization_config": None,
}
REMEDY = "give a folder that `save_pretrained` wrote"
META = "tokenizer_meta.json"  # written by our export if the tokenizer is not GPT-2's


class Index(TypedDict, total=False):
    """model.safetensors.index.json: which file has which weight, if there are several."""

    metadata: dict[str, Any]
    weight_map: Required[dict[str, str]]


def read(source: str) -> tuple[GPTConfig, dict[str, Tensor], dict[str, Any] | None]:
    """The config, the weights under our names, and the tokenizer's meta, None for GPT-2's.

    `source`: a folder, or a published size (SIZES). Raises ValueError, in one line, if it cannot
    be loaded or is another kind of model.
    """
    folder = Path(source) if Path(source).is_dir() else downloaded(source)
    theirs = read_json(folder / "config.json", dict[str, Any], REMEDY)
    with about(source, REMEDY):
        _check(theirs)
    tensors = _tensors(folder)
    with about(source, REMEDY):
        config, weights = _parsed(theirs, tensors)
    meta = read_json(folder / META, dict[str, Any], REMEDY) if (folder / META).exists() else None
    return config, weights, meta


def downloaded(size: str) -> Path:
    """The folder of a published size in the user's cache, downloaded if it is not there."""
    from transformers.utils import cached_file, logging

    logging.disable_progress_bar()
    try:
        cached_file(size, "model.safetensors")
        return Path(cached_file(size, "config.json")).parent
    except OSError as error:
        raise ValueError(f"--init_from={size}: its weights cannot be loaded (there is no network "
                         f"and no cached copy); {REMEDY}") from error


def _check(theirs: dict[str, Any]) -> None:
    """Raise ValueError if the config.json is not that of this trainer's GPT-2."""
    for key, value in EXPECTED.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{key}={shown(theirs[key])}, this trainer's GPT-2 has {value}")
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


def _tensors(folder: Path) -> dict[str, Tensor]:
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.exists():
        names = read_json(index, Index, REMEDY)["weight_map"].values()
        files = [folder / Path(name).name for name in sorted(set(names))]
    pickled = "its pytorch_model.bin, a pickle that may run code, is not read; "
    remedy = pickled * (folder / "pytorch_model.bin").exists() + REMEDY
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(regular_file(file, remedy))
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged ({error!s:.200}); {REMEDY}") from None
    return tensors


def _parsed(theirs: dict[str, Any],
            tensors: dict[str, Tensor]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights under our names. Raises ValueError if the two do not fit."""
    prefixed = any(name.startswith("transformer.") for name in tensors)  # not in a GPT2Model
    named = {name if prefixed or name == HEAD else f"transformer.{name}": tensor
             for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    shape, head = config_fields(named), named.pop(HEAD, None)
    if head is not None and not torch.equal(floats(head, HEAD).float(), named[EMBEDDING].float()):
        raise ValueError(f"{HEAD} is not the embedding, which this trainer's GPT-2 has as its head")
    weights = dict(named)
    for name, tensor in named.items():
        if name.endswith(TRANSPOSED) and tensor.dim() == 2:
            weights[name] = tensor.t().contiguous()
    for key, name in SIZE_KEYS.items():
        if theirs.get(key, shape[name]) != shape[name]:
            raise ValueError(f"config.json says {key}={shown(theirs[key])}, its weights "
                             f"{shape[name]}")
    activation: Any = ACTIVATIONS[_activation(theirs)]
    config = GPTConfig(**shape, n_head=theirs.get("n_head", 12), activation=activation)
    return config, checked_weights(config, weights)


@torch.no_grad()
def write(model: Decoder, folder: Path, vocab_size: int) -> None:
    """Write a folder for AutoModelForCausalLM, with the first vocab_size rows of the vocabulary.

    GPT-2 has biases; a model without them gets zeros, which is the same function. The folder is
    loaded again: raises ValueError if its logits differ from the model's by 1e-3.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    c = model.config
    end = min(50256, vocab_size - 1)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, activation_function="gelu_new" if c.activation == "gelu_tanh" else "gelu",
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        bos_token_id=end, eos_token_id=end,
    ))
    ours = {k: v.T if k.endswith(TRANSPOSED) else v for k, v in model.state_dict().items()}
    ours |= {k: ours[k][:vocab_size] for k in (EMBEDDING, HEAD)}
    theirs.load_state_dict({k: ours.get(k, torch.zeros_like(v))
                            for k, v in theirs.state_dict().items()})
    theirs.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors makes its files 0600
        file.chmod((folder / "config.json").stat().st_mode)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    idx = torch.randint(vocab_size, (1, min(c.block_size, 32)),
                        generator=torch.Generator().manual_seed(0))
    logits = model.cpu().eval().logits(idx)[..., :vocab_size]
    difference = (again(idx).logits - logits).abs().max().item()
    if not difference < 1e-3:
        raise ValueError(f"{folder}: reloaded, its logits differ from the model's by "
                         f"{difference:.2g}; not a usable export")
