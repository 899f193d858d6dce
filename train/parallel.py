"""Several processes as one: who this rank is, how the model is spread, when gradients are reduced.

A function that says "every rank must call it" is a collective.
"""

import datetime
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gpt import GPT
from gpt.layers import PLAIN
from train.config import ParallelConfig

T = TypeVar("T")

# -- which rank this is ----------------------------------------------------------


class World(NamedTuple):
    """This process among all of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    """how often torchrun has restarted the run"""


def world() -> World:
    """The World that torchrun describes; without torchrun a single process.

    Nothing else reads torchrun's variables, but for the rendezvous in `start`, which takes the
    address of the store from them.
    """
    if "RANK" not in os.environ:
        return World()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    default = {"LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "TORCHELASTIC_RESTART_COUNT": "0"}
    return World(*(int(os.environ.get(name) or default[name]) for name in names))


def start(w: World, device: torch.device, c: ParallelConfig) -> dist.Store | None:
    """Initialise the process group, and return a store that all ranks share.

    A single process gets neither, and returns None, unless --parallel names a way to spread the
    model. Every rank must call it.
    """
    if w.size == 1 and c.parallel == "auto":
        return None
    backend = c.backend
    if backend == "auto":  # gloo carries small objects without the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store: Any = dist.HashStore() if w.size == 1 else next(rendezvous("env://"))[0]
    if w.size == w.local_size:
        # torchrun's store outlives a restart and still holds the addresses of dead ranks, so each
        # attempt has a prefix. Agents on several nodes count restarts apart, and their prefixes
        # would differ: docs/several-nodes.md gives them a new store for each attempt.
        store = dist.PrefixStore(f"attempt-{w.restarts}", store)
    # NCCL connects at once, on this GPU, and not at the first collective on the one it guesses.
    nccl = device.type == "cuda" and "nccl" in backend
    # Ten times the watchdog's: the watchdog must come first, since it names the rank that hangs;
    # and the first step may compile for long.
    timeout = datetime.timedelta(seconds=10 * c.hang_timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=w.rank, world_size=w.size,
                            device_id=device if nccl else None)
    return dist.PrefixStore("ridge", store.clone())


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


# -- how the model is spread -----------------------------------------------------


def strategy(c: ParallelConfig, w: World, model: nn.Module, device: torch.device) -> str:
    """none, ddp, fsdp or hsdp, as --parallel says.

    auto: ddp, but fsdp where the model's state would fill half of a GPU. The state is the weights,
    gradients and two moments in fp32: 16 bytes a parameter.
    """
    if c.parallel != "auto":
        return c.parallel
    if w.size == 1:
        return "none"
    if device.type != "cuda":
        return "ddp"
    state_bytes = 16 * sum(p.numel() for p in model.parameters())
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    return "fsdp" if state_bytes > memory_bytes / 2 else "ddp"


def place(model: GPT, c: ParallelConfig, w: World, device: torch.device, dtype: torch.dtype,
          compiled: bool) -> nn.Module:
    """Add activation checkpointing, compile, then replicate (DDP) or shard (FSDP2) the model.

    Every rank must call it.

    One process compiles the whole model. Several compile block by block, so that the gradients of a
    block are reduced during the backward of the block below; the loss is compiled apart. Forwards
    are replaced, not modules: parameters keep their names, and FSDP2's hooks are not compiled.
    """
    how = strategy(c, w, model, device)
    if c.activation_checkpointing:
        for block in model.transformer.h:
            block.forward = recomputed(block.forward, model.config.dropout)
    if compiled and how == "none":
        model.compile()
    elif compiled:
        # DDP's own optimizer would cut a block's graph where a bucket ends. It serves models that
        # are one graph; between blocks buckets go out without it.
        torch._dynamo.config.optimize_ddp = False
        for block in model.transformer.h:
            block.forward = compiled_in_training(block.forward)
        loss = torch.compile(model.kernels.linear_cross_entropy)
        model.kernels = model.kernels._replace(linear_cross_entropy=loss)
    if how in ("fsdp", "hsdp"):
        return shard(model, how, w, device, dtype)
    if how == "none":
        return model
    # A bucket holds one block's gradients, so that few messages overlap with the next backward.
    block_mb = sum(4 * p.numel() for p in model.transformer.h[0].parameters()) / 2**20
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None,
        bucket_cap_mb=max(1, round(block_mb)), gradient_as_bucket_view=True)


def shard(model: GPT, how: str, w: World, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Shard the model in place by FSDP2: over all ranks, or (hsdp) within each node.

    Every rank must call it. Each block is a unit. The root unit has the embeddings and the last
    norm, and keeps them gathered from forward to backward. bf16 gradients are reduced in fp32.
    """
    if dtype == torch.float16:
        raise ValueError(f"--parallel={how} has no loss scaling for --dtype=float16; use bfloat16, "
                         "float32, or --parallel=ddp")
    if w.size % w.local_size:
        raise ValueError(f"--parallel={how}: {w.size} ranks are not whole nodes of {w.local_size}")
    if how == "hsdp":
        mesh = init_device_mesh(device.type, (w.size // w.local_size, w.local_size),
                                mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (w.size,))
    # Inputs are not cast: the stream has the dtype of the parameters, and rotations stay fp32.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def compiled_in_training(forward: Callable) -> Callable:
    """A block's forward, compiled, except in generation with a cache.

    There each token has another length, and each length would be compiled anew.
    """
    compiled = torch.compile(forward)

    @functools.wraps(forward)
    def either(x, residual=None, context=PLAIN):
        return (compiled if context.cache is None else forward)(x, residual, context)

    return either


def recomputed(forward: Callable, dropout: float) -> Callable:
    """A block's forward that saves its inputs and `kept_operators`, and recomputes the rest."""
    context = functools.partial(create_selective_checkpoint_contexts, kept_operators(dropout))
    return functools.partial(checkpoint, forward, use_reentrant=False,
                             preserve_rng_state=dropout > 0, context_fn=context)


def kept_operators(dropout: float) -> list:
    """The operators whose outputs activation checkpointing keeps: attention, the dearest to redo.

    With dropout, PyTorch's attention must run again: it draws its mask from the generator, and
    without that draw the masks after it would differ. Ours gets its seed as an argument.
    """
    ours = [getattr(torch.ops.ridge, name).default
            for name in ("attention_forward", "rotary_attention_forward")
            if hasattr(torch.ops.ridge, name)]
    if dropout > 0:
        return ours
    names = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
             "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")
    return ours + [getattr(torch.ops.aten, name).default for name in names]


