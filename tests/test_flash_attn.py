"""The flash-attn backend against a stand-in of the package and, on a GPU, with the package."""

import importlib
import sys
from functools import partial
from types import ModuleType

import pytest
import torch

from kernels import load, reference, resolve, torch_ops
from tests.numerics import DEVICE, assert_as_accurate


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):
    """As flash-attn 2.8 documents it: query i sees key j if i - left <= j <= i + right.

    A `left` or `right` of -1 is no limit.
    """
    assert deterministic and not dropout_p
    left, right = (q.shape[1] if w < 0 else w for w in window_size)
    right = 0 if causal else right
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])[None, :]
    scale = softmax_scale or q.shape[-1] ** -0.5
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * scale
    p = scores.masked_fill((j < i - left) | (j > i + right), float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v.float()).to(q.dtype)


def flash_attn_qkvpacked_func(qkv, *args, **kwargs):
    return flash_attn_func(*qkv.unbind(2), *args, **kwargs)


@pytest.fixture
def flash(monkeypatch):
    package = ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func = flash_attn_func
    package.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.delitem(sys.modules, "kernels.flash_attn", raising=False)
    yield load("torch", attention="flash_attn")
    sys.modules.pop("kernels.flash_attn", None)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_windows_and_scale_are_ours(flash, window):
    qkv = torch.randn(2, 7, 3, 2, 16, dtype=torch.bfloat16)
    expected = reference.attention_qkv(qkv, window=window)
    torch.testing.assert_close(flash.attention_qkv(qkv, window=window), expected)
    torch.testing.assert_close(flash.attention(*qkv.unbind(2), window=window), expected)


def test_what_the_package_lacks_is_refused(flash):
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match=r"no torch.float32; give --dtype=bfloat16"):
        flash.attention(q, q, q)
    q = q.bfloat16()
    with pytest.raises(ValueError, match="doc_start"):
        flash.attention(q, q, q, doc_start=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="window=0"):
        flash.attention(q, q, q, window=0)


def test_a_missing_package_is_named():
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    with pytest.raises(ValueError, match=r"not installed; `pip install flash-attn`"):
        resolve("torch", "cuda", attention="flash_attn")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 200])
def test_the_package_is_as_accurate_as_pytorch(window):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    qkv = torch.randn(2, 1000, 3, 4, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    flash = load("torch", attention="flash_attn")
    ours, definition, yardstick = (partial(backend.attention_qkv, window=window)
                                   for backend in (flash, reference, torch_ops))
    assert_as_accurate(ours, definition, (qkv,), yardstick)
