"""Files that are written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write and seek in, which takes the place of `path` when the block ends without an error.

    Written beside it as NAME.tmp, synced, renamed: whoever opens `path` finds the old file or the new one, no part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there is none but after an error
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has the file, or of a folder the names in it: what a power cut would take."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written whole."""
    with whole(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The value in the JSON file `path`; a ValueError that names the file where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}); prepare the data again") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; memory bounded."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
