"""A run's folder: what in it is a checkpoint, and which is the newest, the best, whole, sound.

A checkpoint is a folder `step-NNNNNNNN` in a run's out_dir: model.safetensors, or the folder
model/ with the shards of a run under FSDP; model.json (the GPTConfig), tokenizer.json, what the
trainer needs to go on, and DONE, written last: {file: {"bytes", "sha256"}}. A folder without DONE
was cut short and does not count; one with any other name is not ours, and is left alone. Saved
anew, a step is `step-NNNNNNNN.again` until the older folder has made room for it.
"""

import fcntl
import hashlib
import itertools
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict

from safetensors import SafetensorError, safe_open

from common.bounds import NonNegative, Positive
from common.files import read_json, regular_file

DONE, AGAIN, TEMPORARY, LOCK = "DONE", ".again", ".unfinished-", ".lock"
_NAME = re.compile(rf"step-(\d{{8,}})({re.escape(AGAIN)})?")
_REMEDY = "take another checkpoint, or a copy of this one that is whole"


class Entry(TypedDict):
    """What DONE says of a file."""

    bytes: int
    sha256: str


class State(TypedDict):
    """state.json: what the trainer needs to go on, beside the tensors."""

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


# -- which -----------------------------------------------------------------------------


def step_of(folder: Path) -> int:
    """The step of a checkpoint by its folder's name, which is one of ours."""
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def step_folders(out_dir: Path) -> list[Path]:
    """The folders of a run that have a checkpoint's name, oldest first, whole or not."""
    found = [f for f in out_dir.glob("step-*") if _NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(found, key=lambda f: (step_of(f), f.name))


def whole_checkpoints(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [f for f in step_folders(out_dir) if (f / DONE).is_file()]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest in a run's folder.

    Raises ValueError if there is none.
    """
    path = Path(path)
    if (path / DONE).is_file():
        return path
    found = whole_checkpoints(path)
    if not found:
        what = "has no whole checkpoint" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; train one with "
                         f"`python train/run.py CONFIG --out_dir={path}`")
    return found[-1]


def newest_sound(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint at `path`, or the newest sound one in a run's folder; the newer ones' faults.

    Raises ValueError, with the newest one's fault, if none is sound.
    """
    newest, faults = find_checkpoint(path), list[str]()
    for folder in [newest] if newest == path else whole_checkpoints(path)[::-1]:
        try:
            check_sound(folder)
        except ValueError as error:
            faults.append(str(error))
        else:
            return folder, faults
    others = f"; none of the {len(faults)} checkpoints there is sound" if len(faults) > 1 else ""
    raise ValueError(faults[0] + others)


def worth_keeping(folders: list[Path], last: int) -> set[Path]:
    """The `last` of them, and the one with the lowest validation loss.

    One whose loss is no finite number, or whose state cannot be read, takes nobody's place.
    """
    losses = {folder: _val_loss(folder) for folder in folders}
    usable = [f for f, loss in losses.items() if loss is None or math.isfinite(loss)]
    evaluated = {f: loss for f, loss in losses.items() if loss is not None and math.isfinite(loss)}
    best = sorted(evaluated, key=evaluated.__getitem__)[:1]
    return {*usable[-last:], *best}


def _val_loss(folder: Path) -> float | None:
    """None where the checkpoint was saved without; NaN where its state cannot be read."""
    try:
        return read_state(folder)["val_loss"]
    except ValueError:
        return math.nan


# -- whole, and sound ------------------------------------------------------------------


def entry(file: Path) -> Entry:
    """What DONE is to say of a file."""
    with file.open("rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": sha256}


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
    """Raise ValueError where no run must go on from here: it is damaged, or its loss, a weight or a
    moment is no finite number."""
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


def tensor_files(folder: Path, part: str) -> list[Path]:
    """The safetensors of a part ("model", "optimizer", "rng"): one, or a rank's shard each."""
    return sorted([*folder.glob(f"{part}.safetensors"), *folder.glob(f"{part}/*.safetensors")])


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file. Raises ValueError for what is none."""
    try:
        with safe_open(regular_file(file, _REMEDY), "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}; {_REMEDY}") from None


def read_state(folder: Path) -> State:
    return read_json(folder / "state.json", State, _REMEDY)


# -- beside others that read or write --------------------------------------------------


@contextmanager
def lock(out_dir: Path) -> Iterator[None]:
    """Hold a run's folder against other runs. Raises ValueError where one is at work in it.

    The kernel's lock (flock) ends with the process, however that ends. A folder that was made for
    the lock is removed again if nothing else was written to it.
    """
    is_new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ValueError(f"another run is at work in {out_dir} ({file.read().strip()}); wait "
                             "for it, or give this one another --out_dir") from error
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(out_dir / LOCK)):
            raise ValueError(f"another run in {out_dir} ended just now; give the same command again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if is_new and os.listdir(out_dir) == [LOCK]:
                (out_dir / LOCK).unlink()
                out_dir.rmdir()


@contextmanager
def reading(path: str | Path) -> Iterator[Path]:
    """`find_checkpoint(path)`, which no run that saves meanwhile removes until the block ends."""
    while (done := _hold(folder := find_checkpoint(path))) is None:
        pass  # removed since it was found, so there is a newer one
    with done:
        yield folder


def _hold(folder: Path) -> BinaryIO | None:
    """The checkpoint's DONE, locked against `remove` until closed; None if the folder is gone."""
    try:
        done = (folder / DONE).open("rb")
        with suppress(OSError):  # a file system without locks: read all the same
            fcntl.flock(done, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(done.fileno()), os.stat(folder / DONE)):
            return done
        done.close()
    except FileNotFoundError:
        pass
    return None


def remove(folder: Path) -> bool:
    """Remove a checkpoint that nobody reads; False, and it stays, where somebody does."""
    with (folder / DONE).open("rb") as done:
        try:
            fcntl.flock(done, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Renamed first, so that half of it is never taken for whole.
        discard(folder.rename(folder.with_name(f"{TEMPORARY}{folder.name}")))
    return True


def discard(folder: Path) -> None:
    """Remove a folder; of a link to one the link alone."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def free_name(path: Path) -> Path:
    """PATH-1, or the first PATH-N that is not there yet."""
    names = (path.with_name(f"{path.name}-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())
