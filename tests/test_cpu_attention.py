"""Attention in blocks on a CPU: as accurate as the operator of PyTorch that it replaces.

In bf16 that is the fused operator. In fp32, where the blocks serve only dropout, it is the unfused
one.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import cpu_attention, reference, torch_ops
from kernels.cpu_attention import attention_qkv
from kernels.cpu_dropout import keep_mask
from tests.numerics import assert_as_accurate, assert_same_bits, grads

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [1, 2, 7, 63, 64, 65, 127, 129, 300]


def packed(B, T, H, D, dtype=torch.float32):
    return torch.randn(B, T, 3, H, D, dtype=dtype).requires_grad_()


def fused(qkv):
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def unfused(qkv):
    """What PyTorch computes in fp32 with dropout."""
    with sdpa_kernel(SDPBackend.MATH):
        return fused(qkv)


YARDSTICK = {torch.float32: unfused, torch.bfloat16: fused}


def masked(qkv, **options):
    """PyTorch's operator with a mask, which it computes unfused."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    seen = reference.visible(qkv.shape[1], **options)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


@pytest.fixture(params=["one block", "many blocks", "computed again"])
def blocks(request, monkeypatch):
    """As shipped; every 16 queries of each sequence alone; the same with nothing kept."""
    if request.param != "one block":
        monkeypatch.setattr(cpu_attention, "ROWS", 16)
        monkeypatch.setattr(cpu_attention, "CACHE_BYTES", 1)
    if request.param == "computed again":
        monkeypatch.setattr(cpu_attention, "KEPT_BYTES", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", LENGTHS)
def test_errs_no_more_than_pytorch(T, dtype, blocks):
    torch.manual_seed(T)
    # short sequences: the gradients of q and k depend on few numbers, whose largest error is luck
    B = 64 if T < 7 else 3
    for D in (8, 40, 64):
        assert_as_accurate(attention_qkv, reference.attention_qkv, (packed(B, T, 2, D, dtype),),
                           YARDSTICK[dtype])


def test_documents_and_windows(blocks):
    torch.manual_seed(0)
    starts = torch.tensor([[0] * 5 + [5] * 20 + [25] * 15, [0] * 40], dtype=torch.int32)
    for options in ({"window": 3}, {"window": 17}, {"doc_start": starts},
                    {"doc_start": starts, "window": 9}):
        ours, defined, theirs = (partial(f, **options)
                                 for f in (attention_qkv, reference.attention_qkv, masked))
        assert_as_accurate(ours, defined, (packed(2, 40, 3, 16),), theirs)


def test_rows_whose_maximum_is_repeated_and_scores_of_a_hundred():
    x = packed(2, 65, 2, 16, torch.bfloat16)
    with torch.no_grad():
        x[:, :, 1] = 1.0  # all keys alike: every score of a row is its maximum
    assert_as_accurate(attention_qkv, reference.attention_qkv, (x,), fused)
    large = packed(1, 65, 1, 16)
    with torch.no_grad():
        large[:, :, :2] *= 6
    assert_as_accurate(attention_qkv, reference.attention_qkv, (large,), unfused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_that_of_the_probabilities(dtype):
    """The result is the definition's with the mask of `keep_mask` on its probabilities."""
    B, T, H, D, p, seed = 2, 9, 2, 16, 0.3, torch.tensor(11)

    def defined(qkv):
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        scores = (q @ k.mT * D**-0.5).masked_fill(~reference.visible(T), float("-inf"))
        keep = keep_mask(11, (B * H, T, T), p, torch.float32).view(B, H, T, T).to(qkv.dtype)
        return (scores.softmax(-1) * keep / (1 - p) @ v).transpose(1, 2)

    assert_as_accurate(partial(attention_qkv, dropout=p, seed=seed), defined,
                       (packed(B, T, H, D, dtype),))


def test_dropout_keeps_the_mean_and_needs_a_seed(blocks):
    qkv = torch.randn(1, 40, 3, 2, 8)
    many = torch.stack([attention_qkv(qkv, dropout=0.3, seed=torch.tensor(100 * s))
                        for s in range(2000)])
    error = many.mean(0) - attention_qkv(qkv)
    assert (error.abs() <= 5.5 * many.std(0) / 2000**0.5 + 1e-6).all()
    assert torch.equal(many[7], attention_qkv(qkv, dropout=0.3, seed=torch.tensor(700)))
    with pytest.raises(ValueError, match="needs seed="):
        attention_qkv(qkv, dropout=0.3)


def test_gradients_of_a_sum_and_of_strided_input(blocks):
    """The gradient of y.sum() arrives with stride 0."""
    x = packed(2, 33, 2, 8)
    (ours,) = torch.autograd.grad(attention_qkv(x).sum(), x)
    (theirs,) = torch.autograd.grad(fused(x).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    turned = torch.randn(3, 8, 2, 33, 2).permute(4, 3, 0, 2, 1).requires_grad_()
    torch.testing.assert_close(attention_qkv(turned), fused(turned))


def test_thirty_backwards_have_the_same_bits(blocks):
    """Also with dropout: the mask of the backward is that of the forward."""
    x = packed(2, 50, 2, 16, torch.bfloat16)
    options = {"dropout": 0.2, "seed": torch.tensor(5)}
    fn = partial(attention_qkv, **options)
    first = grads(fn, (x,))
    for _ in range(30):
        assert_same_bits(grads(fn, (x,)), first)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_opcheck_and_one_graph(dropout):
    qkv, seed = packed(2, 20, 2, 8), torch.tensor(3) if dropout else None
    torch.library.opcheck(cpu_attention._forward_op, (qkv, None, None, dropout, seed))
    y, kept = cpu_attention._forward_op(qkv.detach(), None, None, dropout, seed)
    torch.library.opcheck(cpu_attention._backward_op,
                          (torch.randn_like(y), kept, qkv.detach(), None, None, dropout, seed))
    fn = partial(attention_qkv, dropout=dropout, seed=seed)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert_same_bits(grads(compiled, (qkv,)), grads(fn, (qkv,)))


def test_pytorchs_backend_takes_it_where_it_is_faster():
    """In bf16 or with dropout; fp32 without dropout stays PyTorch's fused operator, bit for bit."""
    seed = torch.tensor(4)
    for dtype, options in ((torch.bfloat16, {}), (torch.float32, {"dropout": 0.2, "seed": seed})):
        x = torch.randn(2, 70, 3, 2, 16).to(dtype)
        for y in (torch_ops.attention_qkv(x, **options),
                  torch_ops.attention(*x.unbind(2), **options)):
            assert torch.equal(y, attention_qkv(x, **options))
    x = torch.randn(2, 70, 3, 2, 16)
    assert torch.equal(torch_ops.attention_qkv(x), fused(x))
