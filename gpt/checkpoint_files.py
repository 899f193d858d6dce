"""The files of one checkpoint: reading them, and checking that they are what was written.

model.safetensors and optimizer.safetensors, or under FSDP the folders model/ and optimizer/ with a
shard from each rank; rng.safetensors, model.json (the GPTConfig), tokenizer.json, state.json, and
DONE, written last: {file: {"bytes", "sha256"}}. train/checkpoint.py writes them.
"""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.bounds import NonNegative, Positive
from common.files import read_json, regular_file, sha256_of
from data.tokenizer import check_meta
from gpt.config import GPTConfig, StitchedConfig, make_config, resolved
from gpt.tensors import about

DONE = "DONE"
_REMEDY = "take another checkpoint, or an undamaged copy of this one"


class Entry(TypedDict):
    """What DONE says of a file."""

    bytes: int
    sha256: str


class State(TypedDict):
    """state.json: what the trainer needs to resume, beside the tensors."""

    step: NonNegative
    val_loss: float | None
    best_val_loss: float
    position: NonNegative
    config: dict[str, str | float | bool]
    kernels: dict[str, Any]
    world_size: Positive
    scaler: dict[str, Any]
    torch: str
    compiled: NotRequired[bool]


_Fields = TypedDict(  # type: ignore[misc]
    "_Fields", get_type_hints(StitchedConfig, include_extras=True), total=False)


# -- is it sound? ----------------------------------------------------------------------


def entry(file: Path) -> Entry:
    """The entry of a file in DONE."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def verify(folder: Path) -> None:
    """Raise ValueError, naming the file, if one is missing or not what was written."""
    entries = read_json(folder / DONE, dict[str, Entry], _REMEDY)
    for name, written in entries.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder / DONE}: {name!r} is outside of the folder; {_REMEDY}")
        size = regular_file(file, _REMEDY).stat().st_size
        if size != written["bytes"]:
            raise ValueError(f"{file}: {size} bytes, was written with {written['bytes']}; "
                             f"{_REMEDY}")
        if entry(file) != written:
            raise ValueError(f"{file}: damaged, its sha256 is not the one it was written with; "
                             f"{_REMEDY}")
    weights = [f.relative_to(folder).as_posix() for f in tensor_files(folder, "model")]
    for name in ("model.json", "tokenizer.json", *(weights or ["model.safetensors"])):
        if name not in entries:
            raise ValueError(f"{folder / DONE}: does not list {name}; {_REMEDY}")


def check_sound(folder: Path) -> None:
    """Raise ValueError if a file is damaged, or the loss, a weight or a moment is not finite."""
    verify(folder)
    loss = read_state(folder)["val_loss"]
    if loss is not None and not math.isfinite(loss):
        raise ValueError(f"{folder}: its validation loss is {loss}")
    for part in ("model", "optimizer"):
        for file in tensor_files(folder, part):
            with opened(file) as tensors:
                for name in tensors.keys():
                    if not tensors.get_tensor(name).isfinite().all():
                        raise ValueError(f"{file}: {name} is not finite")


# -- JSON ------------------------------------------------------------------------------


def read_state(folder: Path) -> State:
    """Read state.json."""
    return read_json(folder / "state.json", State, _REMEDY)


def read_config(folder: Path) -> GPTConfig:
    """The config in model.json. Raises ValueError if it is not one, or of a newer version."""
    file, remedy = folder / "model.json", "it must have the fields of gpt/config.py"
    fields = read_json(file, _Fields, remedy)
    with about(file, remedy):
        return resolved(make_config(**fields))


def config_json(config: GPTConfig) -> str:
    """What model.json holds."""
    return json.dumps(asdict(config), indent=1)


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The tokenizer's meta, from which data.tokenizer.load_tokenizer makes it."""
    file = folder / "tokenizer.json"
    return check_meta(read_json(file, dict[str, Any], "it must be as a meta.json"), str(file))


# -- tensors ---------------------------------------------------------------------------


def tensor_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of a part ("model", "optimizer", "rng"): one, or one for each shard."""
    return sorted([*folder.glob(f"{part}.safetensors"), *folder.glob(f"{part}/*.safetensors")])


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """An open safetensors file. Raises ValueError for any other file."""
    try:
        with safe_open(regular_file(file, _REMEDY), "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}; {_REMEDY}") from None


def saved_shapes(folder: Path, part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's tensors by name; of shards, those of the full tensors."""
    files = tensor_files(folder, part)
    if files and files[0].parent != folder:
        return {name: tuple(t.size) for name, t in _sharded(folder / part).items()}
    with ExitStack() as stack:
        found = [stack.enter_context(opened(file)) for file in files]
        return {name: tuple(t.get_slice(name).get_shape()) for t in found for name in t.keys()}


def read_part(folder: Path, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a part, "model" or "optimizer"; shards are put together."""
    if (folder / f"{part}.safetensors").is_file():
        return load_file(folder / f"{part}.safetensors", device=str(device))
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype, device=device)
               for name, t in _sharded(folder / part).items()}
    read_into(folder, part, tensors)
    return tensors


def read_into(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Fill some or all of a part's tensors in place; of a DTensor only this rank's shard."""
    from torch.distributed import checkpoint as dcp  # a second to import

    place = folder / part if (folder / part).is_dir() else folder
    reader = dcp.HuggingFaceStorageReader(str(place))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no_dist is meant
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def _sharded(folder: Path) -> dict[str, Any]:
    """The metadata of tensors that were saved in shards, by name."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of any other new file; `save_file` makes it 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)
