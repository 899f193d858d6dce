"""A run's folder: which of its checkpoints is the newest, the best, sound; locks; removal.

A checkpoint is a folder `step-NNNNNNNN` with the files of gpt/checkpoint_files.py. It is complete
once DONE is there; one without was cut short and does not count. Folders with other names are not
ours and are left alone. A step that is saved again is `step-NNNNNNNN.again` until the older folder
is removed.
"""

import fcntl
import itertools
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gpt.checkpoint_files import DONE, check_sound, read_state

AGAIN, TEMPORARY, LOCK = ".again", ".unfinished-", ".lock"
_NAME = re.compile(rf"step-(\d{{8,}})({re.escape(AGAIN)})?")


# -- which -----------------------------------------------------------------------------


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def step_folders(out_dir: Path) -> list[Path]:
    """The folders of a run that have a checkpoint's name, complete or not, oldest first."""
    found = [f for f in out_dir.glob("step-*") if _NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(found, key=lambda f: (step_of(f), f.name))


def complete_checkpoints(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [f for f in step_folders(out_dir) if (f / DONE).is_file()]


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest in a run's folder.

    Raises ValueError if there is none.
    """
    path = Path(path)
    if (path / DONE).is_file():
        return path
    found = complete_checkpoints(path)
    if not found:
        what = "has no complete checkpoint" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; train one with "
                         f"`python train/run.py CONFIG --out_dir={path}`")
    return found[-1]


def newest_sound(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint at `path`, or a run's newest sound one, and what is wrong with newer ones.

    Raises ValueError, with the newest one's fault, if none is sound.
    """
    newest, faults = find_checkpoint(path), list[str]()
    for folder in [newest] if newest == path else complete_checkpoints(path)[::-1]:
        try:
            check_sound(folder)
        except ValueError as error:
            faults.append(str(error))
        else:
            return folder, faults
    others = f"; none of the {len(faults)} checkpoints there is sound" if len(faults) > 1 else ""
    raise ValueError(faults[0] + others)


def worth_keeping(folders: list[Path], last: int) -> set[Path]:
    """The newest `last` checkpoints, and the one with the lowest validation loss.

    Those whose loss is not finite or whose state cannot be read are not counted.
    """
    losses = {folder: _val_loss(folder) for folder in folders}
    usable = [f for f, loss in losses.items() if loss is None or math.isfinite(loss)]
    evaluated = {f: loss for f, loss in losses.items() if loss is not None and math.isfinite(loss)}
    best = sorted(evaluated, key=evaluated.__getitem__)[:1]
    return {*usable[-last:], *best}


def _val_loss(folder: Path) -> float | None:
    """None if the checkpoint was saved without one; NaN if its state cannot be read."""
    try:
        return read_state(folder)["val_loss"]
    except ValueError:
        return math.nan


# -- locks and removal -----------------------------------------------------------------


@contextmanager
def lock(out_dir: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder. Raises ValueError if one is at work in it.

    The lock (flock) ends with the process, however that ends. A folder that was made for the lock
    is removed again if nothing else was written to it.
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
            raise ValueError(f"another run in {out_dir} ended just now; give the same command "
                             "again")
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
    """`find_checkpoint(path)`; no run removes that checkpoint before the block ends."""
    while (done := _hold(folder := find_checkpoint(path))) is None:
        pass  # it was removed since it was found, so there is a newer one
    with done:
        yield folder


def _hold(folder: Path) -> BinaryIO | None:
    """The checkpoint's DONE, open and locked against `remove`; None if the folder is gone."""
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
    """Remove a checkpoint; return False, without removing it, while somebody reads it."""
    with (folder / DONE).open("rb") as done:
        try:
            fcntl.flock(done, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Renamed first, so that a partly removed one never counts as complete.
        discard(folder.rename(folder.with_name(f"{TEMPORARY}{folder.name}")))
    return True


def discard(folder: Path) -> None:
    """Remove a folder; if it is a symbolic link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def free_name(path: Path) -> Path:
    """The first of PATH-1, PATH-2, ... that does not exist."""
    names = (path.with_name(f"{path.name}-{n}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())
