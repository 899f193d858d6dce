"""attention_qkv with a rotation; without one: tests/test_attention.py."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="triton is not installed")
from kernels import attention as plain
from kernels import launch, load, reference, torch_ops
from kernels import rotary as ours
from tests.numerics import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    assert_as_accurate,
    assert_same_bits,
    grads,
    needs_gpu,
)
from tests.test_attention import documents, packed, seed
from train.parallel import kept_operators

ALL = (ours.attention_qkv, reference.attention_qkv, torch_ops.attention_qkv)


def rotation(T, D, base=100.0):
    """Cosines and sines of t / base^(2 i / D), for position t and pair i."""
    angles = torch.arange(T)[:, None] / base ** (torch.arange(0, D, 2) / D)
    return torch.cat([angles.cos(), angles.sin()], 1).to(DEVICE, FP32)


def check(x, **options):
    """Ours errs at most twice as much as PyTorch's or, with dropout, the definition."""
    options = {"rotation": rotation(x.shape[1], x.shape[4])} | options
    fn, definition, yardstick = [partial(fn, **options) for fn in ALL]
    assert_as_accurate(fn, definition, (x,), None if "dropout" in options else yardstick)


# -- numbers -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 7, 63, 65])
def test_errs_no_more_than_pytorch(T, dtype):
    """At T = 2, fp32 takes 64 sequences: see tests/test_attention.py."""
    check(packed(64 if (T, dtype) == (2, FP32) else 2, T, 2, 16, dtype))


@pytest.mark.parametrize("H, D, dtype", [
    (3, 24, BF16), (2, 40, FP16), (1, 48, FP32), (5, 64, BF16), (3, 80, FP32), (2, 96, BF16),
    (1, 128, FP32), (3, 128, BF16), (1, 256, BF16),
], ids=str)
def test_heads_and_head_dimensions(H, D, dtype):
    check(packed(2, 37, H, D, dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("options", [
    {"window": 9}, {"doc_start": documents(2, 70)}, {"doc_start": documents(2, 70), "window": 9},
    {"dropout": 0.3, "seed": seed()},
    {"dropout": 0.3, "seed": seed(), "window": 20, "doc_start": documents(2, 70)},
], ids="+".join)
def test_windows_documents_and_dropout(options, dtype):
    check(packed(2, 70, 2, 24, dtype), **options)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e3])
def test_rows_of_any_size(size):
    """eps is as large as the mean square of rows of 1e-3; rows of zeros have a finite slope."""
    x = (size * packed(2, 9, 2, 16).detach()).requires_grad_()
    assert all(t.isfinite().all() for t in grads(partial(ours.attention_qkv,
                                                         rotation=rotation(9, 16)), (x,)))
    check(x)


def test_qkv_and_rotation_of_any_strides():
    def draw(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)

    wide = torch.cat([rotation(66, 24), rotation(66, 24)], 1)[::2, :24]
    for x in (draw(2, 3, 3, 33, 24).permute(0, 3, 1, 2, 4),  # heads before positions
              draw(2, 33, 3, 3, 48)[..., 8:32],  # rows with a gap
              draw(2, 33, 3, 24, 3).transpose(3, 4),  # the last axis is not the dense one
              draw(33, 3, 3, 24).expand(2, 33, 3, 3, 24)):  # a stride of 0
        check(x.detach().requires_grad_(), rotation=wide)


def test_gradient_of_a_sum_and_of_a_transposed_output():
    x, turn = packed(2, 33, 2, 16), rotation(33, 16)
    for after in (torch.sum, lambda y: y.transpose(1, 3).flatten().square().sum(),
                  lambda y: y[:, ::2, :, ::2].sum()):
        want, = torch.autograd.grad(after(reference.attention_qkv(x, rotation=turn)), x)
        got, = torch.autograd.grad(after(ours.attention_qkv(x, rotation=turn)), x)
        torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


def test_only_differences_of_positions_count():
    x = packed(1, 40, 2, 16, grad=False)
    late = ours.attention_qkv(x, rotation=rotation(140, 16)[100:])
    torch.testing.assert_close(late, ours.attention_qkv(x, rotation=rotation(40, 16)),
                               atol=1e-5, rtol=1e-4)


def test_without_a_rotation_it_is_plain_attention():
    x = packed(1, 9, 2, 16, BF16)
    assert_same_bits(grads(ours.attention_qkv, (x,)), grads(plain.attention_qkv, (x,)))
    kernels = load("triton")
    assert kernels.attention_qkv is ours.attention_qkv and kernels.attention is plain.attention


