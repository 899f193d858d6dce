"""Compile every kernel ahead of time, for GPUs that need not be there, and report on the code.

    python bench/aot/ahead.py                         # every case, for sm_80, sm_86, sm_90, sm_100
    python bench/aot/ahead.py --quick=True --arch=90  # GPT-2's four sizes, for Hopper
    OTHER/bin/python bench/aot/ahead.py --quick=True --out=FILE --beside=bench/results/ahead.json

The cases are those of bench/ops/cases.py. For each kernel, launch setting and architecture:
registers, spills, shared memory, resident blocks, matrix instructions, and the width of global
loads and stores (bench/aot/sass.py). For each memory-bound operator: the bytes it moves over the
fewest possible (bench/aot/traffic.py). A table goes to stdout, everything to a JSON file.

Another triton than the installed one is that of the environment OTHER; --beside=FILE names the
kernels to which it gives other registers or spills than the triton of that report.

Triton's own launch path compiles the kernels: the operators run on tensors without data
(bench/aot/offline.py), and each launch is specialised and compiled exactly as on the device, for a
target that a stand-in driver names.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import TypedDict
from unittest.mock import patch

from torch.utils._pytree import tree_leaves

from bench.aot import sass, traffic
from bench.aot.offline import offline
from bench.ops import cases
from bench.options import named
from bench.timing import RESULTS, environment, write_result
from common import cli
from common.bounds import NotEmpty, Processes
from common.files import read_json
from common.processes import end_with_parent
from kernels import FAMILIES, calls
from kernels.calls import Case

MEMORY_BOUND = ("layernorm", "add_layernorm", "rmsnorm", "add_rmsnorm", "cross_entropy",
                "linear_cross_entropy")


@dataclass(frozen=True)
class Options:
    """Compile every kernel ahead; report registers, spills, occupancy and bytes moved."""

    arch: str = "80,86,90,100"
    """compute capabilities without the dot, with commas"""
    quick: bool = False
    """only GPT-2's four sizes, both architectures, in bf16"""
    family: str = ""
    """only these families of operators, with commas: attention, layernorm, cross_entropy"""
    out: NotEmpty = str(RESULTS / "ahead.json")
    """JSON file for the result"""
    processes: Processes = 2
    """cores to use"""
    beside: str = ""
    """report of another triton; its registers and spills are printed beside these"""


class Report(TypedDict):
    """A JSON file of this program."""

    environment: dict
    kernels: list[dict]
    traffic: list[dict]


# -- compiling (in a worker process without TRITON_INTERPRET) ------------------


class OfflineDriver:
    """Answers what Triton asks before it compiles; a device's number is its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compile_cases(batch: list[Case], arch: int) -> list[dict]:
    """One row per kernel and launch setting, with the names of the cases that use it.

    The row of a kernel that does not compile has "error" in place of the figures.
    """
    import triton

    assert not triton.knobs.runtime.interpret, "kernels are compiled without TRITON_INTERPRET"
    compile_kernel = triton.runtime.JITFunction.run
    rows: dict[str, dict] = {}
    case = batch[0]  # `launched` reads the loop's case

    def launched(kernel, grid, args, kwargs):
        row = {"family": case.family, "kernel": kernel.__name__, "arch": arch,
               "settings": _settings(kernel, args, kwargs)}
        key = repr(row)
        try:
            with redirect_stdout(StringIO()):  # where ptxas fails, Triton prints all of its input
                compiled = compile_kernel(kernel, *args, grid=grid, warmup=True, **kwargs)
        except triton.TritonError as error:
            rows.setdefault(key, row | {"error": _reason(error), "cases": []})
        else:
            key = compiled.hash
            if key not in rows:
                rows[key] = row | _facts(compiled, arch) | {"cases": []}
        if str(case) not in rows[key]["cases"]:
            rows[key]["cases"].append(str(case))

    with patch.object(triton.runtime.driver, "_active", OfflineDriver(arch)):
        for case in batch:
            with offline(divmod(arch, 10), launched):
                fn, args = calls.operator(case, "triton"), calls.arguments(case, "meta")
                for _ in calls.run(fn, args, calls.options(case, "meta")):
                    pass
    return list(rows.values())


def _facts(compiled, arch: int) -> dict:
    m = compiled.metadata
    tensor_memory = getattr(m, "tmem_size", None) or 0
    return sass.facts(compiled.asm["cubin"], arch, m.num_warps, m.shared, tensor_memory)


def _settings(kernel, args: list, kwargs: dict) -> dict:
    """What the code depends on: dtype, absent tensors, constants, warps, stages, registers."""
    parameters = {p.name: p.is_constexpr for p in kernel.params}
    bound = kernel.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in parameters})
    bound.apply_defaults()
    dtype = next((str(v.dtype).removeprefix("torch.")
                  for v in tree_leaves(list(bound.arguments.values())) if hasattr(v, "dtype")), "")
    constants = {k: v if isinstance(v, bool | int | float | str | None) else str(v)
                 for k, v in bound.arguments.items() if parameters[k] or v is None}
    return {"dtype": dtype, **constants, **{k: v for k, v in kwargs.items() if k not in parameters}}


def _reason(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong."""
    lines = str(error).strip().splitlines()
    return next((line for line in lines if "fatal" in line or "error:" in line.lower()),
                lines[0]).strip()


def _become_compiler() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    end_with_parent()


def _become_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    end_with_parent()


# -- the report ----------------------------------------------------------------


