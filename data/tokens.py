"""Files of token ids: read window by window, written atomically.

There are two formats, recognised by the first bytes. nanoGPT's files are raw little-endian uint16.
The shards of llm.c and modded-nanogpt have a header of 256 int32 (1024 bytes) in front of that:
magic 20240520, version 1, number of tokens, zeros.
"""

import glob
import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import atomic_write, regular_file
from data.manifest import UNFINISHED, recorded_max_id

DTYPE = np.dtype("<u2")
HEADER_BYTES = 1024
MAGIC, VERSION = 20240520, 1
MAX_ID = 65535
_CHUNK_TOKENS = 1 << 22  # 8 MiB
_SCAN_BYTES = 1 << 30  # the most that a scan for the largest id reads, in about a second


class _Shard(NamedTuple):
    descriptor: int
    offset: int  # bytes before the first token
    tokens: int


class Tokens:
    """The tokens of one file, or of several shards in a row. `name` is for messages.

    Reads with preadv, since the pages of a memory map would count as this process's memory. Raises
    ValueError for a file that is absent, of another format, or damaged.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self._shards = paths, list[_Shard]()
        self.name = str(paths[0])
        if len(paths) > 1:
            self.name += f" to {paths[-1].name} ({len(paths)} shards)"
        try:
            for path in paths:
                header_expected = bool(self._shards) and self._shards[0].offset > 0
                self._shards.append(_open(path, header_expected))
        except (ValueError, OSError):
            self.close()
            raise
        self._ends = list(accumulate(shard.tokens for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def close(self) -> None:
        while self._shards:
            os.close(self._shards.pop().descriptor)

    def __del__(self) -> None:
        self.close()

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows of `length` tokens that begin at `starts` (n,): (n, length) uint16.

        Raises ValueError for a window that does not lie within the tokens.
        """
        windows = np.empty((len(starts), length), DTYPE)
        for window, start in zip(windows, np.asarray(starts).tolist()):
            if not 0 <= start <= len(self) - length:
                raise ValueError(f"{self.name}: no window of {length} tokens at {start}; it holds "
                                 f"{len(self):,}")
            self._fill(window, start)
        return windows

    def _fill(self, window: np.ndarray, start: int) -> None:
        """Read the tokens from `start` on into `window` (length,), across shards."""
        shard = bisect_right(self._ends, start)
        while len(window):
            descriptor, offset, tokens = self._shards[shard]
            begin = start - (self._ends[shard] - tokens)
            here = window[: tokens - begin]
            if os.preadv(descriptor, [here.data], offset + begin * DTYPE.itemsize) != here.nbytes:
                raise ValueError(f"{self.paths[shard]}: cut short since it was opened; prepare the "
                                 "data again")
            window, start, shard = window[len(here) :], start + len(here), shard + 1

    def chunks(self, every: int = 1) -> Iterator[np.ndarray]:
        """All tokens in order, in arrays of up to 8 MiB; of these arrays only one in `every`."""
        for start in range(0, len(self), _CHUNK_TOKENS * every):
            yield self.read(np.array([start]), min(_CHUNK_TOKENS, len(self) - start))[0]


class Reversed(Tokens):
    """The tokens in reverse order, from the last to the first, for backward models."""

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        return super().read(len(self) - length - np.asarray(starts), length)[:, ::-1]


def in_reading_order(tokens: Tokens, direction: str) -> Tokens:
    """The tokens as a model of this `direction` reads them: "forward" or "backward"."""
    return Reversed(tokens.paths) if direction == "backward" else tokens


