"""How good a model is: `python train/evaluate.py --out_dir=out --dataset=openwebtext`, alone or
under torchrun.

Goes through a whole split once: loss, perplexity, bits per byte. With local files also HellaSwag
and LAMBADA:

hellaswag, completion style (llm.c, build-nanogpt): ctx + " " + ending; acc takes the ending of
least total loss, acc_norm the one of least loss per token. lambada, last word: the text up to its
last space, then " " + word; acc counts words that greedy decoding writes whole, ppl is of those
words. An empty context is the end-of-text token, as in lm-eval; but these are not lm-eval's
figures: for those, export with --to=hf.
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

from common import cli
from common.bounds import Must, NotEmpty, Positive
from common.files import formed, read_text


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on whole files."""

    out_dir: NotEmpty = "out"
    """a run's folder, or one checkpoint in it"""
    init_from: NotEmpty = "resume"
    """resume: out_dir; else gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a model"""
    dataset: str = ""
    """folder under data/; its split is gone through whole"""
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
    """Print and return the figures, summed over all ranks. Raises ValueError or OSError for what
    the user can mend."""
    from common import hardware
    from data.tokenizer import load_tokenizer
    from gpt.pretrained import load_model, model_of, read_source, read_tokenizer, tokenizer_of
    from gpt.run_folder import reading
    from train import parallel
    from train.config import ParallelConfig
    from train.documents import Mask, mask_at, no_mask, trained_with_mask

    if not (c.dataset or c.data_dir or c.hellaswag or c.lambada):
        raise ValueError("nothing to evaluate on; give --dataset=, --data_dir=, --hellaswag=FILE "
                         "or --lambada=FILE")
    world = parallel.world()
    device = hardware.resolve_device(c.device, world.local_rank)
    masked = c.document_mask is True
    if c.init_from == "resume":
        with reading(c.out_dir) as folder:
            model, tokenizer = load_model(folder, device), load_tokenizer(read_tokenizer(folder))
            masked |= c.document_mask == "auto" and trained_with_mask(folder)
    else:
        trained = read_source(c.init_from)
        model, tokenizer = model_of(trained).to(device), tokenizer_of(trained)
    if model.config.direction == "backward" and (c.hellaswag or c.lambada):
        raise ValueError("--hellaswag and --lambada ask what follows a context; this model has "
                         "--direction=backward")
    parallel.start(world, device, ParallelConfig())
    figures: dict[str, float] = {}
    with hardware.autocast(device, hardware.resolve_dtype(c.dtype, device)):
        if c.dataset or c.data_dir:
            mask: Mask = no_mask
            if masked:
                mask = mask_at(tokenizer.end_of_text, model.config.direction,
                               c.data_dir or c.dataset)
                if world.rank == 0:
                    print("document_mask: True")
            figures |= whole_split(c, model, tokenizer, world, mask)
        if c.hellaswag:
            figures |= hellaswag(read_lines(c.hellaswag, HellaSwag), model, tokenizer, world)
        if c.lambada:
            figures |= lambada(read_lines(c.lambada, Lambada), model, tokenizer, world)
    if world.rank == 0:
        for name, value in figures.items():
            print(f"{name}: {value:.6g}")
    parallel.stop()
    return figures


def whole_split(c: Evaluate, model, tokenizer, world, mask=lambda idx: {}) -> dict[str, float]:
    """Every token of the split but the first, predicted once from at most block_size before it.

    `mask` (train/documents.py) may keep what is before it to its own document.

    The end-of-text token stands for no text: it counts with its loss and with 0 bytes.
    """
    import numpy as np
    import torch

    from data.tokens import check_vocabulary, open_split
    from gpt.scoring import perplexity, spans
    from train.config import ROOT
    from train.init_from import directed
    from train.parallel import sum_over_ranks

    tokens = directed(open_split(c.data_dir or ROOT / "data" / c.dataset, c.split), model.config)
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
        whole = [span for span in group if span[1] - span[0] == size]
        for part in [whole, *([span] for span in group if span not in whole)]:
            if not part:
                continue
            windows = tokens.read(np.array([start for start, _ in part]),
                                  part[0][1] - part[0][0] + 1).astype(np.int64)
            ids = torch.from_numpy(windows).to(device)
            with torch.no_grad():
                total[0] += model(ids[:, :-1], ids[:, 1:], reduction="sum",
                                  **mask(ids[:, :-1]))
            total[1:] += torch.tensor([ids[:, 1:].numel(), bytes_of[ids[:, 1:]].sum()],
                                      device=device)
    loss, count, n_bytes = sum_over_ranks(total).tolist()
    return {"loss": loss / count, "perplexity": perplexity(loss / count),
            "bits per byte": loss / math.log(2) / max(n_bytes, 1), "tokens": count}


