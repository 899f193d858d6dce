"""Evaluation: what counts as text, empty contexts, and wrong files."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.tokenizer import Bytes
from data.tokenizer import GPT2Tokenizer as GPT2
from data.tokens import write_tokens
from gpt import GPT, GPTConfig
from gpt.scoring import perplexity
from tests.conftest import every_architecture
from train import evaluate
from train.parallel import World, world

END = 50256


@pytest.fixture
def model(architecture):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=16,
                         architecture=architecture)).eval()


@every_architecture
def test_the_end_of_text_has_a_loss_and_no_bytes(model, tmp_path):
    """It counted as the 13 bytes of "<|endoftext|>", which flattered bits per byte."""
    ids = GPT2().encode("One text.<|endoftext|>Another one.<|endoftext|>")
    assert ids.count(END) == 2
    write_tokens(tmp_path / "val.bin", np.array(ids))
    asked = SimpleNamespace(data_dir=str(tmp_path), dataset="", split="val", batch_size=2)
    figures = evaluate.whole_split(asked, model, GPT2(), world())
    assert figures["tokens"] == len(ids) - 1
    first = GPT2().decode(ids[:1])  # nothing predicts the first token
    written = len("One text.Another one.") - len(first)
    bits = figures["loss"] * (len(ids) - 1) / math.log(2)
    assert figures["bits per byte"] * written == pytest.approx(bits)


def answers(task, form, lines, model, tokenizer, folder):
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return task(evaluate.read_lines(str(folder / "lines.jsonl"), form), model, tokenizer, world())


@every_architecture
def test_an_empty_context_is_the_end_of_text(model, tmp_path):
    """A LAMBADA text of one word, or an empty ctx of HellaSwag, ended the evaluation."""
    log_p = model.logits(torch.tensor([[END]]))[0, -1].log_softmax(-1)
    loss = -log_p[GPT2().encode(" word")[0]].item()
    found = answers(evaluate.lambada, evaluate.Lambada, [{"text": "word"}], model, GPT2(), tmp_path)
    assert found["lambada ppl"] == pytest.approx(math.exp(loss), rel=1e-4)
    line = {"ctx": "", "endings": ["word", "other"], "label": "1"}
    found = answers(evaluate.hellaswag, evaluate.HellaSwag, [line], model, GPT2(), tmp_path)
    assert found["hellaswag examples"] == 1


def test_where_there_is_no_such_token_the_line_is_named(model, tmp_path):
    texts, said = [{"text": "two words"}, {"text": "one"}], r"lines\.jsonl, line 2: nothing stands "
    with pytest.raises(ValueError, match=said + "before .* no end-of-text token"):
        answers(evaluate.lambada, evaluate.Lambada, texts, model, Bytes(), tmp_path)


GOOD = {"ctx": "a", "endings": ["b", "c"], "label": 0, "ind": 7, "source_id": "x"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (GOOD | {"label": 2}, "label=2: must be from 0 to 1"),
        (GOOD | {"label": -1}, "label=-1"),
        (GOOD | {"label": "x"}, "label='x'"),
        (GOOD | {"label": None}, "label"),
        (GOOD | {"endings": []}, "endings=[]: must have an ending"),
        (GOOD | {"endings": "ab"}, "endings"),
        (GOOD | {"endings": ["a", 3]}, "endings"),
        (GOOD | {"ctx": None}, "ctx"),
        ([GOOD], "no object"),
        ("GOOD", "no object"),
        (7, "no object"),
        ({"ctx": "a"}, "no 'endings'"),
        ({"text": ""}, "text='': must end in a word"),
        ({"text": "a b "}, "must end in a word"),
        ({"text": ["a"]}, "text"),
        ({"txt": "a b"}, "no 'text'"),
        (None, "no object"),
    ],
)
def test_a_wrong_line_is_named(line, says, model, tmp_path):
    """Lists for objects, labels beyond the endings and the like were tracebacks."""
    is_lambada = isinstance(line, dict) and not line.keys() & GOOD.keys()
    task, form, good = evaluate.hellaswag, evaluate.HellaSwag, GOOD
    if is_lambada:
        task, form, good = evaluate.lambada, evaluate.Lambada, {"text": "a b"}
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2: ") as refused:
        answers(task, form, [good, line], model, GPT2(), tmp_path)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff", b"", b"\n\n", b'{"text": NaN}', b'{"text": ']
)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "lines.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"lines\.jsonl"):
        evaluate.read_lines(str(tmp_path / "lines.jsonl"), evaluate.Lambada)


def test_a_fifo_is_refused(tmp_path):
    os.mkfifo(tmp_path / "lines.jsonl")
    with pytest.raises(ValueError, match=r"lines\.jsonl: no regular file"):
        evaluate.read_lines(str(tmp_path / "lines.jsonl"), evaluate.Lambada)


def test_a_line_ends_at_the_end_of_the_line(tmp_path):
    """U+2028 may stand in JSON's texts; the file was cut there."""
    (tmp_path / "lines.jsonl").write_text('{"text": "a\u2028b\x85 c"}\r\n\n{"text": "d e"}')
    lines = evaluate.read_lines(str(tmp_path / "lines.jsonl"), evaluate.Lambada)
    assert [e.line["text"] for e in lines] == ["a\u2028b\x85 c", "d e"]
    assert lines[1].where.endswith("line 3")


def test_a_perplexity_beyond_all_floats_is_infinite():
    """A diverged model's loss of 852 was an OverflowError."""
    assert perplexity(852.0) == math.inf and perplexity(1.0) == math.e
    assert math.isnan(perplexity(math.nan))


def test_ranks_share_the_examples(model, tmp_path, monkeypatch):
    monkeypatch.setattr("train.parallel.sum_over_ranks", lambda x: x)
    (tmp_path / "l.jsonl").write_text('{"text": "a b"}\n' * 5)
    lines = evaluate.read_lines(str(tmp_path / "l.jsonl"), evaluate.Lambada)
    found = (evaluate.lambada(lines, model, GPT2(), World(rank, 2)) for rank in (0, 1))
    logs = [math.log(figures["lambada ppl"]) for figures in found]
    assert logs[0] == pytest.approx(logs[1] * 3 / 2, rel=1e-5)
