"""The formulas of gpt/flops.py against PyTorch's counter, and the MFU made from them."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gpt import GPT, SIZES
from gpt.config import ARCHITECTURES
from gpt.flops import count_params, flops_per_token, mfu
from gpt.peaks import PEAK_TFLOPS, peak_tflops
from gpt.tensors import POSITIONS, shapes_of
from kernels import load
from kernels.reference import visible
from tests.conftest import every_architecture

T = 1024


def counted_per_token(config, backend):
    """FLOPs of a forward and backward, by FlopCounterMode on tensors without data."""
    kernels = load(backend)  # before the counter, which copies the formulas registered by then
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model, idx = GPT(config, kernels), torch.zeros(1, T, dtype=torch.long)
        model(idx, idx).backward()
    return counter.get_total_flops() / T


OTHERS = [name for name in ARCHITECTURES if name != "gpt2"]


def sized(size, architecture):
    """A published size in this architecture, without biases."""
    return replace(SIZES[size], vocab_size=50304, bias=False, activation="gelu",
                   architecture=architecture)


@pytest.mark.parametrize(("size", "architecture"), [*((size, "gpt2") for size in SIZES),
                                                    *(("gpt2", name) for name in OTHERS)])
def test_both_formulas_are_within_half_a_percent_of_what_torch_counts(size, architecture):
    """The reference multiplies full attention matrices. palm counts them; causal counts half.

    llm.c's causal formula also counts 6 operations for each of the T d learned position embeddings,
    though nothing is multiplied with them (0.6 % at 124M): they are subtracted here.
    """
    config = sized(size, architecture)
    counted, formula = counted_per_token(config, "reference"), flops_per_token(config)
    L, d = config.n_layer, config.n_embd
    assert abs(formula["palm"] / counted - 1) < 0.005
    without, with_positions = count_params(config)
    assert with_positions - without == (T * d if POSITIONS in shapes_of(config) else 0)
    masked_half, positions = 6 * L * d * T, 6 * (with_positions - without)
    assert abs((formula["causal"] - positions) / (counted - masked_half) - 1) < 0.005


@every_architecture
def test_the_kernels_tell_torch_what_they_multiply(architecture):
    """6 FLOPs for each matrix element; for attention 2 units of L d T forward and 5 backward.

    The fifth recomputes the scores.
    """
    config = replace(sized("gpt2", architecture), n_layer=2)
    d = config.n_embd
    assert counted_per_token(config, "triton") == 6 * (12 * 2 * d**2 + 50304 * d) + 7 * 2 * d * T


@pytest.mark.parametrize("window", [1, 7, 300, 1023, 1024, 5000])
def test_a_window_counts_the_scores_that_are_used(window):
    """By counting the pairs of the definition.

    As without a window, half of each token's score with itself is left out; and PaLM's count takes
    as many keys for each token as the last one sees.
    """
    with_window, without = (flops_per_token(replace(SIZES["gpt2"], window=w)) for w in (window, 0))
    each = 12 * 12 * 768  # operations of a score, forward and backward, in all layers
    seen = visible(T, window=window)[0]
    less = {name: without[name] - with_window[name] for name in without}
    assert (each * T / 2 - less["causal"]) * T == each * (seen.sum().item() - min(T, window) / 2)
    assert each * T - less["palm"] == each * seen[-1].sum().item()


def test_mfu_by_hand():
    config = replace(SIZES["gpt2"], vocab_size=50304)
    assert flops_per_token(config)["palm"] / 1e6 == pytest.approx(855.4, abs=0.05)
    assert flops_per_token(config)["causal"] / 1e6 == pytest.approx(803.5, abs=0.05)
    peak = peak_tflops("NVIDIA H200")
    assert mfu(config, 650_000, peak)["mfu_palm"] == pytest.approx(0.562, abs=0.001)
    assert mfu(config, 650_000, None) == {"mfu_palm": None, "mfu_causal": None}


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
    ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA L40", 181.05), ("NVIDIA L40S", 362.05), ("Tesla T4", 65),
    ("NVIDIA RTX A6000", 154.8), ("NVIDIA RTX A5000", 111.1), ("NVIDIA RTX A4000", 76.7),
    ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
    ("NVIDIA GeForce RTX 3070", 40.6), ("NVIDIA GeForce RTX 3080", 59.5),
    ("NVIDIA GeForce RTX 3090", 71.2), ("NVIDIA GeForce RTX 4080", 97.5),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 5090", 209.5)])
def test_a_peak_is_the_data_sheets(name, tflops):
    """Computed or not, it is what NVIDIA's data sheet or white paper prints for this card.

    Taken are the dense figures with fp32 accumulation.
    """
    assert peak_tflops(name) == pytest.approx(tflops, abs=0.05)
    assert peak_tflops(name, given=7.0) == 7.0


@pytest.mark.parametrize("name", [
    "some GPU", "", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "Quadro RTX 6000",
    "NVIDIA RTX 6000D", "NVIDIA A100", "AMD EPYC 9654 (AVX512, bf16 units), 2 threads"])
def test_a_name_that_is_not_listed_has_no_peak(name):
    """A slice of a GPU, a laptop's version and a mere likeness are other devices."""
    assert peak_tflops(name) is None and peak_tflops(name, given=100.0) == 100.0


def test_sparse_and_half_rate_figures_are_not_among_the_peaks():
    """Those with sparsity are twice these; so are those of GeForce cards with fp16 accumulation."""
    twice = {624, 1979, 1513, 1671, 733, 362.1, 242, 330, 250, 330.3, 419, 142, 309.7, 728.5, 4500}
    assert not twice & set(PEAK_TFLOPS.values())
    assert len(PEAK_TFLOPS) > 50 and all(20 < peak <= 2500 for peak in PEAK_TFLOPS.values())
