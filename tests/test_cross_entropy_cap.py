"""linear_cross_entropy with capped logits; without a cap: tests/test_cross_entropy.py."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl

from kernels import cross_entropy as ce
from kernels import launch, reference, torch_ops
from kernels.primitives import tanh
from tests.numerics import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    assert_as_accurate,
    assert_same_bits,
    grads,
    needs_gpu,
    tensor,
)
from tests.test_cross_entropy import targets_for


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch):
    """Four rows per chunk: one chunk of the shipped size would take the interpreter a minute."""
    monkeypatch.setattr(launch, "chunk_rows", lambda M, V, itemsize: 4)


def check(*args, cap=15.0, **options):
    ours, definition, theirs = (partial(backend.linear_cross_entropy, cap=cap, **options)
                                for backend in (ce, reference, torch_ops))
    assert_as_accurate(ours, definition, args, theirs)


@triton.jit
def _tanh_of(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), tanh(tl.load(x + tl.arange(0, N))))


def test_tanh_is_accurate_near_0_and_without_bound():
    sizes = torch.logspace(-30, 30, 2**14, device=DEVICE)
    middle = torch.linspace(0.4, 10, 2**14, device=DEVICE)
    ends = torch.tensor([0.0, 0.5, float("inf")], device=DEVICE).repeat(2**14)[: 2**14]
    x = torch.stack([sizes, middle, ends, -middle]).flatten()
    y = torch.empty_like(x)
    _tanh_of[(1,)](x, y, len(x))
    true = torch.tanh(x.double())
    assert ((y - true).abs() <= 4e-7 * true.abs()).all()
    x[0] = float("nan")
    _tanh_of[(1,)](x, y, len(x))
    assert y.isnan().nonzero().tolist() == [[0]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("M, N, V", [(1, 1, 1), (5, 3, 2), (11, 16, 65), (6, 8, 5000)])
def test_errs_no_more_than_pytorch(M, N, V, dtype, reduction):
    """V = 65 and 5000 are padded: a padded logit, -inf, must not become -cap."""
    x, weight = tensor(M, N, dtype=dtype, scale=3), tensor(V, N, dtype=dtype)
    check(x, weight, targets_for(M, V, ignored=[1] if M > 2 else []), reduction=reduction)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("cap, scale", [(15.0, 1e-3), (30.0, 1.0), (0.5, 1.0), (1, 10.0)])
def test_logits_far_below_and_far_beyond_the_cap(cap, scale, dtype):
    check(tensor(7, 8, dtype=dtype, scale=scale), tensor(65, 8), targets_for(7, 65, [2]), cap=cap)


def test_products_beyond_the_range_of_fp16():
    """60,000 squared is inf in fp16: its logit is the cap, and it has no gradient."""
    x = torch.tensor([[60000.0], [-60000.0]], device=DEVICE, dtype=FP16, requires_grad=True)
    weight = torch.tensor([[60000.0], [-60000.0], [0.0]], device=DEVICE, requires_grad=True)
    loss, dx, dweight = grads(partial(ce.linear_cross_entropy, cap=5.0),
                              (x, weight, torch.tensor([0, 2], device=DEVICE)))
    logits = torch.tensor([[5.0, -5.0, 0.0], [-5.0, 5.0, 0.0]], device=DEVICE)
    true = reference.cross_entropy(logits, torch.tensor([0, 2], device=DEVICE))
    torch.testing.assert_close(loss, true)
    assert dx.eq(0).all() and dweight[:2].eq(0).all() and dweight[2].isfinite().all()


def test_without_a_cap_it_is_as_before():
    args = tensor(7, 8), tensor(65, 8), targets_for(7, 65, [2])
    plain = grads(ce.linear_cross_entropy, args)
    for cap in (0, 0.0):
        assert_same_bits(grads(partial(ce.linear_cross_entropy, cap=cap), args), plain)
    capped = grads(partial(ce.linear_cross_entropy, cap=2.0), args)
    assert not torch.equal(capped[0], plain[0])


def test_evaluation_has_the_loss_of_training():
    args = tensor(7, 8, scale=5), tensor(65, 8), targets_for(7, 65, [2])
    with torch.no_grad():
        alone = ce.linear_cross_entropy(*args, cap=3.0)
    torch.testing.assert_close(alone, ce.linear_cross_entropy(*args, cap=3.0).detach(),
                               rtol=1e-6, atol=0)
    torch.testing.assert_close(alone, reference.linear_cross_entropy(*args, cap=3.0).detach())


@pytest.mark.parametrize("wrong", [-2, 70])
def test_targets_out_of_range_give_nan_where_unchecked(wrong, monkeypatch):
    """As on a GPU. Target 70 is within the padding of the private logits."""
    monkeypatch.setattr(ce, "_check_targets", lambda *args: None)
    x, weight, targets = tensor(7, 8), tensor(65, 8), targets_for(7, 65)
    targets[3] = wrong
    loss = ce.linear_cross_entropy(x, weight, targets, cap=15.0)
    assert loss.isnan()
    assert all(g.isnan().any() for g in torch.autograd.grad(loss, (x, weight)))


def test_opcheck_and_thirty_equal_runs():
    args = tensor(5, 8), tensor(24, 8), targets_for(5, 24, [1])
    torch.library.opcheck(ce._linear_cross_entropy_op, (*args, -1, True, True, 15.0))
    first, *rest = (grads(partial(ce.linear_cross_entropy, cap=15.0), args) for _ in range(30))
    for again in rest:
        assert_same_bits(again, first)


def test_compiles_whole_and_does_not_recompile():
    def loss(x, weight, targets):
        return ce.linear_cross_entropy(x * 2, weight, targets, cap=15.0)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for M in (7, 11):
        with torch.compiler.set_stance("default" if M == 7 else "fail_on_recompile"):
            args = tensor(M, 8), tensor(65, 8), targets_for(M, 65, [1])
            torch.testing.assert_close(grads(compiled, args), grads(loss, args))


@needs_gpu
def test_real_sizes_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    for N in (768, 1600):
        x, weight = tensor(8193, N, dtype=BF16), tensor(50304, N, dtype=BF16, scale=0.3)
        check(x, weight, targets_for(8193, 50304, [5]))