def report(chosen: Iterable[Case], archs: list[int], processes: int) -> dict:
    """Kernel rows and traffic rows of the cases, by `processes` worker processes."""
    families = defaultdict(list)
    for case in chosen:
        families[case.family].append(case)
    batches = [(batch, arch) for batch in families.values() for arch in archs]
    bound = memory_bound(case for batch in families.values() for case in batch)
    capabilities = [divmod(arch, 10) for arch in archs]
    # its processes begin without triton, and share one import of torch
    context = get_context("forkserver")
    context.set_forkserver_preload(["bench.aot.traffic"])

    def pool(become: Callable[[], None]) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(processes, mp_context=context, initializer=become)

    with pool(_become_compiler) as workers:
        kernels = [row for rows in workers.map(compile_cases, *zip(*batches)) for row in rows]
    with pool(_become_interpreter) as workers:
        counted = workers.map(traffic.traffic, bound, [capabilities] * len(bound))
        moved = [row for rows in counted for row in rows]
    return {"environment": environment() | {"ptxas": _ptxas()}, "kernels": kernels,
            "traffic": moved}


def memory_bound(chosen: Iterable[Case]) -> list[Case]:
    """The cases whose bytes are counted, of attention those with a rotation; one of equal ones.

    The kernels of linear_cross_entropy see (M, V) alone: its cases that differ in N are the same.
    """
    found: dict[tuple, Case] = {}
    for c in chosen:
        if c.operator in MEMORY_BOUND or c.variant == "rotary":
            shape = c.shape[::2] if c.operator == "linear_cross_entropy" else c.shape
            found[c.operator, shape, c.dtype, c.variant] = c
    return list(found.values())


def _ptxas() -> dict:
    from triton import knobs

    return {tool: getattr(knobs.nvidia, tool).version for tool in ("ptxas", "ptxas_blackwell")}


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the header, as columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                     for row in rows)


def kernel_table(kernels: list[dict]) -> str:
    """A line for each kernel, launch setting and architecture."""
    def counts(found: dict) -> str:
        return " ".join(f"{name}x{n}" for name, n in found.items()) or "-"

    def cells(row: dict) -> list[str]:
        named = [row["kernel"], str(row["arch"]),
                 " ".join(f"{k}={v}" for k, v in row["settings"].items())]
        if "error" in row:
            return [*named, *["-"] * 5, f"DOES NOT COMPILE: {row['error']}"]
        return [*named, str(row["registers"]), str(row["spill_bytes"]), str(row["shared_bytes"]),
                f"{row['blocks_per_multiprocessor']} ({row['limited_by']})",
                counts(row["matrix_instructions"]), counts(row["global_accesses"])]

    header = ["kernel", "sm", "settings", "regs", "spill B", "shared B", "blocks/SM", "matrix",
              "global accesses"]
    ordered = sorted(kernels, key=lambda row: (row["family"], row["kernel"], row["arch"]))
    return table([header, *map(cells, ordered)])


def traffic_table(moved: list[dict]) -> str:
    """A line for each memory-bound operator: bytes moved over the fewest possible."""
    header = ["memory-bound operator", "phase", "sm", "floor MB", "requested/floor", "moved/floor"]
    return table([header, *([row["case"], row["phase"], str(row["arch"]),
                             f"{row['floor_bytes'] / 1e6:.1f}",
                             f"{row['requested_over_floor']:.3f}",
                             f"{row['moved_over_floor']:.3f}"] for row in moved)])


def comparison(here: dict, other: Report) -> str:
    """A line for each kernel to which two reports give other registers or spills."""
    def figures(row: dict) -> str:
        return ("does not compile" if "error" in row
                else f"{row['registers']} registers, {row['spill_bytes']} B of spills")

    theirs = {(row["kernel"], row["arch"], case): figures(row)
              for row in other["kernels"] for case in row["cases"]}
    lines: dict[tuple, str] = {}
    for row in here["kernels"]:
        for case in row["cases"]:
            found = theirs.get((row["kernel"], row["arch"], case), "not reported")
            if found != figures(row):  # of the cases with equal figures, the first one
                lines.setdefault((row["kernel"], row["arch"], figures(row), found), case)
    versions = (f"triton {result['environment']['triton']}" for result in (here, other))
    return table([["kernel", "sm", *versions, "case"],
                  *([kernel, str(arch), ours, found, case]
                    for (kernel, arch, ours, found), case in lines.items())])


def architectures(given: str) -> list[int]:
    """The architectures of --arch. Raises ValueError for one that is not known."""
    return [int(name) for name in named("arch", given, map(str, sass.MULTIPROCESSOR))]


def main(options: Options) -> int:
    """Compile, report, write; 1 where a kernel does not compile."""
    archs = architectures(options.arch)
    families = named("family", options.family, FAMILIES) if options.family else list(FAMILIES)
    every = cases.quick() if options.quick else cases.full()
    chosen = [case for case in every if case.family in families]
    other = (read_json(Path(options.beside), Report, "name a report of bench/aot/ahead.py")
             if options.beside else None)
    result = report(chosen, archs, options.processes)
    write_result(options.out, result)
    print(kernel_table(result["kernels"]))
    if result["traffic"]:
        print("\n" + traffic_table(result["traffic"]))
    if other:
        print("\n" + comparison(result, other))
    broken = sum("error" in row for row in result["kernels"])
    spilling = sum(row.get("spill_bytes", 0) > 0 for row in result["kernels"])
    print(f"\n{len(result['kernels'])} kernels: {broken} do not compile, {spilling} spill. Written "
          f"to {options.out}")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
