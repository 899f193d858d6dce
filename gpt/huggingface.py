"""Hugging Face's folders, read and written, and its published sizes of GPT-2, read.

What all folders need is here; gpt/hf_gpt2.py and gpt/hf_nanochat.py say what each architecture is
called there. Folders are read here as JSON and safetensors. transformers would import, download or
unpickle what their config.json asks for (_attn_implementation, auto_map, quantization_config, ...).
"""

from pathlib import Path
from typing import Any, Protocol, Required, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.files import read_json, regular_file
from gpt import hf_gpt2, hf_nanochat
from gpt.config import GPTConfig
from gpt.decoder import Decoder
from gpt.tensors import EMBEDDING, HEAD, about, checked, shapes_of, shown

REMEDY = "give a folder that `save_pretrained` wrote"
META = "tokenizer_meta.json"  # written by our export if the tokenizer is not GPT-2's


class Translation(Protocol):
    """An architecture in transformers' terms: a module with these names."""

    NAME: str
    """what messages call it"""
    PREFIX: str
    """what all names begin with but the head's; the model without a head leaves it out"""
    NEEDS: dict[str, Any]
    """the fields of GPTConfig that must have these values, for theirs is no other"""
    EXPECTED: dict[str, Any]
    """the fields of their config that must have these values, for ours is no other"""
    SIZES: dict[str, str]
    """the fields of their config that the weights tell, with our names"""
    TRANSPOSED: tuple[str, ...]
    """the ends of the names of matrices that they store (in, out)"""
    BUFFERS: tuple[str, ...]
    """the ends of the names of tensors that are no weights"""

    def check(self, theirs: dict[str, Any]) -> None:
        """Raise ValueError if ours cannot express this config.json."""

    def config(self, theirs: dict[str, Any], tensors: dict[str, Tensor]) -> GPTConfig:
        """Our config of a checked config.json and the folder's tensors."""

    def fields(self, c: GPTConfig) -> dict[str, Any]:
        """Their config's arguments for our config, but for vocabulary and special tokens."""

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors of theirs that are our parameter of this name, one below the other."""


# By their model_type, which is our name of the architecture.
TRANSLATIONS: dict[str, Translation] = {"gpt2": hf_gpt2, "nanochat": hf_nanochat}


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
        translation = _translation(theirs)
    tensors = _tensors(folder)
    with about(source, REMEDY):
        config, weights = _parsed(translation, theirs, tensors)
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


def _translation(theirs: dict[str, Any]) -> Translation:
    """That of the config.json's model. Raises ValueError if ours cannot express it."""
    kind = theirs.get("model_type", "gpt2")
    if not isinstance(kind, str) or kind not in TRANSLATIONS:
        raise ValueError(f"model_type={shown(kind)}, this trainer has {', '.join(TRANSLATIONS)}")
    translation = TRANSLATIONS[kind]
    for key, value in {**translation.EXPECTED, "quantization_config": None}.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{key}={shown(theirs[key])}, this trainer's {translation.NAME} has "
                             f"{value}")
    translation.check(theirs)
    return translation


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


def _parsed(translation: Translation, theirs: dict[str, Any],
            tensors: dict[str, Tensor]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights under our names. Raises ValueError if the two do not fit."""
    prefix = translation.PREFIX
    prefixed = any(name.startswith(prefix) for name in tensors)
    named = {name if prefixed or name == HEAD else prefix + name: tensor
             for name, tensor in tensors.items() if not name.endswith(translation.BUFFERS)}
    config = translation.config(theirs, named)
    for key, name in translation.SIZES.items():
        size = getattr(config, name)
        if theirs.get(key, size) != size:
            raise ValueError(f"config.json says {key}={shown(theirs[key])}, its weights {size}")
    if config.tied:
        named.pop(HEAD, None)
    for name, tensor in named.items():
        if name.endswith(translation.TRANSPOSED) and tensor.dim() == 2:
            named[name] = tensor.t().contiguous()
    shapes = shapes_of(config)
    parts = {name: translation.parts(name) for name in shapes}
    found = checked({part: torch.Size((shape[0] // len(parts[name]), *shape[1:]))
                     for name, shape in shapes.items() for part in parts[name]}, named)
    return config, {name: torch.cat([found[part] for part in of]) if len(of) > 1 else found[of[0]]
                    for name, of in parts.items()}


@torch.no_grad()
def write(model: Decoder, folder: Path, vocab_size: int) -> None:
    """Write a folder for AutoModelForCausalLM, with the first vocab_size rows of the vocabulary.

    GPT-2 has biases; a model without them gets zeros, which is the same function. The folder is
    loaded again: raises ValueError if its logits differ from the model's by 1e-3.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = model.config.architecture
    translation, end = TRANSLATIONS[kind], min(50256, vocab_size - 1)
    # No padding: its row of the embedding would have no gradient there.
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, **translation.fields(model.config), vocab_size=vocab_size,
        bos_token_id=end, eos_token_id=end, pad_token_id=None))
    biases = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()
              if name.endswith(".bias")}
    theirs.load_state_dict(biases | _named(translation, model, vocab_size))
    theirs.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors makes its files 0600
        file.chmod((folder / "config.json").stat().st_mode)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    idx = torch.randint(vocab_size, (1, min(model.config.block_size, 32)),
                        generator=torch.Generator().manual_seed(0))
    logits = model.cpu().eval().logits(idx)[..., :vocab_size]
    difference = (again(idx).logits - logits).abs().max().item()
    if not difference < 1e-3:
        raise ValueError(f"{folder}: reloaded, its logits differ from the model's by "
                         f"{difference:.2g}; not a usable export")


def _named(translation: Translation, model: Decoder, vocab_size: int) -> dict[str, Tensor]:
    """The model's weights under their names, without the padding of the vocabulary."""
    named: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        rows = tensor[:vocab_size] if name in (EMBEDDING, HEAD) else tensor
        parts = translation.parts(name)
        named |= zip(parts, rows.chunk(len(parts)), strict=True)
    return {name: tensor.T if name.endswith(translation.TRANSPOSED) else tensor
            for name, tensor in named.items()}
