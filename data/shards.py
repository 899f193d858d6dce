"""Write the token files of one split, resumable to the token.

A file has the suffix .partial until it is complete.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.files import sync
from data.manifest import UNFINISHED, SplitProgress
from data.tokens import DTYPE, HEADER_BYTES, header_of

# The names that a ShardWriter gives to its files.
SHARD_FILE_NAME = re.compile(r"((train|val)|.+_(train|val)_\d{6,})\.bin(\.partial)?", re.DOTALL)


class ShardWriter:
    """Writes the ids of a split into `folder`: SPLIT.bin, or shards with a header.

    Shards hold `shard_tokens` each and are called NAME_SPLIT_000000.bin. `commit` syncs what was
    written and returns the state; a writer made with that state goes on from there, and drops what
    was written after the commit.
    """

    def __init__(self, folder: Path, split: str, name: str, shard_tokens: int | None,
                 state: SplitProgress) -> None:
        self._folder, self._split, self._name = folder, split, name
        self._shard_tokens = shard_tokens
        self._offset = HEADER_BYTES if shard_tokens else 0
        self.shards: list[int] = list(state["shards"])  # the tokens of each full shard
        self.max_id: int = state["max_id"]
        self._open_tokens: int = state["open"]
        self._file: BinaryIO | None = self._reopen() if self._open_tokens else None

    @property
    def tokens(self) -> int:
        return sum(self.shards) + self._open_tokens

    def path(self, shard: int) -> Path:
        """The file of a shard. Training shards count from 1: in llm.c number 0 is validation."""
        if self._shard_tokens is None:
            return self._folder / f"{self._split}.bin"
        number = shard + (self._split == "train")
        return self._folder / f"{self._name}_{self._split}_{number:06}.bin"

    def _partial(self) -> Path:
        path = self.path(len(self.shards))
        return path.with_name(path.name + ".partial")

    def _reopen(self) -> BinaryIO:
        """Open the shard that was being written, truncated to its committed tokens."""
        path, complete = self._partial(), self.path(len(self.shards))
        if link := next((file for file in (path, complete) if file.is_symlink()), None):
            raise ValueError(f"{link}: a link, whose target would be cut; remove it and "
                             f"{self._folder / UNFINISHED} to start anew")
        if not path.exists() and complete.exists():
            complete.rename(path)  # it was finished after the last commit
        size = self._offset + self._open_tokens * DTYPE.itemsize
        if not path.is_file() or path.stat().st_size < size:
            raise ValueError(f"{path}: shorter than {UNFINISHED} says; remove "
                             f"{self._folder / UNFINISHED} to start anew")
        os.truncate(path, size)
        return open(path, "ab")

    def write(self, ids: np.ndarray) -> None:
        """Append the ids (n,) uint16, starting a new shard whenever one is full."""
        self.max_id = max(self.max_id, int(ids.max(initial=0)))
        while len(ids):
            if self._file is None:
                self._partial().unlink(missing_ok=True)  # left by a killed run, or a link
                self._file = open(self._partial(), "xb")
                self._file.write(bytes(self._offset))
            room = self._shard_tokens - self._open_tokens if self._shard_tokens else len(ids)
            self._file.write(ids[:room].tobytes())
            self._open_tokens += len(ids[:room])
            ids = ids[room:]
            if self._open_tokens == self._shard_tokens:
                self.finish()

    def commit(self) -> SplitProgress:
        """Sync what was written to the disk, and return the state to go on from."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"shards": list(self.shards), "open": self._open_tokens, "max_id": self.max_id}

    def finish(self) -> None:
        """Give the open shard, if there is one, its header and its final name."""
        if self._file is None:
            return
        self.commit()
        self._file.close()
        if self._offset:
            with open(self._partial(), "r+b") as file:
                file.write(header_of(self._open_tokens))
                file.flush()
                os.fsync(file.fileno())
        self._partial().rename(self.path(len(self.shards)))
        sync(self._folder)
        self.shards.append(self._open_tokens)
        self._file, self._open_tokens = None, 0

    def close(self) -> None:
        """Close the open shard without finishing it."""
        if self._file is not None:
            with suppress(OSError):  # a full disk: the lost bytes were not committed
                self._file.close()
