"""The model: its sizes, initialisation, losses and logits, and the text that it generates."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from gpt import GPT, SIZES, GPTConfig, linear
from gpt.config import ARCHITECTURES, make_config
from gpt.flops import count_params
from gpt.generate import generate, sample_token
from gpt.kv_cache import KVCache
from gpt.pretrained import Trained, cropped
from gpt.seam import residual_stream
from gpt.tensors import POSITIONS, shapes_of
from kernels import load
from tests.conftest import every_architecture
from tests.numerics import stirred

PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
             "gpt2-xl": 1_557_611_200}
TINY = GPTConfig(block_size=16, vocab_size=65, n_layer=3, n_head=2, n_embd=32)


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(replace(TINY, **changes))


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_have_the_published_parameters(size):
    with torch.device("meta"):
        model = GPT(SIZES[size])
    assert model.num_params() == PUBLISHED[size]
    c = SIZES[size]
    norms, biases = (2 * c.n_layer + 1) * 2 * c.n_embd, c.n_layer * 9 * c.n_embd
    without = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd + norms + biases
    assert model.num_params(non_embedding=True) == without
    assert count_params(c) == (without, without + 1024 * c.n_embd)


@every_architecture
def test_loss_at_the_start_is_that_of_a_guess(architecture):
    model, idx = tiny(architecture=architecture), torch.randint(65, (8, 16))
    assert abs(model(idx, idx.roll(1)).item() - math.log(65)) < 0.1


def test_residual_projections_start_smaller():
    """GPT-2 divides by sqrt(2 * n_layer) what is added to the residual stream that often."""
    model = tiny(n_embd=128, n_layer=4)
    assert abs(model.transformer.h[1].mlp.c_fc.weight.std().item() - 0.02) < 1e-3
    assert abs(model.transformer.h[1].mlp.c_proj.weight.std().item() - 0.02 / math.sqrt(8)) < 1e-3


@pytest.mark.parametrize("changes", [{"bias": True}, *({"architecture": a} for a in ARCHITECTURES)],
                         ids=str)
def test_backends_agree_in_loss_and_gradients(changes):
    ours = stirred(tiny(**changes))
    defined = GPT(ours.config, load("reference"))
    defined.load_state_dict(ours.state_dict())
    idx, targets = torch.randint(65, (2, 2, 11))
    losses = [model(idx, targets) for model in (ours, defined)]
    torch.testing.assert_close(*losses)
    sum(losses).backward()
    for (name, p), q in zip(ours.named_parameters(), defined.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


@every_architecture
@pytest.mark.parametrize(("autocast", "stream"), [
    (None, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_the_residual_stream_is_bf16_under_bf16_autocast(autocast, stream, architecture):
    """And as wide as the weights otherwise; what every layer reads, on a CPU."""
    model, seen = tiny(architecture=architecture), []
    for layer in (*model.transformer.h, model.transformer.ln_f):
        layer.register_forward_pre_hook(
            lambda _, args: seen.append(residual_stream(args).dtype))
    idx = torch.randint(65, (2, 7))
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = model(idx, idx)
    loss.backward()
    assert seen == [stream] * 4
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@every_architecture
def test_no_token_sees_its_future(architecture):
    model = stirred(tiny(architecture=architecture))
    x = torch.randn(1, 10, 32, requires_grad=True)
    model.transformer.wte.forward = lambda idx: x
    for t in range(10):
        (grad,) = torch.autograd.grad(model.features(torch.zeros(1, 10, dtype=torch.long))[0, t]
                                      @ torch.arange(32.0), x)
        assert (grad[0, t + 1 :] == 0).all()
        assert (grad[0, : t + 1] != 0).any(-1).all()


@every_architecture
def test_documents_do_not_see_each_other(architecture):
    model, idx = stirred(tiny(architecture=architecture)), torch.randint(65, (1, 12))
    starts = torch.tensor([[0] * 5 + [5] * 7], dtype=torch.int32)
    other = idx.clone()
    other[0, :5] = (other[0, :5] + 1) % 65
    torch.testing.assert_close(model.features(idx, starts)[0, 5:],
                               model.features(other, starts)[0, 5:], rtol=0, atol=0)
    assert not torch.equal(model.features(idx)[0, 5:], model.features(other)[0, 5:])


@every_architecture
def test_logits_are_of_all_positions_or_the_last(architecture):
    model, idx = stirred(tiny(architecture=architecture)), torch.randint(65, (2, 7))
    logits = model.logits(idx)
    assert logits.shape == (2, 7, 65)
    torch.testing.assert_close(model.logits(idx, last_only=True), logits[:, -1:])
    torch.testing.assert_close(model.predict(idx, targets=False), logits[:, -1:])
    assert torch.equal(model.predict(idx), logits)
    assert torch.equal(model.predict(idx, targets=True), logits)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten())
    torch.testing.assert_close(model(idx, idx), losses)


def test_an_unknown_activation_is_refused():
    """It would have been the exact GELU."""
    config = replace(TINY)
    object.__setattr__(config, "activation", "relu")
    with pytest.raises(KeyError, match="relu"):
        GPT(config)


@every_architecture
@pytest.mark.parametrize(("texts", "dtype"), [(2, torch.double), (1, torch.float32)])
@pytest.mark.parametrize("prompt", [1, 5, 16, 20])
def test_greedy_text_is_the_same_with_and_without_cache(prompt, texts, dtype, architecture):
    """Across the end of the window too, where positions shift and the cache no longer holds.

    One text in fp32 takes gpt/linear.py's way for each new token.
    """
    model = stirred(tiny(architecture=architecture)).to(dtype)
    # A tied head repeats its input.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(65, 32, dtype=dtype))
    model.transformer.wte.weight.data *= 4  # or the text is one token over and over
    idx = torch.randint(65, (texts, prompt))
    cached, defined = (torch.cat([*generate(model, idx, 30, temperature=0, cached=c)], 1)
                       for c in (True, False))
    assert torch.equal(cached, defined)
    assert len(cached.unique()) > 2


@every_architecture
def test_generate_keeps_the_prompt_and_the_mode(architecture):
    model = stirred(tiny(dropout=0.5, architecture=architecture)).train()
    idx = torch.randint(65, (2, 4))
    out = model.generate(idx, 6, temperature=0)
    assert out.shape == (2, 10) and torch.equal(out[:, :4], idx) and model.training
    assert torch.equal(out, model.generate(idx, 6, temperature=0))


@every_architecture
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="no MKL, no own way")
def test_every_product_of_a_new_token_is_one_of_a_row(architecture, monkeypatch):
    """Four in each layer, one in the seam, one in the head; in the prompt of 3 the head's only."""
    rows = []
    spy = lambda x, w: (rows.append(tuple(w.shape)), x @ w.T)[1]  # noqa: E731
    monkeypatch.setattr(linear, "row_times", spy)
    stitched = GPT(make_config(1, **asdict(TINY) | {"architecture": architecture}))
    list(generate(stitched, torch.randint(65, (1, 3)), 5))
    assert len(rows) == 5 + 4 * (4 * 3 + 1) and rows.count((65, 32)) == 5


