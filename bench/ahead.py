"""Compile every kernel ahead of time, for GPUs that need not be there, and report what the compiler
made of it.

    python bench/ahead.py                          every case of bench/cases.py, for sm_80, sm_86, sm_90 and sm_100
    python bench/ahead.py --quick=True --arch=90   GPT-2's four sizes, for Hopper

For each kernel, launch setting and architecture: registers, spills, shared memory, resident blocks,
matrix instructions, the width of global loads and stores (bench/sass.py). For each memory-bound
operator: the bytes it moves over the fewest possible (bench/traffic.py). A table goes to stdout,
everything to a JSON file.

The kernels are compiled by Triton's own launch path: the operators run on tensors without data
(bench/offline.py), and what they would launch is specialised and compiled exactly as on the device,
for a target named by a stand-in driver.
"""

import os
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context, parent_process
from unittest.mock import patch

from torch.utils._pytree import tree_leaves

from bench import cases, sass, traffic
from bench.cases import Case
from bench.offline import name_of, offline
from bench.timing import ROOT, environment, write_result
from common import cli
from common.bounds import NotEmpty, Processes

MEMORY_BOUND = ("layernorm", "add_layernorm", "cross_entropy", "linear_cross_entropy")


@dataclass(frozen=True)
class Options:
    """Compile every kernel for GPUs that need not be there; report registers, spills, occupancy and
    bytes moved."""

    arch: str = "80,86,90,100"  # compute capabilities without the dot, with commas between
    quick: bool = False  # only GPT-2's four sizes, in bf16
    family: str = ""  # only this family of operators (attention, layernorm, cross_entropy)
    out: NotEmpty = str(ROOT / "bench" / "results" / "ahead.json")  # where the JSON goes
    processes: Processes = 2  # how many cores to use


# -- compiling (in a worker process without TRITON_INTERPRET) ------------------


class OfflineDriver:
    """What Triton asks of a driver before it compiles; the device is numbered like its
    architecture."""

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
    """One row per kernel and launch setting that the cases use, with the names of the cases that
    use it.

    A kernel that does not compile has an "error" in place of what there would be to say about it.
    """
    import triton

    assert not triton.knobs.runtime.interpret, "kernels are compiled without TRITON_INTERPRET"
    compile_kernel = triton.runtime.JITFunction.run
    rows: dict[str, dict] = {}
    case = batch[0]

    def launched(kernel, grid, args, kwargs):
        row = {"family": case.family, "kernel": name_of(kernel), "arch": arch,
               "settings": _settings(kernel, args, kwargs)}
        try:
            with redirect_stdout(StringIO()):  # where ptxas fails, Triton prints all of its input
                compiled = compile_kernel(kernel, *args, grid=grid, warmup=True, **kwargs)
        except triton.TritonError as error:
            rows.setdefault(repr(row),
                            row | {"error": _reason(error), "cases": []})["cases"].append(str(case))
            return
        if compiled.hash not in rows:
            m = compiled.metadata
            found = sass.facts(compiled.asm["cubin"], arch, m.num_warps, m.shared,
                               getattr(m, "tmem_size", None) or 0)
            rows[compiled.hash] = row | found | {"cases": []}
        if str(case) not in rows[compiled.hash]["cases"]:
            rows[compiled.hash]["cases"].append(str(case))

    with patch.object(triton.runtime.driver, "_active", OfflineDriver(arch)):
        for case in batch:
            with offline(divmod(arch, 10), launched):
                deque(cases.run(cases.operator(case, "triton"), cases.arguments(case, "meta"),
                                cases.options(case, "meta")), 0)
    return list(rows.values())


def _settings(kernel, args: list, kwargs: dict) -> dict:
    """What distinguishes this launch: the dtype, absent tensors, compile-time constants, warps,
    stages, registers."""
    parameters = {p.name: p.is_constexpr for p in kernel.params}
    bound = kernel.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in parameters})
    bound.apply_defaults()
    dtype = next((str(v.dtype).removeprefix("torch.")
                  for v in tree_leaves(list(bound.arguments.values())) if hasattr(v, "dtype")), "")
    constants = {k: v if isinstance(v, bool | int | float | str | None) else str(v)
                 for k, v in bound.arguments.items() if parameters[k] or v is None}
    return {"dtype": dtype, **constants, **{k: v for k, v in kwargs.items() if k not in parameters}}


def _reason(error: Exception) -> str:
    """The line of a compiler's complaint that says what is wrong."""
    lines = str(error).strip().splitlines()
    return next((line for line in lines if "fatal" in line or "error:" in line.lower()),
                lines[0]).strip()


def _become_compiler() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    _follow_parent()


