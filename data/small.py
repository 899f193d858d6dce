"""Data sets that fit in memory: write their files, and get the text of tiny Shakespeare."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_write, read_text
from data.manifest import UNFINISHED, SplitEntry, shard_entry, start_unfinished, write_manifest
from data.tokenizer import write_meta
from data.tokens import write_tokens

TINY_SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/input.txt")
_TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def write_dataset(out: Path, splits: dict[str, np.ndarray], recipe: dict[str, Any], kind: str,
                  vocab_size: int, chars: str = "") -> None:
    """Write SPLIT.bin for each split, the tokenizer's meta.json and the manifest; print the counts.

    `splits` maps a name to ids (n,). `kind`, `vocab_size` and `chars` are those of `write_meta`.
    """
    start_unfinished(out, recipe)
    entries: dict[str, SplitEntry] = {}
    for split, ids in splits.items():
        tokens = write_tokens(out / f"{split}.bin", ids)
        shard = shard_entry(out / f"{split}.bin", tokens)
        entries[split] = {"tokens": tokens, "max_id": int(ids.max(initial=0)), "shards": [shard]}
    write_meta(out, kind, vocab_size, chars)
    write_manifest(out, recipe, kind, vocab_size, entries)
    (out / UNFINISHED).unlink()
    print(f"vocab size: {vocab_size:,}")
    for split, entry in entries.items():
        print(f"{split} has {entry['tokens']:,} tokens")


def tiny_shakespeare(file: Path | None, out: Path) -> str:
    """The text of `file`; without one, of out/input.txt, which is downloaded if it is absent.

    Raises ValueError if it is empty or not UTF-8, or if the download fails.
    """
    path = file or out / "input.txt"
    if file is None and not os.path.lexists(path):
        content = _download(TINY_SHAKESPEARE, _TINY_SHAKESPEARE_SHA256)
        with atomic_write(path) as new:
            new.write(content)
    text = read_text(path, "give --input=FILE, a UTF-8 text")
    if not text:
        raise ValueError(f"{path}: holds no text; give --input=FILE, a UTF-8 text")
    return text


def _download(url: str, sha256: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content = answer.read()
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"no --input=FILE was given, and {url} cannot be had ({reason}); "
                         "give the file") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{url}: {len(content):,} bytes with the wrong SHA-256, not the known "
                         "text; give --input=FILE")
    return content
