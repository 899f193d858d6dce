"""Several processes as one: who this process is, how the model is spread over them, and when
gradients meet."""

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
from train.config import ParallelConfig

T = TypeVar("T")

# -- who -------------------------------------------------------------------------


class World(NamedTuple):
    """This process among all of the run. `restarts`: how often torchrun has had to start the run
    again."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0


def world() -> World:
    """What torchrun says; alone without it. The only place that reads its variables."""
    if "RANK" not in os.environ:
        return World()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    default = {"LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "TORCHELASTIC_RESTART_COUNT": "0"}
    return World(*(int(os.environ.get(name) or default[name]) for name in names))


def start(w: World, device: torch.device, c: ParallelConfig) -> dist.Store | None:
    """Meet the other ranks, where there are any or a way to spread over them is asked for by name.

    A store that all of them share, which for torchrun's sake is another one after each restart;
    None for one alone.
    """
    if w.size == 1 and c.parallel == "auto":
        return None
    backend = c.backend
    if backend == "auto":
        # gloo: small objects, without the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store: Any = dist.HashStore() if w.size == 1 else next(rendezvous("env://"))[0]
    if w.size == w.local_size:
        # torchrun's store lives on through restarts: the addresses of dead ranks are in it. Agents
        # on several nodes count restarts apart, so there the prefix would not agree:
        # docs/several-nodes.md gives them a new store each time.
        store = dist.PrefixStore(f"attempt-{w.restarts}", store)
    # Ten times what the watchdog waits: it comes first and says who; the first step may compile for
    # long.
    timeout = datetime.timedelta(seconds=10 * c.hang_timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=w.rank, world_size=w.size)
    return dist.PrefixStore("ridge", store.clone())


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# -- how -------------------------------------------------------------------------


def strategy(c: ParallelConfig, w: World, model: nn.Module, device: torch.device) -> str:
    """none, ddp, fsdp or hsdp, as asked for; auto: ddp, but fsdp where a GPU would be half full of
    the model's state.

    State: weight, gradient and two moments, all fp32, so 16 bytes a parameter.
    """
    if c.parallel != "auto":
        return c.parallel
    if w.size == 1:
        return "none"
    memory = torch.cuda.get_device_properties(
        device).total_memory if device.type == "cuda" else float("inf")
    return "fsdp" if 16 * sum(p.numel() for p in model.parameters()) > memory / 2 else "ddp"


def place(model: GPT, c: ParallelConfig, w: World, device: torch.device, dtype: torch.dtype,
          compiled: bool) -> nn.Module:
    """The whole parallel story: recompute, compile, then replicate (DDP) or shard (FSDP2).
    Parameters keep their names.

    One process compiles the model whole. Several compile block by block, so that a block's
    gradients leave while the backward of the block before it runs; the loss is compiled apart.
    Forwards are replaced, not modules: no key changes, and the hooks of FSDP2 stay outside what is
    compiled.
    """
    how = strategy(c, w, model, device)
    if c.activation_checkpointing:
        for block in model.transformer.h:
            block.forward = recomputed(block.forward, model.config.dropout)
    if compiled and how == "none":
        model.compile()
    elif compiled:
        for block in model.transformer.h:
            block.forward = compiled_in_training(block.forward)
        model.kernels = model.kernels._replace(
            linear_cross_entropy=torch.compile(model.kernels.linear_cross_entropy))
    if how in ("fsdp", "hsdp"):
        return shard(model, how, w, device, dtype)
    if how == "none":
        return model
    # A bucket is a block's gradients: the all-reduce of one block beside the backward of the next,
    # in few messages.
    block_mb = sum(4 * p.numel() for p in model.transformer.h[0].parameters()) / 2**20
    return DistributedDataParallel(model,
                                   device_ids=[device.index] if device.type == "cuda" else None,
                                   bucket_cap_mb=max(1, round(block_mb)),
                                   gradient_as_bucket_view=True)


def shard(model: GPT, how: str, w: World, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """FSDP2 in place: each block a unit; the tied embedding, positions and last norm in the root's,
    which stays whole from forward to backward. hsdp: sharded within a node, replicated over nodes.
    bf16 gradients are reduced in fp32."""
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
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def compiled_in_training(forward: Callable) -> Callable:
    """The forward of a block, compiled; generation with its cache, of another length at each token,
    stays as it is."""
    fast = torch.compile(forward)

    @functools.wraps(forward)
    def either(x, residual=None, doc_start=None, cache=None):
        return fast(x, residual,
                    doc_start) if cache is None else forward(x, residual, doc_start, cache)

    return either


def recomputed(forward: Callable, dropout: float) -> Callable:
    """The forward of a block, run again in backward instead of keeping what is in it, all but
    attention's outputs."""
    context = functools.partial(create_selective_checkpoint_contexts, kept_operators(dropout))
    return functools.partial(checkpoint, forward, use_reentrant=False,
                             preserve_rng_state=dropout > 0, context_fn=context)


