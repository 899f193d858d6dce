"""Write the tables of README.md and docs/ from bench/results/*.json; `--check=True` only compares.

A table stands there between `<!-- bench:NAME -->` and `<!-- /bench -->`. A table without a result
says that it is not measured; nothing here is typed by hand.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.timing import RESULTS, ROOT
from common import cli

MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


@dataclass(frozen=True)
class Options:
    """Write the tables of README.md and docs/ from the results."""

    check: bool = False
    """write nothing; exit 1 where a page is not what the results say"""


def where(environment: dict[str, Any]) -> str:
    """The machine, versions, commit and command of a result, as one sentence under its table."""
    gpu = environment.get("gpu")
    device = gpu["name"] if gpu else f"{environment['cpu']}, {environment['threads']} threads"
    return (f"{device}; torch {environment['torch']}, Python {environment['python']}; commit "
            f"{environment['commit'][:8]}, {environment['date'][:10]}; `python "
            f"{environment['command']}`.")


def training(result: dict[str, Any]) -> str:
    """Training steps, one line per case and variant, with the speed over nanoGPT's default."""
    lines = ["| case | variant | dtype | ms/step (quartiles) | tokens/s | x nanoGPT |",
             "|---|---|---|---|---|---|"]
    for case, found in result["cases"].items():
        rows = found["variants"]
        base = rows.get("nanoGPT")
        for name, row in rows.items():
            step = row["step"]
            ratio = f"{base['step']['median_ms'] / step['median_ms']:.2f}" if base else ""
            spread = f"{step['median_ms']:.1f} ({step['q1_ms']:.1f} to {step['q3_ms']:.1f})"
            lines.append(f"| {case} | {name} | {row['dtype']} | {spread} | "
                         f"{row['tokens_per_s']:,.0f} | {ratio} |")
    return "\n".join([*lines, "", "Training steps on " + where(result["environment"])])


def generation(result: dict[str, Any]) -> str:
    """Text generation, one line per variant."""
    rows = result["variants"]
    lines = ["| variant | tokens/s | ours is |", "|---|---|---|"]
    lines += [f"| {name}{', ' + row['dtype'] + ' weights' if 'dtype' in row else ''} | "
              f"{row['tokens_per_s']:.1f} | "
              f"{rows['ours']['tokens_per_s'] / row['tokens_per_s']:.2f} x this |"
              for name, row in rows.items()]
    options = result["options"]
    told = f"{options['new_tokens']} new tokens of {options['size']}, one sequence, on "
    return "\n".join([*lines, "", told + where(result["environment"])])


def operators(result: dict[str, Any]) -> str:
    """Each operator's implementations, forward and backward; of a loss, forward and both."""
    lines = ["| operator | by | forward ms | | of floor | backward ms | | of floor |",
             "|---|---|---|---|---|---|---|---|"]
    for case, found in result["cases"].items():
        second = "both" if found["floor"]["backward"] is None else "backward"
        for name, row in found["variants"].items():
            cells = [cell for phase in ("forward", second)
                     for cell in _measured(row[phase], "both: " * (phase == "both"))]
            lines.append(f"| {case} | {name} | {' | '.join(cells)} |")
    rates = result["rates"]
    told = (f"Floor: a copy at {rates['copy_gbs']:,.4g} GB/s, a matrix product at "
            f"{rates['matmul_tflops']:.4g} TFLOP/s, measured in the same run on ")
    return "\n".join([*lines, "", told + where(result["environment"])])


def _measured(row: dict[str, Any] | None, prefix: str) -> tuple[str, str, str]:
    if row is None:
        return "refused", "", ""
    speed = f"{row['tflops']:.3g} TFLOP/s" if row["tflops"] else f"{row['gbs']:,.4g} GB/s"
    return f"{prefix}{row['timing']['median_ms']:.4g}", speed, f"{100 * row['of_floor']:.0f}%"


def parity(result: dict[str, Any]) -> str:
    """The same run on several backends."""
    lines = ["| kernels | validation loss | training losses differ, mean | at most | tokens/s |",
             "|---|---|---|---|---|"]
    for name, run in result["backends"].items():
        apart = result["against"].get(name)
        differ = f"{apart['mean']:.2g} | {apart['most']:.2g}" if apart else "|"
        lines.append(f"| {name} | {run['val_loss']:.4f} | {differ} | {run['tokens_per_s']:,.0f} |")
    return "\n".join([*lines, "", f"{result['steps']} steps on {result['corpus']}, one seed, on "
                      + where(result["environment"])])


