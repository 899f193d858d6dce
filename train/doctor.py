"""Say what this machine has, whether data is intact, or how fast ranks exchange gradients.

    python train/doctor.py
    python train/doctor.py --data_dir=data/openwebtext
    torchrun --standalone --nproc_per_node=8 train/doctor.py --dist=True
"""

import importlib.metadata
import platform
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import cli

PACKAGES = ("torch", "triton", "numpy", "safetensors", "flash-attn", "wandb", "tensorboard",
            "transformers", "tiktoken")


@dataclass(frozen=True)
class Doctor:
    """Say what this machine has, and what a run would use of it."""

    dist: bool = False
    """under torchrun: measure all-reduce, from 1 MB to 256 MB (16 MB on a CPU)"""
    data_dir: str = ""
    """compare every byte of a folder of tokens with its manifest; a run samples large files"""


def examine() -> dict[str, str]:
    """Packages, compiler and devices, and what a run would use: name -> description."""
    import torch

    from common import hardware
    from kernels import resolve

    device = hardware.resolve_device("auto")
    found = {"python": f"{platform.python_version()} ({sys.executable})",
             "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    compilers = [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    found["C++ compiler"] = compilers[0] if compilers else (
        "none: --compile=True cannot work on a CPU, and Triton cannot build its launcher")
    found["GPUs"] = ", ".join(_gpu(i) for i in range(torch.cuda.device_count())) or "none"
    found["device"] = f"{device}: {hardware.device_name(device)}"
    dtype = str(hardware.resolve_dtype("auto", device)).removeprefix("torch.")
    found["dtype"] = f"{dtype} (--dtype=auto)"
    found["kernels"] = ("auto: measured when a run starts" if device.type == "cuda"
                        else str(resolve("auto", device)))
    if device.type == "cuda":
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _gpu(index: int) -> str:
    import torch

    p = torch.cuda.get_device_properties(index)
    return (f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, "
            f"{p.multi_processor_count} multiprocessors)")


def all_reduce() -> list[tuple[int, float, float]]:
    """Time all-reduce: (bytes, ms, GB/s) for each size, [] on ranks other than 0.

    ms is the median of ten; GB/s is the bus bandwidth as NCCL's tests define it, what each link
    carries: bytes / time * 2 (n - 1) / n. Every rank must call it. Raises ValueError outside of
    torchrun.
    """
    import torch
    import torch.distributed as dist

    from common import hardware
    from train import parallel
    from train.config import ParallelConfig

    w = parallel.world()
    if w.size == 1:
        raise ValueError("--dist=True needs ranks: `torchrun --standalone --nproc_per_node=N "
                         "train/doctor.py --dist=True`")
    device = hardware.resolve_device("auto", w.local_rank)
    parallel.start(w, device, ParallelConfig())
    rows = []
    for megabytes in (1, 4, 16, 64, 256) if device.type == "cuda" else (1, 4, 16):
        values, seconds = torch.ones(megabytes * 2**18, device=device), []
        for _ in range(12):
            start = time.perf_counter()
            dist.all_reduce(values)
            values[:1].tolist()  # waits for the device
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[2:])
        bus_gbs = values.nbytes / median * 2 * (w.size - 1) / w.size / 1e9
        rows.append((values.nbytes, 1e3 * median, bus_gbs))
    parallel.stop()
    return rows if w.rank == 0 else []


def check_data(data_dir: Path) -> str:
    """Compare every byte with the manifest; say what was compared. Raises ValueError."""
    from data.manifest import MANIFEST, listed_files, verify

    files = listed_files(data_dir)
    if not files:
        raise ValueError(f"{data_dir}: no {MANIFEST} to compare with; prepare the data again")
    verify(data_dir, full=True)
    size = sum(entry["bytes"] for _, entry in files)
    return f"{data_dir}: {len(files)} files, {size:,} bytes, all as they were prepared"


def report(config: Doctor) -> None:
    """Print what was asked for. Raises ValueError for data that is not intact."""
    if config.data_dir and config.dist:
        raise ValueError("--data_dir and --dist=True: give one of them")
    if config.data_dir:
        print(check_data(Path(config.data_dir)))
    elif config.dist:
        for size, ms, rate in all_reduce():
            print(f"all-reduce of {size / 2**20:4.0f} MB: {ms:8.2f} ms, {rate:7.2f} GB/s")
    else:
        print("\n".join(f"{what:14}{words}" for what, words in examine().items()))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr for bad input."""
    return cli.run(report, Doctor, argv)


if __name__ == "__main__":
    sys.exit(main())
