"""Training steps of ours and of peers (bench/mfu.py, bench/steps/peers.py)."""

import importlib.machinery
import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bench import mfu
from bench.mfu import Options
from bench.steps import peers, variants
from bench.timing import Timing
from common import hardware
from gpt import GPT, GPTConfig
from gpt.flops import flops_per_token
from kernels import load
from tests.conftest import every_architecture
from tests.numerics import DEVICE, stirred

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
CPU = torch.device("cpu")


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {k: v.detach().clone() for k, v in GPT(CONFIG).state_dict().items()}


@pytest.fixture
def batch():
    return torch.randint(31, (2, 3, 8))


def test_a_rehearsal_leaves_the_weights_bit_for_bit(weights, batch):
    peer = peers.ours(CONFIG, weights, CPU, torch.float32)
    loss = peer.rehearse(*batch)
    assert all(torch.equal(v, weights[k]) for k, v in peer.module.state_dict().items())
    held = sum(p.nbytes for p in peer.module.parameters())
    assert peer.bytes_held() > 3 * held, "weights and two moments"
    assert peer.step(*batch) == loss
    assert not torch.equal(peer.module.lm_head.weight, weights["lm_head.weight"])


def test_a_step_of_micro_steps_has_one_optimizer_step_of_the_mean_gradient(weights, batch,
                                                                           monkeypatch):
    """The gradient before it is clipped: Adam's own step hardly depends on its size."""
    once, thrice = (peers.ours(CONFIG, weights, CPU, torch.float32) for _ in range(2))
    passes, steps, norms = [], [], []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *inputs: norms.append(clip(*inputs).item()))
    loss, step = thrice.loss, thrice.optimizer.step
    thrice.loss = lambda *inputs: passes.append(1) or loss(*inputs)
    thrice.optimizer.step = lambda: steps.append(1) or step()
    once.step(*batch)
    thrice.step(*batch, micro_steps=3)
    assert (len(passes), len(steps)) == (3, 1) and norms[0] == pytest.approx(norms[1])
    for p, q in zip(once.module.parameters(), thrice.module.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("make", [peers.ours, peers.transformers_gpt2])
def test_variants_share_parameters_and_optimizer(make, weights, batch):
    if make is peers.transformers_gpt2:
        pytest.importorskip("transformers", reason="transformers is not installed")
    one = make(CONFIG, weights, CPU, torch.float32)
    two = make(CONFIG, weights, CPU, torch.float32, like=one)
    pairs = zip(one.module.parameters(), two.module.parameters(), strict=True)
    assert all(p is q for p, q in pairs)
    one.step(*batch)
    assert one.evaluate(*batch) == two.evaluate(*batch) and one.optimizer is two.optimizer


def test_transformers_agrees_with_ours(weights, batch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    here = (CONFIG, weights, CPU, torch.float32)
    peers.agree([peers.ours(*here), peers.transformers_gpt2(*here)], *batch)


@pytest.mark.parametrize("loss, value", [(lambda x: x + 0.01, "has loss 3."),
                                         (lambda x: x * float("nan"), "has loss nan")])
def test_a_peer_with_another_loss_is_refused_with_both_values(loss, value, weights, batch):
    def wrong(*args, **kwargs):
        return loss(load("torch").linear_cross_entropy(*args, **kwargs))

    ours = peers.ours(CONFIG, weights, CPU, torch.float32)
    kernels = load("torch")._replace(linear_cross_entropy=wrong)
    broken = peers.ours(CONFIG, weights, CPU, torch.float32, name="theirs",
                        kernels=kernels, like=ours)
    with pytest.raises(ValueError, match=rf"theirs {value}.* where ours has 3\.\d+.*not timed"):
        peers.agree([ours, broken], *batch)


@every_architecture
def test_liger_is_given_what_it_takes(architecture, batch, monkeypatch):
    """liger-kernel 0.8's interface: its norm needs a bias, its loss ignores -100 by default.

    The cap is one that changes the loss.
    """
    def fused(input, weight, target, bias=None, ce_weight=None, ignore_index=-100,
              lse_square_scale=0.0, label_smoothing=0.0, reduction="mean", softcap=None):
        logits = input @ weight.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_layer_norm = lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B.view(-1), eps)
    functional.liger_cross_entropy = F.cross_entropy
    functional.liger_fused_linear_cross_entropy = fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    batch[1, 0, :3] = -1
    config = replace(CONFIG, architecture=architecture,
                     **({"logit_cap": 0.1} if architecture == "nanochat" else {}))
    torch.manual_seed(0)
    ours = peers.ours(config, stirred(GPT(config)).state_dict(), CPU, torch.float32)
    theirs = peers.ours(config, {}, CPU, torch.float32, name="Liger",
                        kernels=peers.liger_kernels(), like=ours)
    peers.agree([ours, theirs], *batch)
    assert theirs.module.kernels.attention_qkv is ours.module.kernels.attention_qkv


@pytest.mark.parametrize("other", [{"architecture": "nanochat"}, {"tie_weights": False}], ids=str)
def test_models_that_a_peer_does_not_have_are_refused(other, weights, tmp_path):
    (tmp_path / "model.py").touch()
    here = replace(CONFIG, **other), weights, CPU, torch.float32
    with pytest.raises(ValueError, match="nanoGPT is GPT-2 with a tied head, this is .*=False"):
        peers.nanogpt(tmp_path, *here)
    with pytest.raises(ValueError, match="transformers' GPT2LMHeadModel is GPT-2"):
        peers.transformers_gpt2(*here)


def test_a_folder_without_nanogpt_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="no model.py there"):
        peers.nanogpt(tmp_path, CONFIG, weights, CPU, torch.float32)


