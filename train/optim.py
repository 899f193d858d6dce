"""Optimizers, their state by parameter name, and the learning rate."""

import math

import torch
from torch import Tensor, nn

from gpt.tensors import decay_groups
from train.config import OptimConfig

# The state of each parameter. AdamW is a subclass of Adam.
MOMENTS = {torch.optim.SGD: {"momentum_buffer"},
           torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}


def build(model: nn.Module, c: OptimConfig) -> torch.optim.Optimizer:
    """Make the fused optimizer of the parameters that are trained.

    Weight decay (adamw, sgd) is for matrices and embeddings, not for norms and biases.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [trained[name] for name in names], "weight_decay": decay}
              for names, decay in zip(decay_groups(trained), (c.weight_decay, 0.0), strict=True)
              if names]
    if c.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=c.learning_rate, momentum=c.momentum, fused=True)
        # Otherwise the first step allocates them, and leaves them unfilled if it is skipped.
        for p in trained.values() if c.momentum else ():
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if c.optimizer == "adam":
        groups = [g | {"weight_decay": 0.0} for g in groups]
        return torch.optim.Adam(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


def learning_rate(step: int, c: OptimConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, a cosine down to lr_decay_iters, then min_lr."""
    if not c.decay_lr:
        return c.learning_rate
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    done = min(1.0, (step - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters))
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (c.learning_rate - c.min_lr)


def step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Step unless `skip`, a bool () on the device, is true; then weights and moments stay.

    The host does not wait: fused optimizers read it on the device, as GradScaler's `found_inf`.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The optimizer's parameters in the order in which its state_dict numbers them."""
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def load_moments(moments: dict[str, dict[str, Tensor]], model: nn.Module,
                 optimizer: torch.optim.Optimizer) -> None:
    """Set the optimizer's state from `moments`: parameter -> key -> tensor.

    Raises ValueError unless every parameter has all of them, in its shape: fused optimizers do not
    check, and write beyond the memory of a moment that is too small.
    """
    names, parameters = parameter_names(model, optimizer), dict(model.named_parameters())
    if wrong := sorted(moments.keys() ^ set(names)):
        raise ValueError(f"the state has not the optimizer's parameters: {wrong[0]} is in only one "
                         f"of the two ({len(wrong)} such names)")
    needed = next(keys for kind, keys in MOMENTS.items() if isinstance(optimizer, kind))
    if not optimizer.defaults.get("momentum", True):
        needed = set()  # sgd without momentum has no state
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