def _become_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    _follow_parent()


def _follow_parent() -> None:
    """A worker whose parent is killed would wait for work for ever: it ends instead."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# -- the report ----------------------------------------------------------------


def report(chosen: Iterable[Case], archs: list[int], processes: int) -> dict:
    """Kernel rows and traffic rows of the cases, by `processes` worker processes."""
    families = defaultdict(list)
    for case in chosen:
        families[case.family].append(case)
    batches = [(batch, arch) for batch in families.values() for arch in archs]
    # The kernels of linear_cross_entropy see (M, V) alone: of cases that differ in N, one is
    # enough.
    bound = list({(c.operator, c.shape if c.operator != "linear_cross_entropy" else c.shape[::2],
                   c.dtype, c.variant): c
                  for batch in families.values()
                  for c in batch if c.operator in MEMORY_BOUND}.values())
    capabilities = [divmod(arch, 10) for arch in archs]
    # its processes begin without triton, and share one import of torch
    workers = get_context("forkserver")
    workers.set_forkserver_preload(["bench.traffic"])
    with ProcessPoolExecutor(processes, mp_context=workers, initializer=_become_compiler) as pool:
        kernels = [row for rows in pool.map(compile_cases, *zip(*batches)) for row in rows]
    with ProcessPoolExecutor(processes, mp_context=workers,
                             initializer=_become_interpreter) as pool:
        moved = [row for rows in pool.map(traffic.traffic, bound, [capabilities] * len(bound))
                 for row in rows]
    return {"environment": environment() | {"ptxas": _ptxas()}, "kernels": kernels,
            "traffic": moved}


def _ptxas() -> dict:
    from triton import knobs

    return {tool: getattr(knobs.nvidia, tool).version for tool in ("ptxas", "ptxas_blackwell")}


def table(rows: list[list[str]]) -> str:
    """Rows of cells, the first one the header, as columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                     for row in rows)


def kernel_table(kernels: list[dict]) -> str:
    def counts(found: dict) -> str:
        return " ".join(f"{name}x{n}" for name, n in found.items()) or "-"

    def cells(row: dict) -> list[str]:
        named = [row["kernel"], str(row["arch"]),
                 " ".join(f"{k}={v}" for k, v in row["settings"].items())]
        if "error" in row:
            return [*named, *["-"] * 5, f"DOES NOT COMPILE: {row['error']}"]
        return [*named, str(row["registers"]), str(row["spill_bytes"]), str(row["shared_bytes"]),
                f"{row['blocks_per_multiprocessor']} ({row['limited_by']})",
                counts(row["matrix_instructions"]),
                counts(row["global_accesses"])]

    header = ["kernel", "sm", "settings", "regs", "spill B", "shared B", "blocks/SM", "matrix",
              "global accesses"]
    ordered = sorted(kernels, key=lambda row: (row["family"], row["kernel"], row["arch"]))
    return table([header, *map(cells, ordered)])


def traffic_table(moved: list[dict]) -> str:
    header = ["memory-bound operator", "phase", "sm", "floor MB", "requested/floor", "moved/floor"]
    return table([header] + [
        [row["case"], row["phase"], str(row["arch"]), f"{row['floor_bytes'] / 1e6:.1f}",
         f"{row['requested_over_floor']:.3f}", f"{row['moved_over_floor']:.3f}"] for row in moved
    ])


def main(options: Options) -> int:
    """Compile, report, write; 1 where a kernel does not compile."""
    try:
        archs = [int(arch) for arch in options.arch.split(",")]
        unknown: list[int | str] = [arch for arch in archs if arch not in sass.MULTIPROCESSOR]
    except ValueError:
        unknown = [options.arch]
    if unknown:
        raise ValueError(f"--arch={options.arch}: unknown {unknown[0]}; choose from "
                         f"{', '.join(map(str, sass.MULTIPROCESSOR))}")
    chosen = [c for c in (cases.quick() if options.quick else cases.full())
              if options.family in ("", c.family)]
    if not chosen:
        raise ValueError(f"--family={options.family}: choose from "
                         f"{', '.join(sorted(set(cases.FAMILY.values())))}")
    result = report(chosen, archs, options.processes)
    write_result(options.out, result)
    print(kernel_table(result["kernels"]))
    if result["traffic"]:
        print("\n" + traffic_table(result["traffic"]))
    broken = sum("error" in row for row in result["kernels"])
    spilling = sum(row.get("spill_bytes", 0) > 0 for row in result["kernels"])
    print(f"\n{len(result['kernels'])} kernels: {broken} do not compile, {spilling} spill. Written "
          f"to {options.out}")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
