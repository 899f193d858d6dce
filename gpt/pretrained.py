"""Reading trained models: our checkpoints (gpt/run_folder.py), and those of others."""

import contextlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.files import read_json
from data.tokenizer import Tokenizer, check_meta, load_tokenizer, read_meta
from gpt import nanogpt, run_folder
from gpt.config import SIZES, GPTConfig
from gpt.model import GPT
from gpt.run_folder import read_state, reading, tensor_files, verify
from gpt.tensors import DTYPES, about, dtype_of, fitting
from kernels import Kernels

DATA = Path(__file__).resolve().parents[1] / "data"


class Trained(NamedTuple):
    """A model that someone trained, and what messages call it."""

    name: str
    config: GPTConfig
    weights: dict[str, Tensor]
    meta: dict[str, Any] | None = None
    """its tokenizer's, for load_tokenizer; None where its files do not say, as GPT-2's do not"""
    untold: tuple[str, ...] = ()
    """fields of config that its files do not say"""


def read_part(folder: Path, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a part of a checkpoint, "model" or "optimizer", whole."""
    if (folder / f"{part}.safetensors").is_file():
        return load_file(folder / f"{part}.safetensors", device=str(device))
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    saved: Any = HuggingFaceStorageReader(str(folder / part)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype, device=device)
               for name, t in saved.items()}
    read_into(folder, part, tensors)
    return tensors


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of any other new file; `save_file` makes it 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def saved_shapes(folder: Path, part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's tensors, whole, by their names."""
    files = tensor_files(folder, part)
    if files and files[0].parent != folder:  # shards: what each is of is in their metadata
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        saved: Any = HuggingFaceStorageReader(
            str(folder / part)).read_metadata().state_dict_metadata
        return {name: tuple(t.size) for name, t in saved.items()}
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(run_folder.opened(file)) for file in files]
        return {name: tuple(t.get_slice(name).get_shape()) for t in found for name in t.keys()}


