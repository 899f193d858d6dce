"""Optimizers, their groups and state by parameter name, and the schedule of their rates."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gpt.decoder import Decoder, Role
from gpt.tensors import decay_groups
from train.config import OptimConfig
from train.muon import Muon

ADAM = ["exp_avg", "exp_avg_sq", "step"]


def build(model: nn.Module, c: OptimConfig,
          dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """Make the fused optimizer of the parameters that are trained.

    `dtype`: of the run's products, and so of Muon's.
    """
    groups = groups_of(model, c)
    trained = [p for group in groups for p in group["params"]]
    betas = (c.beta1, c.beta2)
    if c.optimizer == "muon":
        return Muon(groups, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, betas)
    if c.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=c.learning_rate, momentum=c.momentum, fused=True)
        # Otherwise the first step allocates them, and leaves them unfilled if it is skipped.
        for p in trained if c.momentum else ():
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if c.optimizer == "adam":
        groups = [g | {"weight_decay": 0.0} for g in groups]
        return torch.optim.Adam(groups, lr=c.learning_rate, betas=betas, fused=True)
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=betas, fused=True)


def groups_of(model: nn.Module, c: OptimConfig) -> list[dict[str, Any]]:
    """The trained parameters in groups of one rate and weight decay; Muon's also of one shape.

    A group's rate is `scale` times the schedule's. Weight decay is for matrices and embeddings, not
    for norms and biases.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    roles = model.roles() if isinstance(model, Decoder) else {}
    decayed, _ = decay_groups(trained)
    groups: dict[Any, dict[str, Any]] = {}
    for name, p in trained.items():
        role, decays = roles.get(name, Role("vector")), name in decayed
        rate, more = c.learning_rate, {}
        if role.kind == "embedding" and c.embedding_lr:
            rate = c.embedding_lr
        if role.kind == "matrix" and c.optimizer == "muon":
            rate, more = c.muon_lr, {"packed": role.packed}
        group = groups.setdefault((rate, decays, *((role, p.shape) if more else ())), {
            "params": [], "lr": rate, "weight_decay": c.weight_decay if decays else 0.0,
            "scale": rate / c.learning_rate if rate != c.learning_rate else 1.0, **more})
        group["params"].append(p)
    return sorted(groups.values(), key=lambda group: group["params"][0].dim() < 2)


def set_rates(optimizer: torch.optim.Optimizer, step: int, lr: float, c: OptimConfig) -> None:
    """Set every group's rate, which is `lr` where its scale is 1, and Muon's momentum."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        if "packed" in group:
            group["momentum"] = muon_momentum(step, c)


def learning_rate(step: int, c: OptimConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then the schedule to lr_decay_iters, then min_lr.

    cosine: half a period. trapezoid: constant, then a straight line over the last decay_fraction of
    lr_decay_iters. Constant with decay_lr=False.
    """
    if not c.decay_lr:
        return c.learning_rate
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if c.schedule == "trapezoid":
        left = (c.lr_decay_iters - step) / (c.decay_fraction * c.lr_decay_iters)
        return c.min_lr + min(1.0, max(0.0, left)) * (c.learning_rate - c.min_lr)
    done = min(1.0, (step - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters))
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (c.learning_rate - c.min_lr)


def muon_momentum(step: int, c: OptimConfig) -> float:
    """Muon's momentum: from 0.1 below muon_momentum up to it over 300 steps.

    In a third of lr_decay_iters where that is less. Source of the warm-up: modded-nanogpt.
    """
    warmed_up = min(1.0, step / max(1.0, min(300, c.lr_decay_iters / 3)))
    return max(0.0, c.muon_momentum - 0.1 * (1 - warmed_up))


def step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Step unless `skip`, a bool () on the device, is true; then weights and moments stay.

    The host does not wait: the optimizers read it on the device, as GradScaler's `found_inf`. With
    Muon every rank must call it.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The optimizer's parameters in the order in which its state_dict numbers them."""
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def moments_per_element(c: OptimConfig, group: dict[str, Any]) -> int:
    """How many numbers the optimizer keeps for each element of a group's parameters."""
    return 1 if "packed" in group or c.optimizer == "sgd" else 2


def state_keys(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    """The names of the tensors that are the state of each of the optimizer's parameters."""
    names, found = iter(parameter_names(model, optimizer)), dict[str, list[str]]()
    for group in optimizer.param_groups:
        keys = ADAM
        if "packed" in group:
            keys = ["momentum_buffer"]
        elif isinstance(optimizer, torch.optim.SGD):
            keys = ["momentum_buffer"] if group["momentum"] else []
        found |= {next(names): keys for _ in group["params"]}
    return found


def load_moments(moments: dict[str, dict[str, Tensor]], model: nn.Module,
                 optimizer: torch.optim.Optimizer) -> None:
    """Set the optimizer's state from `moments`: parameter -> key -> tensor.

    Raises ValueError unless every parameter has all of them, in its shape: fused optimizers do not
    check, and write beyond the memory of a moment that is too small.
    """
    needed, parameters = state_keys(model, optimizer), dict(model.named_parameters())
    if wrong := sorted(moments.keys() ^ needed.keys()):
        raise ValueError(f"the state has not the optimizer's parameters: {wrong[0]} is in only one "
                         f"of the two ({len(wrong)} such names)")
    for name, keys in needed.items():
        if moments[name].keys() != set(keys):
            has, wants = (" and ".join(sorted(k)) or "nothing" for k in (moments[name], keys))
            raise ValueError(f"the state has {has} of {name}; the optimizer needs {wants}")
        for key, tensor in moments[name].items():
            shape = torch.Size(()) if key == "step" else parameters[name].shape
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"the state's {key} of {name} is {tuple(tensor.shape)} "
                                 f"{tensor.dtype}; floats of {tuple(shape)} are needed")
    state = {i: moments[name] for i, name in enumerate(needed)}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
