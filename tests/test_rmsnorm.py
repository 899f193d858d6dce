import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")
from kernels import reference, torch_ops
from kernels import rmsnorm as rms
from tests.numerics import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    LUCK,
    assert_as_accurate,
    assert_same_bits,
    grads,
    needs_gpu,
    tensor,
)

SHAPES = [(1, 1), (1, 8), (7, 96), (33, 768), (5, 1000), (3, 1600), (2, 16384), (257, 3)]


def arguments(M, N, x=BF16, residual=None):
    """x, and the residual if it has a dtype."""
    stream = [] if residual is None else [tensor(M, N, dtype=residual, seed=1)]
    return tensor(M, N, dtype=x), *stream


def check(*args, slack=2.0):
    """Of (x,) or (x, residual): ours errs no more than PyTorch's operator."""
    name = "rmsnorm" if len(args) == 1 else "add_rmsnorm"
    ours, definition, theirs = (getattr(module, name) for module in (rms, reference, torch_ops))
    assert_as_accurate(ours, definition, args, theirs, slack)


# -- numbers -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rmsnorm_errs_no_more_than_pytorch(shape, dtype):
    check(*arguments(*shape, x=dtype))


@pytest.mark.parametrize("x, residual", [
    (FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP32), (FP16, FP16), (FP32, BF16),
], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rmsnorm_errs_no_more_than_pytorch(shape, x, residual):
    check(*arguments(*shape, x=x, residual=residual))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(M=st.integers(1, 40), N=st.integers(1, 300), x=st.sampled_from([FP32, BF16, FP16]),
       residual=st.sampled_from([None, FP32, BF16]))
def test_any_shape_and_mix_of_dtypes(M, N, x, residual):
    check(*arguments(M, N, x, residual), slack=LUCK)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e4])
def test_eps_is_inside_the_root(size):
    """In rows of 1e-3 it is as large as the mean square; zeros stay zeros, and their slope finite.
    """
    x = tensor(5, 96, scale=size)
    check(x)
    y, dx = grads(rms.rmsnorm, (x,))
    assert y.isfinite().all() and dx.isfinite().all()
    torch.testing.assert_close(rms.rmsnorm(x, eps=0.5), reference.rmsnorm(x, eps=0.5))
    for got, true in zip(rms.add_rmsnorm(x, x, 0.5), reference.add_rmsnorm(x, x, 0.5), strict=True):
        torch.testing.assert_close(got, true)


def test_no_rows():
    x = tensor(0, 8)
    y = rms.rmsnorm(x)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert x.grad.shape == (0, 8)


# -- layouts and gradients -----------------------------------------------------


def test_rows_may_lie_apart_and_columns_too():
    packed = tensor(2, 7, 3, 96, dtype=BF16, grad=False)
    for x in (packed[:, :, 1], packed[0, :1, 0].expand(5, 96), packed.view(96, -1).T,
              packed[..., ::2].reshape(-1, 96)):
        x = x.detach().requires_grad_()
        check(x)
        # with the strides of x where its elements do not overlap
        check(x, x.detach().float().requires_grad_())
        check(x, x.detach().requires_grad_())


@pytest.mark.parametrize("residual", [None, BF16, FP32], ids=str)
def test_expanded_gradients(residual):
    """The gradient of a sum has stride 0: read as contiguous, it is garbage."""
    args = arguments(7, 96, residual=residual)
    outputs = rms.rmsnorm(*args) if residual is None else rms.add_rmsnorm(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expanded = torch.autograd.grad([o.sum() for o in outputs], args, retain_graph=True)
    ones = [torch.ones_like(o) for o in outputs]
    assert_same_bits(expanded, torch.autograd.grad(outputs, args, ones))


def test_gradient_whose_rows_lie_apart():
    (x,) = arguments(7, 96, x=FP32)
    gradients = [torch.randn(7, 200, device=DEVICE)[:, 3:99], torch.randn(96, 7, device=DEVICE).T]
    got, true = (torch.autograd.grad(backend.add_rmsnorm(x, x), x, gradients)
                 for backend in (rms, reference))
    torch.testing.assert_close(got, true)
    got, true = (torch.autograd.grad(backend.rmsnorm(x), x, gradients[0])
                 for backend in (rms, reference))
    torch.testing.assert_close(got, true)


@pytest.mark.parametrize("residual", [BF16, FP32], ids=str)
def test_one_output_alone(residual):
    args = arguments(7, 96, residual=residual)
    total, y = rms.add_rmsnorm(*args)
    dtotal, dy = torch.randn_like(total), torch.randn_like(y)

    both = torch.autograd.grad([total, y], args, [torch.zeros_like(total), dy], retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, args, dy, retain_graph=True), both)
    dx, dr = torch.autograd.grad(total, args, dtotal)
    assert_same_bits((dr, dx), (dtotal, dtotal.to(BF16)))


