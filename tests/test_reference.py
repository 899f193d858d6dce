"""The definitions against PyTorch in fp64, the torch backend against them, and the registry."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels import FAMILIES, Kernels, load, reference, resolve, torch_ops
from tests.numerics import DEVICE, assert_as_accurate, grads


def randn(*shape, dtype=torch.float64, grad=True):
    return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=grad)


def qkv(B=2, T=9, H=3, D=8, dtype=torch.float64):
    return tuple(randn(B, T, H, D, dtype=dtype) for _ in range(3))


def test_attention_is_scaled_dot_product_attention():
    q, k, v = qkv()
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    theirs = F.scaled_dot_product_attention(*heads_first, is_causal=True)
    torch.testing.assert_close(reference.attention(q, k, v), theirs.transpose(1, 2))


def test_window_and_documents_by_hand():
    """T=4, window 2, documents [0, 1], [2, 3]: who sees whom, written out."""
    starts = torch.tensor([[0, 0, 2, 2]], dtype=torch.int32)
    seen = reference.visible(4, starts, 2)
    assert seen.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]
    assert reference.visible(3, None, 2).int().tolist() == [[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]


def test_philox_is_the_published_one():
    """A known answer of Random123's philox4x32-10: counter 0 and key 0 give 6627e8d5 first."""
    seed = torch.tensor(0, device=DEVICE)
    keep = reference.philox_keep(seed, (1, 1, 1, 1), 0x6627E8D5 / 2**32)
    drop = reference.philox_keep(seed, (1, 1, 1, 1), 0x6627E8D6 / 2**32)
    assert keep.item() and not drop.item()


