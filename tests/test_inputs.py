"""What the Triton operators refuse, and how they say so."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from kernels import attention as attn
from kernels import cross_entropy as ce
from kernels import layernorm as ln
from kernels import rmsnorm as rms
from kernels import rotary
from tests.numerics import BF16, DEVICE

SEED = torch.tensor(7, device=DEVICE)


def zeros(*shape, **options):
    return torch.zeros(shape, device=DEVICE, **options)


QKV = dict.fromkeys("qkv", zeros(2, 8, 2, 16))
TARGETS = zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("changes, message", [
    ({"k": zeros(2, 9, 2, 16)}, r"k is \(2, 9, 2, 16\).*make them alike"),
    ({"v": zeros(2, 8, 2, 16, dtype=BF16)}, r"v is .*bfloat16.*q is .*float32"),
    (dict.fromkeys("qkv", zeros(8, 2, 16)), r"q is \(8, 2, 16\).*give \(B, T, H, D\)"),
    (dict.fromkeys("qkv", zeros(2, 8, 2, 16, dtype=torch.float64)), "float64; give .* in float32"),
    *((dict.fromkeys("qkv", zeros(1, 2, 1, D)), f"head dimension {D}; .*--attention=torch")
      for D in (8, 20, 100, 264)),
    ({"window": 0}, "window=0; .* 1 or more"), ({"window": -3}, "window=-3"),
    ({"dropout": 1.0, "seed": SEED}, r"dropout=1.0; .*below 1"),
    ({"dropout": -0.1}, r"dropout=-0.1"),
    ({"dropout": 0.1}, "needs seed="),
    ({"dropout": 0.1, "seed": zeros(1, dtype=torch.int64)}, "without axes"),
    ({"dropout": 0.1, "seed": zeros()}, "int64"),
    ({"doc_start": zeros(2, 7, dtype=torch.int32)},
     r"doc_start is \(2, 7\).*give \(2, 8\) torch.int32"),
    ({"doc_start": zeros(2, 8, dtype=torch.int64)}, "doc_start is .*int64.*torch.int32"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_attention_names_a_wrong_argument_with_its_value_and_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        attn.attention(**QKV | changes)


def test_attention_names_a_wrong_packed_shape():
    for shape in ((2, 8, 96), (2, 8, 2, 3, 16)):
        with pytest.raises(ValueError, match=r"view the projection as \(B, T, 3, H, D\)"):
            attn.attention_qkv(zeros(*shape))
        with pytest.raises(ValueError, match=r"view the projection as \(B, T, 3, H, D\)"):
            rotary.attention_qkv(zeros(*shape), rotation=zeros(8, 16))


@pytest.mark.parametrize("changes, message", [
    ({"rotation": zeros(8, 8)}, r"rotation is \(8, 8\) .*give \(8, 16\) torch.float32"),
    ({"rotation": zeros(1, 8, 16)}, r"rotation is \(1, 8, 16\)"),
    ({"rotation": zeros(8, 16, dtype=BF16)}, r"rotation is .*bfloat16"),
    ({"rotation": zeros(8, 16).to("meta")}, "on meta"),
    ({"qkv": zeros(2, 8, 3, 2, 12)}, "head dimension 12"),
    ({"qkv": zeros(2, 8, 3, 2, 16, dtype=torch.float64)}, "float64"),
    ({"window": 0}, "window=0"), ({"dropout": 0.1}, "needs seed="),
    ({"doc_start": zeros(2, 7, dtype=torch.int32)}, r"doc_start is \(2, 7\)"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_rotary_attention_names_a_wrong_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        rotary.attention_qkv(**{"qkv": zeros(2, 8, 3, 2, 16), "rotation": zeros(8, 16)} | changes)


@pytest.mark.parametrize("call, message", [
    (lambda: ln.layernorm(zeros(2, 8), zeros(9)), r"w has shape \(9,\), but x ends in 8"),
    (lambda: ln.layernorm(zeros(2, 8), zeros(8), zeros(1)), r"b has shape \(1,\)"),
    (lambda: ln.layernorm(zeros(2, 8).double(), zeros(8)), "x is torch.float64; use fp16"),
    (lambda: ln.layernorm(zeros(2, 8), zeros(8).long()), "w is torch.int64"),
    (lambda: ln.layernorm(zeros(2, 16385), zeros(16385)), "1 to 16384"),
    (lambda: ln.layernorm(zeros(2, 0), zeros(0)), "1 to 16384"),
    (lambda: ln.layernorm(zeros(2, 8), zeros(8).to("meta")), "w is on meta"),
    (lambda: ln.add_layernorm(zeros(2, 8), zeros(3, 8), zeros(8)), r"residual is \(3, 8\)"),
    (lambda: ln.add_layernorm(zeros(2, 8), zeros(2, 8).double(), zeros(8)), "float64"),
    (lambda: ln.add_layernorm(zeros(2, 8), zeros(2, 8).to("meta"), zeros(8)), "on meta"),
    (lambda: rms.rmsnorm(zeros(2, 8).double()), "rmsnorm: x is torch.float64; use fp16"),
    (lambda: rms.rmsnorm(zeros(2, 16385)), "1 to 16384"),
    (lambda: rms.rmsnorm(zeros()), "1 to 16384"),
    (lambda: rms.add_rmsnorm(zeros(2, 8), zeros(3, 8)), r"add_rmsnorm: .*residual is \(3, 8\)"),
    (lambda: rms.add_rmsnorm(zeros(2, 8), zeros(2, 8).double()), "float64"),
    (lambda: rms.add_rmsnorm(zeros(2, 8), zeros(2, 8).to("meta")), "on meta"),
])
def test_norms_name_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("logits, targets, reduction, message", [
    (zeros(3, 5), TARGETS, "none", "'none'; choose 'mean' or 'sum'"),
    (zeros(3, 1, 5), TARGETS, "mean", "must have two axes"),
    (zeros(3, 0), TARGETS, "mean", "must have two axes"),
    (zeros(3, 5).double(), TARGETS, "mean", "float64"),
    (zeros(4, 5), TARGETS, "mean", r"must be \(4,\) int64"),
    (zeros(3, 5), TARGETS.int(), "mean", "int32"),
    (zeros(3, 5), TARGETS.to("meta"), "mean", "on meta"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_cross_entropy_names_bad_input(logits, targets, reduction, message):
    with pytest.raises(ValueError, match=message):
        ce.cross_entropy(logits, targets, reduction=reduction)


@pytest.mark.parametrize("weight, targets, reduction, message", [
    (zeros(7, 4), TARGETS, "mean", r"weight must be \(V, 5\)"),
    (zeros(7, 5).double(), TARGETS, "mean", "float64"),
    (zeros(7, 5).to("meta"), TARGETS, "mean", "on meta"),
    (zeros(7, 5), TARGETS[:2], "mean", r"must be \(3,\) int64"),
    (zeros(7, 5), TARGETS, "max", "'max'"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_linear_cross_entropy_names_bad_input(weight, targets, reduction, message):
    with pytest.raises(ValueError, match=message):
        ce.linear_cross_entropy(zeros(3, 5), weight, targets, reduction=reduction)


@pytest.mark.parametrize("cap", [-1.0, float("inf"), float("nan")])
def test_linear_cross_entropy_names_a_bad_cap(cap):
    with pytest.raises(ValueError, match=f"cap={cap}; give a finite number"):
        ce.linear_cross_entropy(zeros(3, 5), zeros(7, 5), TARGETS, cap=cap)


def test_cross_entropy_names_targets_out_of_range_on_a_cpu():
    for wrong in (-2, 65, 2**33):
        targets = torch.tensor([3, -1, wrong])
        with pytest.raises(ValueError, match=f"target {wrong} is outside of the vocabulary of 65"):
            ce.cross_entropy(torch.zeros(3, 65), targets)
        with pytest.raises(ValueError, match=f"target {wrong}"):
            ce.linear_cross_entropy(torch.zeros(3, 8), torch.zeros(65, 8), targets)
