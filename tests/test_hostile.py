"""Hostile and damaged files: at most one line of error, in time, and no other file touched."""

import json
import os
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from common import cli
from data import encode, manifest
from data.encode import Validation
from data.shakespeare_char import prepare as characters
from data.sources import Files
from data.text import prepare as text
from data.tokenizer import Bytes, load_tokenizer, read_meta
from data.tokens import check_vocabulary, check_window, open_split
from gpt import GPT, GPTConfig, huggingface
from gpt.generate import generate
from tests.conftest import TINY
from tests.drills import assert_ends_well, contents, mutated_bytes, mutated_json, replaced
from tests.test_encode import documents, go, write_lines
from train import evaluate, run
from train.command_line import parse
from train.parallel import World

# -- one test for each bug that was found --------------------------------------------------


@pytest.mark.parametrize("name", ["../thesis.txt", "/thesis.bin", "thesis.txt", "..", ""])
def test_a_manifest_cannot_make_us_delete_other_files(tmp_path, name):
    """The next preparation deleted what a downloaded manifest named: "file": "../thesis.txt"."""
    source, out = write_lines(tmp_path / "a.jsonl", documents(9)), tmp_path / "out"
    go(source, out)
    name = str(tmp_path / name[1:]) if name.startswith("/") else name
    if "thesis" in name:
        (out / name).write_text("all I wrote")
    text = (out / "manifest.json").read_text().replace('"train.bin"', json.dumps(name))
    (out / "manifest.json").write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json: file='.*': must"):
        go(source, out, Validation(tokens=3))
    assert contents(tmp_path) == before


def test_an_unfinished_preparation_deletes_only_its_own_files(tmp_path):
    """The next preparation deleted every .bin file beside unfinished.json."""
    source, out = write_lines(tmp_path / "a.jsonl", documents(9)), tmp_path / "out"
    go(source, out)
    recipe = json.loads((out / "manifest.json").read_text())["source"] | {"name": "other"}
    manifest.start_unfinished(out, recipe)
    (out / "weights.bin").write_bytes(b"mine")
    before = contents(out)
    with pytest.raises(ValueError, match="holds weights.bin, which no manifest accounts for"):
        go(source, out)
    assert contents(out) == before
    (out / "weights.bin").unlink()
    go(source, out)
    assert sorted(os.listdir(out)) == ["manifest.json", "meta.json", "train.bin", "val.bin"]


def start_preparation(source, out, name, fraction, splits):
    """Write the unfinished.json of a preparation that has written `splits`."""
    split = Validation(fraction=fraction)._asdict()
    recipe = {"name": name, "text": Files(str(source)).describe(), "split": split,
              "format": "raw", "shard_tokens": None}
    progress = manifest.start_unfinished(out, recipe) | {"splits": splits}
    (out / "unfinished.json").write_text(json.dumps(progress))


@pytest.mark.parametrize("link", ["train.bin.partial", "meta.json.tmp", "manifest.json.tmp"])
@pytest.mark.parametrize("resumed", [False, True])
def test_no_link_is_written_through(tmp_path, link, resumed):
    """A link in a downloaded folder, with the name of a temporary file, was written through."""
    source, out = write_lines(tmp_path / "a.jsonl", documents(9)), tmp_path / "out"
    (tmp_path / "thesis.txt").write_bytes(b"all I wrote" * 1000)
    out.mkdir()
    (out / link).symlink_to("../thesis.txt")
    if resumed:
        splits = {"train": {"shards": [], "open": 3, "max_id": 0}}
        start_preparation(source, out, "t", 0.1, splits)
    try:
        go(source, out)
    except ValueError as error:
        assert resumed and ("a link, whose target" in str(error) or "shorter than" in str(error))
    assert (tmp_path / "thesis.txt").read_bytes() == b"all I wrote" * 1000


@pytest.mark.parametrize("change", [
    {"documents": -1}, {"begun": "x"}, {"splits": {"train": {"shards": [-3]}}}, {"splits": []},
    {"made_from": None},
])
def test_a_malformed_unfinished_json_is_refused(tmp_path, change):
    """It ended in a traceback."""
    progress = manifest.start_unfinished(tmp_path, {}) | change
    (tmp_path / "unfinished.json").write_text(json.dumps(progress))
    with pytest.raises(ValueError, match=r"unfinished\.json: .*; remove it to start anew"):
        go(write_lines(tmp_path / "a.jsonl", documents(9)), tmp_path)


# -- mutations -----------------------------------------------------------------------------


def read_as_a_run(folder):
    """Read what the start of a run reads of its data."""
    manifest.verify(folder, full=True)
    splits = [open_split(folder, split) for split in ("train", "val")]
    meta = read_meta(folder)
    load_tokenizer(meta).decode([0, 1])
    for tokens in splits:
        check_window(tokens, 4)
        check_vocabulary(tokens, meta["vocab_size"] if meta else 50257)
        tokens.read(np.array([0]), 4)


def mutate(path, rng):
    """Change the file `path`: a value in its JSON, some bytes, or the kind of file."""
    draw = rng.random()
    if draw < 0.15:
        return replaced(path, rng)
    content = path.read_bytes()
    if draw < 0.65 and path.suffix in (".json", ".jsonl"):
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(mutated_json(json.loads(lines[i]), rng))
        content = "\n".join(lines).encode()
    else:
        content = mutated_bytes(content, rng)
    path.write_bytes(content)


