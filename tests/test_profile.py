"""Where a step goes (bench/steps/profile_step.py)."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench.floors import Rates, ns_per_token
from bench.steps import peers, profile_step
from bench.steps.profile_step import STEPS, kind
from gpt import GPT, GPTConfig

SMALL = GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
RATES = Rates(matmul_tflops=0.1, copy_gbs=10.0)


@pytest.mark.parametrize("names, category", [
    (["nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT"], "matmul"),
    (["sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"], "matmul"),
    (["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>"], "attention"),
    (["fmha_cutlassF_bf16_aligned_64x64_rf_sm80"], "attention"),
    (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"], "attention"),
    (["triton_per_fused_add_native_layer_norm_3"], "norm"),
    (["triton_red_fused__log_softmax_nll_loss_forward_7"], "cross-entropy"),
    (["triton_poi_fused_gelu_2"], "elementwise"),
    (["aten::square_"], "elementwise"),
    (["triton_per_fused__fused_rms_norm_0"], "norm"),
    (["attention_backward_kv"], "attention"),
    (["rotary_forward"], "attention"),
    (["rmsnorm_backward"], "norm"),
    (["cross_entropy_in_place"], "cross-entropy"),
    (["unknown", "ridge::attention_forward", "ridge::attention_forward"], "attention"),
    (["unknown", "ridge::layernorm"], "norm"),
    (["nvjet_tst", "aten::mm", "ridge::linear_cross_entropy"], "matmul"),
    (["multi_tensor_apply_kernel<FusedAdamMathFunctor>"], "optimizer"),
    (["aten::as_strided", "aten::t", "aten::linear"], "matmul"),
    (["Memset (Device)"], "elementwise"),
    (["something new"], "rest"),
])
def test_kernels_are_known_by_name_or_by_who_launched_them(names, category):
    assert kind(names) == category


def test_overlapping_spans_count_once():
    spans = [(0, 1000), (500, 1500), (600, 700), (3000, 4000)]
    assert profile_step.busy_ms(spans) == pytest.approx(2.5)
    assert profile_step.busy_ms([]) == 0


def event(name, start=0.0, end=0.0, kernels=(), device=DeviceType.CPU, parent=None, note=False):
    return SimpleNamespace(name=name, device_type=device,
                           kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels],
                           cpu_parent=parent, is_user_annotation=note,
                           time_range=SimpleNamespace(start=start, end=end))


def test_each_kernel_counts_once_and_by_its_operator():
    outer = event("ridge::attention_forward")
    events = [outer, event("cuLaunchKernel", kernels=[("unknown", 2000.0)], parent=outer),
              event("unknown", 0, 2000, device=DeviceType.CUDA),
              event("gemm", 2000, 5000, device=DeviceType.CUDA),
              event("Optimizer.step", 0, 9000, device=DeviceType.CUDA, note=True)]
    rows = profile_step.kernels_of_device(events)
    assert sorted(rows) == [("gemm", "matmul", 3.0), ("unknown", "attention", 2.0)]


def test_a_table_has_the_floor_of_floors_and_adds_up():
    rows = [("aten::mm", "matmul", 6.0), ("aten::mm", "matmul", 3.0), ("x", "rest", 3.0)]
    found = profile_step.table(rows, wall_ms=15.0, busy=12.0, config=SMALL, tokens=64, rates=RATES)
    assert found["categories"]["matmul"]["ms"] == pytest.approx(9.0 / STEPS)
    assert found["categories"]["idle"]["ms"] == pytest.approx(3.0 / STEPS)
    assert sum(row["ms"] for row in found["categories"].values()) == pytest.approx(found["step_ms"])
    assert found["floor_ms"] == pytest.approx(ns_per_token(SMALL, RATES, 64) * 64 * 1e-6)
    assert found["longest"][0] == {"name": "aten::mm", "category": "matmul", "ms": 3.0,
                                   "calls": pytest.approx(2 / STEPS)}


def test_a_step_on_a_cpu_is_attributed_and_traced(tmp_path):
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    peer = peers.ours(SMALL, GPT(SMALL).state_dict(), cpu, torch.float32)
    idx, targets = torch.randint(65, (2, 4, 32))
    found = profile_step.profile_all([peer], SMALL, idx, targets, tmp_path)["variants"]["ours"]
    spent = {name: row["ms"] for name, row in found["categories"].items()}
    assert all(spent[name] > 0 for name in ("matmul", "attention", "norm", "cross-entropy",
                                            "embedding", "optimizer", "elementwise"))
    assert spent["rest"] < 0.5 * found["step_ms"], found["longest"]
    assert sum(spent.values()) == pytest.approx(found["step_ms"], rel=0.05)
    calls = {row["name"]: row["calls"] for row in found["longest"]}
    layers = 4 * SMALL.n_layer + 1
    assert calls["aten::mm"] == 3 * layers, "three products for each linear layer and the head"
    trace = json.loads(gzip.open(tmp_path / found["trace"]).read())
    assert any(e.get("name") == "aten::mm" for e in trace["traceEvents"])
