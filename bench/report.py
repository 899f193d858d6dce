"""README's tables, made from bench/results/*.json: `python bench/report.py` writes them, `--check=True` only compares.

A table stands in README.md between `<!-- bench:NAME -->` and `<!-- /bench -->`. What has no result says so; nothing here is
typed by hand.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.timing import ROOT

RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


@dataclass(frozen=True)
class Options:
    """Write README's tables from the results."""

    check: bool = False
    """write nothing; exit 1 where README.md is not what the results say"""


def where(environment: dict[str, Any]) -> str:
    """The machine, versions, commit and command of a result, as one sentence under its table."""
    gpu = environment.get("gpu")
    device = gpu["name"] if gpu else f"{environment['cpu']}, {environment['threads']} threads"
    return (f"{device}; torch {environment['torch']}, Python {environment['python']}; commit {environment['commit'][:8]}, "
            f"{environment['date'][:10]}; `python {environment['command']}`.")


def training(result: dict[str, Any]) -> str:
    """Training steps, one line per case and variant, as a multiple of nanoGPT's own default where it was measured."""
    lines = ["| case | variant | dtype | ms/step (quartiles) | tokens/s | x nanoGPT |", "|---|---|---|---|---|---|"]
    for case, found in result["cases"].items():
        rows = found["variants"]
        base = rows.get("nanoGPT")
        for name, row in rows.items():
            step = row["step"]
            ratio = f"{base['step']['median_ms'] / step['median_ms']:.2f}" if base else ""
            spread = f"{step['median_ms']:.1f} ({step['q1_ms']:.1f} to {step['q3_ms']:.1f})"
            lines.append(f"| {case} | {name} | {row['dtype']} | {spread} | {row['tokens_per_s']:,.0f} | {ratio} |")
    return "\n".join([*lines, "", "Training steps on " + where(result["environment"])])


def generation(result: dict[str, Any]) -> str:
    """Text generation, one line per variant."""
    rows = result["variants"]
    lines = ["| variant | tokens/s | ours is |", "|---|---|---|"]
    lines += [f"| {name}{', ' + row['dtype'] + ' weights' if 'dtype' in row else ''} | {row['tokens_per_s']:.1f} "
              f"| {rows['ours']['tokens_per_s'] / row['tokens_per_s']:.2f} x this |" for name, row in rows.items()]
    told = f"{result['options']['new_tokens']} new tokens of {result['options']['size']}, one sequence, on "
    return "\n".join([*lines, "", told + where(result["environment"])])


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "cpu": ("mfu-cpu.json", training),
    "generation": ("generation-cpu.json", generation),
    "gpu": ("mfu-cuda.json", training),
}


def table(name: str, results: Path = RESULTS) -> str:
    """The text between the markers of `name`. Raises ValueError for a name that is none."""
    if name not in TABLES:
        raise ValueError(f"README.md has a table bench:{name}; there are {', '.join(TABLES)}")
    file, render = TABLES[name]
    if not (results / file).exists():
        return f"{name}: not measured.\n"
    return render(json.loads((results / file).read_text())) + "\n"


def filled(readme: str, results: Path = RESULTS) -> str:
    """README.md with every table anew."""
    return MARKED.sub(lambda m: m[1] + table(m[2], results) + m[3], readme)


def main(options: Options) -> int:
    """0 when README.md is, or now is, what the results say."""
    path = ROOT / "README.md"
    before = path.read_text()
    after = filled(before)
    if options.check:
        return int(before != after)
    path.write_text(after)
    print(f"{path.name}: {'written' if before != after else 'up to date'}")
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Options, prog="bench/report.py", config=(tyro.conf.FlagConversionOff,))))
