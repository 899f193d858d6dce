"""nanoGPT's ckpt.pt, in and out: {model, optimizer, model_args, iter_num, best_val_loss, config}.

Its parameters have our names, and its optimizer numbers them in our order: first all that decay, then the rest.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.config import GPTConfig

FILE = "ckpt.pt"
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


@dataclass
class NanoGPT:
    """What a ckpt.pt holds; `optimizer` is the state_dict of its AdamW."""

    config: GPTConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    best_val_loss: float


def read(path: str | Path) -> NanoGPT:
    """The checkpoint at `path`, the file or its folder. No code in it is run. Raises ValueError for what is not one."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: not a nanoGPT checkpoint that can be read safely ({str(error).splitlines()[0]})") from error
    missing = {"model", "model_args", "iter_num"} - loaded.keys() if isinstance(loaded, dict) else {"model"}
    if missing:
        raise ValueError(f"{file}: not a nanoGPT checkpoint, it has no {sorted(missing)[0]!r}")
    config = GPTConfig(**{k: loaded["model_args"][k] for k in MODEL_ARGS if k in loaded["model_args"]}, activation="gelu")
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in loaded["model"].items()}
    weights.pop("lm_head.weight", None)  # the same as the embedding
    return NanoGPT(
        config=config, weights={k: v for k, v in weights.items() if not k.endswith(".attn.bias")},
        optimizer=loaded.get("optimizer") or {}, step=int(loaded["iter_num"]),
        best_val_loss=float(loaded.get("best_val_loss", float("inf"))),
    )


def write(path: str | Path, config: GPTConfig, weights: dict[str, Tensor], optimizer: dict[str, Any], step: int,
          best_val_loss: float, settings: dict[str, Any]) -> None:
    """Write what nanoGPT's train.py resumes from and its sample.py reads."""
    if config.activation != "gelu":
        raise ValueError(f"nanoGPT knows only the exact GELU, this model has {config.activation}; export it with --to=hf")
    model = weights | {"lm_head.weight": weights["transformer.wte.weight"]}
    torch.save({
        "model": model, "optimizer": optimizer, "model_args": {k: getattr(config, k) for k in MODEL_ARGS},
        "iter_num": step, "best_val_loss": best_val_loss, "config": settings,
    }, path)