def memory(result: dict[str, Any]) -> str:
    """Peak memory of a step by batch size, GiB."""
    backends = result["backends"]
    batches = sorted({int(batch) for found in backends.values() for batch in found["peak_bytes"]})
    lines = ["| kernels | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
             "|---" * (1 + len(batches)) + "|"]
    for name, found in backends.items():
        peaks = [found["peak_bytes"].get(str(batch)) for batch in batches]
        cells = ["does not fit" if p is None else f"{p / 2**30:.1f}" for p in peaks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    told = (f"Peak memory in GiB of a step of {result['case']}, {result['config']['block_size']} "
            "tokens a sequence, on ")
    return "\n".join([*lines, "", told + where(result["environment"])])


def race(result: dict[str, Any]) -> str:
    """Who needs how much for a validation loss; ours beside each rival whose loss it reaches."""
    lines = ["| | steps | tokens, millions | s of training (in all) | validation loss, each seed "
             "| ours to there | tokens | s of training | s in all |", "|---" * 9 + "|"]
    for name, found in result["contestants"].items():
        runs = found["runs"].values()
        training, total = (fmean(run[key] for run in runs) for key in ("training_s", "total_s"))
        losses = ", ".join(f"{run['final_loss']:.3f}" for run in runs)
        tokens = found["steps"] * found["tokens_per_step"] / 1e6
        lines.append(f"| {name} | {found['steps']:,} | {tokens:.3f} | {training:.1f} ({total:.1f}) "
                     f"| {losses} | {_reached(result, name)} |")
    told = ("The loss is that of the whole validation split, in fp32. Means of the seeds; in turns "
            "on ")
    return "\n".join([*lines, "", told + where(result["environment"])])


def _reached(result: dict[str, Any], name: str) -> str:
    """The last four cells of a contestant: what ours needs of a rival's, none for ours."""
    won = result["verdicts"].get(name)
    if won is None or not won["reached_by"]:
        return " | ".join(["" if won is None else "not reached", "", "", ""])
    needs = [f"1/{won[key]:.2f}" for key in ("tokens", "training_s", "total_s")]
    steps = result["contestants"][won["reached_by"]]["steps"]
    return " | ".join([f"{steps:,} steps", *needs])


def ablation(result: dict[str, Any]) -> str:
    """What the recipe loses without each ingredient, and what each gives to GPT-2's recipe."""
    config = result["config"]
    tokens = (config["max_iters"] * config["gradient_accumulation_steps"] * config["batch_size"]
              * config["block_size"])
    told = (f"The loss is that of the whole validation split, after {config['max_iters']:,} steps "
            f"and {tokens / 1e6:.3f} million tokens; differences are between runs of the same "
            "seed. Within noise: at most twice the spread between seeds of the recipe without "
            "changes. On ")
    return "\n".join([*_beside(result["without"], "the whole recipe", "without"), "",
                      *_beside(result["plain"], "GPT-2's recipe", "with"), "",
                      told + where(result["environment"])])


def _beside(part: dict[str, Any], base: str, how: str) -> list[str]:
    """The lines of a table: the recipe, and what is `how` an ingredient."""
    found = part["base"]
    least, most = (pick(run["loss"] for run in found["runs"].values()) for pick in (min, max))
    lines = ["| | validation loss | difference | s of training |", "|---|---|---|---|",
             f"| {base}{_rate(found)} | {found['loss']:.3f} ({least:.3f} to {most:.3f}) | "
             f"| {found['training_s']:.1f} |"]
    for name, row in part["rows"].items():
        noise = ", within noise" if row["within_noise"] else ""
        then = f": {row['then']}{_rate(row)}" if row["then"] else ""
        lines.append(f"| {how} {name}{then} | {row['loss']:.3f} "
                     f"| {row['minus_base']:+.3f}{noise} | {row['training_s']:.1f} |")
    return lines


def _rate(row: dict[str, Any]) -> str:
    """At which of the rates tried, for what has some."""
    rates = row.get("rates", {})
    return f" at {min(rates, key=lambda rate: rates[rate])}" if rates else ""


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "cpu_bf16": ("mfu-cpu-bf16.json", training),
    "cpu": ("mfu-cpu.json", training),
    "generation_bf16": ("generation-cpu-bf16.json", generation),
    "generation": ("generation-cpu.json", generation),
    "gpu": ("mfu-cuda.json", training),
    "operators": ("operators-cuda.json", operators),
    "parity": ("parity-cuda.json", parity),
    "memory": ("memory-cuda.json", memory),
    "race": ("race-macbook.json", race),
    "race_quickstart": ("race-quickstart.json", race),
    "ablation": ("ablation-macbook.json", ablation),
    "ablation_quickstart": ("ablation-quickstart.json", ablation),
}


def table(name: str, results: Path = RESULTS) -> str:
    """The text between the markers of `name`. Raises ValueError for an unknown name."""
    if name not in TABLES:
        raise ValueError(f"no table bench:{name}; there are {', '.join(TABLES)}")
    file, render = TABLES[name]
    if not (results / file).exists():
        return f"{name}: not measured.\n"
    return render(json.loads((results / file).read_text())) + "\n"


def filled(page: str, results: Path = RESULTS) -> str:
    """The text of a page with every table made anew."""
    return MARKED.sub(lambda m: m[1] + table(m[2], results) + m[3], page)


def main(options: Options) -> int:
    """Write the pages' tables, or with --check only compare. Returns 0, or 1 where they differ."""
    differ = False
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text()
        after = filled(before)
        differ |= before != after
        if before != after and not options.check:
            path.write_text(after)
            print(f"{path.relative_to(ROOT)}: written")
    if not options.check and not differ:
        print("up to date")
    return int(differ) if options.check else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
