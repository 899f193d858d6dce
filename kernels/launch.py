"""Launch settings: block sizes, warps and stages from shape and compute capability.

The tables' rows come from the code compiled ahead (`python bench/aot/ahead.py`); no GPU has timed
one yet. `use` replaces them by what was measured: at the start of a run (--kernels=auto), or by
`python bench/tune.py`. Only `capability` and `multiprocessors` ask the device.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch

Settings = dict[str, int] | int
Row = TypeVar("Row", bound=Callable[..., Settings])


class Call(NamedTuple):
    """A function of this file and the arguments it was called with."""

    function: str
    arguments: tuple

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(repr, self.arguments))})"


# The one state of this package: an operator of torch.library takes tensors and numbers alone, so
# what was chosen for the process cannot reach its body as an argument.
_chosen: Mapping[str, Settings] = {}
_given: dict[Call, Settings] = {}


def use(chosen: Mapping[str, Settings]) -> None:
    """Replace the tables' settings in this process from now on.

    `chosen` has all settings for the text of a call, or a part of them for a function's name.
    """
    global _chosen
    _chosen = chosen
    _given.clear()


def given() -> dict[Call, Settings]:
    """The settings of each call that was made since `use`."""
    return dict(_given)


def tunable(row: Row) -> Row:
    """A function of shapes that gives launch settings, which `use` can replace."""
    @functools.wraps(row)
    def settings(*arguments: Any) -> Settings:
        call = Call(row.__name__, arguments)
        if call not in _given:
            _given[call] = _replaced(call, row(*arguments))
        return _given[call]
    return cast(Row, settings)


def _replaced(call: Call, now: Settings) -> Settings:
    if str(call) in _chosen:
        return _chosen[str(call)]
    changes = _chosen.get(call.function, now)
    return now | changes if isinstance(now, dict) and isinstance(changes, dict) else changes


# capability -> what one block may use
SHARED_MEMORY_BYTES = {
    (8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448,
}


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; for the interpreter, that of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


# Settings that --kernels=auto tries besides the tables', together for each family: changes by
# function. They compile without spills for sm_90 (tests/test_ahead.py); no GPU has timed them.
ALTERNATIVES: dict[str, tuple[dict[str, Settings], ...]] = {
    "attention": (
        {"attention_forward": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
         "attention_backward_q": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2,
                                  "maxnreg": 168},
         "attention_backward_kv": {"num_stages": 2}},
        {"attention_forward": {"num_stages": 2}, "attention_backward_q": {"num_stages": 2},
         "attention_backward_kv": {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}},
    ),
    "layernorm": (
        {"layernorm_backward": {"num_warps": 8}, "rmsnorm_backward": {"num_warps": 8}},
    ),
    "cross_entropy": (
        {"cross_entropy_in_place": {"BLOCK_V": 4096, "num_warps": 8}},
        {"cross_entropy_in_place": {"BLOCK_V": 16384, "num_warps": 32}},
    ),
}

# -- attention ----------------------------------------------------------------
# Architecture (32: fp32 on any) -> largest head dimension -> BLOCK_M queries, BLOCK_N keys,
# num_warps, num_stages and, in some rows, maxnreg. Other architectures take the rows of 80. No GPU
# has timed a row: they are PyTorch's settings for FlexAttention where these kernels compile with
# them without spills, else the nearest ones that do (code compiled ahead by triton 3.7.1).
# - 90, D up to 64: the forward has 116 registers, so two blocks of 8 warps share a multiprocessor,
#   and the softmax of one runs beside the products of the other. So do two of backward_q, which has
#   126 when held to 128, else 139. backward_kv has 218: one block. Blocks of 64 by 64 would need
#   all of L2's bandwidth, about 20 bytes per cycle and multiprocessor. Blocks of 128 by 128 with 4
#   warps spill, and ptxas serialises the matrix units (C7511).
# - 90, by triton 3.6.0: the same, but backward_kv has 235, and each thread copies lse and delta in
#   16 times 8 bytes an iteration, for twice 4. Neither spills at GPT-2's and nanochat's shapes.
# - 90, D = 256: 255 registers, a few spills in the forward, and serialised products (C7515). It
#   works, but slowly.
# - 100: the tensor memory has 512 columns; for D = 256, wider blocks do not fit.
# - 80: at D = 64 to 128 at most 16 bytes of spills; with dropout 120 in backward_kv at D = 128,
#   8 at D = 64. There, blocks of 64 queries spill 216 without dropout.
# - D = 40, like every odd multiple of 8, spills on every architecture: Triton loads its rows 2
#   bytes at a time (bench/LOG.md).
# - fp32 does not use the matrix units; each element of a product takes a register: small blocks.

_Rows = dict[int, dict[int, tuple[int, ...]]]

_FORWARD: _Rows = {
    32: {128: (32, 32, 8, 2), 256: (16, 16, 4, 2)},
    80: {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 4, 2)},
    90: {128: (128, 64, 8, 3), 256: (64, 32, 4, 3)},
    100: {128: (128, 64, 8, 3), 256: (64, 32, 4, 2)},
}
_BACKWARD_Q: _Rows = {
    32: {128: (32, 32, 8, 2), 256: (16, 16, 4, 2)},
    80: {128: (64, 64, 4, 2), 256: (64, 32, 4, 2)},
    90: {64: (128, 64, 8, 3, 128), 128: (128, 64, 8, 3), 256: (64, 32, 4, 3)},
    100: {128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
}
_BACKWARD_KV: _Rows = {
    32: {128: (32, 32, 8, 2), 256: (16, 16, 4, 2)},
    80: {128: (32, 64, 4, 2), 256: (32, 64, 8, 2)},
    90: {64: (64, 128, 8, 3), 128: (32, 128, 8, 3), 256: (32, 64, 8, 2)},
    100: {128: (64, 128, 8, 3), 256: (32, 64, 8, 2)},
}


@tunable
def attention_forward(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int]:
    """Settings of the forward, which keeps a tile of q and streams those of k and v."""
    row = _attention_row(_FORWARD, D, dtype, capability)
    return _with_stages_that_fit(row, row["BLOCK_M"], row["BLOCK_N"], D, dtype, capability)


@tunable
def attention_backward_q(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int]:
    """Settings of the kernel of dq, which keeps tiles of q and dy and streams those of k and v."""
    row = _attention_row(_BACKWARD_Q, D, dtype, capability)
    return _with_stages_that_fit(row, 2 * row["BLOCK_M"], row["BLOCK_N"], D, dtype, capability)


@tunable
def attention_backward_kv(D: int, dtype: torch.dtype,
                          capability: tuple[int, int]) -> dict[str, int]:
    """Settings of the kernel of dk and dv, which keeps tiles of k and v and streams q and dy."""
    row = _attention_row(_BACKWARD_KV, D, dtype, capability)
    return _with_stages_that_fit(row, 2 * row["BLOCK_N"], row["BLOCK_M"], D, dtype, capability)


def _attention_row(rows: _Rows, D: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict:
    arch = 32 if dtype == torch.float32 else {9: 90, 10: 100}.get(capability[0], 80)
    row = next(row for widest, row in rows[arch].items() if D <= widest)
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg")
    return dict(zip(names, row, strict=False))


def _with_stages_that_fit(row: dict, kept: int, streamed: int, D: int, dtype: torch.dtype,
                          capability: tuple[int, int]) -> dict[str, int]:
    """`row`, with fewer stages where they would not fit the shared memory of a block.

    A block holds `kept` rows and, per stage, two tiles of `streamed` rows; a row is D elements,
    padded to a power of two. An unknown device counts as the smallest.
    """
    limit = SHARED_MEMORY_BYTES.get(capability, min(SHARED_MEMORY_BYTES.values()))
    row_bytes = (1 << (D - 1).bit_length()) * dtype.itemsize
    room = (limit - 2048) // row_bytes - kept  # the kernels keep up to 2 kB of other data there
    return row | {"num_stages": max(1, min(row["num_stages"], room // (2 * streamed)))}


@tunable
def rotary(D: int) -> dict[str, int]:
    """The rows of a program of kernels/rotary.py, forward and backward: 8 pairs per thread.

    Those are two 16-byte loads forward and four backward. On sm_90 that takes 32 and 48 registers,
    so 64 and 40 warps per multiprocessor have 64 and 80 kB in flight. No GPU has timed it.
    """
    return {"ROWS": 1024 >> (D // 2 - 1).bit_length(), "num_warps": 4}


# -- norms --------------------------------------------------------------------
# From the code compiled for sm_80, sm_90 and sm_100, which is alike in what matters here: no spill
# up to N = 8192, 16-byte loads and stores where N is a multiple of 16, and few enough registers for
# the occupancy that the docstrings give. No GPU has timed a row yet.

LAYERNORM_WIDEST = 16_384


@tunable
def layernorm_forward(N: int, itemsize: int) -> dict[str, int]:
    """The tile of the forward, for rows of N elements of at least `itemsize` bytes.

    One warp holds a row of up to 2048 bf16 elements, in chunks that its 32 threads load 16 bytes
    each; a program has four warps. At N = 768 that is 64 registers per thread, so 32 rows (48 kB)
    in flight per multiprocessor; 4.3 TB/s at a latency of 0.7 us need 23 kB.
    """
    block = 1 << (N - 1).bit_length()
    per_warp = 512 // itemsize
    lanes = min(block, max(per_warp, block // 8))
    return {"CHUNKS": block // lanes, "ROWS": max(1, 4 * per_warp // lanes), "LANES": lanes,
            "num_warps": max(4, lanes // per_warp)}


@tunable
def layernorm_backward(N: int) -> dict[str, int]:
    """The tile of the backward: at most three chunks of columns, as many as N needs.

    At N = 768 a warp has whole rows, and none idles, as one of four would in 1024 columns: on sm_90
    a tile of 4 rows takes 515 instructions and no barrier, instead of 810 and 6.
    """
    block = 1 << (N - 1).bit_length()
    lanes = max(min(256, block), 1 << (-(-N // 3) - 1).bit_length())
    rows = 1024 // lanes if lanes < 1024 else max(1, 4096 // block)
    return {"CHUNKS": -(-N // lanes), "ROWS": rows, "LANES": lanes,
            "num_warps": max(4, min(16, lanes // 256))}


@tunable
def layernorm_programs(N: int, itemsize: int, multiprocessors: int) -> int:
    """The number of backward programs: all that are resident at once; one more would run alone.

    Registers limit it: 128 threads with at most 168 each (three programs per multiprocessor) where
    `itemsize`, that of the residual, is 2, else with 255 (two). Each program writes 8 N bytes of
    partial sums, 2.4 MB in all at N = 768 on an H200.
    """
    return multiprocessors * (3 if N <= 2048 and itemsize == 2 else 2 if N <= 4096 else 1)


@tunable
def rmsnorm_forward(N: int, itemsize: int) -> dict[str, int]:
    """The tile of the RMS norm's forward: layer norm's, at N = 768 in 48 registers, without w."""
    return layernorm_forward(N, itemsize)


@tunable
def rmsnorm_backward(N: int, itemsize: int) -> dict[str, int]:
    """The tile of the RMS norm's backward, which has no sums over rows: the forward's does, too.

    A thread then loads up to 64 elements of each of three tensors. On sm_90 that takes 80 registers
    at N = 768 and 168 at N = 1280 and 1600 (six and three programs per multiprocessor), at most 186
    for any N, without spills. By triton 3.6.0 it takes 126 and 210 (four and two programs).
    """
    return layernorm_forward(N, itemsize)


def multiprocessors(device: torch.device) -> int:
    """How many a CUDA device has; 1 for the interpreter, so that a program has several tiles."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# -- cross-entropy ------------------------------------------------------------
