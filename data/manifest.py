"""The manifest beside the tokens: what they were made from, how many they are, and the checksum of
each file.

    {"source": {...}, "tokenizer": "gpt2", "vocab_size": 50257,
     "splits": {"train": {"tokens": 9, "max_id": 50256, "shards": [...]}}}

It says nothing of when and where, so that the same text gives the same manifest.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any, TypedDict

from common.bounds import FileName, Must, NonNegative, Positive
from common.files import read_json, regular, sha256_of, write_json

NAME = "manifest.json"
UNFINISHED = "unfinished.json"  # lies in a folder while its files are being made
# At each start of a run a file up to _WHOLE_BYTES is hashed whole, and of a larger one _PIECES
# pieces of _PIECE_BYTES: 4 MiB, spread evenly over it.
_WHOLE_BYTES = 1 << 25
_PIECES, _PIECE_BYTES = 64, 1 << 16

# What is prepared anew replaces the files that an older manifest names: it may name none but these.
TokenFile = Annotated[FileName, Must("end in .bin", lambda name: name.endswith(".bin"))]
MaxId = Annotated[int, Must("be from 0 to 65535", lambda n: 0 <= n < 1 << 16)]
Sha256 = Annotated[str, Must("be 64 hexadecimal digits", re.compile("[0-9a-f]{64}").fullmatch)]


class Shard(TypedDict):
    """A file of tokens; `sample` is the checksum of its `fingerprint`."""

    file: TokenFile
    tokens: NonNegative
    bytes: NonNegative
    sha256: Sha256
    sample: Sha256


class Split(TypedDict):
    """What a split holds, and its largest id."""

    tokens: NonNegative
    max_id: MaxId
    shards: list[Shard]


class Manifest(TypedDict):
    """`source` is free-form: whatever tells one text from another."""

    source: dict[str, Any]
    tokenizer: str
    vocab_size: Positive
    splits: dict[str, Split]


class Progress(TypedDict):
    """Of a split in an unfinished preparation: the tokens of whole shards, and of the open one."""

    shards: list[NonNegative]
    open: NonNegative
    max_id: MaxId


class Unfinished(TypedDict):
    """How far a preparation got: whole documents, pieces of the next, documents without text."""

    made_from: dict[str, Any]
    documents: NonNegative
    begun: NonNegative
    empty: NonNegative
    splits: dict[str, Progress]


def unfinished(data_dir: Path, made_from: dict[str, Any]) -> Unfinished:
    """Begin a preparation: until its manifest is there, no run takes old and new files together."""
    state = Unfinished(made_from=made_from, documents=0, begun=0, empty=0, splits={})
    write_json(data_dir / UNFINISHED, state)
    return state


def shard_entry(path: Path, tokens: int) -> Shard:
    """The manifest's entry for the file `path` of `tokens` ids."""
    size = path.stat().st_size
    return {"file": path.name, "tokens": tokens, "bytes": size, "sha256": sha256_of(path),
            "sample": fingerprint(path)}


def write_manifest(data_dir: str | Path, source: dict[str, Any], tokenizer: str, vocab_size: int,
                   splits: dict[str, Split]) -> None:
    """Write the manifest, the last file of a data set: `source` is free-form, `splits` as in the
    module's docstring."""
    write_json(Path(data_dir) / NAME,
               {"source": source, "tokenizer": tokenizer, "vocab_size": vocab_size,
                "splits": splits})


def read_manifest(data_dir: str | Path) -> Manifest | None:
    """The manifest in `data_dir`, or None where there is none."""
    path = Path(data_dir) / NAME
    if not os.path.lexists(path):
        return None
    return read_json(path, Manifest, "remove it, and prepare the data again")


def _splits(data_dir: str | Path) -> dict[str, Split]:
    manifest = read_manifest(data_dir)
    return manifest["splits"] if manifest else {}


def files_of(data_dir: str | Path) -> list[tuple[Path, Shard]]:
    """The files that the manifest in `data_dir`, if there is one, names, with their entries."""
    shards = [shard for split in _splits(data_dir).values() for shard in split["shards"]]
    return [(Path(data_dir) / shard["file"], shard) for shard in shards]


def verify(data_dir: str | Path, *, full: bool = False) -> None:
    """Raise a ValueError that names the first file which is not what the manifest in `data_dir`
    says.

    Size and content are compared: with `full` every byte, otherwise every byte of small files and 4
    MiB spread over each large one. A folder without a manifest, such as nanoGPT's, passes.
    """
    for path, shard in files_of(data_dir):
        regular(path, f"{NAME} names it; prepare the data again")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise ValueError(f"{path}: {size:,} bytes, {NAME} says {shard['bytes']:,}; "
                             f"{_remedy(path)}")
        if (sha256_of(path) != shard["sha256"]) if full else (fingerprint(path) != shard["sample"]):
            raise ValueError(f"{path}: its content is not what {NAME} says; {_remedy(path)}")


def already_made(data_dir: str | Path, source: dict[str, Any]) -> bool:
    """Whether `data_dir` holds, unchanged, what was made from this `source`; says so in one line if
    it does."""
    if (Path(data_dir) / UNFINISHED).exists():
        return False
    try:
        verify(data_dir)
        manifest = read_manifest(data_dir)
    except ValueError:
        return False
    if manifest is None or manifest["source"] != source:
        return False
    counts = ", ".join(f"{split} {entry['tokens']:,}"
                       for split, entry in manifest["splits"].items())
    print(f"{data_dir}: already made from the same source, tokens: {counts}")
    return True


def _remedy(path: Path) -> str:
    return f"prepare the data again, or remove {path.parent / NAME} if you changed it on purpose"


def fingerprint(path: Path) -> str:
    """The SHA-256 of pieces spread evenly over the file, from its first bytes to its last; of all
    of a small file."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(_PIECES):
            digest.update(os.pread(file.fileno(), _PIECE_BYTES,
                                   (size - _PIECE_BYTES) * i // (_PIECES - 1)))
    return digest.hexdigest()


def recorded_max_id(paths: list[Path]) -> int | None:
    """The largest id of the files `paths`, which share a folder, by their manifest; None where it
    does not tell."""
    sizes = {path.name: path.stat().st_size for path in paths}
    for split in _splits(paths[0].parent).values():
        if {shard["file"]: shard["bytes"] for shard in split["shards"]} == sizes:
            return split["max_id"]
    return None