def describe(wrapped: nn.Module, w: World, c: ParallelConfig) -> str:
    """How the model is spread, for the first lines of a run."""
    if isinstance(wrapped, FSDPModule):
        how = "HSDP" if c.parallel == "hsdp" else "FSDP2"
    else:
        how = "DDP" if isinstance(wrapped, DistributedDataParallel) else "one process"
    if how != "one process":
        how += f", {w.size} ranks on {w.size // w.local_size} node(s)"
    return how + (", activation checkpointing" if c.activation_checkpointing else "")


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of `value`, sharded as `parameter` is.

    `value` is the full tensor, and equal on all ranks. One of another shape is returned as it is.
    """
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(parameter.device), mesh, parameter.placements,
                             src_data_rank=None)


# -- when gradients are reduced --------------------------------------------------


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Switch the reduction of gradients over ranks on or off for the next forward and backward.

    Call it before the forward: DDP reads the flag there, FSDP2 in the backward.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def reshard(model: nn.Module) -> None:
    """Free the root unit's gathered parameters after forwards without a backward.

    FSDP2 would keep them gathered for a backward that does not come.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scale gradients down to a norm of at most `limit` (0: no limit). Every rank must call it.

    Return the norm before, over all ranks: ().
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))
    return full_tensor(norm)


def accumulation_per_rank(total: int, w: World) -> int:
    """The micro-steps of each rank, of `total` over all ranks.

    Raises ValueError, with the nearest numbers that divide, where `total` does not.
    """
    if total % w.size:
        below, above = total // w.size * w.size, (total // w.size + 1) * w.size
        near = f"{below} or {above}" if below else above
        raise ValueError(f"gradient_accumulation_steps={total} is for all ranks together, {w.size} "
                         f"ranks do not divide it; use {near}")
    return total // w.size


# -- collectives -----------------------------------------------------------------


def full_tensor(value: Tensor) -> Tensor:
    """All-gather a tensor of which this rank holds a shard. Every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce a tensor in place: the sum over all ranks. Every rank must call it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast_from_rank_0(fn: Callable[[], T], w: World) -> T:
    """Call fn() on rank 0 and return its result on all ranks. Every rank must call it.

    A ValueError or OSError of rank 0 is raised on all ranks.
    """
    return gather_or_raise(lambda: fn() if w.rank == 0 else cast(T, None), w)[0]


def gather_or_raise(fn: Callable[[], T], w: World,
                    group: dist.ProcessGroup | None = None) -> list[T]:
    """Call fn() on every rank and all-gather the results, by rank. Every rank must call it.

    The first ValueError or OSError, by rank, is raised on all ranks.
    """
    mine: tuple[Any, Exception | None]
    try:
        mine = fn(), None
    except (ValueError, OSError, SafetensorError) as error:
        mine = None, error if isinstance(error, ValueError | OSError) else OSError(str(error))
    gathered: list[Any] = [mine] * w.size
    if w.size > 1:
        dist.all_gather_object(gathered, mine, group)
    for _, raised in gathered:
        if raised is not None:
            raise raised
    return [result for result, _ in gathered]
