"""The source of Python's standard library, as bytes: real text on every machine, no network."""

import hashlib
import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import run
from data.manifest import already_made
from data.small import write_dataset

# Tests and demos, which repeat themselves; generated tables and topics; installed packages; and
# files that differ between builds of one version.
SKIPPED = {"test", "tests", "idlelib", "turtledemo", "encodings", "pydoc_data", "site-packages",
           "dist-packages"}
SKIPPED_BEGINNINGS = ("config-", "_sysconfigdata", "__pycache__")


def source_files(root: Path) -> list[str]:
    """The .py files to take: paths relative to `root`, sorted, with forward slashes."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED
                      and not name.startswith(SKIPPED_BEGINNINGS)]
        paths += [(Path(folder) / name).relative_to(root).as_posix() for name in files
                  if name.endswith(".py") and not name.startswith(SKIPPED_BEGINNINGS)]
    return sorted(paths)


def is_validation(path: str) -> bool:
    """Whether a file is in the validation split: one in twenty is, by the hash of its path."""
    return hashlib.sha256(path.encode()).digest()[0] % 20 == 0


def read_library() -> tuple[dict[str, list[bytes]], dict[str, Any]]:
    """The contents of the files by split, "train" and "val", and where they are from.

    Raises ValueError where this Python comes without its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[bytes]] = {"train": [], "val": []}
    digest = hashlib.sha256()
    files = source_files(root)
    for path in files:
        content = (root / path).read_bytes()
        digest.update(f"{path} {len(content)}\n".encode() + content)
        parts["val" if is_validation(path) else "train"].append(content)
    if not all(parts.values()):
        raise ValueError(f"{root}: only {len(files)} .py files; this Python comes without its "
                         "library's source, take one that has it, or another data set")
    return parts, {"python": platform.python_version(), "files": len(files),
                   "sha256": digest.hexdigest()}


def main(out: Path = Path(__file__).parent) -> None:
    """Write train.bin, val.bin, meta.json and manifest.json.

    Args:
        out: the folder to write to
    """
    parts, source = read_library()
    recipe = {"name": "python_stdlib"} | source
    if already_made(out, recipe):
        return
    print(f"{source['files']} files of Python {source['python']}, {len(parts['val'])} of them for "
          "validation")
    splits = {split: np.frombuffer(b"".join(contents), np.uint8)
              for split, contents in parts.items()}
    write_dataset(out, splits, recipe, "bytes", 256)


if __name__ == "__main__":
    sys.exit(run(main))