def rotation(T, D):
    angles = torch.randn(T, D // 2, device=DEVICE)
    return torch.cat([angles.cos(), angles.sin()], 1), angles


def test_rotated_pairs_are_complex_numbers_times_one():
    """a + b i, of the root mean square 1, times exp(-i angle); v is left alone."""
    x, (turn, angles) = torch.randn(2, 9, 3, 2, 8, device=DEVICE).double(), rotation(9, 8)
    a, b = F.rms_norm(x[:, :, :2], (8,), eps=1e-6).chunk(2, -1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), -angles)[:, None, None]
    found = reference.rotated_qkv(x, turn)
    torch.testing.assert_close(found[:, :, :2], torch.cat([turned.real, turned.imag], -1),
                               rtol=1e-6, atol=1e-6)
    assert torch.equal(found[:, :, 2], x[:, :, 2])
    theirs = reference.attention(*found.unbind(2))
    assert torch.equal(reference.attention_qkv(x, rotation=turn), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_rotates_as_the_definition_does(dtype):
    torch.manual_seed(0)
    x, (turn, _) = randn(2, 9, 3, 2, 16, dtype=dtype), rotation(9, 16)
    for name in ("rotated_qkv", "attention_qkv"):
        ours, defined = (partial(getattr(backend, name), rotation=turn)
                         for backend in (torch_ops, reference))
        if dtype == torch.float32 or name == "rotated_qkv":
            assert_as_accurate(ours, defined, (x,))
        else:  # products of rounded q, k and probabilities
            torch.testing.assert_close(grads(ours, (x,)), grads(defined, (x,)), rtol=0.03,
                                       atol=0.03)


def test_dropout_keeps_the_mean_and_needs_a_seed():
    q, k, v = qkv(B=1, T=4, D=4)
    many = [reference.attention(q, k, v, dropout=0.3, seed=torch.tensor(s, device=DEVICE))
            for s in range(3000)]
    assert (torch.stack(many).mean(0) - reference.attention(q, k, v)).abs().max() < 0.1
    with pytest.raises(ValueError, match="needs seed"):
        reference.attention(q, k, v, dropout=0.3)


def test_norms_are_layer_norm():
    x, r, w, b = randn(5, 16), randn(5, 16), randn(16), randn(16)
    torch.testing.assert_close(reference.layernorm(x, w, b), F.layer_norm(x, (16,), w, b))
    total, y = reference.add_layernorm(x, r, w)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(y, F.layer_norm(x + r, (16,), w))


def test_rms_norms_are_rms_norm():
    x, r = randn(5, 16), randn(5, 16)
    torch.testing.assert_close(reference.rmsnorm(x), F.rms_norm(x, (16,), eps=1e-6))
    total, y = reference.add_rmsnorm(x, r, eps=0.1)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(y, F.rms_norm(x + r, (16,), eps=0.1))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_ignores_what_is_ignored(reduction):
    x, w = randn(7, 6), randn(11, 6)
    targets = torch.tensor([3, -1, 0, 10, -1, 5, 2], device=DEVICE)
    theirs = F.cross_entropy(x @ w.T, targets, ignore_index=-1, reduction=reduction)
    torch.testing.assert_close(reference.cross_entropy(x @ w.T, targets, reduction=reduction),
                               theirs)
    torch.testing.assert_close(reference.linear_cross_entropy(x, w, targets, reduction=reduction),
                               theirs)


def test_a_cap_is_cap_times_tanh():
    x, w, targets = randn(7, 6), randn(11, 6), torch.arange(7, device=DEVICE)
    capped = 2 * torch.tanh(x @ w.T / 2)
    torch.testing.assert_close(reference.linear_cross_entropy(x, w, targets, cap=2.0),
                               F.cross_entropy(capped, targets))


def test_definitions_switch_autocast_off():
    """Under bf16 autocast an fp32 definition's error would grow from 4e-7 to 1e-2."""
    q, k, v = qkv(dtype=torch.float32)
    x, w = randn(7, 6, dtype=torch.float32), randn(11, 6, dtype=torch.float32)
    targets = torch.arange(7, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = reference.attention(q, k, v), reference.linear_cross_entropy(x, w, targets)
    torch.testing.assert_close(inside[0], reference.attention(q, k, v), rtol=0, atol=0)
    torch.testing.assert_close(inside[1], reference.linear_cross_entropy(x, w, targets),
                               rtol=0, atol=0)


def test_the_torch_backend_is_as_accurate_as_the_definitions():
    torch.manual_seed(0)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3, 8], [0] * 9], dtype=torch.int32, device=DEVICE)
    for options in ({}, {"window": 3}, {"doc_start": starts}, {"doc_start": starts, "window": 2}):
        ours = partial(torch_ops.attention, **options)
        defined = partial(reference.attention, **options)
        assert_as_accurate(ours, defined, qkv(dtype=torch.float32))
    x, head = randn(7, 16, dtype=torch.float32), randn(11, 16, dtype=torch.float32)
    targets = torch.tensor([3, -1, 0, 10, -1, 5, 2], device=DEVICE)
    for cap in (0.0, 2.0):
        ours, defined = (partial(backend.linear_cross_entropy, cap=cap)
                         for backend in (torch_ops, reference))
        assert_as_accurate(ours, defined, (x, head, targets))
        # in bf16 it rounds the logits and their gradient, which the definition does not
        args = x.detach().bfloat16().requires_grad_(), head, targets
        torch.testing.assert_close(grads(ours, args), grads(defined, args), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_norms_are_as_accurate_as_the_definitions(dtype):
    torch.manual_seed(0)
    x, r = randn(7, 16, dtype=dtype), randn(7, 16, dtype=torch.float32)
    w, b = (randn(16, dtype=torch.float32) for _ in "wb")
    assert_as_accurate(torch_ops.layernorm, reference.layernorm, (x, w, b))
    assert_as_accurate(torch_ops.add_layernorm, reference.add_layernorm, (x, r, w, b))
    assert_as_accurate(torch_ops.add_layernorm, reference.add_layernorm, (x, r.to(dtype), w))
    assert_as_accurate(torch_ops.rmsnorm, reference.rmsnorm, (x,))
    assert_as_accurate(torch_ops.add_rmsnorm, reference.add_rmsnorm, (x, r))
    assert_as_accurate(torch_ops.add_rmsnorm, reference.add_rmsnorm, (x, r.to(dtype)))


def test_every_backend_has_all_operators():
    for backend in ("reference", "torch"):
        assert all(callable(f) for f in load(backend))
    mixed = load("torch", attention="reference")
    assert isinstance(mixed, Kernels)
    assert (mixed.attention, mixed.layernorm) == (reference.attention, torch_ops.layernorm)


def test_resolver_says_what_it_chose_and_refuses_what_cannot_run(monkeypatch):
    automatic = resolve("auto", "cpu")
    assert automatic.backends == dict.fromkeys(FAMILIES, "torch") and "cpu" in str(automatic)
    mixed = resolve("torch", "cpu", attention="reference")
    assert mixed.backends == automatic.backends | {"attention": "reference"}
    known = "no such implementation; choose from reference, torch, triton, flash_attn"
    with pytest.raises(ValueError, match=known):
        resolve("torch", "cpu", attention="nonsense")
    with pytest.raises(ValueError, match=r"flash_attn needs a CUDA device.*--attention=torch"):
        resolve("torch", "cpu", attention="flash_attn")
    with pytest.raises(ValueError, match="choose from reference, torch, triton"):
        resolve("torch", "cpu", layernorm="flash_attn")
    monkeypatch.setattr("kernels._interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device.*TRITON_INTERPRET=1"):
        resolve("triton", "cpu")
