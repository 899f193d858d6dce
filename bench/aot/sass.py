"""Read what the compiler made of a kernel from its machine code (SASS), with cuobjdump.

`facts` gives registers, spills, shared memory, occupancy (blocks per multiprocessor), matrix
instructions and the widths of global loads and stores. The limits of a multiprocessor are those of
the CUDA C++ Programming Guide, "Technical specifications per compute capability", and of the
occupancy calculator in Nsight Compute.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """The resources of one multiprocessor, which its resident blocks share."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65_536
    tensor_memory_columns: int = 0


MULTIPROCESSOR = {
    80: Multiprocessor(warps=64, blocks=32, shared_bytes=167_936),
    86: Multiprocessor(warps=48, blocks=16, shared_bytes=102_400),
    89: Multiprocessor(warps=48, blocks=24, shared_bytes=102_400),
    90: Multiprocessor(warps=64, blocks=32, shared_bytes=233_472),
    100: Multiprocessor(warps=64, blocks=32, shared_bytes=233_472, tensor_memory_columns=512),
}
RESERVED_SHARED_BYTES = 1024  # per block, used by CUDA itself, since sm_80
MATRIX = re.compile(r"\b(HGMMA|QGMMA|IGMMA|HMMA|IMMA|DMMA|QMMA|UTC[A-Z]*MMA)\b")
# LDGSTS is cp.async; UTMALDG and UTMASTG are the tensor memory accelerator's, UBLKCP is a bulk
# copy: these three move whole tiles.
MEMORY = re.compile(r"\b(LDG|STG|LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|RED|REDG|ATOM|ATOMG)"
                    r"(?![A-Z])((?:\.[A-Z0-9_]+)*)")
WIDTH = re.compile(r"(?:^|[.])(?:ENL2\.)?(256|128|64|U16|S16|U8|S8)(?:$|[.])")
SPILL = re.compile(r"\b(LDL|STL)\b")


def facts(cubin: bytes, arch: int, warps: int, shared_bytes: int,
          tensor_memory_columns: int = 0) -> dict:
    """The report's figures of one compiled kernel, launched with `shared_bytes` per block."""
    text = _disassemble(cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage, f"cuobjdump names no registers:\n{text[:500]}"
    registers, stack = map(int, usage.groups())
    blocks, limit = blocks_per_multiprocessor(arch, warps, registers, shared_bytes,
                                              tensor_memory_columns)
    return {
        "registers": registers,
        # the stack of a thread: without recursion and local arrays, only spills are on it
        "spill_bytes": stack,
        "spill_instructions": len(SPILL.findall(text)),
        "shared_bytes": shared_bytes,
        "blocks_per_multiprocessor": blocks,
        "limited_by": limit,
        "matrix_instructions": dict(Counter(MATRIX.findall(text))),
        "global_accesses": dict(sorted(_accesses(text).items())),
    }


def blocks_per_multiprocessor(arch: int, warps: int, registers: int, shared_bytes: int,
                              tensor_memory_columns: int = 0) -> tuple[int, str]:
    """How many blocks are resident at once, and which resource limits the number.

    Registers are allocated to a warp in units of 256, and to warps in groups of four; shared memory
    is allocated in units of 128 bytes.
    """
    sm = MULTIPROCESSOR[arch]
    registers_of_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = sm.registers // registers_of_warp // 4 * 4
    shared = -(-(shared_bytes + RESERVED_SHARED_BYTES) // 128) * 128
    limits = {
        "threads": sm.warps // warps,
        "registers": warps_by_registers // warps,
        "shared memory": sm.shared_bytes // shared,
        "blocks": sm.blocks,
    }
    if tensor_memory_columns:
        limits["tensor memory"] = sm.tensor_memory_columns // tensor_memory_columns
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _accesses(text: str) -> Counter:
    """Counts of instructions that access global memory: {"LDG.128": 12}, with bits per thread."""
    found: Counter = Counter()
    for mnemonic, modifiers in MEMORY.findall(text):
        width = WIDTH.search(modifiers)
        bits = width.group(1).lstrip("US") if width else "32"
        found[mnemonic if mnemonic.startswith("U") else f"{mnemonic}.{bits}"] += 1
    return found


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
