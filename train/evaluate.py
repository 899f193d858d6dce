"""Evaluate a model on a whole split, HellaSwag and LAMBADA, alone or under torchrun.

    python train/evaluate.py --out_dir=out --dataset=openwebtext --hellaswag=hellaswag_val.jsonl

A split gives loss, perplexity and bits per byte. The other two read local files:
- hellaswag, completion style (llm.c, build-nanogpt): ctx + " " + ending. acc takes the ending of
  least total loss, acc_norm that of least loss per token.
- lambada, the last word of a text, after " ". acc counts the words that greedy decoding writes
  whole, ppl is the perplexity of those words.
An empty context is the end-of-text token, as in lm-eval. The figures differ from lm-eval's: for
those, export with --to=hf.
"""

import math
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

from common import cli
from common.bounds import Must, NotEmpty, Positive
from common.files import check_json, parse_json, read_text


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on whole files."""

    out_dir: NotEmpty = "out"
    """a run's folder, or one checkpoint in it"""
    init_from: NotEmpty = "resume"
    """resume: out_dir; else gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a model"""
    dataset: str = ""
    """folder under data/, whose whole split is read"""
    data_dir: str = ""
    """any other folder of tokens"""
    split: NotEmpty = "val"
    batch_size: Positive = 8
    document_mask: bool | Literal["auto"] = "auto"
    """of a split: attention does not look beyond a document; auto: as out_dir was trained"""
    hellaswag: str = ""
    """hellaswag_val.jsonl: lines with ctx, endings, label"""
    lambada: str = ""
    """lambada_test.jsonl: lines with text"""
    device: str = "auto"
    dtype: str = "auto"


def evaluate(c: Evaluate) -> dict[str, float]:
    """Print and return the figures of all ranks. Raises ValueError or OSError for bad input."""
    from common import hardware
    from gpt.model import load_with_tokenizer
    from train import parallel
    from train.config import ParallelConfig
    from train.documents import Documents, documents_at, one_document

    if not (c.dataset or c.data_dir or c.hellaswag or c.lambada):
        raise ValueError("nothing to evaluate on; give --dataset=, --data_dir=, --hellaswag=FILE "
                         "or --lambada=FILE")
    world = parallel.world()
    device = hardware.resolve_device(c.device, world.local_rank)
    model, tokenizer = load_with_tokenizer(c.init_from, c.out_dir, device)
    masked = hides_documents(c)
    if model.config.direction == "backward" and (c.hellaswag or c.lambada):
        raise ValueError("--hellaswag and --lambada ask what follows a context; this model has "
                         "--direction=backward")
    parallel.start(world, device, ParallelConfig())
    figures: dict[str, float] = {}
    with hardware.autocast(device, hardware.resolve_dtype(c.dtype, device)):
        if c.dataset or c.data_dir:
            documents: Documents = one_document
            if masked:
                data = c.data_dir or c.dataset
                documents = documents_at(tokenizer.end_of_text, model.config.direction, data)
                if world.rank == 0:
                    print("document_mask: True")
            figures |= whole_split(c, model, tokenizer, world, documents)
        if c.hellaswag:
            figures |= hellaswag(read_lines(c.hellaswag, HellaSwag), model, tokenizer, world)
        if c.lambada:
            figures |= lambada(read_lines(c.lambada, Lambada), model, tokenizer, world)
    if world.rank == 0:
        for name, value in figures.items():
            print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.6g}")
    parallel.stop()
    return figures


def hides_documents(c: Evaluate) -> bool:
    """Whether attention must not look beyond a document: --document_mask, auto as in training."""
    from gpt.run_folder import reading
    from train.documents import trained_with_mask

    if c.document_mask != "auto" or c.init_from != "resume":
        return c.document_mask is True
    with reading(c.out_dir) as folder:
        return trained_with_mask(folder)


def whole_split(c: Evaluate, model, tokenizer, world,
                documents=lambda idx: None) -> dict[str, float]:
    """Predict every token of the split but the first, once, from at most block_size before it.

    `documents` may hide others (train/documents.py). End-of-text tokens count with their loss and
    with 0 bytes. Every rank must call it.
    """
    import numpy as np
    import torch

    from data.tokens import check_vocabulary, in_reading_order, open_split
    from gpt.scoring import perplexity, spans
    from train.config import ROOT
    from train.parallel import sum_over_ranks

    data_dir = c.data_dir or ROOT / "data" / c.dataset
    tokens = in_reading_order(open_split(data_dir, c.split), model.config.direction)
    if len(tokens) < 2:
        raise ValueError(f"{tokens.name}: {len(tokens)} token(s), at least 2 are needed")
    check_vocabulary(tokens, model.config.vocab_size)
    size, device = model.config.block_size, model.lm_head.weight.device
    texts = set(range(tokenizer.vocab_size)) - {tokenizer.end_of_text}
    bytes_of = torch.tensor([len(tokenizer.decode_bytes([i])) if i in texts else 0
                             for i in range(model.config.vocab_size)], device=device)
    mine = islice(spans(len(tokens), size), world.rank, None, world.size)
    total = torch.zeros(3, dtype=torch.float64, device=device)  # loss in nats, tokens, bytes
    while group := list(islice(mine, c.batch_size)):
        full = [span for span in group if span[1] - span[0] == size]
        short = [[span] for span in group if span not in full]
        for batch in [full, *short] if full else short:
            starts, (start, end) = np.array([start for start, _ in batch]), batch[0]
            windows = tokens.read(starts, end - start + 1).astype(np.int64)
            ids = torch.from_numpy(windows).to(device)
            idx, targets = ids[:, :-1], ids[:, 1:]
            with torch.no_grad():
                total[0] += model(idx, targets, doc_start=documents(idx), reduction="sum")
            total[1:] += torch.tensor([targets.numel(), bytes_of[targets].sum()], device=device)
    loss, count, n_bytes = sum_over_ranks(total).tolist()
    return {"loss": loss / count, "perplexity": perplexity(loss / count),
            "bits per byte": loss / math.log(2) / max(n_bytes, 1), "tokens": int(count)}


