"""Does a model learn with our attention dropout as it does with PyTorch's?

    python bench/curves/dropout_forms.py --data_dir=data/shakespeare_char

On a CPU the masks of our dropout are made from few random words (kernels/cpu_dropout.py), and those
of the attention are drawn block by block (kernels/cpu_attention.py). Here small models train with
these, with PyTorch's own dropout of the probabilities, and with none in the attention, from the
same seeds, on a slice of the text so short that they overfit and dropout matters. Their validation
losses are compared.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing import RESULTS, environment, write_result
from common import cli
from common.bounds import BelowOne, NotEmpty, Positive
from data.loader import Loader, eval_batches
from data.tokens import check_vocabulary, open_split, open_tokens, write_tokens
from gpt import GPT, GPTConfig
from kernels import load
from train import optim
from train.config import OptimConfig

VOCABULARY = 65  # the characters of data/shakespeare_char


@dataclass(frozen=True)
class Options:
    """Compare forms of attention dropout."""

    data_dir: NotEmpty = "data/shakespeare_char"
    train_tokens: Positive = 50_000
    dropout: BelowOne = 0.2
    max_iters: Positive = 800
    seeds: Positive = 3
    out: NotEmpty = str(RESULTS / "dropout-forms.json")


def on_probabilities(qkv: Tensor, *, dropout: float = 0.0, **_: object) -> Tensor:
    """PyTorch's dropout: of single probabilities."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout,
                                          is_causal=True).transpose(1, 2)


def none(qkv: Tensor, **_: object) -> Tensor:
    """No dropout in the attention; the dropout elsewhere stays."""
    return on_probabilities(qkv)


FORMS: dict[str, Callable] = {
    "ours": load("torch").attention_qkv, "PyTorch's": on_probabilities, "none": none,
}


def run(form: Callable, seed: int, options: Options, data: Path) -> float:
    """Train on the tokens in `data`; the validation loss at the end, in nats."""
    config = GPTConfig(block_size=64, vocab_size=VOCABULARY, n_layer=4, n_head=4, n_embd=128,
                       dropout=options.dropout)
    c = OptimConfig(learning_rate=1e-3, min_lr=1e-4, max_iters=options.max_iters,
                    lr_decay_iters=options.max_iters, warmup_iters=50, beta2=0.99)
    torch.manual_seed(seed)
    model = GPT(config, load("torch")._replace(attention_qkv=form))
    optimizer = optim.build(model, c)
    batches = Loader(open_tokens(data), block_size=64, batch_size=12, seed=seed)
    for step in range(options.max_iters):
        rate = optim.learning_rate(step, c)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        model(*next(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        held_out = eval_batches(open_split(options.data_dir, "val"), block_size=64, batch_size=12,
                                count=100, seed=0)
        return statistics.mean(model(*batch).item() for batch in held_out)


def main(options: Options) -> None:
    """Train with each form from each seed, in turns; print and write.

    Raises ValueError for data with ids of VOCABULARY or more.
    """
    losses: dict[str, list[float]] = {name: [] for name in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "slice.bin"
        whole = open_split(options.data_dir, "train")
        check_vocabulary(whole, VOCABULARY)
        write_tokens(data, next(whole.chunks())[: options.train_tokens])
        for seed in range(options.seeds):
            for name, form in FORMS.items():
                losses[name].append(run(form, seed, options, data))
                print(f"seed {seed}, dropout of {name}: validation loss {losses[name][-1]:.4f}",
                      flush=True)
    for name in FORMS:
        spread = f" +- {statistics.stdev(losses[name]):.4f}" if options.seeds > 1 else ""
        print(f"{name:26}{statistics.mean(losses[name]):.4f}{spread}")
    result = {"benchmark": "dropout_forms", "environment": environment("cpu"), "options": options,
              "val_loss": losses}
    write_result(options.out, result)


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
