"""Reading trained models: our checkpoint folders.

A checkpoint is a folder `step-NNNNNNNN` in a run's out_dir: model.safetensors, or the folder model/ with the shards of a run
under FSDP; model.json (the GPTConfig), tokenizer.json, what the trainer needs to go on, and DONE, written last: {file:
{"bytes", "sha256"}}. A folder without DONE was cut short and does not count.
"""

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gpt import nanogpt
from gpt.config import SIZES, GPTConfig
from gpt.model import GPT
from kernels import Kernels


def whole_checkpoints(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(done.parent for done in out_dir.glob("step-*/DONE"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder at `path`: itself, or the newest in a run's folder. Raises ValueError if there is none."""
    path = Path(path)
    if (path / "DONE").is_file():
        return path
    found = whole_checkpoints(path)
    if not found:
        what = "has no whole checkpoint" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; train one with `python train/run.py CONFIG --out_dir={path}`")
    return found[-1]


def entry(file: Path) -> dict[str, Any]:
    """What DONE says of a file."""
    with file.open("rb") as f:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def verify(folder: Path) -> None:
    """Raise ValueError, naming the file, if one is missing or not what was written."""
    for name, written in json.loads((folder / "DONE").read_text()).items():
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size != written["bytes"]:
            raise ValueError(f"{file}: {'missing' if size is None else f'{size} bytes'}, was written with {written['bytes']}")
        if entry(file) != written:
            raise ValueError(f"{file}: damaged, its sha256 is not the one it was written with")


def read_part(folder: Path, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a part of a checkpoint, "model" or "optimizer", whole."""
    if (folder / f"{part}.safetensors").is_file():
        return load_file(folder / f"{part}.safetensors", device=str(device))
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    saved: Any = HuggingFaceStorageReader(str(folder / part)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype, device=device) for name, t in saved.items()}
    read_into(folder, part, tensors)
    return tensors


def tensor_names(folder: Path, part: str) -> list[str]:
    """The names of a part's tensors, in order."""
    names: set[str] = set()
    for file in [*folder.glob(f"{part}.safetensors"), *folder.glob(f"{part}/*.safetensors")]:
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return sorted(names)


def read_into(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, all or some of a part's, in place. Of a DTensor only this rank's shard is read."""
    from torch.distributed import checkpoint as dcp  # a second to import

    reader = dcp.HuggingFaceStorageReader(str(folder / part if (folder / part).is_dir() else folder))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no_dist is one process: it is each by itself
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def read_config(folder: Path) -> GPTConfig:
    return GPTConfig(**json.loads((folder / "model.json").read_text()))


def read_tokenizer(folder: Path) -> dict:
    """What data.tokenizer.load_tokenizer makes the model's tokenizer from."""
    return json.loads((folder / "tokenizer.json").read_text())


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
    c = json.loads((folder / "state.json").read_text())["config"]
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
    folder = find_checkpoint(path)
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
    folder = find_checkpoint(path)
    verify(folder)
    with torch.device("meta"):
        model = GPT(read_config(folder), kernels)
    model.to_empty(device=device)
    model.tie()
    fill(model, read_part(folder, "model", device))
    return model.eval()
