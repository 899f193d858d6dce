"""What joining two models costs, layer by layer; a few minutes on one core.

    python bench/stitch_sweep.py --text=FILE

Trains small character models, SIZE-fw|bw-OPTIMIZER-SEED, then joins the first, A, to the second, B,
at every layer i: merged, and through a linear layer at the seam, each under A's head and under B's.
Validation losses are in nats. Writes a JSON file and draws it. The trained models are kept in
--out_dir and used again.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.timing import RESULTS, ROOT, environment, write_result
from common import cli
from common.bounds import NotEmpty, Positive
from common.plot import picture
from data.shakespeare_char.prepare import main as prepare
from gpt.config import Depth, Width
from gpt.run_folder import complete_checkpoints
from train import loop, optim
from train.build import build
from train.command_line import parse
from train.config import Config
from train.state import Run


@dataclass(frozen=True)
class Options:
    """Train, join, draw."""

    text: str = ""
    """any UTF-8 text; its last tenth is for validation. Empty: tiny Shakespeare, downloaded"""
    out_dir: NotEmpty = str(ROOT / "out-stitch")
    """folder for data and trained models"""
    n_layer: Depth = 4
    n_embd: Width = 64
    max_iters: Positive = 1200
    """steps of each model"""
    seam_iters: Positive = 200
    """steps in which a seam is trained"""
    out: NotEmpty = str(RESULTS / "stitch.json")
    plot: NotEmpty = str(ROOT / "docs" / "stitching.png")


class Base(NamedTuple):
    """A model to train."""

    direction: str
    optimizer: str
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"char-{'fw' if self.direction == 'forward' else 'bw'}-{self.optimizer}-{self.seed}"


A, B = Base("forward", "adamw", 1337, 2e-3), Base("forward", "adamw", 1339, 2e-3)
# to compare A with: other optimizers (SGD needs a larger learning rate), the other direction
OTHERS = (Base("forward", "adam", 1337, 2e-3), Base("forward", "sgd", 1337, 1e-1),
          Base("backward", "adamw", 1337, 2e-3))
# key of a layer's row, label, style of its line
LINES = (("merge_a", "merged, A's head", "o-"), ("merge_b", "merged, B's head", "s-"),
         ("stitch_a_trained", "stitched, A's head, trained", "^-"),
         ("stitch_b", "stitched, B's head, least squares", "v-"),
         ("stitch_b_trained", "stitched, B's head, trained", "D-"))


def main(o: Options) -> dict:
    """Train, join, write and draw; the result that was written."""
    data = Path(o.out_dir) / "data"
    if not (data / "train.bin").exists():
        prepare(Path(o.text) if o.text else None, data)
    bases = {base.name: {**base._asdict(), **trained(o, base)} for base in (A, B, *OTHERS)}
    for name, row in bases.items():
        print(f"{name:20} validation loss {row['loss']:.4f}")
    layers = []
    print("layer  merged: A's head  B's head   stitched: B's head  trained   A's head, trained")
    for i in range(o.n_layer + 1):
        layers.append(row := {"layer": i, **joined(o, i)})
        print(f"{i:5}{row['merge_a']:17.4f}{row['merge_b']:10.4f}{row['stitch_b']:20.4f}"
              f"{row['stitch_b_trained']:9.4f}{row['stitch_a_trained']:19.4f}")
    measured = {key: getattr(o, key) for key in ("n_layer", "n_embd", "max_iters", "seam_iters")}
    result = {"benchmark": "stitch", "environment": environment(), "options": measured,
              "models": bases, "a": A.name, "b": B.name, "layers": layers}
    write_result(o.out, result)
    draw(result, Path(o.plot))
    print(f"written to {o.out} and {o.plot}")
    return result


def settings(o: Options, **flags: object) -> Config:
    """A run on one CPU core, evaluated on 60 batches, 46,080 characters."""
    common = {"data_dir": Path(o.out_dir) / "data", "device": "cpu", "dtype": "float32",
              "compile": False, "kernels": "torch", "n_layer": o.n_layer, "n_embd": o.n_embd,
              "n_head": 4, "block_size": 64, "batch_size": 12, "gradient_accumulation_steps": 1,
              "warmup_iters": 100, "beta2": 0.99, "eval_iters": 60}
    return parse([f"--{name}={value}" for name, value in (common | flags).items()])


def trained(o: Options, base: Base) -> dict[str, float]:
    """Train a model unless its folder has it already, and return its validation loss."""
    out_dir = Path(o.out_dir) / base.name
    config = settings(o, out_dir=out_dir, seed=base.seed, optimizer=base.optimizer,
                      direction=base.direction, learning_rate=base.learning_rate,
                      min_lr=base.learning_rate / 10, max_iters=o.max_iters,
                      lr_decay_iters=o.max_iters, eval_interval=o.max_iters, init_from="auto")
    done = complete_checkpoints(out_dir)
    if not done or done[-1].name != f"step-{o.max_iters:08d}":
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train(config)
    return {"loss": loop.evaluate(build(config))["val"]}


def joined(o: Options, i: int) -> dict[str, float]:
    """The losses of A and B joined at layer i."""
    row, folder = {}, Path(o.out_dir)
    for head in "ab":
        merged, stitched = (build(settings(
            o, init_from=how, resume_dir=folder / A.name, merge_dir=folder / B.name,
            stitch_layer_index=i, use_original_head=head == "a", out_dir=folder / "none",
            learning_rate=2e-3, min_lr=2e-4, warmup_iters=10,
            lr_decay_iters=max(o.seam_iters, 11))) for how in ("merge", "stitch"))
        row[f"merge_{head}"] = loop.evaluate(merged)["val"]
        row[f"stitch_{head}"] = loop.evaluate(stitched)["val"]
        row[f"stitch_{head}_trained"] = train_seam(stitched, o.seam_iters)
    return row


def train_seam(run: Run, steps: int) -> float:
    """The loss after `steps` steps in which the seam alone is trained."""
    for run.step in range(steps):
        loop.train_step(run, optim.learning_rate(run.step, run.config.optim))
    return loop.evaluate(run)["val"]


def draw(result: dict, path: Path) -> None:
    """The penalty, how much worse than A, by layer: all of it, and near A's own loss."""
    base, layers = result["models"][result["a"]]["loss"], result["layers"]
    numbers = [row["layer"] for row in layers]
    with picture(path, 10, 4.2) as figure:
        whole, near = figure.subplots(1, 2)
        for axes, title in ((whole, f"{result['a']} under {result['b']}"),
                            (near, "the same, near A's own loss")):
            for key, label, style in LINES:
                axes.plot(numbers, [row[key] - base for row in layers], style, markersize=5,
                          label=label)
            axes.axhline(0, color="0.6", linewidth=0.8)
            axes.set(xlabel="layer of the cut", ylabel="loss above A's (nats per character)",
                     title=title, xticks=numbers)
            axes.grid(alpha=0.3)
        near.set_ylim(-0.05, 0.3)
        whole.legend(fontsize="small")


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