@pytest.mark.parametrize("backends, told", [
    ("triton", "needs a CUDA device"), ("torch+norm=torch", "no family 'norm'"),
    ("torch+attention=nonsense", "no such implementation"), ("fast", "no such implementation")])
def test_unknown_backends_are_refused(backends, told, monkeypatch):
    monkeypatch.setattr("kernels._interpreting", lambda: False)
    with pytest.raises(ValueError, match=told):
        variants.backends(backends, CPU)


def test_backends_are_read():
    found = variants.backends("torch,reference+attention=torch+layernorm=torch", CPU)
    assert found == [("torch", "torch", {}),
                     ("reference+attention=torch+layernorm=torch", "reference",
                      {"attention": "torch", "layernorm": "torch"})]
    names = [name for name, *_ in variants.backends("", CPU)]
    assert names == ["torch"], "what runs on a CPU"


def test_the_largest_batch_that_fits_is_found():
    for largest in range(1, 40):
        tried = []
        fits = lambda n: tried.append(n) or n <= largest  # noqa: B023, E731
        assert mfu.largest_batch(fits, limit=33) == min(largest, 33)
        assert len(tried) <= 12 and max(tried) <= 33
    with pytest.raises(ValueError, match="not even one sequence fits"):
        mfu.largest_batch(lambda n: False, limit=8)


def test_out_of_memory_is_an_answer_and_leaves_no_gradient(weights):
    ours, hungry = (peers.ours(CONFIG, weights, CPU, torch.float32) for _ in range(2))

    def loss(idx, targets):
        found = ours.module(idx, targets)
        if len(idx) > 2:
            found.backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    hungry.loss, hungry.module, hungry.optimizer = loss, ours.module, ours.optimizer
    assert mfu.fits([ours, hungry], CONFIG, 2) and not mfu.fits([ours, hungry], CONFIG, 3)
    assert all(p.grad is None for p in ours.module.parameters())
    assert mfu.largest_batch(lambda n: mfu.fits([hungry], CONFIG, n), limit=64) == 2


def test_batch_size_auto_needs_a_gpu():
    with pytest.raises(ValueError, match="--batch_size=auto needs a GPU's limit, this is cpu"):
        mfu.main(Options(device="cpu", dtype="float32", batch_size="auto"))


