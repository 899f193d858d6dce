import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")
from kernels import layernorm as ln
from kernels import reference, torch_ops
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


def arguments(M, N, x=BF16, residual=None, w=FP32, bias=True):
    """x, the residual if it has a dtype, w and b."""
    stream = [] if residual is None else [tensor(M, N, dtype=residual, seed=1)]
    weight, b = tensor(N, dtype=w, seed=2), tensor(N, dtype=w, seed=3)
    return tensor(M, N, dtype=x), *stream, weight, b if bias else None


# -- numbers -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layernorm_errs_no_more_than_pytorch(shape, dtype):
    assert_as_accurate(ln.layernorm, reference.layernorm, arguments(*shape, x=dtype),
                       torch_ops.layernorm)


@pytest.mark.parametrize("x, residual", [
    (FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP32), (FP16, FP16), (FP32, BF16),
], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_layernorm_errs_no_more_than_pytorch(shape, x, residual):
    args = arguments(*shape, x=x, residual=residual)
    assert_as_accurate(ln.add_layernorm, reference.add_layernorm, args, torch_ops.add_layernorm)


@pytest.mark.parametrize("shape", [(7, 96), (3, 1600)], ids=str)
def test_without_bias_and_with_bf16_weight(shape):
    for args in (arguments(*shape, bias=False), arguments(*shape, w=BF16),
                 arguments(*shape, w=BF16, bias=False)):
        assert_as_accurate(ln.layernorm, reference.layernorm, args)
    args = arguments(*shape, residual=FP32, bias=False)
    assert_as_accurate(ln.add_layernorm, reference.add_layernorm, args, torch_ops.add_layernorm)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(M=st.integers(1, 40), N=st.integers(1, 300), x=st.sampled_from([FP32, BF16, FP16]),
       residual=st.sampled_from([None, FP32, BF16]), bias=st.booleans())
def test_any_shape_and_mix_of_dtypes(M, N, x, residual, bias):
    args = arguments(M, N, x, residual, bias=bias)
    name = "layernorm" if residual is None else "add_layernorm"
    assert_as_accurate(getattr(ln, name), getattr(reference, name), args, slack=LUCK)


def test_rows_far_from_zero_keep_their_variance():
    """mean(x^2) - mean(x)^2 would lose every digit of it; so would padding that counts."""
    x, w, b = tensor(5, 1000, grad=False), tensor(1000), tensor(1000, seed=1)
    assert_as_accurate(ln.layernorm, reference.layernorm, ((x + 3e3).requires_grad_(), w, b),
                       torch_ops.layernorm)


def test_no_rows():
    x, w = tensor(0, 8), tensor(8)
    y = ln.layernorm(x, w)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert x.grad.shape == (0, 8) and w.grad.eq(0).all()


# -- layouts and gradients -----------------------------------------------------


def test_rows_may_lie_apart_and_columns_too():
    w, b = tensor(96), tensor(96, seed=1)
    packed = tensor(2, 7, 3, 96, dtype=BF16, grad=False)
    for x in (packed[:, :, 1], packed[0, :1, 0].expand(5, 96), packed.view(96, -1).T,
              packed[..., ::2].reshape(-1, 96)):
        x = x.detach().requires_grad_()
        assert_as_accurate(ln.layernorm, reference.layernorm, (x, w, b), torch_ops.layernorm)
        # with the strides of x where its elements do not overlap
        residual = x.detach().float().requires_grad_()
        assert_as_accurate(ln.add_layernorm, reference.add_layernorm, (x, residual, w, b),
                           torch_ops.add_layernorm)
        twin = x.detach().requires_grad_()
        assert_as_accurate(ln.add_layernorm, reference.add_layernorm, (x, twin, w, b),
                           torch_ops.add_layernorm)


@pytest.mark.parametrize("residual", [None, BF16, FP32], ids=str)
def test_expanded_gradients(residual):
    """The gradient of a sum has stride 0: read as contiguous, it is garbage."""
    args = arguments(7, 96, residual=residual)
    outputs = ln.layernorm(*args) if residual is None else ln.add_layernorm(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expanded = torch.autograd.grad([o.sum() for o in outputs], args, retain_graph=True)
    ones = [torch.ones_like(o) for o in outputs]
    assert_same_bits(expanded, torch.autograd.grad(outputs, args, ones))


def test_gradient_whose_rows_lie_apart():
    x, w, b = arguments(7, 96, x=FP32)
    gradients = [torch.randn(7, 200, device=DEVICE)[:, 3:99], torch.randn(96, 7, device=DEVICE).T]
    got, true = (torch.autograd.grad(backend.add_layernorm(x, x, w, b), (x, w, b), gradients)
                 for backend in (ln, reference))
    torch.testing.assert_close(got, true)
    got, true = (torch.autograd.grad(backend.layernorm(x, w, b), (x, w, b), gradients[0])
                 for backend in (ln, reference))
    torch.testing.assert_close(got, true)


@pytest.mark.parametrize("residual", [BF16, FP32], ids=str)
def test_one_output_alone(residual):
    args = arguments(7, 96, residual=residual)
    total, y = ln.add_layernorm(*args)
    dtotal, dy = torch.randn_like(total), torch.randn_like(y)

    both = torch.autograd.grad([total, y], args, [torch.zeros_like(total), dy], retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, args, dy, retain_graph=True), both)
    dx, dr, dw, db = torch.autograd.grad(total, args, dtotal, allow_unused=True)
    assert_same_bits((dr, dx), (dtotal, dtotal.to(BF16)))
    assert dw is None and db is None


def test_both_summands_get_the_same_gradient():
    x, r, w, b = arguments(7, 96, residual=BF16)
    total, y = ln.add_layernorm(x, r, w, b)
    dx, dr = torch.autograd.grad([total, y], [x, r], [torch.randn_like(total), torch.randn_like(y)])
    assert torch.equal(dx, dr)


def test_thirty_backwards_are_bit_equal():
    x, r, w, b = arguments(65, 96, residual=FP32)
    total, y = ln.add_layernorm(x, r, w, b)
    gradients = [torch.randn_like(total), torch.randn_like(y)]
    first, *rest = (torch.autograd.grad([total, y], [x, r, w, b], gradients, retain_graph=True)
                    for _ in range(30))
    for again in rest:
        assert_same_bits(again, first)


# -- operators, compile --------------------------------------------------------


def test_opcheck():
    x, r, w, b = arguments(5, 24, residual=FP32)
    torch.library.opcheck(ln._layernorm_op, (x, w, b, 1e-5))
    torch.library.opcheck(ln._layernorm_op, (x, w, None, 1e-5))
    torch.library.opcheck(ln._add_layernorm_op, (x, r, w, b, 1e-5))
    stats = torch.rand(5, device=DEVICE), torch.rand(5, device=DEVICE)
    x, r, w = x.detach(), r.detach(), w.detach()
    torch.library.opcheck(ln._backward_op, (x, None, x, w, *stats, True, None))
    torch.library.opcheck(ln._backward_op, (x, r, r, w, *stats, False, BF16))


def test_strides_are_those_that_the_fake_promised():
    x = tensor(96, 7, dtype=BF16).T
    w = tensor(96)
    for real in (*ln._layernorm_op(x, w, None, 1e-5), *ln._add_layernorm_op(x, x, w, None, 1e-5)):
        assert real.is_contiguous()
    fakes = ln._add_layernorm_outputs(x, x, w, None, 1e-5)
    assert all(f.is_contiguous() for f in fakes)


def test_compiles_whole_and_does_not_recompile():
    def block(x, r, w, b):
        total, y = ln.add_layernorm(x, r, w, b)
        return total * 2 + ln.layernorm(y, w, b)

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
        args = arguments(16 * 1024 + 1, N, residual=residual)
        assert_as_accurate(ln.add_layernorm, reference.add_layernorm, args, torch_ops.add_layernorm)
        x, _, w, b = args
        assert_as_accurate(ln.layernorm, reference.layernorm, (x, w, b), torch_ops.layernorm)

    def test_thirty_backwards_are_bit_equal_without_a_host_sync(self, N, residual):
        x, r, w, b = arguments(16 * 1024 + 1, N, residual=residual)
        gradients = [torch.randn_like(r), torch.randn_like(x)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = ln.add_layernorm(x, r, w, b)
            first, *rest = (torch.autograd.grad(outputs, [x, r, w, b], gradients,
                                                retain_graph=True) for _ in range(30))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for again in rest:
            assert_same_bits(again, first)


@needs_gpu
def test_offsets_beyond_int32():
    M, N = 2**31 // 768 + 4096, 768
    x = torch.randn(M, N, device=DEVICE, dtype=BF16).requires_grad_()
    w, b = tensor(N), tensor(N, seed=1)
    y = ln.layernorm(x, w, b)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), device=DEVICE, dtype=BF16).expand(M, N))
    tail = x.detach()[-5:].clone().requires_grad_()
    expected = reference.layernorm(tail, w, b)
    torch.testing.assert_close(y[-5:], expected)
    torch.testing.assert_close(dx[-5:], torch.autograd.grad(expected.sum(), tail)[0])
