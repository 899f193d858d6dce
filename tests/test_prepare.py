"""The prepare.py of every data set: its counts, the same files every time, errors of one line."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import small
from data.encode import validation_documents
from data.gpt2 import END_OF_TEXT, gpt2_encoding
from data.python_stdlib import prepare as python_stdlib
from data.python_stdlib_bpe import prepare as python_stdlib_bpe
from data.shakespeare import prepare as shakespeare
from data.shakespeare_char import prepare as shakespeare_char
from data.tokenizer import load_tokenizer, read_meta
from data.tokens import open_split
from tests.test_encode import contents, tokens_of

ROOT = Path(__file__).parents[1]
TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
needs_text = pytest.mark.skipif(not TEXT.exists(), reason="needs the text of tiny Shakespeare")


@pytest.fixture
def closed_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(small.urllib.request, "urlopen", refuse)


def run(set_name, *options, cwd):
    """Run a data set's prepare.py as a user does; its exit code, stdout and stderr."""
    script = str(ROOT / "data" / set_name / "prepare.py")
    done = subprocess.run([sys.executable, script, *options], cwd=cwd, capture_output=True,
                          text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


# -- shakespeare_char ----------------------------------------------------------------


@needs_text
def test_tiny_shakespeare_has_its_counts(tmp_path, closed_network, capsys):
    shakespeare_char.main(TEXT, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "length of dataset in characters: 1,115,394", "vocab size: 65",
        "train has 1,003,854 tokens", "val has 111,540 tokens",
    ]
    train, val = (np.fromfile(tmp_path / f"{split}.bin", np.uint16) for split in ("train", "val"))
    assert (len(train), len(val)) == (1_003_854, 111_540)
    tokenizer = load_tokenizer(read_meta(tmp_path))
    assert tokenizer.decode(np.concatenate([train, val]).tolist()) == TEXT.read_text()
    assert pickle.loads((tmp_path / "meta.pkl").read_bytes())["stoi"]["z"] == 64


def test_any_text_goes_and_gives_the_same_files_each_time(tmp_path, closed_network):
    (tmp_path / "mine.txt").write_bytes("日本語\r\nétude 🙂\n".encode())
    for out in ("a", "b"):
        shakespeare_char.main(tmp_path / "mine.txt", tmp_path / out)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    ids = [i for split in ("train", "val")
           for i in np.fromfile(tmp_path / "a" / f"{split}.bin", np.uint16).tolist()]
    assert load_tokenizer(read_meta(tmp_path / "a")).decode(ids) == "日本語\r\nétude 🙂\n"


@pytest.mark.parametrize("content, says", [(None, "no such file"), (b"", "holds no text"),
                                           (b"ab\xff", "not UTF-8 at byte 2")])
def test_a_bad_input_is_one_line_and_exit_code_2(tmp_path, content, says):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    code, _, errors = run("shakespeare_char", "--input=in.txt", "--out=out", cwd=tmp_path)
    assert code == 2 and says in errors and errors.count("\n") == 1 and "in.txt" in errors
    assert not (tmp_path / "out").exists()


class Answer:
    """Stands for urlopen: answers with `content`, or raises it if it is an error."""

    def __init__(self, content):
        self.content = content

    def __call__(self, url, timeout):
        if isinstance(self.content, Exception):
            raise self.content
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self):
        return self.content


@pytest.mark.parametrize("answer, says", [
    (small.urllib.error.URLError("no route"), r"cannot be had \(no route\)"),
    (TimeoutError("timed out"), r"cannot be had \(timed out\)"),
    (b"404: Not Found", "14 bytes with the wrong SHA-256"),
])
def test_without_text_and_network_nothing_is_written(tmp_path, monkeypatch, answer, says):
    monkeypatch.setattr(small.urllib.request, "urlopen", Answer(answer))
    with pytest.raises(ValueError, match=f"{says}.*give"):
        shakespeare_char.main(None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_downloaded_once_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "_TINY_SHAKESPEARE_SHA256", hashlib.sha256(b"to be\n").hexdigest())
    monkeypatch.setattr(small.urllib.request, "urlopen", Answer(b"to be\n"))
    shakespeare_char.main(None, tmp_path)
    first = contents(tmp_path)
    monkeypatch.setattr(small.urllib.request, "urlopen", Answer(OSError("unplugged")))
    shakespeare_char.main(None, tmp_path)
    assert contents(tmp_path) == first and first["input.txt"] == b"to be\n"


# -- GPT-2's tokens ------------------------------------------------------------------


@needs_text
def test_tiny_shakespeare_has_its_counts_in_gpt2s_tokens(tmp_path, closed_network, capsys):
    shakespeare.main(TEXT, tmp_path)
    assert "train has 301,966 tokens\nval has 36,059 tokens" in capsys.readouterr().out
    tokenizer = load_tokenizer(read_meta(tmp_path))
    ids = [i for split in ("train", "val")
           for i in np.fromfile(tmp_path / f"{split}.bin", np.uint16).tolist()]
    assert tokenizer.decode(ids) == TEXT.read_text()


