import math

import pytest
import torch
from torch import nn

from gpt import GPT, GPTConfig
from train import optim
from train.config import OptimConfig


def one_step(c):
    """One step of c on a matrix and a vector of ones with gradient 0.5: both after it."""
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    optimizer = optim.build(model, c)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    return model.weight.item(), model.bias.item()


def test_adamw_step_by_hand():
    """Adam's first step is lr * sign(g); only the matrix first decays by lr * weight_decay."""
    matrix, vector = one_step(OptimConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.2))
    assert matrix == pytest.approx(1 * (1 - 0.1 * 0.2) - 0.1, abs=1e-6)
    assert vector == pytest.approx(1 - 0.1, abs=1e-6)


def test_adam_step_by_hand():
    assert one_step(OptimConfig(optimizer="adam", learning_rate=0.1,
                                weight_decay=0.2)) == pytest.approx((0.9, 0.9), abs=1e-6)


def test_sgd_steps_by_hand():
    """Two steps with momentum 0.5: g, then g + 0.5 g, and weight decay in the matrix's gradient."""
    c = OptimConfig(optimizer="sgd", learning_rate=0.1, weight_decay=0.2, momentum=0.5)
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    optimizer = optim.build(model, c)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    assert model.bias.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1 * (0.5 + 0.25), abs=1e-6)
    first = 0.5 + 0.2 * 1
    second = 0.5 + 0.2 * (1 - 0.1 * first) + 0.5 * first
    assert model.weight.item() == pytest.approx(1 - 0.1 * first - 0.1 * second, abs=1e-6)


def test_matrices_decay_and_the_rest_does_not():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, bias=True))
    decay, rest = optim.build(model, OptimConfig()).param_groups
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    # both embeddings, four matrices a layer; the tied head is not counted twice
    assert len(decay["params"]) == 2 + 4 * 2
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_learning_rate_by_hand():
    c = OptimConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
    assert optim.learning_rate(0, c) == pytest.approx(0.1)
    assert optim.learning_rate(8, c) == pytest.approx(0.9)
    assert optim.learning_rate(9, c) == pytest.approx(1.0)
    assert optim.learning_rate(34, c) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert optim.learning_rate(59, c) == pytest.approx(0.55)
    assert optim.learning_rate(109, c) == optim.learning_rate(10**6, c) == pytest.approx(0.1)
    assert optim.learning_rate(5, OptimConfig(learning_rate=0.3, decay_lr=False)) == 0.3


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("change", ["transposed", "smaller", "integers", "missing", "key", "more"])
def test_moments_are_looked_at_before_they_are_placed(kind, change):
    """A fused optimizer takes what it is given, and read beyond the end of one too small."""
    model = nn.Linear(3, 5)
    optimizer = optim.build(model, OptimConfig(optimizer=kind))
    zero = (
        {"momentum_buffer": torch.zeros}
        if kind == "sgd"
        else {"exp_avg": torch.zeros, "exp_avg_sq": torch.zeros}
    )
    moments = {
        name: {key: make(p.shape) for key, make in zero.items()}
        for name, p in model.named_parameters()
    }
    for known in moments.values():
        known |= {} if kind == "sgd" else {"step": torch.tensor(7.0)}
    optim.load_moments(moments, model, optimizer)
    first = next(iter(zero))
    assert optimizer.state[model.weight][first].shape == (5, 3)
    if change == "missing":
        del moments["bias"]
    elif change == "more":
        moments["other"] = moments["bias"]
    elif change == "key":
        del moments["weight"][first]
    else:
        wrong = {
            "transposed": torch.zeros(3, 5),
            "smaller": torch.zeros(5),
            "integers": torch.zeros(5, 3).int(),
        }
        moments["weight"][first] = wrong[change]
    with pytest.raises(ValueError, match="^the state"):
        optim.load_moments(moments, model, optimizer)


def test_sgd_without_momentum_remembers_nothing():
    model = nn.Linear(3, 5)
    optimizer = optim.build(model, OptimConfig(optimizer="sgd", momentum=0.0))
    optim.load_moments({"weight": {}, "bias": {}}, model, optimizer)
    with pytest.raises(ValueError, match="the optimizer needs nothing"):
        moments = {name: {"momentum_buffer": torch.zeros_like(p)}
                   for name, p in model.named_parameters()}
        optim.load_moments(moments, model, optimizer)
