"""Two models joined: where each tensor comes from, and what the seam computes."""

from dataclasses import replace

import pytest
import torch

from gpt import GPT, GPTConfig
from gpt.config import ARCHITECTURES, StitchedConfig, resolved
from gpt.generate import generate
from gpt.layers import Context
from gpt.pretrained import Trained
from gpt.stitch import least_squares, merge, stitch, stream
from tests.conftest import every_architecture

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
CONFIG = GPTConfig(block_size=12, vocab_size=19, n_layer=3, n_head=2, n_embd=8)
N = CONFIG.n_layer


def made(name, seed, architecture="gpt2", **changes):
    """A model with weights far from their initialisation, norms and biases included."""
    bias = {"bias": True} if "bias" in ARCHITECTURES[architecture].own else {}
    config = replace(CONFIG, architecture=architecture, **bias | changes)
    generator = torch.Generator().manual_seed(seed)
    weights = {k: 0.3 * torch.randn(p.shape, generator=generator)
               for k, p in GPT(config).named_parameters()}
    return Trained(name, config, weights)


A, B = made("A", 1), made("B", 2)


@pytest.fixture
def pair(architecture):
    """The two models of a test of `every_architecture`."""
    return made("A", 1, architecture), made("B", 2, architecture)


IDX = torch.randint(19, (8, 12), generator=torch.Generator().manual_seed(3))


def head_of(trained):
    return trained.weights.get(HEAD, trained.weights[WTE])


def model_of(config, weights):
    return GPT.from_trained(Trained("joined", config, weights))


def logits(config, weights, idx=IDX):
    with torch.no_grad():
        return model_of(config, weights).logits(idx)


@every_architecture
@pytest.mark.parametrize("i", range(N + 1))
@pytest.mark.parametrize("original_head", [True, False])
def test_every_tensor_comes_from_where_it_should(i, original_head, pair):
    A, B = pair
    config, weights = merge(A, B, i, original_head)
    below = [f"transformer.h.{n}." for n in range(i)] + ["transformer.wte.", "transformer.wpe."]
    below += ["transformer.ln_f."] if original_head else []
    for name, tensor in weights.items():
        if name != HEAD:
            assert tensor is (A if name.startswith(tuple(below)) else B).weights[name], name
    tied = A.config.tied and original_head
    assert resolved(config) == replace(A.config, tie_weights=tied)
    assert weights.keys() - A.weights.keys() == {HEAD} - ({HEAD} if tied else A.weights.keys())
    model = model_of(config, weights)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert torch.equal(model.transformer.wte.weight, A.weights[WTE])
    assert torch.equal(model.lm_head.weight, head_of(A if original_head else B))


@every_architecture
@pytest.mark.parametrize("i", range(N + 1))
def test_a_model_merged_with_itself_is_itself(i, pair):
    A, _ = pair
    config, weights = merge(A, A, i)
    assert config == A.config and weights.keys() == A.weights.keys()
    assert all(torch.equal(weights[name], A.weights[name]) for name in weights)
    assert torch.equal(logits(*merge(A, A, i, original_head=False)), logits(*A[1:3]))


@every_architecture
def test_the_last_cut_under_its_own_head_is_a(pair):
    A, B = pair
    config, weights = merge(A, B, N)
    assert config == A.config
    assert all(torch.equal(weights[name], A.weights[name]) for name in A.weights)
    assert not torch.equal(logits(*merge(A, B, N, original_head=False)), logits(*A[1:3]))


@every_architecture
def test_a_head_of_its_own_goes_where_its_model_goes(pair):
    """Merging what was merged with B's head: lm_head.weight is no longer the embedding."""
    A, B = pair
    untied = Trained("U", *merge(A, B, 1, original_head=False))
    for a, b, original_head, wanted in (
        (untied, A, True, B), (untied, A, False, A), (A, untied, True, A), (A, untied, False, B),
    ):
        config, weights = merge(a, b, 2, original_head)
        assert config.tied == (a is A and original_head and A.config.tied)
        assert torch.equal(model_of(config, weights).lm_head.weight, head_of(wanted))


@pytest.mark.parametrize(("key", "value"), [
    ("n_layer", 2), ("n_embd", 16), ("n_head", 4), ("vocab_size", 20), ("block_size", 8),
    ("bias", False), ("activation", "gelu_tanh"), ("direction", "backward"), ("window", 4),
    ("architecture", "nanochat"),
])
def test_unequal_architectures_are_named(key, value):
    said = f"{key} is {getattr(A.config, key)} in A and {value} in other"
    with pytest.raises(ValueError, match=said):
        merge(A, made("other", 2, **{key: value}), 1)


def test_what_cannot_be_cut_is_refused():
    for i in (-1, N + 1):
        with pytest.raises(ValueError, match=f"stitch_layer_index={i}: choose 0 to n_layer=3"):
            merge(A, B, i)
    stitched = Trained("S", *stitch(A, B, 1, True, None))
    with pytest.raises(ValueError, match="S is stitched itself, at layer 1"):
        merge(A, stitched, 1)
    for seam in (-2, -1, N + 1):
        with pytest.raises(ValueError, match=f"seam={seam}: must be"):
            StitchedConfig(n_layer=N, seam=seam)


