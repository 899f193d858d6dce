"""Files that are written whole or not at all; text and JSON that are as they should be."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from common.bounds import check_declared

T = TypeVar("T")


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write and seek in, which takes the place of `path` when the block ends
    without an error.

    Written beside it as NAME.tmp, synced, renamed: whoever opens `path` finds the old file or the
    new one, no part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # left by a kill; or a link, which would be written through
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there is none but after an error
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has the file, or of a folder the names in it: what a power cut would
    take."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written whole."""
    with whole(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path, form: type[T], remedy: str) -> T:
    """The value in the JSON file `path`, of the type `form`: TypedDicts, lists, numbers, checked
    down to the leaves, with the rules declared there (common/bounds.py).

    Raises ValueError, in one line with the file and the `remedy`, where it is absent, no regular
    file (a FIFO would wait for ever), not JSON, or of another form. Every JSON file that others may
    have written or damaged is read here.
    """
    return parsed(regular(path, remedy).read_bytes(), form, str(path), remedy)


def parsed(text: bytes | str, form: type[T], name: str, remedy: str) -> T:
    """The JSON value `text`, likewise; `name` says where it comes from."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error}); {remedy}") from None
    return formed(value, form, name, remedy)


def formed(value: Any, form: type[T], name: str, remedy: str) -> T:
    """`value` itself, which must be of the type `form`. Raises ValueError where it is not."""
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

    try:
        every = CollectionCheckStrategy.ALL_ITEMS
        value = check_type(value, form, collection_check_strategy=every)
        check_declared(value, form, "")
    except (TypeCheckError, ValueError) as error:  # typeguard's takes several lines for a union
        raise ValueError(f"{name}: {' '.join(str(error).split())}; {remedy}") from None
    return value


def read_text(path: Path, remedy: str = "name a text file") -> str:
    """The text of a UTF-8 file, its line ends as they are. Raises ValueError where it is none."""
    try:
        return regular(path, remedy).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start:,}; convert it, e.g. with "
                         "iconv -t utf-8") from None


def regular(path: Path, remedy: str) -> Path:
    """`path` itself. Raises ValueError where there is no file, or one that is no regular file."""
    if not path.is_file():
        raise ValueError(f"{path}: {'no regular file' if path.exists() else 'no such file'}; "
                         f"{remedy}")
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; memory bounded."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
