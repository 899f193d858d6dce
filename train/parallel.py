"""Several processes as one: who this process is, and when gradients meet."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class World(NamedTuple):
    """This process among all of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def world() -> World:
    """What torchrun says; alone without it. The only place that reads its variables."""
    if "RANK" not in os.environ:
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def start(w: World, device: torch.device, backend: str) -> None:
    """Meet the other ranks, where there are any."""
    if w.size > 1:
        dist.init_process_group(("nccl" if device.type == "cuda" else "gloo") if backend == "auto" else backend)


def stop(w: World) -> None:
    if w.size > 1:
        dist.destroy_process_group()


def wrap(model: nn.Module, w: World, device: torch.device) -> nn.Module:
    """The model that averages its gradients over the ranks."""
    if w.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next forward's backward ends in an all-reduce. Set before the forward, which is what counts it in."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def accumulation_per_rank(total: int, w: World) -> int:
    """The micro-steps each rank takes. Raises ValueError, with the nearest that fit, if total does not divide."""
    if total % w.size:
        below, above = total // w.size * w.size, (total // w.size + 1) * w.size
        near = f"{below} or {above}" if below else above
        raise ValueError(f"gradient_accumulation_steps={total} is for all ranks together, {w.size} ranks do not divide it; "
                         f"use {near}")
    return total // w.size
