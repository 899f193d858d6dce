"""Devices: which one to run on, in which dtype, how much memory it has, how to read from it.

A run's device, dtype and memory are asked for here.
"""

import ctypes
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Moment = float | torch.cuda.Event  # on the host's clock, or on a GPU's current stream
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device=name` means; "auto" takes a GPU if there is one.

    "cuda" without a number is the GPU `local_rank`. The GPU chosen becomes torch's current device.
    Raises ValueError for a device that this machine does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    kind, _, index = name.partition(":")
    if kind not in available or (index and not index.isdigit()):
        raise ValueError(f"--device={name}: choose auto, cuda, cuda:N, mps or cpu")
    if not available[kind]:
        choices = ", ".join(kind for kind in available if available[kind])
        raise ValueError(f"--device={name}: there is none here; choose from {choices}")
    if kind == "cuda":
        device = torch.device("cuda", int(index) if index else local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device={name}: cuda:{device.index} is not here, "
                             f"{torch.cuda.device_count()} GPU(s) are")
        torch.cuda.set_device(device)
        return device
    return torch.device(kind)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix multiplications that `--dtype=name` means.

    "auto" is bfloat16 if the device has units for it; otherwise float16 on a GPU and float32
    elsewhere. Raises ValueError for an unknown name.
    """
    if name not in (*DTYPES, "auto"):
        raise ValueError(f"--dtype={name}: choose auto, {', '.join(DTYPES)}")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    return _automatic_on_a_cpu() if device.type == "cpu" else torch.float32


# Apart, so that tests can notice who asks for --dtype=auto (tests/conftest.py).
def _automatic_on_a_cpu() -> torch.dtype:
    return torch.bfloat16 if cpu_has_bf16_units() else torch.float32


def cpu_has_bf16_units() -> bool:
    """Whether this CPU has bf16 units. Without them PyTorch emulates bf16, slower than fp32."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))


def cpu_units() -> str:
    """This CPU's vector and bf16 units, "AVX512, bf16 units": the model's name may not say."""
    features = torch.cpu.get_capabilities()
    vectors = next((name for key, name in (("avx512_f", "AVX512"), ("avx2", "AVX2"))
                    if features.get(key)), platform.machine())
    return f"{vectors}, {'' if cpu_has_bf16_units() else 'no '}bf16 units"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """A context in which matrix multiplications run in `dtype` and the rest stays in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def prepare(device: torch.device) -> None:
    """Set what makes training on this device faster, for this process."""
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next allocations, instead of returning it.

    By default glibc maps each block of 32 MB or more anew and Linux fills it with zeros, page by
    page: a sixth of a training step on a CPU with activations of that size (bench/LOG.md). Does
    nothing under other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system


def device_name(device: torch.device) -> str:
    """The name of a GPU, as in gpt/peaks.py; of a CPU its model, units and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} GPU"
    model = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{model} ({cpu_units()}), {torch.get_num_threads()} threads"


def now(device: torch.device) -> Moment:
    """The moment at which the device has done what it was given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Seconds from one moment of a device to another, which has come."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float), "two clocks"
        return end - start
    return start.elapsed_time(end) / 1e3


def read_later(values: Tensor) -> Callable[[], tuple[list[float], Moment]]:
    """Start copying a small tensor to the host, and return a function that reads it.

    The function gives the values, and the moment when the device had them. It waits for this copy
    alone, not for work that was queued on the GPU after it.
    """
    if values.device.type != "cuda":
        return lambda: (values.tolist(), time.perf_counter())
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event(enable_timing=True)
    copied.record()

    def read() -> tuple[list[float], Moment]:
        copied.synchronize()
        return host.tolist(), copied

    return read


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that torch has allocated on a GPU so far; None for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Make `peak_memory_bytes` count from now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory_bytes(device: torch.device) -> int:
    """GPU memory that this process can use: free on the device, or reserved by torch already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
