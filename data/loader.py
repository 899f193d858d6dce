"""Windows of tokens as batches, in an order that is a function of (seed, position) and nothing
else.

Every epoch cuts the tokens into windows of block_size + 1 that share one token with the next, along
a grid which begins somewhere else in each epoch, and goes through all of them once in a shuffled
order. The position, a count of windows over all ranks, is the whole state: a run resumes, on any
number of ranks, by setting it.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from data.tokens import Tokens, check_window

_ROUNDS = 6
# whose windows are worked out together: numpy's cost is per call, 0.3 ms of a step for a single one
_BATCHES_AT_ONCE = 64
_EVALUATION = 0x6576616C  # set apart from the training order that the same seed gives


# -- the order: arithmetic on uint64, which wraps ------------------------------------


def _hash(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of uint64 (n,) in which
    every bit counts."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The places (m,) uint64 of `index` (m,) in the permutations of range(n) that the keys (m,)
    stand for.

    A Feistel network on pairs (left < rows, right < columns), rows * columns barely over n: each
    round adds to one half a hash of the other, which can be undone, so it permutes the pairs; what
    falls outside range(n) goes through again.
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    place, outside = index.copy(), np.arange(len(index))
    while len(outside):
        left, right = np.divmod(place[outside], np.uint64(columns))
        for turn in range(0, _ROUNDS, 2):
            keys = key[outside] + np.uint64(turn)
            left = (left + _hash(_hash(keys) ^ right) % np.uint64(rows)) % np.uint64(rows)
            right = (right
                     + _hash(_hash(keys + np.uint64(1)) ^ left) % np.uint64(columns)) % np.uint64(
                         columns)
        place[outside] = left * np.uint64(columns) + right
        outside = outside[place[outside] >= n]
    return place


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """How many windows an epoch has: those that fit wherever its grid begins, at least one."""
    return max(1, (tokens - block_size) // block_size)


def window_starts(windows: np.ndarray, tokens: int, block_size: int, seed: int) -> np.ndarray:
    """Where the windows of the numbers `windows` (n,), counted from the start of the run, begin:
    token, (n,) int64."""
    per_epoch = windows_per_epoch(tokens, block_size)
    epoch, index = np.divmod(windows.astype(np.uint64), np.uint64(per_epoch))
    key = _hash(_hash(np.full(len(windows), seed % 2**64, np.uint64)) ^ epoch)
    # the last one still leaves the grid its last target
    offsets = min(block_size, tokens - per_epoch * block_size)
    starts = _hash(~key) % np.uint64(offsets) + permute(index, per_epoch,
                                                        key) * np.uint64(block_size)
    return starts.astype(np.int64)


# -- batches --------------------------------------------------------------------------


class Loader:
    """Endless batches (inputs, targets), each (batch_size, block_size) int64 on `device`.

    A batch of all ranks is the next world_size * batch_size windows; rank r has its contiguous part
    of them. So an optimizer step of k micro-batches over all ranks sees the same windows whatever
    the number of ranks. `position` counts the windows handed out, over all ranks; a batch that is
    only on its way to the GPU is not among them.
    """

    def __init__(self, tokens: Tokens, *, block_size: int, batch_size: int, seed: int,
                 device: torch.device | str = "cpu", rank: int = 0, world_size: int = 1,
                 position: int = 0) -> None:
        check_window(tokens, block_size)
        if batch_size < 1 or position < 0:
            raise ValueError(f"batch_size={batch_size} must be at least 1, position={position} at "
                             "least 0")
        assert 0 <= rank < world_size
        self._tokens, self._block_size, self._batch_size, self._seed = tokens, block_size, batch_size, seed
        self._device, self._rank, self._stride = torch.device(device), rank, world_size * batch_size
        self._known = 0
        self._starts: np.ndarray = np.empty((0, batch_size), np.int64)
        if self._device.type == "cuda":
            self._ahead = _Ahead(self._device, (2, batch_size, block_size), self._read)
        self.position = position

    @property
    def position(self) -> int:
        """Where the next batch begins; may be set, to go on from there."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self._position = position
        if self._device.type == "cuda":
            self._ahead.send(position)

    @property
    def epoch(self) -> float:
        """How many times the data has been gone through."""
        return self.position / windows_per_epoch(len(self._tokens), self._block_size)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._device.type == "cuda":
            batch = self._ahead.take()
        else:
            batch = torch.empty(2, self._batch_size, self._block_size, dtype=torch.int64)
            self._read(self.position, batch)
            batch = batch.to(self._device)
        self.position += self._stride
        return batch[0], batch[1]

    def _read(self, position: int, batch: Tensor) -> None:
        """Fill `batch` (2, batch_size, block_size) in host memory with this rank's windows at
        `position`."""
        _read(self._tokens, self._starts_at(position), batch)

    def _starts_at(self, position: int) -> np.ndarray:
        """Where this rank's windows at `position` begin: token, (batch_size,)."""
        index, between = divmod(position - self._known, self._stride)
        if between or not 0 <= index < len(self._starts):
            first = position + self._rank * self._batch_size
            windows = first + np.add.outer(self._stride * np.arange(_BATCHES_AT_ONCE),
                                           np.arange(self._batch_size))
            starts = window_starts(windows.ravel(), len(self._tokens), self._block_size, self._seed)
            self._known, self._starts, index = position, starts.reshape(windows.shape), 0
        return self._starts[index]


