"""Building blocks of Triton kernels: a product, tanh, tiles of (B, T, H, D) tensors, log2(e).

Letters: B batch, T sequence, H heads, D head dimension; a tile is ROWS rows of one head, with D
padded to a power of two. A tensor x is one argument: its pointer and its strides, the last one 1.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2(e)), and exp2 is one instruction


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc, summed in fp32."""
    if triton.knobs.runtime.interpret:  # it would multiply the bits of bf16; widening is exact
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh(x) to about 3e-7 of itself: for |x| < 0.5 from x + x^3 P(x^2), else from exp(2x).

    P is fitted to 2e-8. An exp(2x) that overflows gives 1, as it should.
    """
    z = x * x
    series = (0.01725204 * z - 0.05305093) * z + 0.13325966
    small = x + x * z * (series * z - 0.33333148)
    return tl.where(z < 0.25, small, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E))))


@triton.jit
def tile(x, head, H, start, ROWS: tl.constexpr, D: tl.constexpr):
    """Pointers to the tile of x from row `start` on; `head` counts the heads of all B sequences."""
    pointer, strides = x
    row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
    col = tl.arange(0, triton.next_power_of_2(D))[None, :]
    pointer += (head // H).to(tl.int64) * strides[0] + (head % H).to(tl.int64) * strides[2]
    return pointer + row * strides[1] + col


@triton.jit
def tile_step(x, ROWS: tl.constexpr):
    """What to add to the pointers of a tile for the next one."""
    return tl.cast(ROWS, tl.int64) * x[1][1]


@triton.jit
def inside(start, T, ROWS: tl.constexpr, D: tl.constexpr):
    """Which elements of a tile exist."""
    row = start + tl.arange(0, ROWS)[:, None]
    return (row < T) & (tl.arange(0, triton.next_power_of_2(D))[None, :] < D)


@triton.jit
def load_tile(x, head, H, start, T, ROWS: tl.constexpr, D: tl.constexpr):
    """The tile of x from row `start` on; 0 where there are no elements."""
    return tl.load(tile(x, head, H, start, ROWS, D), mask=inside(start, T, ROWS, D), other=0.0)


@triton.jit
def store_tile(x, values, head, H, start, T, ROWS: tl.constexpr, D: tl.constexpr):
    """Write `values` to the tile of x from row `start` on, rounded to the dtype of x."""
    tl.store(tile(x, head, H, start, ROWS, D), values.to(x[0].dtype.element_ty),
             mask=inside(start, T, ROWS, D))
