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


# -- layer norm ---------------------------------------------------------------


# -- cross-entropy ------------------------------------------------------------
