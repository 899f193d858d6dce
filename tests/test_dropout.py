"""Dropout on a CPU: masks that are what they should be, drawn from one number. fp32 and bf16."""

import math

import pytest
import torch
from torch import nn

from kernels import dropout
from kernels.cpu_dropout import _dropout_op, keep_mask


@pytest.mark.parametrize("p", [0.0, 2**-16, 0.1, 0.2, 0.5, 0.9, 1 - 2**-16])
def test_the_rate_is_exact(p):
    """To 2^-17; a sample of n may differ from that by five standard errors."""
    n = 4_000_001
    dropped = 1 - keep_mask(3, (n,), p, torch.float32).double().mean().item()
    assert abs(dropped - p) <= 5 * math.sqrt(p * (1 - p) / n) + 2**-17


def test_the_mask_is_a_function_of_seed_and_shape():
    a, b = (keep_mask(7, (5, 100, 33), 0.3, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(a, b.float()) and set(a.unique().tolist()) == {0.0, 1.0}
    other = keep_mask(8, (5, 100, 33), 0.3, torch.float32)
    assert (a != other).float().mean() == pytest.approx(0.42, abs=0.03)  # 2 p (1 - p)


def test_rows_and_columns_of_a_mask_have_nothing_in_common():
    """Each word comes from a word of its row and one of its column, so these could be correlated.

    In independent masks, the correlation of two rows times sqrt(n) is a standard normal variable:
    its standard deviation is 1, and no pair of n^2 / 2 is beyond 7.
    """
    rows, columns, p = 1024, 8192, 0.2
    z = (keep_mask(1, (rows, columns), p, torch.float32) - (1 - p)) / math.sqrt(p * (1 - p))
    for table in (z, z.T[:2048]):
        n = table.shape[1]
        correlation = (table @ table.T / math.sqrt(n)).fill_diagonal_(0.0)
        assert correlation.abs().max() < 7
        assert correlation.square().mean().sqrt() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_scaled_and_the_gradient_has_the_same_mask(dtype):
    x = torch.rand(64, 100).add(1).to(dtype).requires_grad_()
    torch.manual_seed(0)
    y = dropout(x, 0.2)
    kept = y != 0
    assert 0.15 < 1 - kept.float().mean() < 0.25
    torch.testing.assert_close(y, torch.where(kept, x / 0.8, 0.0))
    (gradient,) = torch.autograd.grad(y.sum(), x)  # arrives with stride 0
    torch.testing.assert_close(gradient, torch.where(kept, 1.25, 0.0).to(dtype))
    assert dropout(x, 0.2, training=False) is x and torch.equal(dropout(x, 0.0), x)


def test_one_draw_of_the_generator_makes_a_mask():
    """A resumed run restores the generator, and so draws the same masks."""
    x, state = torch.ones(1000), torch.get_rng_state()
    first, after = dropout(x, 0.5), torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(first, dropout(x, 0.5)) and torch.equal(after, torch.get_rng_state())
    assert not torch.equal(first, dropout(x, 0.5))


def test_opcheck_and_one_graph():
    x, seed = torch.randn(33, 7, requires_grad=True), torch.tensor(9)
    torch.library.opcheck(_dropout_op, (x, seed, 0.3))
    turned = torch.randn(7, 33).T.requires_grad_()
    torch.library.opcheck(_dropout_op, (turned, seed, 0.3))
    module = nn.Linear(7, 7)
    compiled = torch.compile(lambda x: dropout(module(x), 0.3), fullgraph=True, backend="aot_eager")
    assert 0.1 < (compiled(x) == 0).float().mean() < 0.5
