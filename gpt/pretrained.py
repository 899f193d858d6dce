"""Trained models, ours and others': config, weights and tokenizer, from any format that is read.

checkpoint_files.py, nanogpt.py and huggingface.py read one format each.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.files import read_json
from data.tokenizer import Tokenizer, load_tokenizer, read_meta
from gpt import huggingface, nanogpt
from gpt.checkpoint_files import read_config, read_part, read_tokenizer, verify
from gpt.config import SIZES, GPTConfig
from gpt.decoder import Decoder
from gpt.run_folder import reading
from gpt.tensors import DTYPES, POSITIONS, about, checked_weights, dtype_of

DATA = Path(__file__).resolve().parents[1] / "data"


class Trained(NamedTuple):
    """A trained model as it was read; `name` is what messages call it."""

    name: str
    config: GPTConfig
    weights: dict[str, Tensor]
    meta: dict[str, Any] | None = None
    """its tokenizer's, for load_tokenizer; None if its files have none, as GPT-2's"""
    guessed: tuple[str, ...] = ()
    """fields of config that its files do not give: their values are guesses"""


@torch.no_grad()
def fill(model: Decoder, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names; ValueError unless all of them fit."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise ValueError(f"not this model's weights: {odd[0]} is in only one of the two "
                         f"({len(odd)} such names)")
    for name, p in parameters.items():
        tensor = tensors[name]
        if p.shape != tensor.shape or tensor.dtype not in DTYPES:
            raise ValueError(f"not this model's weights: {name} is {tuple(tensor.shape)} "
                             f"{dtype_of(tensor)}, the model's {tuple(p.shape)} {dtype_of(p)}")
        p.copy_(tensor)


def read_source(source: str) -> Trained:
    """Read a published size, a Hugging Face folder, a nanoGPT checkpoint, or one of ours; in fp32.

    Raises ValueError, in one line, for anything else.
    """
    path = Path(source)
    if (path / nanogpt.FILE).exists():
        found = nanogpt.read(path)
        meta = nanogpt_meta(path, found)
        return Trained(source, found.config, found.weights, meta, found.guessed)
    if _is_huggingface(path / "config.json") or (source in SIZES and not path.is_dir()):
        return Trained(source, *huggingface.read(source))
    if not path.is_dir():
        raise ValueError(f"{source!r} is no folder and no published size ({', '.join(SIZES)})")
    with reading(path) as folder:
        verify(folder)
        config, weights = read_config(folder), read_part(folder, "model")
        with about(folder, "go back to an older checkpoint"):
            return Trained(source, config, checked_weights(config, weights), read_tokenizer(folder))


def _is_huggingface(file: Path) -> bool:
    """Whether this is Hugging Face's config.json; our runs have a file of that name, too."""
    remedy = "give a folder that `save_pretrained` wrote"
    return file.exists() and "model_type" in read_json(file, dict[str, Any], remedy)


def nanogpt_meta(folder: Path, found: nanogpt.NanoGPT) -> dict[str, Any] | None:
    """The meta of the data that a nanoGPT checkpoint was trained on, if it is found.

    First beside its ckpt.pt. Then in data/DATASET beside that folder, which is nanoGPT's layout,
    and in our data/DATASET; there it must have as many ids as the model.
    """
    meta, dataset = read_meta(folder), found.settings.get("dataset")
    if meta or not isinstance(dataset, str) or dataset != Path(dataset).name or dataset == "..":
        return meta
    metas = (read_meta(place / dataset) for place in (folder.parent / "data", DATA) if dataset)
    rows = found.config.vocab_size
    return next((meta for meta in metas if meta and meta.get("vocab_size") == rows), None)


def cropped(trained: Trained, block_size: int) -> Trained:
    """The model with its first block_size positions, if it has more; short inputs give the same."""
    if block_size >= trained.config.block_size:
        return trained
    weights = {name: tensor[:block_size] if name == POSITIONS else tensor
               for name, tensor in trained.weights.items()}
    config = replace(trained.config, block_size=block_size)
    return trained._replace(config=config, weights=weights)


def same_vocabulary(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two metas encode a text as the same ids."""
    return all(a.get(key) == b.get(key) for key in ("kind", "chars"))


def has_rows_for(config: GPTConfig, tokenizer: Tokenizer) -> bool:
    """Whether the model's vocabulary may be this tokenizer's, padded by less than 1,024 rows."""
    return tokenizer.vocab_size <= config.vocab_size < tokenizer.vocab_size + 1024


def tokenizer_of(trained: Trained) -> Tokenizer:
    """The model's tokenizer, GPT-2's if its files name none. Raises ValueError if none fits."""
    tokenizer, rows = load_tokenizer(trained.meta), trained.config.vocab_size
    if tokenizer.vocab_size > rows or not (trained.meta or has_rows_for(trained.config, tokenizer)):
        raise ValueError(f"{trained.name}: no tokenizer is known for its {rows} ids; put "
                         "the meta.pkl or meta.json of its training data into that folder")
    return tokenizer