def read_into(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, all or some of a part's, in place. Of a DTensor only this rank's shard is
    read."""
    from torch.distributed import checkpoint as dcp  # a second to import

    reader = dcp.HuggingFaceStorageReader(str(folder / part if (folder / part).is_dir()
                                              else folder))
    # that no_dist is one process: it is each by itself
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        dcp.load(tensors, storage_reader=reader, no_dist=True)


_HINTS = get_type_hints(GPTConfig, include_extras=True)
_Shape = TypedDict("_Shape", _HINTS, total=False)  # type: ignore[misc]


def read_config(folder: Path) -> GPTConfig:
    """The shape in model.json. Raises ValueError where it is none, or of a newer version."""
    return GPTConfig(**read_json(folder / "model.json", _Shape,
                                 "it must have the fields of gpt/config.py"))


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """What data.tokenizer.load_tokenizer makes the model's tokenizer from."""
    file = folder / "tokenizer.json"
    return check_meta(read_json(file, dict[str, Any], "it must be as a meta.json"), str(file))


def config_json(config: GPTConfig) -> str:
    return json.dumps(asdict(config), indent=1)


@torch.no_grad()
def fill(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names, all of them. Raises ValueError where they
    do not fit."""
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


def read_optimizer(folder: Path, model: GPT) -> dict:
    """The AdamW state of a checkpoint as a state_dict that numbers the parameters as the trainer
    does: those that decay, then the rest."""
    saved = read_part(folder, "optimizer")
    matrices = [name for name, p in model.named_parameters() if p.dim() >= 2]
    vectors = [name for name, p in model.named_parameters() if p.dim() < 2]
    state: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate([*matrices, *vectors]):
        moments = {k: saved[f"{name}:{k}"] for k in ("step", "exp_avg", "exp_avg_sq")
                   if f"{name}:{k}" in saved}
        if moments:
            state[i] = moments
    c = read_state(folder)["config"]
    shared = {"lr": c["learning_rate"], "betas": (c["beta1"], c["beta2"]), "eps": 1e-8,
              "amsgrad": False, "maximize": False,
              "foreach": None, "capturable": False, "differentiable": False, "fused": None,
              "decoupled_weight_decay": True}
    groups = [
        shared | {"weight_decay": c["weight_decay"], "params": list(range(len(matrices)))},
        shared
        | {"weight_decay": 0.0, "params": list(range(len(matrices), len(matrices) + len(vectors)))},
    ]
    return {"state": state, "param_groups": groups}


def read_source(source: str) -> Trained:
    """A published size, a Hugging Face folder, a nanoGPT checkpoint, or one of ours; in fp32.

    Raises ValueError, in one line, for what is none of them.
    """
    path = Path(source)
    if (path / nanogpt.FILE).exists():
        found = nanogpt.read(path)
        return Trained(source, found.config, found.weights, nanogpt_meta(path, found), found.untold)
    if _is_huggingface(path / "config.json") or (source in SIZES and not path.is_dir()):
        from gpt import huggingface

        return Trained(source, *huggingface.read(source))
    if not path.is_dir():
        raise ValueError(f"{source!r} is no folder and no published size ({', '.join(SIZES)})")
    with reading(path) as folder:
        verify(folder)
        config, weights = read_config(folder), read_part(folder, "model")
        with about(folder, "go back to an older checkpoint"):
            return Trained(source, config, fitting(config, weights), read_tokenizer(folder))


def _is_huggingface(file: Path) -> bool:
    """Whether it is its config.json; a run's folder of ours has one, too."""
    remedy = "give a folder that `save_pretrained` wrote"
    return file.exists() and "model_type" in read_json(file, dict[str, Any], remedy)


def nanogpt_meta(folder: Path, found: nanogpt.NanoGPT) -> dict[str, Any] | None:
    """The meta of the data it was trained on, where one is found.

    Looked for beside its ckpt.pt, and, with as many ids, in data/DATASET beside that folder, as in
    a checkout of nanoGPT, or in ours.
    """
    meta, dataset = read_meta(folder), found.settings.get("dataset")
    if meta or not isinstance(dataset, str) or dataset != Path(dataset).name or dataset == "..":
        return meta
    metas = (read_meta(place / dataset) for place in (folder.parent / "data", DATA) if dataset)
    rows = found.config.vocab_size
    return next((meta for meta in metas if meta and meta.get("vocab_size") == rows), None)


def same_vocabulary(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two metas give the same ids to the same text."""
    return all(a.get(key) == b.get(key) for key in ("kind", "chars"))


def has_rows_for(config: GPTConfig, tokenizer: Tokenizer) -> bool:
    """Whether a vocabulary of which nothing else is known may be this tokenizer's, padded."""
    return tokenizer.vocab_size <= config.vocab_size < tokenizer.vocab_size + 1024


def tokenizer_of(trained: Trained) -> Tokenizer:
    """A model's tokenizer, GPT-2's where its files name none. Raises ValueError where none fits."""
    tokenizer, rows = load_tokenizer(trained.meta), trained.config.vocab_size
    if tokenizer.vocab_size > rows or not (trained.meta or has_rows_for(trained.config, tokenizer)):
        raise ValueError(f"{trained.name}: no tokenizer is known for its {rows} ids; put "
                         "the meta.pkl or meta.json of its training data into that folder")
    return tokenizer


def model_of(trained: Trained, kernels: Kernels | None = None) -> GPT:
    """The model itself, on the CPU, in eval mode."""
    model = GPT(trained.config, kernels)
    fill(model, trained.weights)
    return model.eval()


def from_pretrained(source: str, kernels: Kernels | None = None) -> GPT:
    """The model of anything `read_source` reads, on the CPU, in eval mode."""
    return model_of(read_source(source), kernels)


def load_model(path: str | Path, device: torch.device | str = "cpu",
               kernels: Kernels | None = None) -> GPT:
    """The model of a checkpoint folder, or of the newest one in a run's folder, checked by its
    checksums, in eval mode."""
    with reading(path) as folder:
        verify(folder)
        with torch.device("meta"):
            model = GPT(read_config(folder), kernels)
        model.to_empty(device=device)
        model.tie()
        fill(model, read_part(folder, "model", device))
    return model.eval()