def test_the_cache_is_allocated_once(monkeypatch):
    made, real = [], KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *a: (made.append(1), real(self, *a))[1])
    list(generate(tiny(), torch.randint(65, (1, 3)), 10))
    assert len(made) == 1


@every_architecture
def test_padding_of_the_vocabulary_is_never_sampled(architecture):
    """Its ids from `n_tokens` on, here; GPT-2's vocabulary, padded, is known without that."""
    for vocab_size, n_tokens in ((65, 40), (50304, None)):
        model, real = tiny(architecture=architecture, vocab_size=vocab_size), n_tokens or 50257
        torch.nn.init.zeros_(model.lm_head.weight)
        model.transformer.ln_f.register_forward_hook(lambda *_: (None, torch.ones(4, 1, 32)))
        model.lm_head.weight.data[real:] = 1.0  # wins always
        out = torch.cat([*generate(model, torch.randint(real, (4, 1)), 20, n_tokens=n_tokens)], 1)
        assert out.max() < real
        assert model.logits(out[:, :1]).argmax(-1).min() >= real


def test_sampling_filters():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(2000, 1)
    torch.manual_seed(0)
    p = logits[0].softmax(-1)
    drawn = sample_token(logits, 1.0, None, None).flatten().bincount(minlength=4) / 2000
    torch.testing.assert_close(drawn, p, atol=0.04, rtol=0)
    assert set(sample_token(logits, 1.0, 2, None).flatten().tolist()) == {0, 1}
    assert set(sample_token(logits, 1.0, 1, None).flatten().tolist()) == {0}
    for temperature in (0.0, 5e-324, 1e-40):  # the last two overflowed to NaN
        assert set(sample_token(logits, temperature, None, None).flatten().tolist()) == {0}
    assert set(sample_token(logits, 1e308, None, None).flatten().tolist()) == {0, 1, 2, 3}
    assert set(sample_token(logits, 1.0, None, p[0].item() - 0.01).flatten().tolist()) == {0}
    # In fp32 this is 0, which left no token at all.
    assert set(sample_token(logits, 1.0, None, 1e-300).flatten().tolist()) == {0}
    assert set(sample_token(logits, 1.0, None, p[0].item() + 0.01).flatten().tolist()) == {0, 1}
    assert set(sample_token(logits, 1.0, 3, 1.0).flatten().tolist()) == {0, 1, 2}


def test_bad_sampling_and_lengths_are_named():
    model, idx = tiny(), torch.randint(65, (1, 3))
    for bad in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="must be at least 0"):
            model.generate(idx, 2, **bad)
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(idx[:, :0], 2)
    with pytest.raises(ValueError, match="17 tokens, block_size is 16"):
        model.logits(torch.zeros(1, 17, dtype=torch.long))


@every_architecture
def test_cropping_leaves_short_inputs_alone(architecture):
    model, idx = stirred(tiny(architecture=architecture)), torch.randint(65, (2, 8))
    trained = Trained("A", model.config, dict(model.named_parameters()))
    short = GPT.from_trained(cropped(trained, 8))
    assert short.config.block_size == 8
    assert shapes_of(short.config).get(POSITIONS, (8, 32)) == (8, 32)
    torch.testing.assert_close(short.logits(idx), model.logits(idx), rtol=0, atol=0)
    assert cropped(trained, 16) is cropped(trained, 17) is trained
    with pytest.raises(ValueError, match="9 tokens, block_size is 8"):
        short.logits(torch.zeros(1, 9, dtype=torch.long))