def test_a_case_on_this_machine_has_losses_shares_and_no_mfu_where_the_device_is_unknown(
        tmp_path, monkeypatch, capsys):
    """The name of a GPU is hidden, so that it is unknown, too."""
    monkeypatch.setitem(mfu.CASES, "tiny", (CONFIG, 2))
    monkeypatch.setattr(hardware, "device_name", lambda device: "some GPU")
    out = tmp_path / "mfu.json"
    options = Options(device=DEVICE, dtype="float32", cases="tiny",
                      backends="torch,torch+cross_entropy=reference", compile=False,
                      peers="transformers", steps=2, accumulated_tokens=63, out=str(out))
    mfu.main(options)
    case = json.loads(out.read_text())["cases"]["tiny"]
    rows = case["variants"]
    assert {"ours, torch", "ours, torch+cross_entropy=reference"} <= rows.keys()
    assert all(row["mfu_palm"] is None and row["mfu_causal"] is None and row["tokens_per_s"] > 0
               for row in rows.values())
    many = [row["accumulated"] for row in rows.values()]
    assert all(row["micro_steps"] == 4 and row["mfu_palm"] is None for row in many), "63 of 16"
    assert all(row["tokens_per_s"] == pytest.approx(64e3 / row["step"]["median_ms"])
               for row in many)
    (share,) = case["shares"]
    one, two = (rows[f"ours, {name}"]["step"]["median_ms"]
                for name in ("torch", "torch+cross_entropy=reference"))
    assert (share["backend"], share["change"]) == ("torch", "cross_entropy=reference")
    assert share["more_ms"] == pytest.approx(two - one)
    assert share["more_of_step"] == pytest.approx(two / one - 1)
    printed = capsys.readouterr().out
    assert "4 micro-steps a step: " in printed
    assert "n/a" in printed and "%" not in printed.replace(" %", ""), "no MFU of an unknown device"


def test_a_speed_above_the_peak_is_an_error_not_a_figure(monkeypatch, tmp_path):
    monkeypatch.setitem(mfu.CASES, "tiny", (CONFIG, 2))
    monkeypatch.setattr(hardware, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(mfu, "measure", lambda steps, **_: dict.fromkeys(steps, Timing((1e-9,))))
    with pytest.raises(ValueError, match=r"above 100 %.*--peak_tflops"):
        mfu.main(Options(device=DEVICE, dtype="bfloat16", cases="tiny", backends="torch",
                         compile=False, peers="", out=str(tmp_path / "x.json")))
    assert not (tmp_path / "x.json").exists()


def test_a_variant_that_fails_or_learns_otherwise_is_named_and_the_others_are_timed(
        weights, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("launch failed\nmore")

    first, *others = (peers.ours(CONFIG, weights, CPU, torch.float32, name=name)
                      for name in ("broken", "ours", "wrong", "theirs"))
    wrong, forward = others[1], others[1].loss
    first.loss, wrong.loss = fails, lambda *batch: 2 * forward(*batch)
    monkeypatch.setitem(mfu.CASES, "tiny", (CONFIG, 2))
    monkeypatch.setattr(mfu, "build_variants", lambda *_, **__: [first, *others])
    out = tmp_path / "mfu.json"
    assert mfu.main(Options(device="cpu", dtype="float32", cases="tiny", compile=False, steps=1,
                            out=str(out))) == 1
    case = json.loads(out.read_text())["cases"]["tiny"]
    assert list(case["variants"]) == ["ours", "theirs"]
    assert case["failed"]["broken"] == "RuntimeError: launch failed"
    assert "where ours has" in case["failed"]["wrong"]
    assert "broken: RuntimeError: launch failed" in capsys.readouterr().out
    assert first.optimizer.param_groups[0]["lr"] == peers.OPTIM.learning_rate
    monkeypatch.setattr(mfu, "build_variants", lambda *_, **__: [first])
    with pytest.raises(ValueError, match="no variant runs: .*launch failed"):
        mfu.main(Options(device="cpu", dtype="float32", cases="tiny", out=str(out)))


def test_a_given_peak_is_that_of_any_device():
    row = mfu.speed(CONFIG, 24, Timing((1.0,)), CPU, Options(peak_tflops=2.0))
    assert row["tokens_per_s"] == 24_000
    assert row["mfu_palm"] == flops_per_token(CONFIG)["palm"] * 24_000 / 2e12