def _read(tokens: Tokens, starts: np.ndarray, batch: Tensor) -> None:
    """Fill inputs batch[0] and targets batch[1], the same shifted by one, with the windows that
    begin at `starts` (n,)."""
    found = tokens.read(starts, batch.shape[-1] + 1)
    batch.numpy()[0] = found[:, :-1]
    batch.numpy()[1] = found[:, 1:]


class _Ahead:
    """Two pinned buffers and a stream of their own: a batch is on its way to the GPU while the last
    one is used."""

    def __init__(self, device: torch.device, shape: tuple[int, ...],
                 read: Callable[[int, Tensor], None]) -> None:
        self._device, self._read, self._stream = device, read, torch.cuda.Stream(device)
        self._buffers = [(torch.empty(shape, dtype=torch.int64, pin_memory=True),
                          torch.cuda.Event()) for _ in range(2)]

    def send(self, position: int) -> None:
        """Read the batch at `position` into the buffer used longest ago, and begin to copy it to
        the device."""
        host, copied = self._buffers.pop(0)
        self._buffers.append((host, copied))
        copied.synchronize()  # its last copy, two batches ago, has left it
        self._read(position, host)
        with torch.cuda.stream(self._stream):
            self._batch = host.to(self._device, non_blocking=True)
            copied.record()

    def take(self) -> Tensor:
        """The batch last sent. The device waits for its copy before the work queued from now on;
        the host does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._buffers[-1][1])
        # allocated on the other stream, which must not reuse it too early
        self._batch.record_stream(current)
        return self._batch


def eval_batches(tokens: Tokens, *, block_size: int, batch_size: int, count: int, seed: int,
                 device: torch.device | str = "cpu", rank: int = 0,
                 world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of at most `count` batches (inputs, targets), the same ones at every
    evaluation.

    They are distinct windows in an order of their own, whatever the number of ranks, dealt out
    batch by batch. Where the data has fewer than count * batch_size, there are as many whole
    batches as it has, or a single smaller one. Every rank gets as many batches as the others, since
    under FSDP each forward is a collective: where they do not come out even, a rank ends with a
    batch whose targets are all -1, which has no loss and no tokens.
    """
    check_window(tokens, block_size)
    available = windows_per_epoch(len(tokens), block_size)
    size = min(batch_size, available)
    batches = min(count, available // size)
    on_gpu = torch.device(device).type == "cuda"
    for index in range(rank, rank + batches, world_size):
        batch = torch.empty(2, size, block_size, dtype=torch.int64, pin_memory=on_gpu)
        windows = np.arange(index * size, (index + 1) * size)
        _read(tokens, window_starts(windows, len(tokens), block_size, seed ^ _EVALUATION), batch)
        if index >= batches:
            batch[1] = -1
        inputs, targets = batch.to(device, non_blocking=on_gpu)
        yield inputs, targets
