"""Batches of windows of tokens, in an order that depends on the seed and the position alone.

Each epoch cuts the tokens into windows of block_size + 1, each sharing one token with the next, and
goes through all of them once in a shuffled order. Where the first window begins differs from epoch
to epoch. The position, the number of windows that all ranks have read, is the whole state: a run
resumes on any number of ranks by setting it.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from data.tokens import Tokens, check_window

_ROUNDS = 6
# Windows of so many batches are computed together: for each batch alone numpy takes 0.3 ms.
_BATCHES_AT_ONCE = 64
_EVALUATION = 0x6576616C  # xor-ed into the seed, for an order other than that of training


# -- the order, in uint64 arithmetic modulo 2**64 ------------------------------------


def _hash(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of uint64 (n,) that mixes all bits.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Permute range(n): the places (m,) uint64 of `index` (m,), each under its own key (m,).

    A Feistel network on pairs (left < rows, right < columns) with rows * columns just above n. A
    round adds a hash of one half to the other half. That can be undone, so all rounds together are
    a permutation of the pairs. A result outside range(n) goes through the rounds again.
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    place, outside = index.copy(), np.arange(len(index))
    while len(outside):
        left, right = np.divmod(place[outside], np.uint64(columns))
        for turn in range(0, _ROUNDS, 2):
            keys = key[outside] + np.uint64(turn)
            left = (left + _hash(_hash(keys) ^ right) % np.uint64(rows)) % np.uint64(rows)
            added = _hash(_hash(keys + np.uint64(1)) ^ left) % np.uint64(columns)
            right = (right + added) % np.uint64(columns)
        place[outside] = left * np.uint64(columns) + right
        outside = outside[place[outside] >= n]
    return place


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """The number of windows that fit wherever the first one begins, and at least one."""
    return max(1, (tokens - block_size) // block_size)


def window_starts(windows: np.ndarray, tokens: int, block_size: int, seed: int) -> np.ndarray:
    """The position of the first token, (n,) int64, of the windows numbered `windows` (n,)."""
    per_epoch = windows_per_epoch(tokens, block_size)
    epoch, index = np.divmod(windows.astype(np.uint64), np.uint64(per_epoch))
    key = _hash(_hash(np.full(len(windows), seed % 2**64, np.uint64)) ^ epoch)
    # The largest offset still leaves room for the last target of the last window.
    offsets = min(block_size, tokens - per_epoch * block_size)
    offset = _hash(~key) % np.uint64(offsets)
    starts = offset + permute(index, per_epoch, key) * np.uint64(block_size)
    return starts.astype(np.int64)


# -- batches --------------------------------------------------------------------------


class Loader:
    """Endless batches (inputs, targets), each (batch_size, block_size) int64 on `device`.

    A batch of all ranks is the next world_size * batch_size windows; rank r takes those from
    r * batch_size on. So a step of k micro-batches, counted over all ranks, has the same
    windows for any number of ranks. `position` counts the windows returned on all ranks, without a
    batch that was only prefetched. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, tokens: Tokens, *, block_size: int, batch_size: int, seed: int,
                 device: torch.device | str = "cpu", rank: int = 0, world_size: int = 1,
                 position: int = 0) -> None:
        check_window(tokens, block_size)
        if batch_size < 1 or position < 0:
            raise ValueError(f"batch_size={batch_size} must be at least 1, "
                             f"position={position} at least 0")
        assert 0 <= rank < world_size
        self._tokens, self._seed, self._rank = tokens, seed, rank
        self._block_size, self._batch_size = block_size, batch_size
        self._device = torch.device(device)
        self._stride = world_size * batch_size  # windows from one batch to the next
        self._starts: np.ndarray = np.empty((0, batch_size), np.int64)  # of the next batches
        self._starts_position = 0  # where the first of those batches begins
        if self._device.type == "cuda":
            shape = (2, batch_size, block_size)
            self._prefetcher = _Prefetcher(self._device, shape, self._read)
        self.position = position

    @property
    def position(self) -> int:
        """The number of the window that the next batch begins with. Set it to resume there."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self._position = position
        if self._device.type == "cuda":
            self._prefetcher.start(position)

    @property
    def epoch(self) -> float:
        """How many times the data has been read, with fractions."""
        return self.position / windows_per_epoch(len(self._tokens), self._block_size)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._device.type == "cuda":
            batch = self._prefetcher.take()
        else:
            batch = torch.empty(2, self._batch_size, self._block_size, dtype=torch.int64)
            self._read(self.position, batch)
            batch = batch.to(self._device)
        self.position += self._stride
        return batch[0], batch[1]

    def _read(self, position: int, batch: Tensor) -> None:
        """Read this rank's batch at `position` into `batch` (2, batch_size, block_size)."""
        _read_windows(self._tokens, self._starts_at(position), batch)

    def _starts_at(self, position: int) -> np.ndarray:
        """Positions (batch_size,) int64 where this rank's windows at `position` begin."""
        index, remainder = divmod(position - self._starts_position, self._stride)
        if remainder or not 0 <= index < len(self._starts):
            first = position + self._rank * self._batch_size
            windows = first + np.add.outer(self._stride * np.arange(_BATCHES_AT_ONCE),
                                           np.arange(self._batch_size))
            starts = window_starts(windows.ravel(), len(self._tokens), self._block_size, self._seed)
            self._starts, self._starts_position = starts.reshape(windows.shape), position
            index = 0
        return self._starts[index]


