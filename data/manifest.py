"""manifest.json, beside the token files: their source, their counts and their checksums.

    {"source": {...}, "tokenizer": "gpt2", "vocab_size": 50257,
     "splits": {"train": {"tokens": 9, "max_id": 50256, "shards": [...]}}}

It holds no dates and no folders, so the same text gives the same manifest. While the files are
being made, unfinished.json lies beside them, and no run reads them.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any, TypedDict

from common.bounds import FileName, Must, NonNegative, Positive
from common.files import read_json, regular_file, sha256_of, write_json

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
# Each start of a run hashes a file of up to _WHOLE_BYTES whole, and of a larger one _PIECES pieces
# of _PIECE_BYTES, 4 MiB in all.
_WHOLE_BYTES = 1 << 25
_PIECES, _PIECE_BYTES = 64, 1 << 16

# A new preparation deletes the files that an older manifest names, so it may name only .bin files.
TokenFile = Annotated[FileName, Must("end in .bin", lambda name: name.endswith(".bin"))]
MaxId = Annotated[int, Must("be from 0 to 65535", lambda n: 0 <= n < 1 << 16)]
Sha256 = Annotated[str, Must("be 64 hexadecimal digits", re.compile("[0-9a-f]{64}").fullmatch)]


class ShardEntry(TypedDict):
    """One file of tokens; `sample` is its `fingerprint`."""

    file: TokenFile
    tokens: NonNegative
    bytes: NonNegative
    sha256: Sha256
    sample: Sha256


class SplitEntry(TypedDict):
    """One split; `max_id` is the largest token id in it."""

    tokens: NonNegative
    max_id: MaxId
    shards: list[ShardEntry]


class Manifest(TypedDict):
    """manifest.json. `source` is the recipe: whatever tells one text from another."""

    source: dict[str, Any]
    tokenizer: str
    vocab_size: Positive
    splits: dict[str, SplitEntry]


class SplitProgress(TypedDict):
    """What is written of a split: the tokens of each full shard, and of the one being written."""

    shards: list[NonNegative]
    open: NonNegative
    max_id: MaxId


class Progress(TypedDict):
    """unfinished.json: how far a preparation got in its source."""

    made_from: dict[str, Any]  # the recipe; the manifest's "source"
    documents: NonNegative  # whole ones
    begun: NonNegative  # pieces of the next document
    empty: NonNegative  # documents without text
    splits: dict[str, SplitProgress]


def start_unfinished(data_dir: Path, recipe: dict[str, Any]) -> Progress:
    """Write unfinished.json: until it is removed, no run takes old and new files together."""
    progress = Progress(made_from=recipe, documents=0, begun=0, empty=0, splits={})
    write_json(data_dir / UNFINISHED, progress)
    return progress


def shard_entry(path: Path, tokens: int) -> ShardEntry:
    """The manifest's entry for the file `path`, which holds `tokens` tokens."""
    size = path.stat().st_size
    return {"file": path.name, "tokens": tokens, "bytes": size, "sha256": sha256_of(path),
            "sample": fingerprint(path)}


def write_manifest(data_dir: str | Path, recipe: dict[str, Any], tokenizer: str, vocab_size: int,
                   splits: dict[str, SplitEntry]) -> None:
    """Write manifest.json, which must be the last file of a data set to be written."""
    manifest = Manifest(source=recipe, tokenizer=tokenizer, vocab_size=vocab_size, splits=splits)
    write_json(Path(data_dir) / MANIFEST, manifest)


def read_manifest(data_dir: str | Path) -> Manifest | None:
    """The manifest in `data_dir`, or None if there is none. Raises ValueError for a bad one."""
    path = Path(data_dir) / MANIFEST
    if not os.path.lexists(path):
        return None
    return read_json(path, Manifest, "remove it, and prepare the data again")


def _splits(data_dir: str | Path) -> dict[str, SplitEntry]:
    manifest = read_manifest(data_dir)
    return manifest["splits"] if manifest else {}


def listed_files(data_dir: str | Path) -> list[tuple[Path, ShardEntry]]:
    """The files in the manifest of `data_dir` with their entries; none without a manifest."""
    shards = [shard for split in _splits(data_dir).values() for shard in split["shards"]]
    return [(Path(data_dir) / shard["file"], shard) for shard in shards]


def verify(data_dir: str | Path, *, full: bool = False) -> None:
    """Compare the files in `data_dir` with its manifest.

    Without a manifest, as in nanoGPT's folders, nothing is checked. With `full` every byte is read,
    otherwise all of a small file and 4 MiB of a large one. Raises ValueError with the name of the
    first file that differs.
    """
    for path, shard in listed_files(data_dir):
        regular_file(path, f"{MANIFEST} names it; prepare the data again")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise ValueError(f"{path}: {size:,} bytes, {MANIFEST} says {shard['bytes']:,}; "
                             f"{_remedy(path)}")
        checksum, expected = ((sha256_of(path), shard["sha256"]) if full
                              else (fingerprint(path), shard["sample"]))
        if checksum != expected:
            raise ValueError(f"{path}: its content is not what {MANIFEST} says; {_remedy(path)}")


def already_made(data_dir: str | Path, recipe: dict[str, Any]) -> bool:
    """Whether `data_dir` holds unchanged files made by `recipe`; if so, print the counts."""
    if (Path(data_dir) / UNFINISHED).exists():
        return False
    try:
        verify(data_dir)
        manifest = read_manifest(data_dir)
    except ValueError:
        return False
    if manifest is None or manifest["source"] != recipe:
        return False
    counts = ", ".join(f"{split} {entry['tokens']:,}"
                       for split, entry in manifest["splits"].items())
    print(f"{data_dir}: already made from the same source, tokens: {counts}")
    return True


def _remedy(path: Path) -> str:
    manifest = path.parent / MANIFEST
    return f"prepare the data again, or remove {manifest} if you changed it on purpose"


def fingerprint(path: Path) -> str:
    """The SHA-256 of a file, or of 64 pieces from start to end of one above 32 MiB."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(_PIECES):
            offset = (size - _PIECE_BYTES) * i // (_PIECES - 1)
            digest.update(os.pread(file.fileno(), _PIECE_BYTES, offset))
    return digest.hexdigest()


def recorded_max_id(paths: list[Path]) -> int | None:
    """The largest id in the files `paths` of one folder, as its manifest records it.

    None if no split of the manifest has exactly these files with these sizes.
    """
    sizes = {path.name: path.stat().st_size for path in paths}
    for split in _splits(paths[0].parent).values():
        if {shard["file"]: shard["bytes"] for shard in split["shards"]} == sizes:
            return split["max_id"]
    return None