@pytest.fixture
def ground(tmp_path):
    """A folder for the cases; canary.txt beside it and notes.txt in it must stay as they are."""
    (tmp_path / "canary.txt").write_text("all I wrote")
    whole = tmp_path / "whole"
    whole.mkdir()
    (tmp_path / "in.txt").write_text("To be, or not to be: that is the question.\n" * 9)
    write_lines(tmp_path / "in.jsonl", documents(9))
    (whole / "notes.txt").write_text("mine")
    return tmp_path


def prepared(ground):
    characters.main(ground / "in.txt", ground / "whole")
    return ["manifest.json", "meta.json", "train.bin", "val.bin"], read_as_a_run


def trained_on(ground):
    names, _ = prepared(ground)
    flags = [*TINY, "--eval_only=True", "--eval_iters=1", "--n_layer=1",
             f"--out_dir={ground / 'run'}"]
    return names, lambda out: run.main([*flags, f"--data_dir={out}"])


def pickled(ground):
    _, action = prepared(ground)
    for name in ("meta.json", "manifest.json"):
        (ground / "whole" / name).unlink()
    return ["meta.pkl"], action


def encoded(ground, more=("--val_tokens=5",)):
    """A folder that was prepared once, and is prepared again in another way."""
    go(ground / "in.jsonl", ground / "whole")
    flags = [f"--input={ground / 'in.jsonl'}", "--workers=1", *more]
    names = ["manifest.json", "meta.json", "train.bin"]
    return names, lambda out: cli.run(text.main, argv=[*flags, f"--out={out}"])


def unfinished(ground):
    """A preparation that was killed in the middle, and is resumed."""
    (ground / "whole" / "train.bin.partial").write_bytes(bytes(80))
    splits = {"train": {"shards": [], "open": 40, "max_id": 7},
              "val": {"shards": [], "open": 0, "max_id": 0}}
    start_preparation(ground / "in.jsonl", ground / "whole", "text", 0.05, splits)
    flags = [f"--input={ground / 'in.jsonl'}", "--workers=1"]
    names = ["unfinished.json", "unfinished.json", "train.bin.partial"]
    return names, lambda out: cli.run(text.main, argv=[*flags, f"--out={out}"])


def lines_to_prepare(ground):
    shutil.copy(ground / "in.jsonl", ground / "whole" / "in.jsonl")
    flags = ["--val_tokens=5", "--workers=1", f"--out={ground / 'case' / 'out'}"]
    return ["in.jsonl"], lambda out: cli.run(text.main,
                                             argv=[f"--input={out / 'in.jsonl'}", *flags])


def questions(ground, task, form, line):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=1, n_head=1, n_embd=8)).eval()
    (ground / "whole" / "q.jsonl").write_text("\n".join([json.dumps(line)] * 3))

    def answer(out):
        task(evaluate.read_lines(str(out / "q.jsonl"), form), model, Bytes(), World())

    return ["q.jsonl"], answer


def config_of_ours(ground):
    (ground / "whole" / "mine.py").write_text(
        "from train.config import Config, DataConfig, GPTConfig\n\n"
        "config = Config(\n    model=GPTConfig(n_layer=2, n_head=2, n_embd=16),\n"
        "    data=DataConfig(batch_size=12),\n)\n"
    )
    return ["mine.py"], lambda out: parse([str(out / "mine.py")])


def hugging_face(ground, **sizes):
    pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(block_size=16, vocab_size=29, n_layer=2, n_head=2, n_embd=8) | sizes
    huggingface.write(GPT(GPTConfig(**sizes)), ground / "whole", 29)

    def use(out):
        model = GPT.from_pretrained(str(out))
        list(generate(model, torch.zeros(1, 2, dtype=torch.long), 3, temperature=0))

    return ["config.json", "config.json", "model.safetensors"], use


SUBJECTS = {
    "data": prepared,
    "run": trained_on,
    "pickle": pickled,
    "prepared": encoded,
    "unfinished": unfinished,
    "jsonl": lines_to_prepare,
    "hellaswag": partial(
        questions,
        task=evaluate.hellaswag,
        form=evaluate.HellaSwag,
        line={"ctx": "a b", "endings": ["c", "d"], "label": 1, "ind": 3},
    ),
    "lambada": partial(
        questions, task=evaluate.lambada, form=evaluate.Lambada, line={"text": "one two three"}
    ),
    "config": config_of_ours,
    "hf gpt2": hugging_face,
    "hf nanochat": partial(hugging_face, architecture="nanochat"),
}


def drill(subject, ground, capsys, monkeypatch, seeds):
    """For each seed, damage a file of a good folder and use the folder; count the exit codes."""
    monkeypatch.setattr(encode.os, "fsync", lambda descriptor: None)
    names, action = SUBJECTS[subject](ground)
    counts = {0: 0, 2: 0}
    for seed in (None, *seeds):
        rng, case = random.Random(seed), ground / "case"
        shutil.copytree(ground / "whole", case)
        if seed is not None:
            mutate(case / rng.choice(names), rng)
        code = assert_ends_well(lambda out: cli.exit_code(lambda: action(out)), case, capsys)
        assert seed is not None or code == 0, "the undamaged folder is accepted"
        counts[code] += 1
        assert (ground / "canary.txt").read_text() == "all I wrote", seed
        assert (case / "notes.txt").read_text() == "mine", seed
        shutil.rmtree(case)
    print(subject, counts)
    return counts


@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_file_harms(subject, ground, capsys, monkeypatch):
    before = contents(ground)
    counts = drill(subject, ground, capsys, monkeypatch, range(40))
    assert counts[2] > 10
    assert before.items() <= contents(ground).items()


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_many_files(subject, ground, capsys, monkeypatch):
    drill(subject, ground, capsys, monkeypatch, range(1000, 2000))