class HellaSwag(TypedDict):
    """A line of hellaswag_val.jsonl; it may have more keys."""

    ctx: str
    endings: Annotated[list[str], Must("have an ending", bool)]
    label: int | str


class Lambada(TypedDict):
    """A line of lambada_test.jsonl; it may have more keys."""

    text: Annotated[str, Must("end in a word", lambda text: text and not text[-1].isspace())]


class Example(NamedTuple):
    """A line of a JSONL file."""

    where: str
    """file and line number, for messages"""
    line: dict[str, Any]


def read_lines(path: str, form: Any) -> list[Example]:
    """Read the objects of a JSONL file, each a `form`. Raises ValueError that names a bad line."""
    remedy = "mend the line, or leave it out"
    examples = []
    for number, text in enumerate(read_text(Path(path)).split("\n"), 1):
        where = f"{path}, line {number}"
        if not text.strip():
            continue
        line: Any = parse_json(text, object, where, remedy)
        if not isinstance(line, dict):
            raise ValueError(f"{where}: no object")
        if missing := form.__annotations__.keys() - line.keys():
            raise ValueError(f"{where}: no {sorted(missing)[0]!r}")
        line = {key: line[key] for key in form.__annotations__}
        line = check_json(line, form, where, remedy)
        examples.append(Example(where, line))
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return examples


def context_ids(text: str, tokenizer, where: str) -> list[int]:
    """The ids of a context: those of `text`, or the end-of-text token where it is empty."""
    if not text and tokenizer.end_of_text is None:
        raise ValueError(f"{where}: nothing stands before what is asked for, and this model's "
                         "tokenizer has no end-of-text token to stand there; leave the line out")
    return tokenizer.encode(text) or [tokenizer.end_of_text]


def right_ending(example: Example) -> int:
    """The number of the right ending. Raises ValueError where the label is no such number."""
    label, endings = example.line["label"], example.line["endings"]
    if str(label) not in map(str, range(len(endings))):
        raise ValueError(f"{example.where}: label={label!r}: must be from 0 to {len(endings) - 1}, "
                         "as its endings are")
    return int(label)


def hellaswag(examples: list[Example], model, tokenizer, world) -> dict[str, float]:
    """Choose each example's ending by its loss; the accuracies. Every rank must call it."""
    import torch

    from gpt.scoring import continuation_losses
    from train.parallel import sum_over_ranks

    tasks = [(context_ids(e.line["ctx"], tokenizer, e.where),
              [tokenizer.encode(" " + ending) for ending in e.line["endings"]], right_ending(e))
             for e in examples]
    counts = torch.zeros(2, dtype=torch.float64, device=model.lm_head.weight.device)
    for context, endings, right in tasks[world.rank :: world.size]:
        scored = continuation_losses(model, context, endings)
        for i, score in enumerate((torch.Tensor.sum, torch.Tensor.mean)):
            best = min(range(len(scored)), key=lambda e: score(scored[e][0]).item())
            counts[i] += best == right
    acc, acc_norm = (sum_over_ranks(counts) / len(examples)).tolist()
    return {"hellaswag acc": acc, "hellaswag acc_norm": acc_norm,
            "hellaswag examples": len(examples)}


def lambada(examples: list[Example], model, tokenizer, world) -> dict[str, float]:
    """Predict each example's last word; accuracy and perplexity. Every rank must call it."""
    import torch

    from gpt.scoring import continuation_losses, perplexity
    from train.parallel import sum_over_ranks

    tasks = []
    for e in examples:
        context, _, word = e.line["text"].rpartition(" ")
        tasks.append((context_ids(context, tokenizer, e.where), tokenizer.encode(" " + word)))
    counts = torch.zeros(2, dtype=torch.float64, device=model.lm_head.weight.device)
    for context, word in tasks[world.rank :: world.size]:
        ((losses, greedy),) = continuation_losses(model, context, [word])
        counts += torch.tensor([greedy, losses.double().sum()], device=counts.device)
    acc, loss = (sum_over_ranks(counts) / len(examples)).tolist()
    return {"lambada acc": acc, "lambada ppl": perplexity(loss), "lambada examples": len(examples)}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr for bad input."""
    return cli.run(evaluate, Evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
