"""Preparing large data sets: the same files for any number of workers and after any kill."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import encode, shards, sources
from data.encode import Validation, prepare, validation_documents
from data.gpt2 import END_OF_TEXT, gpt2_encoding
from data.manifest import verify
from data.sources import Files
from data.tokenizer import load_tokenizer, read_meta
from data.tokens import open_split

ROOT = Path(__file__).parents[1]
WORDS = ("the of and to in that is was he for it with as his on be at by I\n this had not are but "
         "from or have").split(" ")


def documents(n, words=60, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(words))) for _ in range(n)]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def ids_of(texts):
    encode_text = gpt2_encoding().encode_ordinary
    return [token for text in texts for token in [*encode_text(text), END_OF_TEXT]]


def tokens_of(folder, split):
    return np.concatenate(list(open_split(folder, split).chunks())).tolist()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def go(pattern, out, validation=None, **options):
    options = {"name": "t", "workers": 1} | options
    prepare(Files(str(pattern)), validation or Validation(fraction=0.1), out, **options)


@pytest.fixture
def small_steps(monkeypatch):
    """Tasks of a few words, a commit after each, and no fsync."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 300)
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(encode, "_COMMIT_SECONDS", -1.0)


# -- the files -----------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 100])
@pytest.mark.parametrize("options", [{}, {"format": "shards", "shard_tokens": 50}],
                         ids=["raw", "shards"])
def test_the_files_hold_each_document_and_its_end(tmp_path, small_steps, n, options):
    texts = documents(n)
    go(write_lines(tmp_path / "a.jsonl", texts), tmp_path / "out", **options)
    is_validation = validation_documents(n, 0.1)
    for split, wanted in (("train", ~is_validation), ("val", is_validation)):
        expected = ids_of([text for text, take in zip(texts, wanted) if take])
        assert tokens_of(tmp_path / "out", split) == expected
    verify(tmp_path / "out", full=True)
    assert load_tokenizer(read_meta(tmp_path / "out")).vocab_size == 50257
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["max_id"] == END_OF_TEXT
    assert manifest["source"]["text"]["documents"] == n


def test_shards_are_full_and_named_like_those_of_llmc(tmp_path, small_steps):
    go(write_lines(tmp_path / "a.jsonl", documents(100)), tmp_path / "out", format="shards",
       shard_tokens=500)
    train = sorted(path.name for path in (tmp_path / "out").glob("*train*"))
    assert train == [f"t_train_{i:06}.bin" for i in range(1, len(train) + 1)] and len(train) > 3
    sizes = [(tmp_path / "out" / name).stat().st_size for name in train]
    assert set(sizes[:-1]) == {1024 + 1000} and (tmp_path / "out" / "t_val_000000.bin").exists()


def test_the_first_tokens_can_be_the_validation_split(tmp_path, small_steps):
    texts = documents(50)
    go(write_lines(tmp_path / "a.jsonl", texts), tmp_path / "out", Validation(tokens=333))
    ids = ids_of(texts)
    assert tokens_of(tmp_path / "out", "val") == ids[:333]
    assert tokens_of(tmp_path / "out", "train") == ids[333:]


def test_the_split_is_that_of_the_package_datasets():
    datasets = pytest.importorskip("datasets")
    for n in (2, 4, 1999, 2001, 5000):
        rows = datasets.Dataset.from_dict({"i": range(n)})
        theirs = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        ours = np.flatnonzero(validation_documents(n, 0.0005)).tolist()
        assert sorted(theirs["test"]["i"]) == ours


