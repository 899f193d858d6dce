"""Launch settings: pure functions from shape and compute capability to block sizes, warps and
stages.

No autotuning happens in kernels/: these tables are made by `python bench/tune.py` on a GPU, or,
where a row says so, by reasoning from the compiled code (`python bench/aot/ahead.py`). Each row
says which.
"""

import torch

# per block
SHARED_MEMORY_BYTES = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448,
                       (10, 0): 232_448}


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; on any other (the interpreter), that of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


# -- attention ----------------------------------------------------------------
# BLOCK_M queries, BLOCK_N keys, num_warps, num_stages (, maxnreg), for head dimensions up to the
# number before it. The rows of other architectures are those of 80. No GPU has timed a row: they
# are PyTorch's for FlexAttention where these kernels compile to them without spills, else the
# nearest that do, from the code compiled ahead by triton 3.7.1.
# - 90, to D = 64: 116 registers in the forward, so two blocks of 8 warps share a multiprocessor and
#   one's softmax runs beside the other's products; so does _backward_q with 126, when it is held to
#   128 (139 if it is not). _backward_kv needs 218: one block. Blocks of 64 by 64 would read L2 at
#   about 20 bytes per cycle and multiprocessor, which is all it gives. Blocks of 128 by 128 by 4
#   warps spill, and ptxas serialises the matrix units (C7511).
# - 90, D = 256: 255 registers, a few spills in the forward, and products serialised (C7515); it
#   works, no more.
# - 100: the tensor memory has 512 columns; wider blocks than these for D = 256 do not fit it.
# - 80: without dropout at most 16 bytes of spills at D = 64 to 128; with it 600 in _backward_kv at
#   D = 64.
# - D = 40, as any 8 above a multiple of 16, spills on every architecture: Triton loads its rows by
#   2 bytes (bench/LOG.md).
# - fp32 is multiplied by the ordinary units, a register for each element of a product: small
#   blocks.

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
    80: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 64, 8, 2)},
    90: {64: (64, 128, 8, 3), 128: (32, 128, 8, 3), 256: (32, 64, 8, 2)},
    100: {128: (64, 128, 8, 3), 256: (32, 64, 8, 2)},
}


def attention_forward(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int]:
    """Blocks of the forward: it keeps the tile of q and streams those of k and v."""
    row = _attention_row(_FORWARD, D, dtype, capability)
    return _with_stages_that_fit(row, row["BLOCK_M"], row["BLOCK_N"], D, dtype, capability)


def attention_backward_q(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int]:
    """Blocks of the kernel for dq: it keeps the tiles of q and dy and streams those of k and v."""
    row = _attention_row(_BACKWARD_Q, D, dtype, capability)
    return _with_stages_that_fit(row, 2 * row["BLOCK_M"], row["BLOCK_N"], D, dtype, capability)


def attention_backward_kv(D: int, dtype: torch.dtype,
                          capability: tuple[int, int]) -> dict[str, int]:
    """Blocks of the kernel for dk and dv: it keeps the tiles of k and v and streams those of q and
    dy."""
    row = _attention_row(_BACKWARD_KV, D, dtype, capability)
    return _with_stages_that_fit(row, 2 * row["BLOCK_N"], row["BLOCK_M"], D, dtype, capability)


def _attention_row(rows: _Rows, D: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict:
    arch = 32 if dtype == torch.float32 else {9: 90, 10: 100}.get(capability[0], 80)
    row = next(row for widest, row in rows[arch].items() if D <= widest)
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg"), row,
                    strict=False))


