"""Read and write nanoGPT's ckpt.pt: model, optimizer, model_args, iter_num, best_val_loss, config.

Its parameters have our names, and its optimizer numbers them in one of two `layouts`.
docs/stitching.md lists the versions of the file since December 2022, and what Stitch-LLMs added.
The file may be anyone's: no code in it is run, and its values are checked before they are used.
"""

import math
import pickle
import struct
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import regular_file
from gpt.config import GPTConfig, make_config
from gpt.tensors import (
    EMBEDDING,
    HEAD,
    POSITIONS,
    about,
    checked_weights,
    config_fields,
    decay_groups,
    finite,
    is_embedding,
    shown,
)

FILE = "ckpt.pt"
NEEDS = {"architecture": "gpt2", "tie_weights": True}  # what its models are, in GPTConfig's fields
REMEDY = "give the ckpt.pt of nanoGPT's train.py, or its folder"
MODEL_ARGS: dict[str, type] = {
    "n_layer": int, "n_head": int, "n_embd": int, "block_size": int, "bias": bool,
    "vocab_size": int, "dropout": float,
}
STITCH_ARGS: dict[str, type] = {  # what Stitch-LLMs added
    "backward": bool, "stitching": bool, "stitching_layer": int, "use_original_head": bool,
    "use_original_wpe_wte": bool,
}
SEAM = {f"seam.{part}": f"transformer.stitching.stitching.{part}" for part in ("weight", "bias")}
ADAM = {"step", "exp_avg", "exp_avg_sq"}
MOMENTS = {"adamw": ADAM, "adam": ADAM, "sgd": {"momentum_buffer"}}
FIXED = {"amsgrad": False, "maximize": False, "nesterov": False, "dampening": 0, "eps": 1e-8}
MOST_STEPS = 2**31


@dataclass
class NanoGPT:
    """A ckpt.pt: its checked model, and its raw content, which `progress` and `moments` check."""

    config: GPTConfig
    weights: dict[str, Tensor]
    guessed: tuple[str, ...]
    """fields of config that the file does not tell, so a guess"""
    content: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The training's settings, unchecked; {} in files from before January 2023."""
        found = self.content.get("config")
        return found if isinstance(found, dict) else {}