def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 3000)
    source = write_lines(tmp_path / "a.jsonl", documents(300))
    for workers in (1, 3):
        go(source, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_empty_documents_and_half_characters_are_encoded_as_tiktoken_does(tmp_path, capsys):
    rows = ['{"text": ""}', r'{"text": "a \ud83d b"}', '{"text": ""}', '{"text": "x"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    go(tmp_path / "a.jsonl", tmp_path / "out", Validation(tokens=1))
    assert tokens_of(tmp_path / "out", "train") == ids_of(["a \ud83d b", "", "x"])
    assert tokens_of(tmp_path / "out", "val") == [END_OF_TEXT]
    assert "4 documents, 2 of them empty" in capsys.readouterr().out


def test_a_large_document_is_encoded_exactly(tmp_path):
    text = "\n\n".join(documents(4000, 300))
    assert len(text) > 2_000_000  # several pieces
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("x")
    go(tmp_path, tmp_path / "out", Validation(tokens=1))
    val, train = (tokens_of(tmp_path / "out", split) for split in ("val", "train"))
    assert val + train == ids_of([text, "x"])


# -- a folder that was used before -----------------------------------------------------


def test_the_same_again_is_reused_and_a_change_is_not(tmp_path, small_steps, capsys):
    out, source = tmp_path / "out", tmp_path / "a.jsonl"
    go(write_lines(source, documents(100)), out, format="shards", shard_tokens=200)
    first = contents(out)
    capsys.readouterr()
    go(source, out, format="shards", shard_tokens=200)
    assert "already made" in capsys.readouterr().out and contents(out) == first
    go(write_lines(source, documents(30, seed=1)), out, format="shards", shard_tokens=200)
    removed = f"removes {len(first) - 2} files of an earlier preparation"  # not the two .json
    assert removed in capsys.readouterr().out
    assert 3 < len(contents(out)) < len(first)  # no shard of the first set is left
    is_validation = validation_documents(30, 0.1)
    texts = [text for text, val in zip(documents(30, seed=1), is_validation) if not val]
    assert tokens_of(out, "train") == ids_of(texts)
    go(source, out)
    assert set(contents(out)) == {"train.bin", "val.bin", "meta.json", "manifest.json"}


def test_tokens_of_unknown_origin_are_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds train\.bin, which no manifest accounts for"):
        go(write_lines(tmp_path / "a.jsonl", documents(9)), out)
    assert contents(out) == {"train.bin": b"mine"}


def test_two_preparations_do_not_share_a_folder(tmp_path):
    source, out = write_lines(tmp_path / "a.jsonl", documents(9)), tmp_path / "out"
    with encode._locked(out), pytest.raises(ValueError, match="another preparation is writing"):
        go(source, out)


@pytest.mark.parametrize("n, validation, says",
                         [(1, Validation(fraction=0.5), "the number of documents is 1"),
                          (3, Validation(tokens=10_000), "none came to the split 'train'")])
def test_a_split_without_text_is_refused(tmp_path, n, validation, says):
    with pytest.raises(ValueError, match=says):
        go(write_lines(tmp_path / "a.jsonl", documents(n)), tmp_path / "out", validation)
    with pytest.raises(ValueError, match=r"train\.bin|not finished"):
        open_split(tmp_path / "out", "train")


# -- kills and failures ----------------------------------------------------------------


class Death(BaseException):
    """Stands for kill -9: what comes after it does not reach the disk."""


def die_at(patch, step):
    """Raise Death before the given disk operation and all later ones; returns [their count]."""
    steps = [0]

    def dying(function):
        def wrapper(*args, **kwargs):
            steps[0] += 1
            if steps[0] >= step:
                raise Death
            return function(*args, **kwargs)
        return wrapper

    for owner, names in ((os, ("fsync", "truncate")), (Path, ("rename", "replace", "unlink"))):
        for name in names:
            patch.setattr(owner, name, dying(getattr(owner, name)))
    return steps


@pytest.mark.parametrize("options", [{}, {"format": "shards", "shard_tokens": 200}],
                         ids=["raw", "shards"])
def test_death_at_any_step_and_the_same_command_again(tmp_path, small_steps, options):
    source = write_lines(tmp_path / "a.jsonl", documents(6))
    with pytest.MonkeyPatch.context() as patch:
        steps = die_at(patch, 10**9)
        go(source, tmp_path / "whole", **options)
    wanted = contents(tmp_path / "whole")
    for step in range(1, steps[0] + 1):
        out = tmp_path / f"out{step}"
        for attempt in (step, step % 7 + 1):  # the second attempt may die as well
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Death):
                die_at(patch, attempt)
                go(source, out, **options)
            # The folder is never taken for a finished one.
            assert (out / "unfinished.json").exists() or not list(out.glob("*.bin"))
        go(source, out, **options)
        assert contents(out) == wanted


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def long_text(tmp_path):
    return write_lines(tmp_path / "a.jsonl", documents(3000, 400))


def start(text, out, log):
    """Start data/text/prepare.py with two workers, and wait for its second shard of training text.

    Returns the process and its command.
    """
    command = [sys.executable, str(ROOT / "data" / "text" / "prepare.py"), f"--input={text}",
               f"--out={out}", "--workers=2", "--format=shards", "--shard_tokens=30_000"]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    while len(list(out.glob("*_train_*.bin"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    return process, command


@pytest.mark.skipif(sys.platform != "linux", reason="workers are found in Linux's /proc")
def test_kill_9_leaves_no_worker_and_loses_nothing(tmp_path, long_text):
    go(long_text, tmp_path / "whole", Validation(fraction=0.05), name="text", format="shards",
       shard_tokens=30_000)
    with open(tmp_path / "log", "w+") as log:
        process, command = start(long_text, tmp_path / "out", log)
        workers = children(process.pid)
        process.kill()
        process.wait()
        with pytest.raises(ValueError, match="its preparation is not finished"):
            open_split(tmp_path / "out", "train")
        again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "going on after" in again.stdout, again.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(workers) >= 2 and all(gone(worker) for worker in workers)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are found in Linux's /proc")
def test_a_killed_worker_is_a_loud_failure(tmp_path, long_text):
    with open(tmp_path / "log", "w+") as log:
        process, _ = start(long_text, tmp_path / "out", log)
        worker = next(pid for pid in children(process.pid)
                      if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(worker, signal.SIGKILL)
        assert process.wait(30) == 2
        log.seek(0)
        assert "error: a worker process died" in log.read().splitlines()[-1]
    assert (tmp_path / "out" / "unfinished.json").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


class FullDisk:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if len(content) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(content)
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_said_and_what_was_finished_is_kept(tmp_path, small_steps, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", documents(50))
    go(source, tmp_path / "whole")
    message = "out: the disk is full; what is finished is kept"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
        patch.setattr(shards, "open", lambda path, mode: FullDisk(open(path, mode), 1500),
                      raising=False)
        go(source, tmp_path / "out")
    state = json.loads((tmp_path / "out" / "unfinished.json").read_text())
    assert 0 < state["documents"] < 50 and not (tmp_path / "out" / "train.bin").exists()
    go(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_that_turns_out_broken_leaves_nothing_that_looks_whole(tmp_path, small_steps):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 30 + '{"text": "cut o')
    with pytest.raises(ValueError, match="line 31 is not UTF-8 JSON"):
        go(tmp_path / "a.jsonl", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    go(write_lines(tmp_path / "a.jsonl", ["good"] * 30 + ["cut off"]), tmp_path / "out")
    tokens = sum(len(tokens_of(tmp_path / "out", split)) for split in ("train", "val"))
    assert tokens == 31 * 2 + 1


def test_fewer_documents_than_announced_is_a_failure(tmp_path):
    source = Files(write_lines(tmp_path / "a.jsonl", documents(9)))
    source.documents = 10
    with pytest.raises(ValueError, match="9 documents came, where there should be 10"):
        prepare(source, Validation(fraction=0.1), tmp_path / "out", name="t", workers=1)