@pytest.fixture
def four_documents(tmp_path):
    """A parquet file of four documents; returns the ids of each."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["One document.", "", "Zwei: <|endoftext|> 東京\n\n",
             "and   a fourth one, somewhat longer than the others " * 9]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "four.parquet")
    return [[*gpt2_encoding().encode_ordinary(text), END_OF_TEXT] for text in texts]


@pytest.mark.parametrize("set_name", ["openwebtext", "fineweb", "text"])
def test_four_documents_of_a_local_parquet_are_enough(tmp_path, four_documents, set_name):
    code, out, errors = run(set_name, "--input=four.parquet", "--out=out", cwd=tmp_path)
    assert code == 0 and "4 documents, 1 of them empty" in out and "documents/s" in errors, errors
    train, val = (tokens_of(tmp_path / "out", split) for split in ("train", "val"))
    if set_name == "fineweb":
        assert val + train == [i for ids in four_documents for i in ids]
    else:
        is_val = validation_documents(4, 0.0005)
        assert val == four_documents[is_val.argmax()]
        assert train == [i for ids, held_out in zip(four_documents, is_val) if not held_out
                         for i in ids]


@pytest.mark.parametrize("options, says", [
    ([], "give either --input"),
    (["--input=a.txt", "--hub=x"], "give either --input"),
    (["--input=a.txt"], "a.txt: no such file"),
    (["--input=.", "--val_fraction=1.5"], "val_fraction=1.5: must be between"),
])
def test_wrong_options_are_one_line_and_exit_code_2(tmp_path, options, says):
    code, _, errors = run("text", *options, "--out=out", cwd=tmp_path)
    assert code == 2 and says in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- python_stdlib -------------------------------------------------------------------


def test_the_standard_library_becomes_bytes_and_a_second_call_reuses_them(tmp_path):
    code, out, errors = run("python_stdlib", "--out=std", cwd=tmp_path)
    assert code == 0, errors
    assert "vocab size: 256" in out and "train has " in out and "val has " in out
    first = contents(tmp_path / "std")
    assert set(first) == {"train.bin", "val.bin", "meta.json", "manifest.json"}
    train, val = (open_split(tmp_path / "std", split) for split in ("train", "val"))
    assert len(train) > 5_000_000 and 0.02 < len(val) / len(train) < 0.12
    assert load_tokenizer(read_meta(tmp_path / "std")).vocab_size == 256
    command = [sys.executable, "-m", "data.python_stdlib.prepare", "--out=std"]
    again = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert "already made" in again.stdout and again.stdout.count("\n") == 1, again.stderr
    assert contents(tmp_path / "std") == first


TAKEN = [f"m{i}.py" for i in range(38)] + ["json/a.py", "json/b.py"]


@pytest.fixture
def little_library(tmp_path, monkeypatch):
    """A standard library of the 40 files TAKEN, and some that must not be taken."""
    library = tmp_path / "lib"
    others = ["test/t.py", "json/tests/t.py", "x.txt", "_sysconfigdata_x.py", "site-packages/s.py",
              "__pycache__/c.py"]
    for name in [*TAKEN, *others]:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(f"# {name} \xff\n".encode("latin-1"))
    monkeypatch.setattr(python_stdlib.sysconfig, "get_path", lambda _: str(library))
    return library


def test_every_file_is_in_one_split(little_library, tmp_path):
    python_stdlib.main(tmp_path / "out")
    for split in ("train", "val"):
        names = [name for name in sorted(TAKEN)
                 if python_stdlib.is_validation(name) == (split == "val")]
        assert names
        expected = b"".join(f"# {name} \xff\n".encode("latin-1") for name in names)
        assert bytes(tokens_of(tmp_path / "out", split)) == expected


def test_the_standard_library_in_gpt2s_tokens(little_library, tmp_path):
    python_stdlib_bpe.main(tmp_path / "out")
    for split in ("train", "val"):
        wanted = []
        for name in sorted(TAKEN):
            if python_stdlib.is_validation(name) == (split == "val"):
                text = f"# {name} \N{REPLACEMENT CHARACTER}\n"
                wanted += [*gpt2_encoding().encode_ordinary(text), END_OF_TEXT]
        assert list(tokens_of(tmp_path / "out", split)) == wanted
    assert load_tokenizer(read_meta(tmp_path / "out")).vocab_size == 50_257


def test_a_changed_source_or_output_is_made_again(little_library, tmp_path, capsys):
    out = tmp_path / "out"
    python_stdlib.main(out)
    first = contents(out)
    (out / "val.bin").write_bytes(b"changed")
    python_stdlib.main(out)
    assert contents(out) == first and "already made" not in capsys.readouterr().out
    (little_library / "m1.py").write_text("# other\n")
    python_stdlib.main(out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert contents(out) != first and manifest["source"]["files"] == 40


def test_a_set_that_was_not_finished_is_not_taken_for_whole(little_library, tmp_path, monkeypatch):
    """A second preparation that is killed between two files leaves old and new files together."""
    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    python_stdlib.main(out)
    (little_library / "m1.py").write_text("# other\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(small, "write_meta", interrupt)
        python_stdlib.main(out)
    with pytest.raises(ValueError, match="its preparation is not finished"):
        open_split(out, "train")
    python_stdlib.main(out)
    assert len(open_split(out, "train"))
    assert set(contents(out)) == {"train.bin", "val.bin", "meta.json", "manifest.json"}


def test_a_python_without_its_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(python_stdlib.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match=r"only 0 \.py files"):
        python_stdlib.main(tmp_path / "out")