def _open(path: Path, header_expected: bool) -> _Shard:
    """Open one file and find out its format; a header is expected if other shards have one."""
    descriptor = os.open(regular_file(path, _how_to_prepare(path.parent)), os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        head = np.frombuffer(os.pread(descriptor, 12, 0).ljust(12, b"\0"), "<i4").tolist()
        size_fits = size >= HEADER_BYTES and size == HEADER_BYTES + head[2] * DTYPE.itemsize
        # A raw file begins with the magic number only if its first id is 55,432, which GPT-2 does
        # not have.
        if header_expected or size_fits or head[0] == MAGIC:
            return _Shard(descriptor, HEADER_BYTES, _tokens_behind_header(path, size, head))
        if size % DTYPE.itemsize:
            raise ValueError(f"{path}: {size:,} bytes is no whole number of uint16 tokens; prepare "
                             "the data again")
        return _Shard(descriptor, 0, size // DTYPE.itemsize)
    except (ValueError, OSError):
        os.close(descriptor)
        raise


def _tokens_behind_header(path: Path, size: int, head: list[int]) -> int:
    magic, version, tokens = head
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"{path}: its header says magic {magic}, version {version}; shards of "
                         f"uint16 tokens have magic {MAGIC}, version {VERSION}: prepare them with "
                         "GPT-2's tokenizer")
    if size != HEADER_BYTES + tokens * DTYPE.itemsize:
        raise ValueError(f"{path}: its header says {tokens:,} tokens, its {size:,} bytes do not "
                         "hold just these; prepare or download it again")
    return tokens


def open_tokens(path: str | Path) -> Tokens:
    """Open a file, or all files that the pattern `path` (`*`, `?`) matches, in order of name."""
    matches = sorted(glob.glob(str(path))) if glob.has_magic(str(path)) else []
    return Tokens([Path(match) for match in matches] or [Path(path)])


def open_split(data_dir: str | Path, split: str) -> Tokens:
    """Open the split "train" or "val" of a folder: SPLIT.bin, or all shards *SPLIT_*.bin.

    Raises ValueError if there is neither, if there are both, or if the preparation is unfinished.
    """
    single, pattern = Path(data_dir) / f"{split}.bin", f"*{split}_*.bin"
    if os.path.lexists(Path(data_dir) / UNFINISHED):
        raise ValueError(f"{data_dir}: its preparation is not finished; give the same prepare "
                         "command again")
    shards = sorted(Path(data_dir).glob(pattern))
    if shards and os.path.lexists(single):
        raise ValueError(f"{data_dir}: holds both {single.name} and {len(shards)} shards "
                         f"{pattern}; remove one of them")
    if not shards and not os.path.lexists(single):
        raise ValueError(f"{single}: no such file, nor shards {pattern}; "
                         f"{_how_to_prepare(Path(data_dir))}")
    return Tokens(shards or [single])


def _how_to_prepare(data_dir: Path) -> str:
    here = Path(__file__).parent
    names = sorted(script.parent.name for script in here.glob("*/prepare.py"))
    if data_dir.name in names:
        elsewhere = "" if data_dir.resolve() == here / data_dir.name else f" --out={data_dir}"
        return f"make it with `python data/{data_dir.name}/prepare.py{elsewhere}`"
    return (f"make it with `python data/SET/prepare.py --out={data_dir}`, SET being one of "
            f"{', '.join(names)}")


def check_window(tokens: Tokens, block_size: int) -> None:
    """Raise ValueError unless `tokens` hold at least one window of block_size + 1."""
    if len(tokens) <= block_size:
        raise ValueError(f"{tokens.name}: holds {len(tokens):,} tokens, one window needs "
                         f"block_size + 1 = {block_size + 1:,}; "
                         "lower --block_size or prepare more text")


def check_vocabulary(tokens: Tokens, vocab_size: int) -> None:
    """Raise ValueError if `tokens` hold an id of `vocab_size` or more.

    Up to 1 GiB every token is read. Above that the manifest's `max_id` counts; without a manifest,
    1 GiB in pieces spread evenly over the files is read.
    """
    size_bytes = len(tokens) * DTYPE.itemsize
    largest = recorded_max_id(tokens.paths) if size_bytes > _SCAN_BYTES else None
    if largest is None:
        every = -(-size_bytes // _SCAN_BYTES)
        largest = max((int(chunk.max()) for chunk in tokens.chunks(every)), default=0)
    if largest >= vocab_size:
        raise ValueError(f"{tokens.name}: holds the id {largest}, the model's vocab_size is "
                         f"{vocab_size}; take the data that the model was made for, or a larger "
                         "--vocab_size")


def write_tokens(path: str | Path, ids: np.ndarray) -> int:
    """Write the ids (n,) to `path` as nanoGPT's raw uint16, atomically, and return n.

    Raises ValueError for an id that does not fit 16 bits.
    """
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high > MAX_ID:
        raise ValueError(f"token id {low if low < 0 else high} does not fit 16 bits; prepare the "
                         "data with a tokenizer of at most 65,536 ids")
    with atomic_write(Path(path)) as file:
        file.write(ids.astype(DTYPE, copy=False).tobytes())
    return len(ids)


def header_of(tokens: int) -> bytes:
    """The 1024 bytes in front of a shard of `tokens` tokens."""
    head = np.zeros(HEADER_BYTES // 4, "<i4")
    head[:3] = MAGIC, VERSION, tokens
    return head.tobytes()
