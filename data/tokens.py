"""Files of token ids: written whole or not at all, read by the window.

Two formats, told apart by their first bytes: nanoGPT's raw little-endian uint16, and the shards of
llm.c and modded-nanogpt, the same behind a header of 256 int32 (1024 bytes): magic 20240520,
version 1, count of tokens, zeros.
"""

import glob
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import regular, whole
from data.manifest import UNFINISHED, recorded_max_id

DTYPE = np.dtype("<u2")
HEADER_BYTES = 1024
MAGIC, VERSION = 20240520, 1
MAX_ID = 65535
_CHUNK = 1 << 22  # tokens read at once where a whole file is gone through: 8 MiB
_SCAN_BYTES = 1 << 30  # what a scan for the largest id reads at most: a second or so


class _Shard(NamedTuple):
    descriptor: int
    offset: int  # bytes before the first token
    tokens: int


class Tokens:
    """The tokens of one file, or of several shards as if they were one; `name` says which, for
    messages.

    Windows are read by preadv: a memory map would count every page it touched as this process's
    memory.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self._shards = paths, list[_Shard]()
        self.name = str(paths[0]) if len(
            paths) == 1 else f"{paths[0]} to {paths[-1].name} ({len(paths)} shards)"
        try:
            for path in paths:
                self._shards.append(_open(path, headed=bool(self._shards)
                                          and self._shards[0].offset > 0))
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

    @property
    def dtype(self) -> np.dtype:
        return DTYPE

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows of `length` tokens that begin at `starts` (n,): (n, length) uint16."""
        windows = np.empty((len(starts), length), DTYPE)
        for window, start in zip(windows, np.asarray(starts).tolist()):
            if not 0 <= start <= len(self) - length:
                raise ValueError(f"{self.name}: no window of {length} tokens at {start}; it holds "
                                 f"{len(self):,}")
            self._fill(window, start)
        return windows

    def _fill(self, window: np.ndarray, start: int) -> None:
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
        """All tokens in order, a few MiB at a time; with `every` = k, each k-th of these pieces
        only."""
        for start in range(0, len(self), _CHUNK * every):
            yield self.read(np.array([start]), min(_CHUNK, len(self) - start))[0]


class Reversed(Tokens):
    """The same tokens from the last to the first: what comes next in them is what came before."""

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        return super().read(len(self) - length - np.asarray(starts), length)[:, ::-1]


def _open(path: Path, headed: bool) -> _Shard:
    """Open one file and find out its format; `headed` says that it must have a header, as its
    siblings do."""
    descriptor = os.open(regular(path, _how_to_prepare(path.parent)), os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        head = np.frombuffer(os.pread(descriptor, 12, 0).ljust(12, b"\0"), "<i4").tolist()
        # Two uint16 of a raw file would make the magic number only with the id 55,448 in front,
        # which GPT-2 lacks.
        counted = size >= HEADER_BYTES and size == HEADER_BYTES + head[2] * DTYPE.itemsize
        if headed or counted or head[0] == MAGIC:
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
    """The tokens of a file, or of all files that the pattern `path` matches (`*`, `?`), in the
    order of their names."""
    path = Path(path)
    found = [Path(match)
             for match in sorted(glob.glob(str(path)))] if glob.has_magic(str(path)) else [path]
    return Tokens(found or [path])


def open_split(data_dir: str | Path, split: str) -> Tokens:
    """The tokens of `split` ("train", "val") in a folder: SPLIT.bin, or the shards *SPLIT_*.bin as
    one."""
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
    known = sorted(script.parent.name for script in here.glob("*/prepare.py"))
    if data_dir.name in known:
        elsewhere = "" if data_dir.resolve() == here / data_dir.name else f" --out={data_dir}"
        return f"make it with `python data/{data_dir.name}/prepare.py{elsewhere}`"
    return f"make it with `python data/SET/prepare.py --out={data_dir}`, SET being one of {', '.join(known)}"


def check_window(tokens: Tokens, block_size: int) -> None:
    """Raise a ValueError unless `tokens` hold one window of block_size + 1."""
    if len(tokens) <= block_size:
        raise ValueError(f"{tokens.name}: holds {len(tokens):,} tokens, one window needs "
                         f"block_size + 1 = {block_size + 1:,}; lower --block_size or prepare more "
                         "text")


def check_vocabulary(tokens: Tokens, vocab_size: int) -> None:
    """Raise a ValueError where an id in `tokens` is beyond a model of `vocab_size` ids.

    Every token is looked at, up to 1 GiB. Of more, the manifest beside the files says the largest
    id; where there is none, pieces spread evenly over the files are looked at, 1 GiB in all.
    """
    size_bytes = len(tokens) * DTYPE.itemsize
    largest = recorded_max_id(tokens.paths) if size_bytes > _SCAN_BYTES else None
    if largest is None:
        largest = max((int(chunk.max())
                       for chunk in tokens.chunks(every=-(-size_bytes // _SCAN_BYTES))), default=0)
    if largest >= vocab_size:
        raise ValueError(f"{tokens.name}: holds the id {largest}, the model's vocab_size is "
                         f"{vocab_size}; take the data that the model was made for, or a larger "
                         "--vocab_size")


def as_ids(ids: np.ndarray) -> np.ndarray:
    """`ids` as uint16; a ValueError where one does not fit."""
    ids = np.asarray(ids)
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high > MAX_ID:
        raise ValueError(f"token id {low if low < 0 else high} does not fit 16 bits; prepare the "
                         "data with a tokenizer of at most 65,536 ids")
    return ids.astype(DTYPE, copy=False)


def write_tokens(path: str | Path, arrays: np.ndarray | Iterable[np.ndarray], *,
                 header: bool = False) -> int:
    """Write the ids of one array, or of several in turn, to `path`, whole or not at all; returns
    how many they are.

    With `header`, in the format of llm.c's and modded-nanogpt's shards, else in nanoGPT's.
    """
    tokens = 0
    with whole(Path(path)) as file:
        if header:
            file.write(bytes(HEADER_BYTES))
        for ids in [arrays] if isinstance(arrays, np.ndarray) else arrays:
            file.write(as_ids(ids).tobytes())
            tokens += len(ids)
        if header:
            file.seek(0)
            file.write(header_of(tokens))
    return tokens


def header_of(tokens: int) -> bytes:
    """The 1024 bytes in front of a shard of `tokens` ids."""
    head = np.zeros(HEADER_BYTES // 4, "<i4")
    head[:3] = MAGIC, VERSION, tokens
    return head.tobytes()
