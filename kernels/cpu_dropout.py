"""Dropout on a CPU with few random draws: many mask elements from one random word.

PyTorch draws each element of a CPU mask by itself and on one core, 6 to 8 ns per element. Here one
64-bit word gives four elements, and the words come from a table: word[i, j] = mix(row[i] ^
column[j]), with one random word per row and per column. mix is Fibonacci hashing (Knuth, The Art of
Computer Programming 3, section 6.4), with the high half added to the low half.

Times: bench/results/forms-cpu-bf16.json. Correlation of rows and columns: tests/test_dropout.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, odd, as int64 holds it
COLUMNS = 2048  # words in a row of the table


def keep_mask(seed: int, shape: tuple[int, ...], p: float, dtype: torch.dtype) -> Tensor:
    """A mask on the CPU: 0 with probability p, exact to 2^-17, else 1. It depends on nothing else.

    It has the `dtype` of what it multiplies: a mask of bools makes PyTorch eight times slower.
    """
    n = math.prod(shape)
    rows = -(-n // (4 * COLUMNS))
    generator = torch.Generator().manual_seed(seed)
    ends = torch.empty(rows + COLUMNS, dtype=torch.int64)
    ends.random_(-(2**63), None, generator=generator)
    words = (ends[:rows, None] ^ ends[rows:]).mul_(GOLDEN)
    words.add_(words >> 32)  # the low bits of a product have seen only low bits
    threshold = min(round(p * 2**16) - 2**15, 2**15 - 1)
    keep = torch.empty(shape, dtype=dtype)
    torch.ge(words.view(torch.int16).view(-1)[:n], threshold, out=keep.view(-1))
    return keep


@torch.library.custom_op("ridge::dropout", mutates_args=())
def _dropout_op(x: Tensor, seed: Tensor, p: float) -> Tensor:
    y = _dropout_outputs(x, seed, p)
    torch.mul(x, keep_mask(int(seed), x.shape, p, x.dtype), out=y)
    return y.mul_(1 / (1 - p))


@_dropout_op.register_fake
def _dropout_outputs(x, seed, p):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _differentiate(ctx, dy):
    (seed,) = ctx.saved_tensors
    return _dropout_op(dy, seed, ctx.p), None, None  # drawn again: no mask is saved


_dropout_op.register_autograd(_differentiate, setup_context=_save)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """F.dropout of x: 0 with probability p, else x / (1 - p).

    On a CPU, one draw of PyTorch's generator is the seed of the mask. Elsewhere it is F.dropout.
    """
    if not training or p == 0 or x.device.type != "cpu":
        return F.dropout(x, p, training)
    return _dropout_op(x, torch.randint(2**62, ()), p)


__all__ = ["dropout", "keep_mask"]