@every_architecture
@pytest.mark.parametrize("i", range(N + 1))
def test_the_seam_stands_before_its_block(i, pair):
    """The model written out, with a seam of arbitrary weights, against the model."""
    A, B = pair
    config, weights = stitch(A, B, i, False, IDX)
    generator = torch.Generator().manual_seed(4)
    weights |= {k: torch.randn(v.shape, generator=generator)
                for k, v in weights.items() if "seam" in k}
    model = model_of(config, weights)
    part = model_of(*merge(A, B, i, False)).transformer  # the same blocks without the seam
    with torch.no_grad():
        x, rotation = part.embed(IDX, 0)
        for n in range(N + 1):
            if n == i:
                x = x @ weights["seam.weight"].T + weights["seam.bias"]
            if n < N:
                branch, residual = part.h[n](x, None, Context(rotation))
                x = branch + residual
        expected = part.ln_f(x)[1] @ head_of(B).T
        if cap := part.logit_cap:
            expected = cap * torch.tanh(expected / cap)
    torch.testing.assert_close(model.logits(IDX), expected)


@every_architecture
@pytest.mark.parametrize("i", range(N + 1))
def test_a_model_stitched_to_itself_gets_the_identity(i, pair):
    A, _ = pair
    _, weights = stitch(A, A, i, False, IDX)
    torch.testing.assert_close(weights["seam.weight"], torch.eye(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights["seam.bias"], torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(*stitch(A, A, i, False, IDX)), logits(*A[1:3]),
                               rtol=1e-3, atol=1e-3)


@every_architecture
@pytest.mark.parametrize("i", range(N + 1))
def test_under_as_head_it_starts_as_the_merged_model(i, pair):
    A, B = pair
    config, weights = stitch(A, B, i, True, None)
    assert config.seam == i and config.tied == A.config.tied
    assert torch.equal(logits(config, weights), logits(*merge(A, B, i)))


@every_architecture
@pytest.mark.parametrize("i", [0, 1, N])
def test_the_start_is_the_least_squares_map_between_the_streams(i, pair):
    """No other map fits better: the residual is orthogonal to A's stream and to the constant."""
    A, B = pair
    _, weights = stitch(A, B, i, False, IDX)
    x, y = stream(A, IDX, i), stream(B, IDX, i)
    assert x.shape == y.shape == (96, 8) and x.dtype == torch.float32
    residual = (x @ weights["seam.weight"].T + weights["seam.bias"] - y).double()
    assert residual.norm() > 1e-3
    assert (x.double().T @ residual).abs().max() < 1e-3 and residual.sum(0).abs().max() < 1e-3


def test_least_squares_finds_the_map_there_is():
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(shape, generator=generator) for shape in ((40, 5), (5, 5), (5,)))
    for found, true in zip(least_squares(x, x @ W.T + b), (W, b), strict=True):
        torch.testing.assert_close(found, true)
    flat = torch.cat([x[:, :4], x[:, :1]], dim=1)  # of rank 4: any map that fits will do
    weight, bias = least_squares(flat, flat)
    torch.testing.assert_close(flat @ weight.T + bias, flat)
    with pytest.raises(ValueError, match=r"5 tokens do not determine .* 5 \+ 1 inputs; raise "
                                         r"--batch_size_alignment"):
        least_squares(x[:5], x[:5])


@every_architecture
def test_cached_text_crosses_the_seam(pair):
    A, B = pair
    for i in (0, 2, N):
        model = model_of(*stitch(A, B, i, False, IDX))
        cached, plain = (torch.cat(list(generate(model, IDX[:, :3], 12, top_k=1, cached=c)), 1)
                         for c in (True, False))
        assert torch.equal(cached, plain)


@every_architecture
@pytest.mark.parametrize(("autocast", "stream"), [(torch.float16, torch.float32),
                                                  (torch.bfloat16, torch.bfloat16)])
def test_the_stream_after_the_seam_is_as_wide_as_before_it(pair, autocast, stream):
    """On a CPU; the seam's product is in autocast's dtype."""
    A, B = pair
    model, seen = model_of(*stitch(A, B, 1, True, None)), []
    model.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.append(args[1].dtype))
    with torch.autocast("cpu", dtype=autocast):
        model.features(IDX)
    assert seen == [stream]


@every_architecture
def test_the_seam_is_part_of_one_graph(pair):
    A, B = pair
    model = model_of(*stitch(A, B, 1, False, IDX))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(IDX, IDX), model(IDX, IDX))


@every_architecture
def test_parameters_are_counted_once(pair):
    A, B = pair
    whole = sum(w.numel() for w in A.weights.values())
    own, other = (model_of(*merge(A, B, 1, head)) for head in (True, False))
    more = 19 * 8 if A.config.tied else 0  # a head beside the embedding
    assert (own.num_params(), other.num_params()) == (whole, whole + more)
    embeddings = sum(w.numel() for name, w in A.weights.items() if name[:13] == "transformer.w")
    assert own.num_params(True) == other.num_params(True) == whole + more - embeddings
    assert model_of(*stitch(A, B, 1, True, None)).num_params() == whole + 8 * 8 + 8
