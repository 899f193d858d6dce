"""Checkpoints that survive what happens to machines.

A checkpoint is written into a temporary folder, flushed to disk, marked DONE with the checksum of each file, and only
then renamed to its place; older ones are removed after that. So whatever dies, and whenever, the last whole one stays.
No pickle: tensors are safetensors named after the parameters, the rest is JSON.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt import GPT, GPTConfig
from gpt.pretrained import config_json, fill, sha256, whole_checkpoints
from train import parallel
from train.parallel import World

Tensors = dict[str, dict[str, Tensor]]  # file -> name -> tensor
TEMPORARY = ".unfinished-"


def snapshot(model: GPT, optimizer: torch.optim.Optimizer, w: World) -> Tensors:
    """What a checkpoint holds, by file and name, whole and on the host; on ranks other than 0 nothing. All must call it.

    Random number generators are each rank's own: `RANK:cpu`, `RANK:cuda`.
    """
    rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
    parts = {"model": dict(model.named_parameters()), "optimizer": _moments(model, optimizer)}
    found: Tensors = {
        part: {name: t for name, value in tensors.items() if (t := _on_host(value, w)) is not None}
        for part, tensors in parts.items()
    }
    ranks = parallel.gather(rng, w)
    return found | {"rng": {f"{rank}:{kind}": t for rank, states in enumerate(ranks) for kind, t in states.items()}}


def _on_host(value: Tensor, w: World) -> Tensor | None:
    whole = parallel.whole(value.detach())
    return whole.cpu() if w.rank == 0 else None


def save(out_dir: Path, step: int, tensors: Tensors, model: GPTConfig, state: dict[str, Any], tokenizer: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` whole, or raise OSError and leave all others as they were."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    folder, place = out_dir / f"{TEMPORARY}{step}", out_dir / f"step-{step:08d}"
    try:
        folder.mkdir()
        for part, named in tensors.items():
            _write(folder / f"{part}.safetensors", lambda file, named=named: save_file(named, file))
        _write(folder / "model.json", lambda file: file.write_text(config_json(model)))
        _write(folder / "state.json", lambda file: file.write_text(json.dumps(state | {"step": step}, indent=1)))
        _write(folder / "tokenizer.json", lambda file: file.write_text(json.dumps(tokenizer)))
        written = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())}
        _write(folder / "DONE", lambda file: file.write_text(json.dumps(written, indent=1)))
        if place.exists():
            shutil.rmtree(place)
        folder.rename(place)
        _flush(out_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        kept = whole_checkpoints(out_dir)
        rest = f"the last whole one is {kept[-1]}" if kept else "there is none before it"
        raise OSError(f"checkpoint of step {step} in {out_dir} not written: {error}; {rest}") from error
    return place


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    write(file)
    _flush(file)


def _flush(path: Path) -> None:
    """Wait until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(out_dir: Path, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints but the last `keep_last`, the one with the lowest validation loss, and multiples of keep_every."""
    folders = whole_checkpoints(out_dir)
    losses = {f: read_state(f)["val_loss"] for f in folders}
    best = min((f for f in folders if losses[f] is not None), key=lambda f: losses[f], default=None)
    for folder in folders[:-keep_last]:
        step = int(folder.name.removeprefix("step-"))
        if folder != best and not (keep_every and step % keep_every == 0):
            doomed = folder.rename(out_dir / f"{TEMPORARY}{step}")  # first, so that half of it is never taken for whole
            shutil.rmtree(doomed)


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def restore(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, w: World) -> bool:
    """Put back weights, optimizer state and this rank's random number generators, exactly.

    False: the checkpoint is of another number of ranks, and the generators are left for the caller to seed.
    """
    parameters = dict(model.named_parameters())
    fill(model, {name: parallel.shard_like(t, parameters[name]) if name in parameters else t
                 for name, t in load_file(folder / "model.safetensors").items()})
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        name, _, moment = key.rpartition(":")
        saved.setdefault(name, {})[moment] = parallel.shard_like(tensor, parameters[name])
    positions = {i: name for i, name in enumerate(_names(model, optimizer)) if name in saved}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {i: saved[name] for i, name in positions.items()}})
    rng = load_file(folder / "rng.safetensors")
    if len({key.partition(":")[0] for key in rng}) != w.size:
        return False
    torch.set_rng_state(rng[f"{w.rank}:cpu"])
    if f"{w.rank}:cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng[f"{w.rank}:cuda"])
    return True


def _names(model: GPT, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the optimizer's order, which is how its state_dict numbers them."""
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _moments(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names, state = _names(model, optimizer), optimizer.state_dict()["state"]
    return {
        f"{names[i]}:{key}": value
        for i, moments in state.items() for key, value in moments.items() if isinstance(value, Tensor)
    }
