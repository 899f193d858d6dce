"""Launch settings: pure functions from shape and compute capability to block sizes, warps and stages.

No autotuning happens in kernels/: these tables are made by `python bench/tune.py` on a GPU, or, where a row says so,
by reasoning from the compiled code (`python bench/ahead.py`). Each row says which.
"""

import torch

SHARED_MEMORY_BYTES = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448}  # per block


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; on any other (the interpreter), that of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


# -- attention ----------------------------------------------------------------


def attention_forward(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict:
    return dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)


def attention_backward(D: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[dict, dict]:
    return (dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
            dict(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=3))


# -- layer norm ---------------------------------------------------------------
# By reasoning from the code compiled for sm_80, sm_90 and sm_100, which differ in nothing that matters here: no spill up to
# N = 8192 in bf16, 16-byte loads and stores, registers for the residency named. No GPU has timed a row yet.

LAYERNORM_WIDEST = 16_384


def layernorm_forward(N: int, itemsize: int) -> dict[str, int]:
    """The tile of the forward for rows of N elements of at least `itemsize` bytes.

    One warp holds a row of up to 2048 bf16 elements, in chunks of what 32 threads load as 16 bytes each; a program has
    four warps. At N = 768 that is 64 registers per thread, so 32 rows (48 kB) in flight per multiprocessor, where 4.3 TB/s
    at a latency of 0.7 us ask for 23 kB.
    """
    block = 1 << (N - 1).bit_length()
    per_warp = 512 // itemsize
    lanes = min(block, max(per_warp, block // 8))
    return {"CHUNKS": block // lanes, "ROWS": max(1, 4 * per_warp // lanes), "LANES": lanes,
            "num_warps": max(4, lanes // per_warp)}


def layernorm_backward(N: int) -> dict[str, int]:
    """The tile of the backward: 4096 elements by four warps, 32 of each tensor per thread. A thread keeps the same
    columns in every row, so dw and db cost two registers per column whatever the number of rows."""
    block = 1 << (N - 1).bit_length()
    return {"ROWS": max(1, 4096 // block), "BLOCK_N": block, "num_warps": max(4, block // 1024)}


def layernorm_programs(N: int, itemsize: int, multiprocessors: int) -> int:
    """How many backward programs: as many as are resident at once, since one more would run alone at the end. Registers
    (at most 168 of 128 threads in bf16, 210 in fp32) admit three or two per multiprocessor. Each costs 8 N bytes of
    partial sums, 2.4 MB in all at N = 768 on an H200."""
    return multiprocessors * (3 if N <= 2048 and itemsize == 2 else 2 if N <= 4096 else 1)


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; on any other (the interpreter) 1, so that in small tests too a program has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1



# -- cross-entropy ------------------------------------------------------------