def read(path: str | Path) -> NanoGPT:
    """Read the checkpoint at `path`, a file or its folder. Raises ValueError for anything else."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    content = _load(regular_file(file, REMEDY))
    with about(file, REMEDY):
        return _parsed(content)


def _load(file: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle's versions
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError,
            ValueError, AttributeError, AssertionError, struct.error) as error:  # damaged files
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: not a nanoGPT checkpoint that can be read safely ({why:.200}); "
                         f"{REMEDY}") from None
    for name in ("model", "model_args", "iter_num"):
        if not isinstance(content, dict) or name not in content:
            raise ValueError(f"{file}: not a nanoGPT checkpoint, it has no {name!r}; {REMEDY}")
    return content


def _parsed(content: dict[str, Any]) -> NanoGPT:
    args, weights = _arguments(content["model_args"]), _named(content["model"])
    shape = config_fields(weights)
    for name, value in shape.items():
        if args.get(name, value) != value:
            raise ValueError(f"model_args says {name}={args[name]}, its weights {value}")
    head = weights.get(HEAD)
    tied = head is None or is_embedding(head, weights[EMBEDDING])
    if tied:  # nanoGPT's own were not until 14 January 2023
        weights.pop(HEAD, None)
    seam = args.get("stitching_layer", 0) if args.get("stitching") else -1
    if not -1 <= seam < shape["n_layer"]:
        raise ValueError(f"stitching_layer={seam}: the model has {shape['n_layer']} layers")
    config = make_config(
        **shape, n_head=args["n_head"], dropout=args.get("dropout", 0.0), tie_weights=tied,
        seam=seam, direction="backward" if args.get("backward") else "forward",
    )
    weights = checked_weights(config, weights)
    # Its GELU was the tanh form until June 2023. A file from before May 2023 shows that by its
    # optimizer's layout, one from before 27 January 2023 by having no `bias`, and one of
    # Stitch-LLMs, which kept that GELU, by its arguments.
    older = by_module(content.get("optimizer"), weights) or "bias" not in args
    if older or args.keys() & STITCH_ARGS.keys():
        return NanoGPT(replace(config, activation="gelu_tanh"), weights, (), content)
    return NanoGPT(config, weights, ("activation",), content)


def _arguments(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"model_args is {shown(found)}; a dict is needed")
    known = MODEL_ARGS | STITCH_ARGS
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"model_args has {shown(name)}, which nanoGPT's models do not")
        kinds = (int, float) if known[name] is float else (known[name],)
        if type(value) not in kinds:
            needed = known[name].__name__
            raise ValueError(f"model_args: {name}={shown(value)}, and {needed} is needed")
    if "n_head" not in found:
        raise ValueError("model_args has no 'n_head'")
    return found


def _named(found: Any) -> dict[str, Any]:
    """The tensors under our names."""
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError("'model' is no dict of tensors by name")
    ours = {theirs: name for name, theirs in SEAM.items()}
    plain = {key: key.removeprefix("_orig_mod.") for key in found}  # torch.compile's prefix
    weights = {ours.get(name, name): found[key] for key, name in plain.items()}
    if len(weights) < len(found):
        raise ValueError("'model' has a tensor twice, with and without the prefix _orig_mod.")
    masks = ".attn.bias"  # the causal mask, saved where PyTorch had no attention of its own
    return {name: tensor for name, tensor in weights.items() if not name.endswith(masks)}


# -- what a run resumes ----------------------------------------------------------------


def progress(content: Mapping[str, Any]) -> tuple[int, float]:
    """The step and the best validation loss. Raises ValueError if they are not usable."""
    step, loss = content["iter_num"], content.get("best_val_loss", math.inf)
    if type(step) is not int or not 0 <= step < MOST_STEPS:
        raise ValueError(f"iter_num={shown(step)}: a step below {MOST_STEPS:,} is needed")
    if isinstance(loss, Tensor):  # nanoGPT saves the mean as a tensor
        loss = finite(loss, torch.Size(()), "best_val_loss").item()
    if type(loss) not in (int, float) or not (abs(loss) < 1e300 or loss == math.inf):
        raise ValueError(f"best_val_loss={shown(loss)}: a number is needed")
    return step, float(loss)


def layouts(names: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """How nanoGPT's optimizers number the parameters: for each layout two groups of names.

    "dimension", since May 2023: the `decay_groups`, in the model's order. "module", before that and
    in Stitch-LLMs: the weights of linear layers, then the rest with the embeddings, each sorted.
    The groups' sizes differ by the two embeddings, which tells the layouts apart.

    `names`: in the model's order, each with its shape or its tensor.
    """
    matrices, others = decay_groups(names)
    linear = [name for name in matrices if name not in (EMBEDDING, POSITIONS)]
    return {
        "dimension": [matrices, others],
        "module": [sorted(group, key=lambda name: SEAM.get(name, name))
                   for group in (linear, names.keys() - {*linear})],
    }


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups of an optimizer's state_dict, each with a list "params"; [] if it is not one."""
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not isinstance(groups, list) or not isinstance(optimizer.get("state"), dict):
        return []
    valid = all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    return groups if valid else []


def by_module(optimizer: Any, names: Mapping[str, Any]) -> bool:
    """Whether a state_dict has the layout "module", in which embeddings do not decay."""
    sizes = [len(group["params"]) for group in _groups(optimizer)]
    return sizes == [len(group) for group in layouts(names)["module"]]


def _numbered(groups: list[dict[str, Any]], shapes: Mapping[str, torch.Size],
              kind: str) -> list[str]:
    """The parameters' names by number. Raises ValueError for unknown groups or other options."""
    sizes, known = [len(g["params"]) for g in groups], layouts(shapes).values()
    layout = next((names for names in known if [len(group) for group in names] == sizes), None)
    if layout is None:
        wanted = " or ".join(f"{len(first)} and {len(rest)}" for first, rest in known)
        found = " and ".join(map(str, sizes)) or "no"
        raise ValueError(f"its optimizer's groups are of {found} parameters; {wanted} are known")
    names = [name for group in layout for name in group]
    numbers = [i for g in groups for i in g["params"]]
    if not all(type(i) is int for i in numbers) or numbers != list(range(len(names))):
        raise ValueError("its optimizer's parameters are not numbered in order")
    fixed = FIXED | {"decoupled_weight_decay": kind == "adamw"}
    no_decay = fixed | {"weight_decay": 0}
    expected = no_decay if kind == "adam" else fixed, no_decay
    for group, options in zip(groups, expected, strict=True):
        for key, value in options.items():
            found = group.get(key, value)
            if not isinstance(found, int | float) or found != value:
                raise ValueError(f"its optimizer has {key}={shown(found)} where --optimizer={kind} "
                                 f"has {value}")
    return names


