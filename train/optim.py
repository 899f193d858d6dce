"""Optimizers and the learning rate."""

import math

import torch
from torch import Tensor, nn

from gpt.tensors import decay_groups
from train.config import OptimConfig

MOMENTS = {torch.optim.SGD: {"momentum_buffer"},
           torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}  # AdamW is one


def build(model: nn.Module, c: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer, in its fused form: matrices and embeddings decay (adamw, sgd), norms and
    biases do not."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [trained[name] for name in names], "weight_decay": decay}
              for names, decay in zip(decay_groups(trained), (c.weight_decay, 0.0), strict=True)
              if names]
    if c.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=c.learning_rate, momentum=c.momentum, fused=True)
        # else the first step allocates it, unfilled, even when it is skipped
        for p in trained.values() if c.momentum else ():
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if c.optimizer == "adam":
        groups = [g | {"weight_decay": 0.0} for g in groups]
        return torch.optim.Adam(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


def learning_rate(step: int, c: OptimConfig) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters, then min_lr; steps count from
    0."""
    if not c.decay_lr:
        return c.learning_rate
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    done = min(1.0, (step - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters))
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (c.learning_rate - c.min_lr)


def step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step, or none where `skip` () is true: decided on the device; weights and moments stay as
    they are.

    The fused optimizers take this as `found_inf`, which is how GradScaler skips.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


def numbered(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the optimizer's order, which is how its state_dict numbers them."""
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def place(moments: dict[str, dict[str, Tensor]], model: nn.Module,
          optimizer: torch.optim.Optimizer) -> None:
    """Make `moments`, by parameter name, the optimizer's state.

    Raises ValueError unless they are those of all its parameters, and of their shapes: a fused
    optimizer does not look, and reads and writes beyond a moment that is smaller than it should be.
    """
    names, parameters = numbered(model, optimizer), dict(model.named_parameters())
    if wrong := sorted(moments.keys() ^ set(names)):
        raise ValueError(f"the state has not the optimizer's parameters: {wrong[0]} is in only one "
                         f"of the two ({len(wrong)} such names)")
    needed = next(keys for kind, keys in MOMENTS.items() if isinstance(optimizer, kind))
    if not optimizer.defaults.get("momentum", True):
        needed = set()  # sgd without momentum remembers nothing
    for name in names:
        if moments[name].keys() != needed:
            has, wants = (" and ".join(sorted(k)) or "nothing" for k in (moments[name], needed))
            raise ValueError(f"the state has {has} of {name}; the optimizer needs {wants}")
        for key, tensor in moments[name].items():
            shape = torch.Size(()) if key == "step" else parameters[name].shape
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"the state's {key} of {name} is {tuple(tensor.shape)} "
                                 f"{tensor.dtype}; floats of {tuple(shape)} are needed")
    state = {i: moments[name] for i, name in enumerate(names)}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