def test_both_summands_get_the_same_gradient():
    x, r = arguments(7, 96, residual=BF16)
    total, y = rms.add_rmsnorm(x, r)
    dx, dr = torch.autograd.grad([total, y], [x, r], [torch.randn_like(total), torch.randn_like(y)])
    assert torch.equal(dx, dr)


def test_thirty_backwards_are_bit_equal():
    x, r = arguments(65, 96, residual=FP32)
    total, y = rms.add_rmsnorm(x, r)
    gradients = [torch.randn_like(total), torch.randn_like(y)]
    first, *rest = (torch.autograd.grad([total, y], [x, r], gradients, retain_graph=True)
                    for _ in range(30))
    for again in rest:
        assert_same_bits(again, first)


# -- operators, compile --------------------------------------------------------


def test_opcheck():
    x, r = arguments(5, 24, residual=FP32)
    torch.library.opcheck(rms._rmsnorm_op, (x, 1e-6))
    torch.library.opcheck(rms._add_rmsnorm_op, (x, r, 1e-6))
    rstd, x, r = torch.rand(5, device=DEVICE), x.detach(), r.detach()
    torch.library.opcheck(rms._backward_op, (x, None, x, rstd, None))
    torch.library.opcheck(rms._backward_op, (x, r, r, rstd, BF16))


def test_strides_are_those_that_the_fake_promised():
    x = tensor(96, 7, dtype=BF16).T
    for real in (*rms._rmsnorm_op(x, 1e-6), *rms._add_rmsnorm_op(x, x, 1e-6)):
        assert real.is_contiguous()
    assert all(f.is_contiguous() for f in rms._add_rmsnorm_outputs(x, x, 1e-6))


def test_compiles_whole_and_does_not_recompile():
    def block(x, r):
        total, y = rms.add_rmsnorm(x, r)
        return total * 2 + rms.rmsnorm(y)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    args = arguments(6, 16, x=FP32, residual=FP32)
    assert_same_bits(grads(compiled, args), grads(block, args))
    with torch.compiler.set_stance("fail_on_recompile"):
        grads(compiled, arguments(11, 16, x=FP32, residual=FP32))


# -- on a GPU ------------------------------------------------------------------


@pytest.mark.parametrize("residual", [BF16, FP32], ids=str)
@pytest.mark.parametrize("N", [768, 1024, 1280, 1600])
@needs_gpu
class TestAtRealSize:
    def test_errs_no_more_than_pytorch(self, N, residual):
        x, r = arguments(16 * 1024 + 1, N, residual=residual)
        check(x)
        check(x, r)

    def test_thirty_backwards_are_bit_equal_without_a_host_sync(self, N, residual):
        x, r = arguments(16 * 1024 + 1, N, residual=residual)
        gradients = [torch.randn_like(r), torch.randn_like(x)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = rms.add_rmsnorm(x, r)
            first, *rest = (torch.autograd.grad(outputs, [x, r], gradients, retain_graph=True)
                            for _ in range(30))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for again in rest:
            assert_same_bits(again, first)


@needs_gpu
def test_offsets_beyond_int32():
    M, N = 2**31 // 768 + 4096, 768
    x = torch.randn(M, N, device=DEVICE, dtype=BF16).requires_grad_()
    y = rms.rmsnorm(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), device=DEVICE, dtype=BF16).expand(M, N))
    tail = x.detach()[-5:].clone().requires_grad_()
    expected = reference.rmsnorm(tail)
    torch.testing.assert_close(y[-5:], expected)
    torch.testing.assert_close(dx[-5:], torch.autograd.grad(expected.sum(), tail)[0])
