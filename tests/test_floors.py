"""The arithmetic of the floor (bench/floors.py)."""

from dataclasses import replace

import pytest

from bench import floors
from bench.floors import Rates, Work
from gpt import GPT
from gpt.config import SIZES, GPTConfig
from gpt.flops import flops_per_token
from tests.conftest import every_architecture

# round numbers; the ceilings below are arithmetic, not measurements
H200 = Rates(matmul_tflops=790.0, copy_gbs=4300.0)


def size(name):
    c = SIZES[name]
    return GPTConfig(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)


def test_the_124m_step_in_ns_per_token():
    """By hand: matrix products 938.5, attention 83.6, bytes 101.4, optimizer 1.8."""
    ns = dict.fromkeys(floors.CATEGORIES, 0.0)
    for part in floors.step_parts(size("gpt2")):
        ns[part.category] += part.ns(H200)
    assert ns["matmul"] == pytest.approx(938.5, abs=0.1)
    assert ns["attention"] == pytest.approx(83.6, abs=0.1)
    assert ns["norm"] + ns["cross-entropy"] + ns["embedding"] == pytest.approx(101.4, abs=0.1)
    assert ns["optimizer"] == pytest.approx(1.8, abs=0.1)


@pytest.mark.parametrize("name, thousands", [
    ("gpt2", 889), ("gpt2-medium", 322), ("gpt2-large", 151), ("gpt2-xl", 76.9)])
def test_the_ceiling_of_each_size(name, thousands):
    assert 1e6 / floors.ns_per_token(size(name), H200) == pytest.approx(thousands, rel=4e-3)


@every_architecture
def test_products_are_those_of_the_flop_formula(architecture):
    """But for two parts: 6 N + 6 L d T also counts GPT-2's norms and positions as multiplied.

    It counts attention's backward as four products instead of five.
    """
    c = replace(size("gpt2"), architecture=architecture)
    fifth_product = c.n_layer * c.n_embd * c.block_size
    work = sum(part.work.flops for part in floors.step_parts(c)) - fifth_product
    idle = 6 * ((2 * c.n_layer + 1) * c.n_embd + c.block_size * c.n_embd)
    idle = idle if architecture == "gpt2" else 0
    assert work == pytest.approx(flops_per_token(c)["causal"] - idle)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("own", [{"bias": True}, {"bias": False}, {"architecture": "nanochat"}],
                         ids=str)
def test_parameters_are_the_models(tie, own):
    c = GPTConfig(block_size=32, vocab_size=96, n_layer=3, n_head=2, n_embd=16,
                  tie_weights=tie, **own)
    assert floors.parameters(c) == sum(p.numel() for p in GPT(c).parameters())


def test_nanochats_step_has_an_embedding_norm_and_a_head_of_its_own():
    """By hand, 124M: 2 bytes more for each element of the stream; 50304 x 768 more parameters."""
    theirs, ours = ({part.name: part.work for part in floors.step_parts(replace(
        size("gpt2"), architecture=name), 2**14)} for name in ("gpt2", "nanochat"))
    more = {name: ours[name].bytes - theirs[name].bytes for name in ours}
    positions_and_norms = 1024 * 768 + 25 * 768
    assert more.pop("embedding") == 2 * 768
    assert more.pop("optimizer") == pytest.approx(
        32 * (50304 * 768 - positions_and_norms) / 2**14)
    assert set(more.values()) == {0}
    assert all(ours[name].flops == theirs[name].flops for name in ours)


def test_an_architecture_without_a_floor_is_refused(monkeypatch):
    monkeypatch.delitem(floors.EMBEDDING_BYTES, "nanochat")
    with pytest.raises(ValueError, match="no floor of architecture=nanochat, only of gpt2"):
        floors.step_parts(GPTConfig(architecture="nanochat"))


def test_more_tokens_in_a_step_share_one_optimizer():
    c = size("gpt2")
    few, many = (floors.ns_per_token(c, H200, tokens_per_step=n) for n in (2**14, 2**19))
    optimizer = floors.OPTIMIZER_BYTES * floors.parameters(c) / H200.copy_gbs
    assert few - many == pytest.approx(optimizer / 2**14 - optimizer / 2**19)


def test_a_floor_is_the_longer_of_arithmetic_and_bytes():
    rates = Rates(matmul_tflops=1.0, copy_gbs=1.0)
    assert Work(flops=3e3, bytes=2).ns(rates) == 3.0
    assert Work(flops=1e3, bytes=2).ns(rates) == 2.0


@pytest.mark.parametrize("bad", [{"matmul_tflops": 0.0, "copy_gbs": 1.0},
                                 {"matmul_tflops": 1.0, "copy_gbs": -1.0}])
def test_a_rate_that_was_not_measured_is_refused(bad):
    with pytest.raises(ValueError, match="measure it"):
        Rates(**bad)