def kept_operators(dropout: float) -> list:
    """What is dearer to compute again than to keep: attention. Norms are the other way round.

    PyTorch's own attention draws its dropout from the generator: were it not run again, later draws
    of the second forward would differ from those of the first. So it is kept only without dropout.
    Ours gets its seed as an argument.
    """
    ours = [torch.ops.ridge.attention_forward.default] if hasattr(torch.ops.ridge,
                                                                  "attention_forward") else []
    if dropout > 0:
        return ours
    names = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
             "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")
    return ours + [getattr(torch.ops.aten, name).default for name in names]


def describe(wrapped: nn.Module, w: World, c: ParallelConfig) -> str:
    """How the model is spread, in words."""
    if isinstance(wrapped, FSDPModule):
        how = "HSDP" if c.parallel == "hsdp" else "FSDP2"
    else:
        how = "DDP" if isinstance(wrapped, DistributedDataParallel) else "one process"
    ranks = f", {w.size} ranks on {w.size // w.local_size} node(s)" if how != "one process" else ""
    return how + ranks + (", activation checkpointing" if c.activation_checkpointing else "")


# -- when ------------------------------------------------------------------------


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next forward's backward ends in a reduction. Set before the forward, which is
    what counts it in."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def reshard(model: nn.Module) -> None:
    """After forwards without a backward, put back the root's shards, which FSDP2 leaves whole for a
    backward to come."""
    if isinstance(model, FSDPModule):
        model.reshard()


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to this norm over all ranks (0: leave them); the norm before, the
    same on all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))
    return full_tensor(norm)


def full_tensor(value: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a shard. Every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The shard of `value`, whole and the same on all ranks, that goes with this rank's shard of a
    parameter."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(parameter.device), mesh, parameter.placements,
                             src_data_rank=None)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast_from_rank_0(decide: Callable[[], T], w: World) -> T:
    """What `decide` gives on rank 0, on every rank; the ValueError or OSError it raises there,
    raised on every rank."""
    return gather_or_raise(lambda: decide() if w.rank == 0 else cast(T, None), w)[0]


def gather_or_raise(do: Callable[[], T], w: World, group: dist.ProcessGroup | None = None) -> list[T]:
    """What `do` gives on each rank, in their order; the first ValueError or OSError that it raises
    on any, on all of them."""
    mine: tuple[Any, Exception | None]
    try:
        mine = do(), None
    except (ValueError, OSError, SafetensorError) as error:
        mine = None, error if isinstance(error, ValueError | OSError) else OSError(str(error))
    answers: list[Any] = [mine] * w.size
    if w.size > 1:
        dist.all_gather_object(answers, mine, group)
    for _, raised in answers:
        if raised is not None:
            raise raised
    return [value for value, _ in answers]


def accumulation_per_rank(total: int, w: World) -> int:
    """The micro-steps each rank takes. Raises ValueError, with the nearest that fit, if total does
    not divide."""
    if total % w.size:
        below, above = total // w.size * w.size, (total // w.size + 1) * w.size
        near = f"{below} or {above}" if below else above
        raise ValueError(f"gradient_accumulation_steps={total} is for all ranks together, {w.size} "
                         f"ranks do not divide it; use {near}")
    return total // w.size