def _read_windows(tokens: Tokens, starts: np.ndarray, batch: Tensor) -> None:
    """Read the windows that begin at `starts` (n,) into batch[0], inputs, and batch[1], targets.

    The targets are the inputs shifted by one token.
    """
    windows = tokens.read(starts, batch.shape[-1] + 1)
    batch.numpy()[0] = windows[:, :-1]
    batch.numpy()[1] = windows[:, 1:]


class _Prefetcher:
    """Copies the next batch to the GPU on its own stream, from two pinned buffers."""

    def __init__(self, device: torch.device, shape: tuple[int, ...],
                 read: Callable[[int, Tensor], None]) -> None:
        self._device, self._read, self._stream = device, read, torch.cuda.Stream(device)
        self._buffers = [(torch.empty(shape, dtype=torch.int64, pin_memory=True),
                          torch.cuda.Event()) for _ in range(2)]

    def start(self, position: int) -> None:
        """Read the batch at `position` into the older buffer, and start its copy to the GPU."""
        host, copied = self._buffers.pop(0)
        self._buffers.append((host, copied))
        copied.synchronize()  # the copy of two batches ago is done
        self._read(position, host)
        with torch.cuda.stream(self._stream):
            self._batch = host.to(self._device, non_blocking=True)
            copied.record()

    def take(self) -> Tensor:
        """The batch started last. The GPU's stream waits for its copy, the host does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._buffers[-1][1])
        # Its memory belongs to the other stream, which must not reuse it before `current` is done.
        self._batch.record_stream(current)
        return self._batch


def eval_batches(tokens: Tokens, *, block_size: int, batch_size: int, count: int, seed: int,
                 device: torch.device | str = "cpu", rank: int = 0,
                 world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share of `count` batches (inputs, targets), the same at every evaluation.

    The batches go to the ranks in turn, and all ranks together have the same distinct windows for
    any number of ranks. If the data has too few windows there are fewer batches, or a single
    smaller one. Every rank yields the same number, since under FSDP a forward pass is a collective:
    a rank without a last batch yields one whose targets are all -1, with no loss and no tokens.
    """
    check_window(tokens, block_size)
    available = windows_per_epoch(len(tokens), block_size)
    size = min(batch_size, available)
    batches = min(count, available // size)
    on_gpu = torch.device(device).type == "cuda"
    for index in range(rank, rank + batches, world_size):
        batch = torch.empty(2, size, block_size, dtype=torch.int64, pin_memory=on_gpu)
        windows = np.arange(index * size, (index + 1) * size)
        starts = window_starts(windows, len(tokens), block_size, seed ^ _EVALUATION)
        _read_windows(tokens, starts, batch)
        if index >= batches:
            batch[1] = -1
        inputs, targets = batch.to(device, non_blocking=on_gpu)
        yield inputs, targets