def _with_stages_that_fit(row: dict, kept: int, streamed: int, D: int, dtype: torch.dtype,
                          capability: tuple[int, int]) -> dict[str, int]:
    """`row` with fewer stages where `kept` rows and two tiles of `streamed` rows per stage, of D
    padded to a power of two, would not fit the shared memory of a block (of an unknown device: that
    of the smallest)."""
    limit = SHARED_MEMORY_BYTES.get(capability, min(SHARED_MEMORY_BYTES.values()))
    row_bytes = (1 << (D - 1).bit_length()) * dtype.itemsize
    room = (limit - 2048) // row_bytes - kept  # 2 kB for what else the kernels keep there
    return row | {"num_stages": max(1, min(row["num_stages"], room // (2 * streamed)))}


# -- layer norm ---------------------------------------------------------------
# By reasoning from the code compiled for sm_80, sm_90 and sm_100, which differ in nothing that
# matters here: no spill up to N = 8192, 16-byte loads and stores (where N is a multiple of 16),
# registers for the residency named. No GPU has timed a row yet.

LAYERNORM_WIDEST = 16_384


def layernorm_forward(N: int, itemsize: int) -> dict[str, int]:
    """The tile of the forward for rows of N elements of at least `itemsize` bytes.

    One warp holds a row of up to 2048 bf16 elements, in chunks of what 32 threads load as 16 bytes
    each; a program has four warps. At N = 768 that is 64 registers per thread, so 32 rows (48 kB)
    in flight per multiprocessor, where 4.3 TB/s at a latency of 0.7 us ask for 23 kB.
    """
    block = 1 << (N - 1).bit_length()
    per_warp = 512 // itemsize
    lanes = min(block, max(per_warp, block // 8))
    return {"CHUNKS": block // lanes, "ROWS": max(1, 4 * per_warp // lanes), "LANES": lanes,
            "num_warps": max(4, lanes // per_warp)}


def layernorm_backward(N: int) -> dict[str, int]:
    """The tile of the backward: 4096 elements by four warps, 32 of each tensor per thread. A thread
    keeps the same columns in every row, so dw and db cost two registers per column whatever the
    number of rows."""
    block = 1 << (N - 1).bit_length()
    return {"ROWS": max(1, 4096 // block), "BLOCK_N": block, "num_warps": max(4, block // 1024)}


def layernorm_programs(N: int, itemsize: int, multiprocessors: int) -> int:
    """How many backward programs: as many as are resident at once, since one more would run alone
    at the end. Registers
    decide: at most 168 for each of 128 threads (three per multiprocessor) where `itemsize`, that of
    the residual, is 2, and 255 (two) elsewhere. Each program costs 8 N bytes of partial sums, 2.4
    MB in all at N = 768 on an H200."""
    return multiprocessors * (3 if N <= 2048 and itemsize == 2 else 2 if N <= 4096 else 1)


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; on any other (the interpreter) 1, so that in small tests too a program has
    several tiles."""
    return torch.cuda.get_device_properties(
        device).multi_processor_count if device.type == "cuda" else 1


# -- cross-entropy ------------------------------------------------------------
# By reasoning from the code compiled for sm_80, sm_90 and sm_100, as for layer norm: no GPU has
# timed a row yet.


def cross_entropy_forward(V: int) -> dict[str, int]:
    """The block of the loss alone, one program per row: 16 logits per thread in flight, in two
    16-byte loads."""
    return _vocabulary_block(V, 4096)


def cross_entropy_backward(V: int) -> dict[str, int]:
    """The block of the gradient alone, which is elementwise: V = 50304 fills 98 % of its 25
    blocks."""
    return _vocabulary_block(V, 2048)


def cross_entropy_in_place(V: int) -> dict[str, int]:
    """The block of loss and gradient together, `cross_entropy_programs` at a time: 32 warps per
    multiprocessor, each with 1 kB in flight."""
    return _vocabulary_block(V, 8192)


def _vocabulary_block(V: int, largest: int) -> dict[str, int]:
    block = min(largest, max(8, 1 << (V - 1).bit_length()))
    return {"BLOCK_V": block, "num_warps": max(1, block // 512)}


def cross_entropy_programs(multiprocessors: int) -> int:
    """How many rows of logits are worked on at once. Each is read twice; for the second time to hit
    the cache all must fit: 2 * 132 rows of V = 50304 in bf16 are 27 MB of an H100's 50 MB of L2.
    Two per multiprocessor, because one's exponentials (2 V / 16 cycles) must hide behind the
    other's loads."""
    return 2 * multiprocessors


def chunk_rows(M: int, V: int, itemsize: int) -> int:
    """How many rows of logits (M, V) linear_cross_entropy holds at once: an eighth of all, or 4096
    rows or 64 MB if that is more; spread evenly, in multiples of 128.

    Fewer starve the matmuls. A tile of 128 x 256 of dweight (V, N) reads and writes 262 kB of fp32
    sums per chunk, 8 us of one H200 multiprocessor's bandwidth, and computes for 11 us per 1024
    rows: 18 % of overhead at 4096 rows, 9 % at 8192. And dx (rows, 768) has 192 tiles of 128 x 128
    at 4096 rows, of which 132 run at once.
    """
    rows = max(M // 8, 4096, 2**26 // (V * itemsize))
    chunks = max(1, -(-M // rows))
    return -(-M // chunks // 128) * 128 if M else 128


def padded_vocabulary(V: int) -> int:
    """The row length of the buffer of logits: rows that start on 128 bytes load and multiply fast
    whatever V is."""
    return -(-V // 64) * 64