def test_thirty_backwards_have_the_same_bits():
    x, options = packed(1, 40, 2, 16, BF16), {"dropout": 0.1, "seed": seed(), "window": 30}
    fn = partial(ours.attention_qkv, rotation=rotation(40, 16), **options)
    once, *others = (grads(fn, (x,)) for _ in range(30))
    for other in others:
        assert_same_bits(other, once)


# -- with the rest of PyTorch --------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_opcheck_of_both_operators(dtype):
    x, turn, first = packed(1, 5, 2, 16, dtype), rotation(5, 16), documents(1, 5)
    torch.library.opcheck(ours._forward_op, (x, turn, None, None, 0.0))
    torch.library.opcheck(ours._forward_op, (x, turn, first, seed(), 0.1))
    x = x.detach()
    saved = ours._forward_op(x, turn, first, seed(), 0.1)
    dy, end = saved[0].sum().expand(1, 5, 2, 16), torch.full_like(first, 5)
    torch.library.opcheck(ours._backward_op, (dy, x, turn, *saved, first, end, seed(), 0.1))
    torch.library.opcheck(ours._backward_op, (saved[0], x, turn, *saved, None, None, None, 0.0))


def test_compiles_to_one_graph_once():
    options = {"window": 4, "doc_start": documents(1, 9), "dropout": 0.2, "seed": seed()}

    def twice(x, turn):
        return ours.attention_qkv(x * 1.0, rotation=turn, **options) * 2

    compiled, x, turn = torch.compile(twice, fullgraph=True), packed(1, 9, 2, 16), rotation(9, 16)
    eager = grads(twice, (x, turn))
    with torch.compiler.set_stance("default"):
        first = grads(compiled, (x, turn))
    with torch.compiler.set_stance("fail_on_recompile"):
        second = grads(compiled, (x.detach().clone().requires_grad_(), turn))
    assert_same_bits(first, eager)
    assert_same_bits(second, eager)
    assert [t.stride() for t in first] == [t.stride() for t in eager]


def test_activation_checkpointing_keeps_it(monkeypatch):
    launches, settings_of = [], launch.attention_forward
    monkeypatch.setattr(launch, "attention_forward",
                        lambda *args: launches.append(args) or settings_of(*args))
    x = packed(1, 9, 2, 16)
    fn = partial(ours.attention_qkv, rotation=rotation(9, 16), dropout=0.2, seed=seed())
    want = grads(fn, (x,))
    contexts = partial(create_selective_checkpoint_contexts, kept_operators(0.2))
    for count, extra in ((2, {}), (1, {"context_fn": contexts})):
        launches.clear()
        assert_same_bits(grads(partial(checkpoint, fn, use_reentrant=False, **extra), (x,)), want)
        assert len(launches) == count


def test_autocast_leaves_it_alone():
    x, turn = packed(1, 9, 2, 16), rotation(9, 16)
    with torch.autocast(DEVICE, dtype=BF16):
        inside = ours.attention_qkv(x, rotation=turn)
    assert inside.dtype == FP32 and torch.equal(inside, ours.attention_qkv(x, rotation=turn))


def test_flops_are_those_of_attention():
    B, T, H, D = 2, 8, 3, 16
    with FlopCounterMode(display=False) as counter:
        ours.attention_qkv(packed(B, T, H, D), rotation=rotation(T, D)).sum().backward()
    forward = 4 * B * H * T * T * D // 2
    assert counter.get_total_flops() == forward + forward * 5 // 2


# -- ring 3 --------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"window": 256}, {"doc_start": documents(8, 1024, 0.005)},
], ids="+".join)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@needs_gpu
def test_real_sizes_on_a_gpu(D, dtype, options):
    check(packed(8, 1024, 768 // D, D, dtype), **options)


@needs_gpu
def test_offsets_beyond_two_to_the_31():
    B, T, H, D = 960, 1024, 12, 64  # qkv has 2.26e9 elements
    x = torch.randn(B, T, 3, H, D, device=DEVICE, dtype=BF16, requires_grad=True)
    turn = rotation(T, D)
    y = ours.attention_qkv(x, rotation=turn)
    dy = torch.randn_like(y)
    dx, = torch.autograd.grad(y, x, dy)
    last = x[-1:].detach().clone().requires_grad_()
    want = ours.attention_qkv(last, rotation=turn)
    assert_same_bits((y[-1:], dx[-1:]), (want, *torch.autograd.grad(want, last, dy[-1:])))