class HellaSwag(TypedDict):
    """A line of hellaswag_val.jsonl; it may have more keys."""

    ctx: str
    endings: Annotated[list[str], Must("have an ending", bool)]
    label: int | str


class Lambada(TypedDict):
    """A line of lambada_test.jsonl; it may have more keys."""

    text: Annotated[str, Must("end in a word", lambda text: text and not text[-1].isspace())]


class Example(NamedTuple):
    """A line of a file: where it stands, and what it says."""

    where: str
    line: dict[str, Any]


def read_lines(path: str, form: Any) -> list[Example]:
    """The objects of a JSONL file, of the type `form`. Raises ValueError, naming a wrong line."""
    examples = []
    for number, text in enumerate(read_text(Path(path)).split("\n"), 1):
        where = f"{path}, line {number}"
        if not text.strip():
            continue
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"{where}: no object")
        if missing := form.__annotations__.keys() - found.keys():
            raise ValueError(f"{where}: no {sorted(missing)[0]!r}")
        line = {key: found[key] for key in form.__annotations__}
        examples.append(Example(where, formed(line, form, where, "mend the line, or leave it out")))
    if not examples:
        raise ValueError(f"{path}: no examples in it")
    return examples


def context_ids(text: str, tokenizer, where: str) -> list[int]:
    """The ids of a context; of an empty one the end-of-text token, for a model needs one."""
    if not text and tokenizer.end_of_text is None:
        raise ValueError(f"{where}: nothing stands before what is asked for, and this model's "
                         "tokenizer has no end-of-text token to stand there; leave the line out")
    return tokenizer.encode(text) or [tokenizer.end_of_text]


def right_ending(example: Example) -> int:
    """Which of the endings is the right one. Raises ValueError for a label that is none of them."""
    label, endings = example.line["label"], example.line["endings"]
    if str(label) not in map(str, range(len(endings))):
        raise ValueError(f"{example.where}: label={label!r}: must be from 0 to {len(endings) - 1}, "
                         "as its endings are")
    return int(label)


def hellaswag(examples: list[Example], model, tokenizer, world) -> dict[str, float]:
    import torch

    from gpt.scoring import continuation_losses
    from train.parallel import sum_over_ranks

    asked = [(context_ids(e.line["ctx"], tokenizer, e.where),
              [tokenizer.encode(" " + ending) for ending in e.line["endings"]], right_ending(e))
             for e in examples]
    counts = torch.zeros(2, dtype=torch.float64, device=model.lm_head.weight.device)
    for context, endings, right in asked[world.rank :: world.size]:
        scored = continuation_losses(model, context, endings)
        for i, score in enumerate((torch.Tensor.sum, torch.Tensor.mean)):
            best = min(range(len(scored)), key=lambda e: score(scored[e][0]).item())
            counts[i] += best == right
    acc, acc_norm = (sum_over_ranks(counts) / len(examples)).tolist()
    return {"hellaswag acc": acc, "hellaswag acc_norm": acc_norm,
            "hellaswag examples": len(examples)}


def lambada(examples: list[Example], model, tokenizer, world) -> dict[str, float]:
    import torch

    from gpt.scoring import continuation_losses, perplexity
    from train.parallel import sum_over_ranks

    asked = []
    for e in examples:
        context, _, word = e.line["text"].rpartition(" ")
        asked.append((context_ids(context, tokenizer, e.where), tokenizer.encode(" " + word)))
    counts = torch.zeros(2, dtype=torch.float64, device=model.lm_head.weight.device)
    for context, word in asked[world.rank :: world.size]:
        ((losses, greedy),) = continuation_losses(model, context, [word])
        counts += torch.tensor([greedy, losses.double().sum()], device=counts.device)
    acc, loss = (sum_over_ranks(counts) / len(examples)).tolist()
    return {"lambada acc": acc, "lambada ppl": perplexity(loss), "lambada examples": len(examples)}


def main(argv: list[str] | None = None) -> int:
    """0 when all is printed; 2, after one line on stderr, for what the user can mend."""
    return cli.run(evaluate, Evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
