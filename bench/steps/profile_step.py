"""Where a training step goes: its kernels (on a CPU, its operators) by kind, beside their floors.

`python bench/mfu.py --profile=True` calls this for every variant it measures: a table of each goes
into the result, and a Chrome trace beside it, for chrome://tracing or ui.perfetto.dev. Profiled
steps are slower than timed ones, above all where the host is the limit: read the shares here, and
the speeds in the table of bench/mfu.py.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import floors
from bench.floors import Rates
from bench.operators import measure_rates
from bench.steps.peers import Variant
from gpt.config import GPTConfig

# The kind of a kernel or operator is the first pattern that its name matches. If none does, the
# name of the operator that launched it decides, then that of this operator's caller, and so on.
KINDS = {
    "attention": r"attention|rotary|flash|fmha|sdpa",
    "cross-entropy": r"cross_entropy|log_softmax|nll_loss|cross-entropy",
    "norm": r"(layer|rms)_?norm",
    "optimizer": r"adam|optimizer|multi_tensor|foreach|vector_norm|clip_grad",
    "matmul": r"gemm|nvjet|cutlass|cublas|::(t?mm|addmm|bmm|matmul|linear)\b|mkldnn_linear",
    "embedding": r"embedding|index_select|indexing_backward",
    "elementwise": r"gelu|relu|square|tanh|dropout|elementwise|copy|memcpy|memset|fill|zero_|cat\b"
                   r"|::(add|mul|div|sum|stack|_to_copy)_?\b|triton_|cpp_fused",
}
CATEGORIES = (*floors.CATEGORIES, "elementwise", "rest", "idle")
STEPS = 3  # are profiled; the table has their mean
LONGEST = 40  # names in the table


def kind(names: Iterable[str]) -> str:
    """The category of a kernel by its own name, then those of its callers, innermost first."""
    for name in names:
        for category, pattern in KINDS.items():
            if re.search(pattern, name, re.IGNORECASE):
                return category
    return "rest"


# -- events ----------------------------------------------------------------------


def _around(event: Any) -> Iterator[str]:
    """The names of an operator and of those that called it."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def operators_of_cpu(events: Iterable[Any]) -> list[tuple[str, str, float]]:
    """(name, category, own milliseconds) of every operator on a CPU."""
    return [(e.name, kind(_around(e)), e.self_cpu_time_total / 1e3)
            for e in events if e.device_type == DeviceType.CPU]


def kernels_of_device(events: Iterable[Any]) -> list[tuple[str, str, float]]:
    """(name, category, milliseconds) of every kernel, copy and fill on the device.

    The operator that launched it decides the category, or its own name where the profiler did not
    connect the launch with an operator.
    """
    found: list[tuple[str, str, float]] = []
    linked: dict[str, float] = defaultdict(float)  # milliseconds of a name that are in `found`
    for event in events:
        for kernel in event.kernels if event.device_type == DeviceType.CPU else ():
            found.append((kernel.name, kind([kernel.name, *_around(event)]), kernel.duration / 1e3))
            linked[kernel.name] += kernel.duration / 1e3
    for event in device_events(events):
        name, ms = event.name, (event.time_range.end - event.time_range.start) / 1e3
        if linked[name] < ms - 1e-9:
            found.append((name, kind([name]), ms - linked[name]))
        linked[name] = max(0.0, linked[name] - ms)
    return found


def device_events(events: Iterable[Any]) -> list[Any]:
    """The events on the device, without the ranges that operators draw around them."""
    return [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]


def busy_ms(spans: Iterable[tuple[float, float]]) -> float:
    """Milliseconds covered by at least one of the spans (start, end), given in microseconds."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e3


# -- one step --------------------------------------------------------------------


def profile_step(variant: Variant, config: GPTConfig, idx: Tensor, targets: Tensor, rates: Rates,
                 trace: Path) -> dict:
    """The table of a step of a warm variant; writes the Chrome trace (.json or .json.gz)."""
    cuda = variant.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as prof:
        began = time.perf_counter()
        for _ in range(STEPS):
            variant.step(idx, targets)
        if cuda:
            torch.cuda.synchronize(variant.device)
        wall_ms = (time.perf_counter() - began) * 1e3
    trace.parent.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(trace))
    events = list(prof.events())
    if cuda:
        rows = kernels_of_device(events)
        busy = busy_ms((e.time_range.start, e.time_range.end) for e in device_events(events))
    else:
        rows = operators_of_cpu(events)
        busy = sum(ms for *_, ms in rows)
    return table(rows, wall_ms, busy, config, idx.numel(), rates) | {"trace": trace.name}


def table(rows: list[tuple[str, str, float]], wall_ms: float, busy: float, config: GPTConfig,
          tokens: int, rates: Rates) -> dict:
    """One step, from the rows, wall time and busy time of STEPS steps: by category and by name.

    "idle" is the time when nothing ran on the device; on a CPU, when no operator ran, which is
    Python's own time.
    """
    spent = dict.fromkeys(CATEGORIES, 0.0)
    names: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, category, ms in rows:
        spent[category] += ms / STEPS
        names[name, category].append(ms)
    spent["idle"] = max(0.0, wall_ms - busy) / STEPS
    floor = dict.fromkeys(CATEGORIES, 0.0)
    for part in floors.step_parts(config, tokens):
        floor[part.category] += part.ns(rates) * tokens * 1e-6
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {"step_ms": wall_ms / STEPS, "floor_ms": sum(floor.values()), "tokens": tokens,
            "categories": {name: {"ms": spent[name], "floor_ms": floor[name]}
                           for name in CATEGORIES},
            "longest": [{"name": name, "category": category, "ms": sum(ms) / STEPS,
                         "calls": len(ms) / STEPS}
                        for (name, category), ms in longest]}


def show(title: str, found: dict, lines: int = 12) -> None:
    """Print a step's table."""
    print(f"\n{title}: {found['step_ms']:.4g} ms a step under the profiler, floor "
          f"{found['floor_ms']:.4g} ms\n{'':16}{'ms':>10}{'of step':>9}{'floor ms':>10}")
    for name, row in found["categories"].items():
        floor = f"{row['floor_ms']:10.3f}" if row["floor_ms"] else ""
        print(f"{name:16}{row['ms']:10.3f}{100 * row['ms'] / found['step_ms']:8.1f}%{floor}")
    for row in found["longest"][:lines]:
        print(f"  {row['ms']:10.3f} ms {row['calls']:6.0f} x  {row['category']:14} "
              f"{row['name'][:80]}")


def profile_all(variants: list[Variant], config: GPTConfig, idx: Tensor, targets: Tensor,
                folder: Path) -> dict:
    """Profile and print every variant of a case, with ceilings measured now.

    Returns the tables by name; the traces go to `folder`.
    """
    rates, ceilings = measure_rates(idx.device)
    found = {}
    for variant in variants:
        slug = re.sub(r"[^A-Za-z0-9]+", "-",
                      f"{config.n_layer}x{config.n_embd} {variant.name}").strip("-")
        variant.step(idx, targets)
        found[variant.name] = profile_step(variant, config, idx, targets, rates,
                                        folder / f"trace-{slug}.json.gz")
        show(variant.name, found[variant.name])
    return {"rates": ceilings, "variants": found}