# From the code compiled for sm_80, sm_90 and sm_100, as for layer norm. No GPU has timed a row yet.


@tunable
def cross_entropy_forward(V: int) -> dict[str, int]:
    """The block of the loss, one program per row: 16 logits per thread, in two 16-byte loads."""
    return _vocabulary_block(V, 4096)


@tunable
def cross_entropy_backward(V: int) -> dict[str, int]:
    """The block of the gradient, which is elementwise: V = 50304 fills 98 % of its 25 blocks."""
    return _vocabulary_block(V, 2048)


@tunable
def cross_entropy_in_place(V: int) -> dict[str, int]:
    """The block of loss and gradient together, in `cross_entropy_programs` programs.

    They are 32 warps per multiprocessor, each with 1 kB in flight. With a cap, triton 3.6.0 spills
    8 bytes on sm_90.
    """
    return _vocabulary_block(V, 8192)


def _vocabulary_block(V: int, largest: int) -> dict[str, int]:
    block = min(largest, max(8, 1 << (V - 1).bit_length()))
    return {"BLOCK_V": block, "num_warps": max(1, block // 512)}


@tunable
def cross_entropy_programs(multiprocessors: int) -> int:
    """How many rows of logits are in work at once: two per multiprocessor.

    A row is read twice, and the second time from the cache if all of them fit: 2 * 132 rows of
    V = 50304 in bf16 are 27 MB of an H100's 50 MB of L2. There are two, so that the exponentials of
    one (2 V / 16 cycles) run during the loads of the other.
    """
    return 2 * multiprocessors


def chunk_rows(M: int, V: int, itemsize: int) -> int:
    """How many rows of logits (M, V) linear_cross_entropy holds at once, a multiple of 128.

    That is an eighth of all rows, or 4096 rows or 64 MB if that is more, in chunks of equal size.
    With fewer rows the products are slow: per chunk, a tile of 128 x 256 of dweight (V, N) reads
    and writes 262 kB of fp32 sums, 8 us of one H200 multiprocessor's bandwidth, and it computes for
    11 us per 1024 rows. This is 18 % of overhead at 4096 rows, 9 % at 8192. And at 4096 rows dx
    (rows, 768) has 192 tiles of 128 x 128, of which 132 run at once.
    """
    rows = max(M // 8, 4096, 2**26 // (V * itemsize))
    chunks = max(1, -(-M // rows))
    return -(-M // chunks // 128) * 128 if M else 128


def padded_vocabulary(V: int) -> int:
    """The row length of a buffer of logits: rows that start on 128 bytes load fast for any V."""
    return -(-V // 64) * 64
