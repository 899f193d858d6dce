"""The micro-batch for the memory at hand, with the tokens of an optimizer step left as they are."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from common import hardware
from train import parallel
from train.config import Config
from train.documents import Mask, no_mask
from train.parallel import World

# of what is free: the allocator's pieces, NCCL's buffers and cuBLAS's workspaces take the rest
USABLE = 0.92


def check(config: Config, w: World, device: torch.device) -> None:
    """Raise ValueError, before anything is built, where the batches of a step cannot be shared out
    or fitted."""
    if not config.data.fit_batch:
        parallel.accumulation_per_rank(config.optim.gradient_accumulation_steps, w)
    elif device.type != "cuda":
        raise ValueError("--batch_size=auto measures a GPU's memory, and the device is "
                         f"{device.type}; give a number")
    else:
        micro_batches(config, w)


def micro_batches(config: Config, w: World) -> list[int]:
    """Every batch_size that gives the same tokens per step on these ranks, smallest first.

    Raises ValueError where none does.
    """
    total = config.optim.gradient_accumulation_steps * config.data.batch_size
    per_rank, left = divmod(total, w.size)
    if left or not per_rank:
        raise ValueError(f"{total} sequences a step (batch_size {config.data.batch_size} times "
                         f"gradient_accumulation_steps {config.optim.gradient_accumulation_steps}) "
                         f"do not divide among {w.size} ranks")
    return [n for n in range(1, per_rank + 1) if per_rank % n == 0]


def with_micro_batch(config: Config, batch_size: int) -> Config:
    """The same tokens per step in micro-batches of another size."""
    total = config.optim.gradient_accumulation_steps * config.data.batch_size
    assert total % batch_size == 0
    return replace(config, data=replace(config.data, batch_size=batch_size),
                   optim=replace(config.optim, gradient_accumulation_steps=total // batch_size))


def fit(config: Config, wrapped: nn.Module, w: World, device: torch.device,
        dtype: torch.dtype, mask: Mask = no_mask) -> Config:
    """The config with the largest micro-batch that fits on every rank. Measured without
    torch.compile, which needs less.

    Draws random numbers where there is dropout; leaves no gradient behind.
    """
    def peak(sequences: int) -> int:
        hardware.reset_peak_memory(device)
        idx = torch.zeros(sequences, config.model.block_size, dtype=torch.int64, device=device)
        with torch.compiler.set_stance("force_eager"), hardware.autocast(device, dtype):
            loss = wrapped(idx, idx, **mask(idx))
        loss.backward()
        return max(parallel.gather_or_raise(lambda: hardware.peak_memory_bytes(device) or 0, w))

    peak(1)  # allocates the gradients, which all later micro-batches find there
    here = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes
               for p in wrapped.parameters() if p.requires_grad)
    moments = 1 if config.optim.optimizer == "sgd" else 2
    free = min(parallel.gather_or_raise(lambda: hardware.free_memory_bytes(device), w))
    chosen = largest(micro_batches(config, w), peak, moments * here, free)
    wrapped.zero_grad(set_to_none=True)
    return with_micro_batch(config, chosen)


def largest(sizes: list[int], peak_bytes: Callable[[int], int], later_bytes: int,
            free_bytes: int) -> int:
    """The largest of `sizes` whose step fits: what a step takes is a constant and so much a
    sequence, measured at 1 and 2.

    peak_bytes: what forward and backward of so many sequences take at their peak; later_bytes: what
    comes on top of that (the optimizer's moments). Raises ValueError where not even the smallest
    fits.
    """
    one, two = peak_bytes(1), peak_bytes(2)
    each = max(two - one, 1)
    room = int(USABLE * free_bytes) - later_bytes - (one - each)
    fitting = [n for n in sizes if n * each <= room]
    if not fitting:
        raise ValueError(f"not even a micro-batch of {sizes[0]} fits: it takes "
                         f"{(one + later_bytes) / 1e9:.1f} GB of {free_bytes / 1e9:.1f}; try "
                         "--activation_checkpointing=True, --parallel=fsdp on several GPUs, or a "
                         "smaller --block_size")
    return fitting[-1]


def advice(config: Config, w: World, error: torch.OutOfMemoryError) -> str:
    """What to change when memory was not enough: flags that take less, with the same tokens per
    step where they can."""
    smaller = [n for n in micro_batches(config, w) if n < config.data.batch_size]
    ways = []
    if smaller:
        steps = with_micro_batch(config, smaller[-1]).optim.gradient_accumulation_steps
        ways = [f"--batch_size={smaller[-1]} --gradient_accumulation_steps={steps} (the same "
                "tokens per step)",
                "--batch_size=auto (the largest that fits)"]
    if not config.parallel.activation_checkpointing:
        ways.append("--activation_checkpointing=True")
    if w.size > 1 and config.parallel.parallel not in ("fsdp", "hsdp"):
        ways.append("--parallel=fsdp")
    ways.append(f"a --block_size below {config.model.block_size}")
    return f"out of memory with --batch_size={config.data.batch_size}; what takes less: {', '.join(ways)}. {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
