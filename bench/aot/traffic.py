"""Count the bytes that a memory-bound operator moves, and compare them with the fewest possible.

Needs no GPU: Triton's interpreter runs the kernels at their real shapes and launch settings, on
tensors without data (loads give ones). Only a few programs of each grid run, evenly spread; the
bytes they load and store are scaled to the whole grid. The bytes of PyTorch's own operators on the
way (a `.contiguous()`, the sum over partial rows) are added.

There are two figures. Both are divided by the operator's floor: inputs read once, outputs written
once.

requested  all bytes that loads and stores ask for.
moved      the bytes that reach DRAM behind an ideal L2 cache, in sectors of 32 bytes. A program
           finds what it touched last in its share of the cache (L2_BYTES divided by the number of
           resident programs). Tensors up to SMALL bytes (parameters, statistics per row, partial
           sums) stay in the cache for all programs.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np

from bench.aot.offline import MULTIPROCESSORS, STORAGE_BITS, Pointer, offline
from kernels.calls import Case, arguments, operator, options, run

SECTOR = 32  # bytes: what L2 fetches and writes back
# of the GPUs in offline.MULTIPROCESSORS
L2_BYTES = {(8, 0): 40e6, (8, 6): 6e6, (8, 9): 96e6, (9, 0): 50e6, (10, 0): 126e6}
SMALL = 4 * 2**20  # bytes
PROGRAMS = 3  # how many programs of a grid are run


def floor_bytes(case: Case) -> dict[str, int]:
    """The fewest bytes each phase can move: its inputs read once, its outputs written once.

    linear_cross_entropy runs matrix products between its kernels; these are not memory-bound, so
    only its kernels count. Their floor is one read of the logits and one write of their gradient,
    both in the forward. For the same reason only the rotation counts of attention with one.
    """
    s = case.dtype.itemsize
    if case.variant == "rotary":
        B, T, H, D = case.shape
        qk, rest = 2 * B * T * H * D * s, 4 * (2 * B * T * H + T * D)  # statistics, the rotation
        return {"forward": 2 * qk + rest, "backward": 3 * qk + rest}
    if case.operator == "linear_cross_entropy":
        M, _, V = case.shape
        return {"forward": 2 * M * V * s + 8 * M}
    if case.operator == "cross_entropy":
        M, V = case.shape
        return {"forward": M * V * s + 8 * M, "backward": 2 * M * V * s + 8 * M}
    M, N = case.shape
    r = 4 if case.variant == "fp32 residual" else s
    assert case.family == "layernorm", f"{case} is not memory-bound"
    if case.operator.endswith("rmsnorm"):
        weight = parameters = 0
    else:
        weight, parameters = 4 * N, 4 * N * (1 if case.variant == "nobias" else 2)
    if not case.operator.startswith("add_"):  # x, y; dy, x, dx, the weight and its gradient
        return {"forward": 2 * M * N * s + parameters,
                "backward": 3 * M * N * s + weight + parameters}
    # x, residual, total, y; dy, dtotal, total, and one gradient for x and residual, or two where
    # their dtypes differ
    backward = M * N * (s + 3 * r + (s if s != r else 0))
    return {"forward": 2 * M * N * (s + r) + parameters, "backward": backward + weight + parameters}


def cache_share(capability: tuple[int, int], programs: int, num_warps: int) -> int:
    """Bytes of L2 per program, with the programs resident that 64 warps per multiprocessor allow.

    Registers may allow fewer programs, and each then has a larger share.
    """
    resident = MULTIPROCESSORS[capability] * max(1, 64 // num_warps)
    return int(L2_BYTES[capability] / min(programs, resident))


# -- counting one program ------------------------------------------------------


class Window:
    """The sectors a program touched last, up to `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._recent: deque[np.ndarray] = deque()
        self._size = 0

    def misses(self, sectors: np.ndarray, elsewhere: "Window | None" = None) -> np.ndarray:
        """Add the distinct `sectors`; returns those that were not here, nor in `elsewhere`."""
        known = [*self._recent, *(elsewhere._recent if elsewhere else ())]
        missing = sectors[~np.isin(sectors, np.concatenate(known))] if known else sectors
        self._recent.append(sectors)
        self._size += len(sectors) * SECTOR
        while self._size > self.capacity:
            self._size -= len(self._recent.popleft()) * SECTOR
        return missing


@dataclass
class Tally:
    """Bytes of the programs run so far: requested, and missed per storage and direction."""

    share: int  # of the cache, in bytes
    requested: int = 0
    missed: dict = field(default_factory=lambda: defaultdict(int))  # (storage, "r" or "w") -> bytes

    def next_program(self) -> None:
        self.reads, self.writes = Window(self.share), Window(self.share)

    def access(self, addresses: np.ndarray, mask: np.ndarray, nbytes: int, direction: str) -> None:
        touched = np.broadcast_to(addresses, mask.shape)[mask]
        self.requested += touched.size * nbytes
        # a stable sort is fast here: they come in order, or nearly
        sectors = np.sort(touched // SECTOR, axis=None, kind="stable")
        sectors = sectors[np.diff(sectors, prepend=sectors[:1] + 1) != 0]
        if direction == "r":
            missing = self.reads.misses(sectors, elsewhere=self.writes)
        else:
            missing = self.writes.misses(sectors)
        storages, counts = np.unique(missing >> (STORAGE_BITS - int(math.log2(SECTOR))),
                                     return_counts=True)
        for storage, count in zip(storages.tolist(), counts.tolist()):
            self.missed[storage, direction] += count * SECTOR


# -- the interpreter -----------------------------------------------------------


def _ones(ptrs):
    """The value of a load: the interpreter keeps bf16 as raw bits, of which 0x3F80 is 1."""
    from triton.runtime import interpreter

    kind = ptrs.get_element_ty()
    one = 0x3F80 if kind.is_bf16() else 1
    data = np.full(ptrs.data.shape, one, interpreter._get_np_dtype(kind))
    return interpreter.TensorHandle(data, kind)


@contextmanager
def _counting(tally: Tally, grid: tuple[int, int, int], chosen: list[int]):
    """Triton's interpreter for the `chosen` programs of a grid: it counts loads and stores only."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    def access(ptrs, mask, direction):
        nbytes = ptrs.get_element_ty().primitive_bitwidth // 8
        tally.access(ptrs.data, mask.data, nbytes, direction)

    def load(ptrs, mask, other, *hints):
        access(ptrs, mask, "r")
        return _ones(ptrs)

    def store(ptrs, value, mask, *hints):
        access(ptrs, mask, "w")

    def atomic(operation, ptrs, value, mask, *semantics):
        store(ptrs, value, mask)
        return load(ptrs, mask, None)

    def next_program(i, _y, _z):
        tally.next_program()
        set_idx(*(int(c) for c in np.unravel_index(chosen[i], grid)))

    def as_they_are(self, args, kwargs):
        return list(args), kwargs  # there is no device to copy them from

    with (patch.multiple(builder, create_masked_load=load, create_masked_store=store,
                         create_atomic_rmw=atomic, set_grid_idx=next_program,
                         set_grid_dim=lambda *_: set_dim(*grid)),
          patch.multiple(executor, _init_args_hst=as_they_are,
                         _restore_args_dev=lambda self, *_: None)):
        yield executor


def _launch_bytes(kernel, grid: tuple[int, int, int], args: list, kwargs: dict,
                  nbytes: dict[int, int], share: int) -> tuple[int, int]:
    """(requested, moved) bytes of one launch.

    `nbytes` is the size of each storage, `share` a program's share of the cache in bytes.
    """
    programs = math.prod(grid)
    count = min(PROGRAMS, programs)
    chosen = [(2 * i + 1) * programs // (2 * count) for i in range(count)]
    tally = Tally(share)
    with _counting(tally, grid, chosen) as executor, np.errstate(all="ignore"):
        executor(kernel.rewrite(), kernel.arg_names, (count,))(*args, **kwargs)
    scale = programs / count
    moved = 0.0
    for (storage, _), missed in tally.missed.items():
        whole = missed * scale
        moved += min(whole, nbytes[storage]) if nbytes[storage] <= SMALL else whole
    return round(tally.requested * scale), round(moved)


def _key(kernel, grid: tuple, args: list, kwargs: dict, nbytes: dict[int, int], share: int) -> str:
    """A string that is equal for launches that move equally many bytes.

    Of an address it has the storage, numbered in order of appearance, and the offset in a sector.
    """
    seen: dict[int, int] = {}

    def alike(arg):
        if isinstance(arg, Pointer):
            storage = arg.address >> STORAGE_BITS
            number = seen.setdefault(storage, len(seen))
            return arg.dtype, number, nbytes[storage], arg.address % SECTOR
        return arg

    return repr((kernel.__name__, grid, [*map(alike, args)],
                 {k: alike(v) for k, v in kwargs.items()}, share))


def traffic(case: Case, capabilities: list[tuple[int, int]],
            fn: Callable | None = None) -> list[dict]:
    """One row per phase and capability: bytes requested, bytes moved by kernel, and the floor.

    Must run in a process that set TRITON_INTERPRET=1 before it imported triton. `fn` replaces the
    operator.
    """
    import triton

    assert triton.knobs.runtime.interpret, "bytes are counted with TRITON_INTERPRET=1"
    fn = fn or operator(case, "triton")
    # capabilities often share their settings, and with them the count
    known: dict[str, tuple[int, int]] = {}
    rows = []
    for capability in capabilities:
        phases = _phases(case, capability, fn, known)
        rows += [_row(case, capability, phase, floor, phases[phase])
                 for phase, floor in floor_bytes(case).items()]
    return rows


def _phases(case: Case, capability: tuple[int, int], fn: Callable,
            known: dict) -> dict[str, dict[str, tuple[int, int]]]:
    """The (requested, moved) bytes of each phase, by kernel."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))

    def add(name: str, requested: int, moved: int) -> None:
        counts[name] = counts[name][0] + requested, counts[name][1] + moved

    def launched(kernel, grid, args, kwargs):
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, args)) | kwargs)
        counted = case.variant != "rotary" or kernel.__name__.startswith("rotary_")
        if counted and (programs := math.prod(grid)):
            share = cache_share(capability, programs, kwargs.get("num_warps", 4))
            key = _key(kernel, grid, args, kwargs, storages.nbytes, share)
            if key not in known:
                known[key] = _launch_bytes(kernel, (*grid, 1, 1)[:3], args, kwargs,
                                           storages.nbytes, share)
            add(kernel.__name__, *known[key])

    def by_torch(name, nbytes):
        if case.operator != "linear_cross_entropy":  # whose products are no part of the floor
            add(name, nbytes, nbytes)

    phases = {}
    with offline(capability, launched, by_torch) as storages:
        steps = run(fn, arguments(case, "meta"), options(case, "meta"))
        counts.clear()
        for phase, _ in steps:
            phases[phase] = dict(counts)
            counts.clear()
    return phases


def _row(case: Case, capability: tuple[int, int], phase: str, floor: int,
         by_kernel: dict[str, tuple[int, int]]) -> dict:
    requested, moved = (sum(part) for part in zip(*by_kernel.values(), strict=True))
    return {
        "case": str(case), "operator": case.operator, "phase": phase,
        "arch": capability[0] * 10 + capability[1], "floor_bytes": floor,
        "requested_bytes": requested, "moved_bytes": moved,
        "requested_over_floor": round(requested / floor, 4),
        "moved_over_floor": round(moved / floor, 4),
        "moved_by": {name: moved for name, (_, moved) in by_kernel.items()},
    }
