"""The operator calls that the bench compiles, counts, tunes and times.

Letters: B batch, T sequence, H heads, D head dimension; M rows, N features, V vocabulary.
"""

import torch

from gpt.config import SIZES
from kernels.calls import Case

GPT2 = dict(zip(("124M", "350M", "774M", "1558M"), SIZES.values(), strict=True))  # by parameters
CONTEXT, VOCABULARY = 1024, 50304  # the vocabulary is padded
ROWS = 16 * 1024  # the tokens of one micro-batch


def gpt2(size: str, batch: int = ROWS // CONTEXT) -> list[Case]:
    """The calls of the model of this size in one micro-batch, bf16."""
    heads, width = GPT2[size].n_head, GPT2[size].n_embd
    rows = batch * CONTEXT
    return [
        Case("attention_qkv", (batch, CONTEXT, heads, width // heads)),
        Case("add_layernorm", (rows, width)),
        Case("layernorm", (rows, width)),
        Case("cross_entropy", (rows, VOCABULARY)),
        Case("linear_cross_entropy", (rows, width, VOCABULARY)),
    ]


def nanochat(size: str, batch: int = ROWS // CONTEXT) -> list[Case]:
    """The calls that nanochat's architecture adds, at the width of a size of GPT-2, bf16."""
    shape = (batch * CONTEXT, (width := GPT2[size].n_embd))
    return [
        *(Case("attention_qkv", (batch, CONTEXT, width // D, D), variant="rotary")
          for D in (64, 128) if width % D == 0),
        Case("add_rmsnorm", shape),
        Case("rmsnorm", shape),
        Case("linear_cross_entropy", (*shape, VOCABULARY), variant="capped"),
    ]


def models(size: str, batch: int = ROWS // CONTEXT) -> list[Case]:
    """The calls of both architectures at a size of GPT-2."""
    return gpt2(size, batch) + nanochat(size, batch)


def quick() -> list[Case]:
    """Both architectures at GPT-2's four sizes."""
    return list(dict.fromkeys(case for size in GPT2 for case in models(size)))


def full() -> list[Case]:
    """GPT-2's sizes, and the head dimensions, widths, vocabularies, dtypes, variants around them.

    Every launch setting in launch.py is used by some case here (tests/test_ahead.py).
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    dims = (16, 32, 40, 80, 96, 128, 160, 192, 256)
    widths = (64, 128, 256, 384, 512, 1000, 2048, 3072, 4096, 5120, 8192, 12288, 16384)
    return quick() + [
        *(Case("attention_qkv", (16, CONTEXT, 12, D)) for D in dims),
        *(Case("attention_qkv", (16, CONTEXT, 12, D), dtype) for D in (64, 128, 256)
          for dtype in (fp16, fp32)),
        *(Case("attention_qkv", (16, CONTEXT, 12, D), bf16, variant)
          for D in (64, 128) for variant in ("window", "documents", "dropout")),
        *(Case(operator, (ROWS, N)) for operator in ("add_layernorm", "layernorm") for N in widths),
        *(Case("layernorm", (ROWS, N), fp32) for N in (768, *widths)),
        Case("layernorm", (ROWS, 768), fp16),
        *(Case(operator, (ROWS, 768), bf16, "nobias")
          for operator in ("add_layernorm", "layernorm")),
        *(Case(operator, (ROWS, 768), bf16, "fp32 residual")
          for operator in ("add_layernorm", "add_rmsnorm")),
        *(Case(operator, (ROWS, N)) for operator in ("add_rmsnorm", "rmsnorm") for N in widths),
        *(Case("rmsnorm", (ROWS, N), fp32) for N in (768, *widths)),
        *(Case("cross_entropy", (ROWS, V)) for V in (65, 50257, 131072)),
        *(Case("cross_entropy", (ROWS, VOCABULARY), dtype) for dtype in (fp16, fp32)),
        *(Case("linear_cross_entropy", (ROWS, 768, 65), bf16, variant)
          for variant in ("", "capped")),
    ]
