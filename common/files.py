"""Files: written atomically, and read with a one-line error for what is wrong with them.

A file that others may have written or damaged is opened with `regular_file`, `read_text` or
`read_json`, which checks the value against a type.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from common.bounds import check_declared

T = TypeVar("T")


def cache_folder() -> Path:
    """The folder for what can be computed again: RidgeGPT's in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ridgegpt"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` if the `with` block ends without an error.

    It is written as NAME.tmp in the same folder, synced to disk, then renamed. So a reader of
    `path` finds the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # left by a killed run, or a link to another file
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only after an error
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the file's content, or the folder's list of names, is safe on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path, form: type[T], remedy: str) -> T:
    """Read the JSON file `path`, whose value must be of the type `form` (`check_json`).

    Raises ValueError, with a message of one line that ends in `remedy`, if the file is absent, not
    a regular file, not JSON, or of another type.
    """
    return parse_json(regular_file(path, remedy).read_bytes(), form, str(path), remedy)


def parse_json(text: bytes | str, form: type[T], name: str, remedy: str) -> T:
    """Parse the JSON `text`, as `read_json` does; errors begin with `name`, its origin."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error}); {remedy}") from None
    return check_json(value, form, name, remedy)


def check_json(value: Any, form: type[T], name: str, remedy: str) -> T:
    """Return `value` if it is of the type `form`, in every item, and keeps its bounds.

    `form` is made of TypedDicts, lists, dicts, numbers and texts, with rules of common/bounds.py.
    Raises ValueError, `name: what is wrong; remedy`.
    """
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

    try:
        every = CollectionCheckStrategy.ALL_ITEMS
        value = check_type(value, form, collection_check_strategy=every)
        check_declared(value, form, "")
    except (TypeCheckError, ValueError) as error:  # for a union the message has several lines
        raise ValueError(f"{name}: {' '.join(str(error).split())}; {remedy}") from None
    return value


def read_text(path: Path, remedy: str = "name a text file") -> str:
    """The text of a UTF-8 file, with its line ends unchanged. Raises ValueError for other bytes."""
    try:
        return regular_file(path, remedy).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start:,}; convert it, e.g. with "
                         "iconv -t utf-8") from None


def regular_file(path: Path, remedy: str) -> Path:
    """Return `path` if it is a regular file, or a link to one. Raises ValueError otherwise.

    Opening a FIFO would wait forever, and reading /dev/zero would never end.
    """
    if not path.is_file():
        problem = "no regular file" if path.exists() else "no such file"
        raise ValueError(f"{path}: {problem}; {remedy}")
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Reads it in small blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
