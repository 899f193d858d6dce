"""gpt/linear.py: a product of one row gives what nn.Linear gives, in its own way."""

import pytest
import torch
import torch.nn.functional as F

from gpt.linear import Linear, row_times

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="no MKL, no own way")


def layer(n=65, k=48, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return Linear(k, n, bias=bias).to(dtype)


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """How each product was computed: "shares", or by F.linear with oneDNN on (True) or off."""
    seen, bmm, linear = [], torch.bmm, F.linear
    monkeypatch.setattr(torch, "bmm", lambda *a: (seen.append("shares"), bmm(*a))[1])
    onednn = torch.backends.mkldnn
    monkeypatch.setattr(F, "linear", lambda *a: (seen.append(onednn.enabled), linear(*a))[1])
    return seen


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 48), (48,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_is_what_it_is_among_others(count, shape, bias, dtype, threads):
    """65 rows leave a rest in 2, 3 and 7 shares."""
    threads(count)
    linear = layer(bias=bias, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        y = linear(x)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert y.shape == (*shape[:-1], 65) and y.dtype == dtype
    torch.testing.assert_close(y, exact.to(dtype))


def test_shares_of_a_transposed_matrix(threads):
    threads(2)
    x, w = torch.randn(1, 48), torch.randn(48, 65).T
    torch.testing.assert_close(row_times(x, w), F.linear(x, w))


def test_more_threads_than_rows(threads):
    threads(4)
    x, w = torch.randn(1, 48), torch.randn(3, 48)
    torch.testing.assert_close(row_times(x, w), F.linear(x, w))


@needs_mkl
@torch.no_grad()
def test_one_row_goes_its_own_way_and_nothing_else_does(calls):
    one, two = torch.randn(1, 1, 48), torch.randn(1, 2, 48)
    layer(n=64 * torch.get_num_threads())(one)
    assert calls == ["shares"]
    calls.clear()
    layer(dtype=torch.bfloat16)(one.bfloat16())
    assert calls == [False]
    calls.clear()
    layer()(two), layer(dtype=torch.bfloat16)(two.bfloat16())
    layer(dtype=torch.double)(one.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer()(one)
    with torch.enable_grad():
        layer()(one).sum().backward()
    assert calls == [True] * 5


@needs_mkl
@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_onednn_is_as_it_was_afterwards(before, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
    linear = layer(dtype=torch.bfloat16)
    linear(torch.randn(1, 48).bfloat16())
    assert torch.backends.mkldnn.enabled == before
    linear.bias.data = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        linear(torch.randn(1, 48).bfloat16())
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_as_long_as_a_row_is_refused(dtype):
    """48 outputs for each would be a valid shape, and wrong."""
    with pytest.raises(RuntimeError), torch.no_grad():
        layer(n=96, bias=False, dtype=dtype)(torch.randn(48, 1).to(dtype))