def moments(optimizer: Any, shapes: Mapping[str, torch.Size], trained: Collection[str],
            kind: str) -> dict[str, dict[str, Tensor]]:
    """The state of each trained parameter in an optimizer's state_dict: by name, copied, in fp32.

    `shapes`: those of all parameters, in the model's order. `kind`: the optimizer that takes over:
    adamw, adam or sgd. Raises ValueError for a state of another model or optimizer, or a damaged
    one.
    """
    if kind not in MOMENTS:
        raise ValueError(f"its optimizer's state is AdamW's, which --optimizer={kind} cannot take "
                         "over")
    names = _numbered(_groups(optimizer), shapes, kind)
    state = {names[i] if type(i) is int and 0 <= i < len(names) else shown(i): found
             for i, found in optimizer["state"].items()}
    if wrong := sorted(state.keys() ^ set(trained)):
        has = "no moments" if wrong[0] in trained else "moments"
        raise ValueError(f"its optimizer has {has} of {wrong[0]} ({len(wrong)} such parameters)")
    moments = {name: _moments_of(name, state[name], shapes[name], kind) for name in trained}
    steps = {found["step"].item() for found in moments.values() if "step" in found}
    if len(steps) > 1:
        raise ValueError(f"its optimizer is at step {min(steps):g} and at step {max(steps):g}")
    return moments


def _moments_of(name: str, found: Any, shape: torch.Size, kind: str) -> dict[str, Tensor]:
    needed, keys = MOMENTS[kind], found.keys() if isinstance(found, dict) else set()
    if keys != needed:
        has = " and ".join(sorted(map(shown, keys))) or "nothing"
        raise ValueError(f"its optimizer has {has} of {name}; --optimizer={kind} needs "
                         f"{' and '.join(sorted(map(shown, needed)))}")
    taken = {}
    for key, value in found.items():
        if key == "step" and type(value) in (int, float) and abs(value) < MOST_STEPS:
            value = torch.tensor(float(value))
        where = f"its optimizer's {key} of {name}"
        tensor = finite(value, torch.Size(()) if key == "step" else shape, where)
        if key != "exp_avg" and key != "momentum_buffer" and (tensor < 0).any():
            raise ValueError(f"{where} is negative")
        taken[key] = tensor.clone(memory_format=torch.contiguous_format)
    return taken


# -- out -----------------------------------------------------------------------------


def adamw_state(saved: Mapping[str, Tensor], names: Mapping[str, Any],
                settings: Mapping[str, Any]) -> dict[str, Any]:
    """An AdamW state_dict in the layout "dimension", from a checkpoint's moments, NAME:KEY.

    `names`: as for `layouts`. `settings`: the run's. A parameter without moments gets no state.
    """
    matrices, others = decay_groups(names)
    state = {}
    for i, name in enumerate([*matrices, *others]):
        found = {key: saved[f"{name}:{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                 if f"{name}:{key}" in saved}
        if found:
            state[i] = found
    shared = {"lr": settings["learning_rate"], "betas": (settings["beta1"], settings["beta2"]),
              "eps": 1e-8, "amsgrad": False, "maximize": False, "foreach": None,
              "capturable": False, "differentiable": False, "fused": None,
              "decoupled_weight_decay": True}
    numbers = [*range(len(names))]
    decayed, plain = numbers[: len(matrices)], numbers[len(matrices) :]
    groups = [shared | {"weight_decay": settings["weight_decay"], "params": decayed},
              shared | {"weight_decay": 0.0, "params": plain}]
    return {"state": state, "param_groups": groups}


def write(path: str | Path, config: GPTConfig, weights: dict[str, Tensor],
          optimizer: dict[str, Any], step: int, best_val_loss: float,
          settings: dict[str, Any]) -> None:
    """Write a ckpt.pt that nanoGPT's train.py resumes and its sample.py reads."""
    if config.activation != "gelu":
        raise ValueError(f"nanoGPT knows only the exact GELU, this model has {config.activation}; "
                         "export it with --to=hf")
    torch.save({
        "model": weights | {HEAD: weights[EMBEDDING]}, "optimizer": optimizer,
        "model_args": {k: getattr(config, k) for k in MODEL_ARGS},
        "iter_num": step, "best_val_loss": best_val_loss, "config": settings,
    }, path)
