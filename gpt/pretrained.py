"""Reading trained models: our checkpoints (gpt/run_folder.py), and those of others."""

import contextlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import read_json
from gpt import nanogpt, run_folder
from gpt.config import SIZES, GPTConfig
from gpt.model import GPT
from gpt.run_folder import read_state, reading, tensor_files, verify
from kernels import Kernels


def read_part(folder: Path, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a part of a checkpoint, "model" or "optimizer", whole."""
    if (folder / f"{part}.safetensors").is_file():
        return load_file(folder / f"{part}.safetensors", device=str(device))
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    saved: Any = HuggingFaceStorageReader(str(folder / part)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype, device=device) for name, t in saved.items()}
    read_into(folder, part, tensors)
    return tensors


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of any other new file; `save_file` alone makes it 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)


def saved_shapes(folder: Path, part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's tensors, whole, by their names."""
    files = tensor_files(folder, part)
    if files and files[0].parent != folder:  # shards: what each is of is in their metadata
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        saved: Any = HuggingFaceStorageReader(str(folder / part)).read_metadata().state_dict_metadata
        return {name: tuple(t.size) for name, t in saved.items()}
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(run_folder.opened(file)) for file in files]
        return {name: tuple(t.get_slice(name).get_shape()) for t in found for name in t.keys()}


def read_into(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, all or some of a part's, in place. Of a DTensor only this rank's shard is read."""
    from torch.distributed import checkpoint as dcp  # a second to import

    reader = dcp.HuggingFaceStorageReader(str(folder / part if (folder / part).is_dir() else folder))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no_dist is one process: it is each by itself
        dcp.load(tensors, storage_reader=reader, no_dist=True)


_Shape = TypedDict("_Shape", get_type_hints(GPTConfig), total=False)  # type: ignore[misc]


def read_config(folder: Path) -> GPTConfig:
    """The shape in model.json. Raises ValueError where it is none, or has what only a newer version knows."""
    return GPTConfig(**read_json(folder / "model.json", _Shape, "it must have the fields of gpt/config.py"))


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """What data.tokenizer.load_tokenizer makes the model's tokenizer from."""
    return read_json(folder / "tokenizer.json", dict[str, Any], "it must be as a meta.json")


def config_json(config: GPTConfig) -> str:
    return json.dumps(asdict(config), indent=1)


@torch.no_grad()
def fill(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names, all of them. Raises ValueError where they do not fit."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise ValueError(f"not this model's weights: {odd[0]} is in only one of the two ({len(odd)} such names)")
    for name, p in parameters.items():
        if p.shape != tensors[name].shape:
            raise ValueError(f"not this model's weights: {name} is {tuple(tensors[name].shape)}, the model's {tuple(p.shape)}")
        p.copy_(tensors[name])


def read_optimizer(folder: Path, model: GPT) -> dict:
    """The AdamW state of a checkpoint as a state_dict that numbers the parameters as the trainer does: those that decay,
    then the rest."""
    saved = read_part(folder, "optimizer")
    matrices = [name for name, p in model.named_parameters() if p.dim() >= 2]
    vectors = [name for name, p in model.named_parameters() if p.dim() < 2]
    state: dict[int, dict[str, Tensor]] = {}
    for i, name in enumerate([*matrices, *vectors]):
        moments = {k: saved[f"{name}:{k}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{k}" in saved}
        if moments:
            state[i] = moments
    c = read_state(folder)["config"]
    shared = {"lr": c["learning_rate"], "betas": (c["beta1"], c["beta2"]), "eps": 1e-8, "amsgrad": False, "maximize": False,
              "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True}
    groups = [
        shared | {"weight_decay": c["weight_decay"], "params": list(range(len(matrices)))},
        shared | {"weight_decay": 0.0, "params": list(range(len(matrices), len(matrices) + len(vectors)))},
    ]
    return {"state": state, "param_groups": groups}


def read_weights(source: str) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The shape and the weights of a published size, a Hugging Face folder, a nanoGPT checkpoint, or one of ours."""
    path = Path(source)
    if (path / nanogpt.FILE).is_file():
        found = nanogpt.read(path)
        return found.config, found.weights
    theirs = path / "config.json"
    if source in SIZES or (theirs.is_file() and "model_type" in json.loads(theirs.read_text())):
        from gpt import huggingface

        return huggingface.read(source)
    if not path.is_dir():
        raise ValueError(f"{source!r} is no folder and no published size ({', '.join(SIZES)})")
    with reading(path) as folder:
        verify(folder)
        return read_config(folder), read_part(folder, "model")


def from_pretrained(source: str, kernels: Kernels | None = None) -> GPT:
    """The model of anything `read_weights` reads, on the CPU, in eval mode."""
    config, weights = read_weights(source)
    model = GPT(config, kernels)
    fill(model, weights)
    return model.eval()


def load_model(path: str | Path, device: torch.device | str = "cpu", kernels: Kernels | None = None) -> GPT:
    """The model of a checkpoint folder, or of the newest one in a run's folder, checked by its checksums, in eval mode."""
    with reading(path) as folder:
        verify(folder)
        with torch.device("meta"):
            model = GPT(read_config(folder), kernels)
        model.to_empty(device=device)
        model.tie()
        fill(model, read_part(folder, "model", device))
    return model.eval()
