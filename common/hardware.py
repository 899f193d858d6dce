"""The one module that knows devices: which there are, what they compute in, and how to wait for
them."""

import ctypes
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device to run on. Raises ValueError, naming what there is, for one that is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    kind, _, index = name.partition(":")
    if kind not in there or (index and not index.isdigit()):
        raise ValueError(f"--device={name}: choose auto, cuda, cuda:N, mps or cpu")
    if not there[kind]:
        raise ValueError(f"--device={name}: there is none here; choose from "
                         f"{', '.join(k for k in there if there[k])}")
    if kind == "cuda":
        device = torch.device("cuda", int(index) if index else local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device={name}: cuda:{device.index} is not here, "
                             f"{torch.cuda.device_count()} GPU(s) are")
        torch.cuda.set_device(device)
        return device
    return torch.device(kind)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """What matrix multiplications run in; auto is bfloat16 where the device has units for it, else
    fp16 on a GPU."""
    if name not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype={name}: choose auto, {', '.join(DTYPES)}")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8,
                                                                              0) else torch.float16
    return _automatic_on_a_cpu() if device.type == "cpu" else torch.float32


def _automatic_on_a_cpu() -> torch.dtype:
    return torch.bfloat16 if cpu_has_bf16_units() else torch.float32


def cpu_has_bf16_units() -> bool:
    """Where they are missing PyTorch emulates bf16, slower than fp32."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))


def cpu_units() -> str:
    """What this CPU computes with, which its model's name may not tell: "AVX512, bf16 units"."""
    features = torch.cpu.get_capabilities()
    vectors = next((name for key, name in (("avx512_f", "AVX512"), ("avx2", "AVX2"))
                    if features.get(key)), platform.machine())
    return f"{vectors}, {'' if cpu_has_bf16_units() else 'no '}bf16 units"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Where matrix multiplications take `dtype` and the rest keeps fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees for its next allocations.

    glibc maps each block of 32 MB or more anew, and the system fills it with zeros page by page: a
    sixth of a CPU's training step where activations are that large (bench/LOG.md). Other C
    libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system


def device_name(device: torch.device) -> str:
    """The name that gpt.flops.PEAK_TFLOPS knows a GPU by; the model of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} GPU"
    model = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{model} ({cpu_units()}), {torch.get_num_threads()} threads"


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """Start copying a small tensor to the host; the call returned waits for that copy alone, not
    for later work."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most that was allocated on a GPU so far; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Let peak_memory_bytes count from now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory_bytes(device: torch.device) -> int:
    """What this process can have of a GPU: what it already holds, and what nobody does."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
