"""Fit the micro-batch to the memory, with the tokens per optimizer step left unchanged."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from common import hardware
from train import optim, parallel
from train.config import Config
from train.documents import Documents, one_document
from train.parallel import World

# The part of a GPU's free memory that is planned for; fragmentation, NCCL's buffers and cuBLAS's
# workspaces take the rest.
USABLE = 0.92


def check(config: Config, w: World, device: torch.device) -> None:
    """Raise ValueError where the ranks cannot share the batches of a step evenly.

    With --batch_size=auto also where the device is no GPU, whose memory could be measured.
    """
    if not config.data.fit_batch:
        parallel.accumulation_per_rank(config.optim.gradient_accumulation_steps, w)
    elif device.type != "cuda":
        raise ValueError("--batch_size=auto measures a GPU's memory, and the device is "
                         f"{device.type}; give a number")
    else:
        micro_batches(config, w)


def micro_batches(config: Config, w: World) -> list[int]:
    """List each batch_size that keeps the tokens per step on these ranks, smallest first.

    Raises ValueError where there is none.
    """
    total = config.optim.gradient_accumulation_steps * config.data.batch_size
    per_rank, left = divmod(total, w.size)
    if left or not per_rank:
        raise ValueError(f"{total} sequences a step (batch_size {config.data.batch_size} times "
                         f"gradient_accumulation_steps {config.optim.gradient_accumulation_steps}) "
                         f"do not divide among {w.size} ranks")
    return [n for n in range(1, per_rank + 1) if per_rank % n == 0]


def with_micro_batch(config: Config, batch_size: int) -> Config:
    """The config with another batch_size and the same tokens per step."""
    total = config.optim.gradient_accumulation_steps * config.data.batch_size
    assert total % batch_size == 0
    return replace(config, data=replace(config.data, batch_size=batch_size),
                   optim=replace(config.optim, gradient_accumulation_steps=total // batch_size))


def fit(config: Config, wrapped: nn.Module, w: World, device: torch.device,
        dtype: torch.dtype, documents: Documents = one_document) -> Config:
    """The config with the largest micro-batch that fits on every rank. Every rank must call it.

    Measured in eager mode, which needs more memory than the compiled model. Dropout draws random
    numbers.
    """
    def peak_bytes(sequences: int) -> int:
        hardware.reset_peak_memory(device)
        idx = torch.zeros(sequences, config.model.block_size, dtype=torch.int64, device=device)
        with torch.compiler.set_stance("force_eager"), hardware.autocast(device, dtype):
            loss = wrapped(idx, idx, doc_start=documents(idx))
        loss.backward()
        return max(parallel.gather_or_raise(lambda: hardware.peak_memory_bytes(device) or 0, w))

    peak_bytes(1)  # allocates the gradients, so that they are in every later measurement
    moments_bytes = sum(
        optim.moments_per_element(config.optim, group)
        * sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in group["params"])
        for group in optim.groups_of(getattr(wrapped, "module", wrapped), config.optim))
    free_bytes = min(parallel.gather_or_raise(lambda: hardware.free_memory_bytes(device), w))
    sizes = micro_batches(config, w)
    chosen = largest(sizes, peak_bytes, moments_bytes, free_bytes)
    wrapped.zero_grad(set_to_none=True)
    return with_micro_batch(config, chosen)


def largest(sizes: list[int], peak_bytes: Callable[[int], int], moments_bytes: int,
            free_bytes: int) -> int:
    """The largest of `sizes` whose step fits, by the model bytes = a + b * size + moments_bytes.

    `peak_bytes(size)` measures forward and backward of a micro-batch; sizes 1 and 2 give a and b.
    Raises ValueError where not even the smallest size fits.
    """
    at_1, at_2 = peak_bytes(1), peak_bytes(2)
    b = max(at_2 - at_1, 1)
    a = at_1 - b
    fitting = [n for n in sizes if a + b * n + moments_bytes <= int(USABLE * free_bytes)]
    if not fitting:
        raise ValueError(f"not even a micro-batch of {sizes[0]} fits: it takes "
                         f"{(at_1 + moments_bytes) / 1e9:.1f} GB of {free_bytes / 1e9:.1f}; try "
                         "--activation_checkpointing=True, --parallel=fsdp on several GPUs, or a "
                         "smaller --block_size")
    return fitting[-1]


def advice(config: Config, w: World, error: torch.OutOfMemoryError) -> str:
    """Say which flags need less memory than the run that failed with `error`."""
    smaller = [n for n in micro_batches(config, w) if n < config.data.batch_size]
    ways = []
    if smaller:
        steps = with_micro_batch(config, smaller[-1]).optim.gradient_accumulation_steps
        ways = [f"--batch_size={smaller[-1]} --gradient_accumulation_steps={steps} (the same "
                "tokens per step)", "--batch_size=auto (the largest that fits)"]
    if not config.parallel.activation_checkpointing:
        ways.append("--activation_checkpointing=True")
    if w.size > 1 and config.parallel.parallel not in ("fsdp", "hsdp"):
        ways.append("--parallel=fsdp")
    ways.append(f"a --block_size below {config.model.block_size}")
    first_line = str(error).partition("\n")[0][:300]
    return (f"out of memory with --batch_size={config.data.batch_size}; what takes less: "
            f"{', '.join(ways)}. {first_line}")
