"""The manifest beside the tokens: what they were made from, how many they are, and the checksum of each file.

    {"source": {...}, "tokenizer": "gpt2", "vocab_size": 50257,
     "splits": {"train": {"tokens": 9, "max_id": 50256, "shards": [{"file", "tokens", "bytes", "sha256", "sample"}]}}}

It says nothing of when and where, so that the same text gives the same manifest.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from data.files import read_json, sha256_of, write_json

NAME = "manifest.json"
UNFINISHED = "unfinished.json"  # lies in a folder while its files are being made
# At each start of a run a file up to _WHOLE_BYTES is hashed whole, and of a larger one _PIECES pieces of _PIECE_BYTES:
# 4 MiB, spread evenly over it.
_WHOLE_BYTES = 1 << 25
_PIECES, _PIECE_BYTES = 64, 1 << 16


def shard_entry(path: Path, tokens: int) -> dict[str, Any]:
    """The manifest's entry for the file `path` of `tokens` ids."""
    size = path.stat().st_size
    return {"file": path.name, "tokens": tokens, "bytes": size, "sha256": sha256_of(path),
            "sample": fingerprint(path)}


def write_manifest(data_dir: str | Path, source: dict[str, Any], tokenizer: str, vocab_size: int,
                   splits: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, the last file of a data set: `source` is free-form, `splits` as in the module's docstring."""
    write_json(Path(data_dir) / NAME, {"source": source, "tokenizer": tokenizer, "vocab_size": vocab_size,
                                       "splits": splits})


def read_manifest(data_dir: str | Path) -> dict[str, Any] | None:
    """The manifest in `data_dir`, or None where there is none."""
    path = Path(data_dir) / NAME
    return read_json(path, dict[str, Any], "prepare the data again") if path.exists() else None


def verify(data_dir: str | Path, *, full: bool = False) -> None:
    """Raise a ValueError that names the first file which is not what the manifest in `data_dir` says.

    Size and content are compared: with `full` every byte, otherwise every byte of small files and 4 MiB spread over
    each large one. A folder without a manifest, such as nanoGPT's, passes.
    """
    manifest = read_manifest(data_dir) or {"splits": {}}
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = Path(data_dir) / shard["file"]
            if not path.exists():
                raise ValueError(f"{path}: named in {NAME}, but absent; prepare the data again")
            size = path.stat().st_size
            if size != shard["bytes"]:
                raise ValueError(f"{path}: {size:,} bytes, {NAME} says {shard['bytes']:,}; {_remedy(path)}")
            if (sha256_of(path) != shard["sha256"]) if full else (fingerprint(path) != shard["sample"]):
                raise ValueError(f"{path}: its content is not what {NAME} says; {_remedy(path)}")


def already_made(data_dir: str | Path, source: dict[str, Any]) -> bool:
    """Whether `data_dir` holds, unchanged, what was made from this `source`; says so in one line if it does."""
    if (Path(data_dir) / UNFINISHED).exists():
        return False
    try:
        verify(data_dir)
        manifest = read_manifest(data_dir)
    except ValueError:
        return False
    if manifest is None or manifest["source"] != source:
        return False
    counts = ", ".join(f"{split} {entry['tokens']:,}" for split, entry in manifest["splits"].items())
    print(f"{data_dir}: already made from the same source, tokens: {counts}")
    return True


def _remedy(path: Path) -> str:
    return f"prepare the data again, or remove {path.parent / NAME} if you changed it on purpose"


def fingerprint(path: Path) -> str:
    """The SHA-256 of pieces spread evenly over the file, from its first bytes to its last; of all of a small file."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(_PIECES):
            digest.update(os.pread(file.fileno(), _PIECE_BYTES, (size - _PIECE_BYTES) * i // (_PIECES - 1)))
    return digest.hexdigest()


def recorded_max_id(paths: list[Path]) -> int | None:
    """The largest id of the files `paths`, which share a folder, by their manifest; None where it does not tell."""
    manifest = read_manifest(paths[0].parent) or {"splits": {}}
    sizes = {path.name: path.stat().st_size for path in paths}
    for split in manifest["splits"].values():
        if {shard["file"]: shard["bytes"] for shard in split["shards"]} == sizes:
            return split["max_id"]
    return None
