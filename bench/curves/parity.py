"""Do two kernel backends learn the same? 200 steps of GPT-2 124M on real text, on each of them.

    python bench/curves/parity.py    # on a GPU torch and triton, on a CPU reference and torch
    python bench/curves/parity.py --steps=50 --out=parity.json

On a CPU it is a small model and 20 steps. All runs start from one seed, so from the same weights,
and read the same batches; they are train/run.py as users run it. The text is the source of Python's
standard library, in GPT-2's tokens where its vocabulary is installed, else in bytes.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from bench.timing import ROOT, environment, result_path, write_result
from common import cli, hardware
from common.bounds import NonNegative, Positive
from data.gpt2 import END_OF_TEXT, encode_ordinary, gpt2_encoding
from data.python_stdlib import prepare
from data.small import write_dataset

# nats of validation loss: twice the 0.011 between the best and the worst of five seeds of the
# macbook run (bench/LOG.md). Backends that share the seed should be closer.
LIMIT = 0.02


@dataclass(frozen=True)
class Options:
    """Train the same on two backends and compare the losses."""

    device: str = "auto"
    steps: NonNegative = 0
    """0: 200 on a GPU, 20 on a CPU"""
    batch_size: Positive = 16
    """sequences of 1024 tokens on a GPU, of 64 on a CPU"""
    backends: str = ""
    """two or more, with commas; the others must equal the first; empty: torch,triton on a GPU,
    reference,torch on a CPU"""
    out: str = ""
    """JSON file for the result; empty: bench/results/parity-DEVICE.json"""


def main(options: Options) -> int:
    """Run, compare, write the JSON. 1 where a backend ends further than LIMIT from the first."""
    device = hardware.resolve_device(options.device)
    cuda = device.type == "cuda"
    names = (options.backends or ("torch,triton" if cuda else "reference,torch")).split(",")
    if len(set(names)) < 2:
        raise ValueError(f"--backends={options.backends}: give at least two, with commas, the "
                         "first to compare the others with")
    steps = options.steps or (200 if cuda else 20)
    out = result_path(options.out, f"parity-{device.type}")
    with tempfile.TemporaryDirectory() as scratch:
        corpus = write_corpus(Path(scratch) / "data", cuda)
        flags = [f"--data_dir={scratch}/data", f"--device={device}",
                 *settings(steps, options.batch_size, cuda)]
        runs = {name: train(Path(scratch) / name, [*flags, f"--kernels={name}"]) for name in names}
    against = {name: compare(runs[names[0]], runs[name]) for name in names[1:]}
    write_result(out, {"benchmark": "parity", "environment": environment(device), "corpus": corpus,
                       "steps": steps, "limit": LIMIT, "backends": runs, "against": against})
    for name, found in against.items():
        print(f"{name} against {names[0]}, {steps} steps on {corpus}: validation loss "
              f"{runs[name]['val_loss']:.4f} and {runs[names[0]]['val_loss']:.4f}; training losses "
              f"differ by {found['mean']:.2g} on average, at most {found['most']:.2g}")
    print(f"written to {out}")
    return int(any(not abs(found["val"]) <= LIMIT for found in against.values()))


def write_corpus(folder: Path, gpt2_tokens: bool) -> str:
    """Write the corpus into `folder`; its name. Bytes where GPT-2's vocabulary is not installed."""
    folder.mkdir(parents=True)
    if gpt2_tokens:
        try:
            gpt2_encoding()
        except ValueError as error:
            print(f"{error}; taking bytes instead")
        else:
            write_gpt2_tokens(folder)
            return "python_stdlib in GPT-2's tokens"
    prepare.main(folder)
    return "python_stdlib in bytes"


def write_gpt2_tokens(folder: Path) -> None:
    """The standard library in GPT-2's tokens, split by file as data/python_stdlib splits it."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for path in prepare.source_files(root):
        ids = encode_ordinary((root / path).read_text(encoding="utf-8", errors="replace"))
        split = "val" if prepare.is_validation(path) else "train"
        parts[split] += [ids, np.array([END_OF_TEXT], ids.dtype)]
    splits = {name: np.concatenate(part).astype(np.uint16) for name, part in parts.items()}
    write_dataset(folder, splits, {"name": "python_stdlib, GPT-2's tokens"}, "gpt2", 50257)


def settings(steps: int, batch_size: int, cuda: bool) -> list[str]:
    """Flags of train/run.py: its default, GPT-2 124M; for a CPU a model that takes seconds."""
    values: dict[str, object] = {
        "max_iters": steps, "lr_decay_iters": steps, "warmup_iters": max(1, steps // 10),
        "eval_interval": steps, "eval_iters": 20, "gradient_accumulation_steps": 1,
        "batch_size": batch_size, "log_interval": 1, "always_save_checkpoint": False, "seed": 1337,
    }
    if not cuda:
        values |= {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64,
                   "learning_rate": 4e-3, "min_lr": 4e-4}
    return [f"--{name}={value}" for name, value in values.items()]


def train(out_dir: Path, flags: list[str]) -> dict:
    """One run: training losses, last validation loss, median tokens/s after the first ten steps."""
    command = [sys.executable, str(ROOT / "train" / "run.py"), f"--out_dir={out_dir}", *flags]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"train/run.py ended with {code} on {flags[-1]}; its last lines are above")
    entries = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [e for e in entries if "loss" in e]
    # --data_dir is a temporary folder, and means nothing later
    return {"flags": [flag for flag in flags if not flag.startswith("--data_dir")],
            "loss": [e["loss"] for e in steps],
            "val_loss": [e["val/loss"] for e in entries if "val/loss" in e][-1],
            "tokens_per_s": float(np.median([e["tokens_per_s"] for e in steps[10:]] or [0.0]))}


def compare(first: dict, other: dict) -> dict[str, float]:
    """The mean and the largest difference of the training losses, and the signed one of `val`."""
    apart = [abs(a - b) for a, b in zip(first["loss"], other["loss"], strict=True)]
    return {"mean": fmean(apart), "most": max(apart), "val": other["val_loss"] - first["val_loss"]}


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
