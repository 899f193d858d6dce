"""What joining two models costs, layer by layer: `python bench/stitch_sweep.py --text=FILE`, a few
minutes on one core.

Trains small character models, SIZE-fw|bw-OPTIMIZER-SEED, then joins the first, A, to the second, B,
at every layer i: merged, and through a linear layer at the seam, each under A's head and under B's;
validation losses in nats. Writes a JSON file and draws it. The trained models are kept in --out_dir
and used again.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.timing import ROOT, environment, write_result
from common import cli
from common.bounds import NotEmpty, Positive
from data.shakespeare_char.prepare import main as prepare
from gpt.config import Depth, Width
from gpt.run_folder import complete_checkpoints
from train import loop, optim
from train.build import Run, build
from train.command_line import parse
from train.config import Config


@dataclass(frozen=True)
class Options:
    """Train, join, draw."""

    text: str = ""
    """any UTF-8 text; its last tenth is for validation. Empty: tiny Shakespeare, downloaded"""
    out_dir: NotEmpty = str(ROOT / "out-stitch")
    """where data and trained models are kept"""
    n_layer: Depth = 4
    n_embd: Width = 64
    max_iters: Positive = 1200
    """steps of each model"""
    seam_iters: Positive = 200
    """steps in which a seam is trained"""
    out: NotEmpty = str(ROOT / "bench" / "results" / "stitch.json")
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
# beside A: the other optimizers, SGD with the larger learning rate it needs, and the other
# direction
OTHERS = (
    Base("forward", "adam", 1337, 2e-3), Base("forward", "sgd", 1337, 1e-1),
    Base("backward", "adamw", 1337, 2e-3),
)


def main(o: Options) -> dict:
    """Everything; the result that was written."""
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
        print(
            f"{i:5}{row['merge_a']:17.4f}{row['merge_b']:10.4f}{row['stitch_b']:20.4f}{row['stitch_b_trained']:9.4f}"
              f"{row['stitch_a_trained']:19.4f}")
    measured = {key: getattr(o, key) for key in ("n_layer", "n_embd", "max_iters", "seam_iters")}
    result = {"benchmark": "stitch", "environment": environment(), "options": measured,
              "models": bases, "a": A.name,
              "b": B.name, "layers": layers}
    write_result(o.out, result)
    draw(result, Path(o.plot))
    print(f"written to {o.out} and {o.plot}")
    return result


def settings(o: Options, *flags: str) -> Config:
    """A run on one CPU core, evaluated on 60 batches, 46,080 characters."""
    return parse([
        f"--data_dir={Path(o.out_dir) / 'data'}", "--device=cpu", "--dtype=float32",
        "--compile=False", "--kernels=torch",
        f"--n_layer={o.n_layer}", f"--n_embd={o.n_embd}", "--n_head=4", "--block_size=64",
        "--batch_size=12",
        "--gradient_accumulation_steps=1", "--warmup_iters=100", "--beta2=0.99",
        "--eval_iters=60", *flags,
    ])


def trained(o: Options, base: Base) -> dict[str, float]:
    """Train the model unless that was done; its loss."""
    out_dir = Path(o.out_dir) / base.name
    config = settings(
        o, f"--out_dir={out_dir}", f"--seed={base.seed}", f"--optimizer={base.optimizer}",
        f"--direction={base.direction}",
        f"--learning_rate={base.learning_rate}", f"--min_lr={base.learning_rate / 10}",
        f"--max_iters={o.max_iters}",
        f"--lr_decay_iters={o.max_iters}", f"--eval_interval={o.max_iters}", "--init_from=auto",
    )
    done = complete_checkpoints(out_dir)
    if not done or done[-1].name != f"step-{o.max_iters:08d}":
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train(config)
    return {"loss": loop.evaluate(build(config))["val"]}


def joined(o: Options, i: int) -> dict[str, float]:
    """The losses of A and B joined at layer i."""
    row = {}
    for head in "ab":
        merged, stitched = (build(settings(
            o, f"--init_from={how}", f"--resume_dir={Path(o.out_dir) / A.name}",
            f"--merge_dir={Path(o.out_dir) / B.name}",
            f"--stitch_layer_index={i}", f"--use_original_head={head == 'a'}",
            f"--out_dir={Path(o.out_dir) / 'none'}",
            "--learning_rate=2e-3", "--min_lr=2e-4", "--warmup_iters=10",
            f"--lr_decay_iters={max(o.seam_iters, 11)}",
        )) for how in ("merge", "stitch"))
        row[f"merge_{head}"] = loop.evaluate(merged)["val"]
        row[f"stitch_{head}"] = loop.evaluate(stitched)["val"]
        row[f"stitch_{head}_trained"] = train_seam(stitched, o.seam_iters)
    return row


def train_seam(run: Run, steps: int) -> float:
    """The loss after `steps` steps of the seam alone."""
    for run.step in range(steps):
        loop.train_step(run, optim.learning_rate(run.step, run.config.optim))
    return loop.evaluate(run)["val"]


def draw(result: dict, path: Path) -> None:
    """Layer against penalty: how much worse than A."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    base, layers = result["models"][result["a"]]["loss"], result["layers"]
    figure, (whole, near) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for key, label, style in (
        ("merge_a", "merged, A's head", "o-"), ("merge_b", "merged, B's head", "s-"),
        ("stitch_a_trained", "stitched, A's head, trained", "^-"),
        ("stitch_b", "stitched, B's head, least squares", "v-"),
        ("stitch_b_trained", "stitched, B's head, trained", "D-"),
    ):
        points = [row["layer"] for row in layers], [row[key] - base for row in layers]
        for axes in (whole, near):
            axes.plot(*points, style, markersize=5, label=label)
    for axes, title in ((whole, f"{result['a']} under {result['b']}"),
                        (near, "the same, near A's own loss")):
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xlabel="layer of the cut", ylabel="loss above A's (nats per character)",
                 title=title,
                 xticks=[row["layer"] for row in layers])
        axes.grid(alpha=0.3)
    near.set_ylim(-0.05, 0.3)
    whole.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
