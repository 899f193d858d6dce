"""Text to token ids and back: bytes, the characters of a data set, or GPT-2's byte-pair encoding.

Which of them a data set uses is in its meta.json, {"kind": "bytes" | "char" | "gpt2", "vocab_size":
n} and, for "char", "chars": one character per id. nanoGPT's meta.pkl is read where there is no
meta.json; neither means GPT-2's encoding.
"""

import codecs
import io
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from common.bounds import Must, Positive
from common.files import formed, read_json, regular, whole, write_json


def _are_distinct(chars: str) -> bool:
    # JSON can spell half a surrogate pair, which no text has.
    return len(set(chars)) == len(chars) and not any("\ud800" <= char <= "\udfff" for char in chars)


class Meta(TypedDict):
    """Which tokenizer: what meta.json holds, and a checkpoint's tokenizer.json."""

    kind: Annotated[str, Must("be bytes, char or gpt2", ("bytes", "char", "gpt2").__contains__)]
    vocab_size: Positive
    chars: NotRequired[Annotated[str, Must("be characters of UTF-8, each once", _are_distinct)]]


class Tokenizer:
    """What every tokenizer does; a kind of tokenizer has `encode` and `decode_bytes` and knows its
    `vocab_size`."""

    vocab_size: int
    end_of_text: int | None = None  # the id of the end of a document, where there is one

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may begin or end inside a character."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; a byte that belongs to no whole character becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> Callable[..., str]:
        """A function that takes one id after another and returns the text that has become whole
        with it, often none.

        Called without an id at the end, it returns what is left. The pieces joined equal `decode`
        of all ids.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def text_of(token: int | None = None) -> str:
            return decoder.decode(b"",
                                  final=True) if token is None else decoder.decode(
                                      self.decode_bytes([token]))

        return text_of


class Bytes(Tokenizer):
    """One id for each byte of the text's UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)


class Char(Tokenizer):
    """One id for each character of `chars`, by its place there."""

    def __init__(self, chars: str) -> None:
        self.chars = chars
        self.vocab_size = len(chars)
        self._ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[char] for char in text]
        except KeyError as unknown:
            raise ValueError(f"the character {unknown} is none of this data set's "
                             f"{self.vocab_size}; leave it out, or prepare the data with text that "
                             "has it") from None

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(self.chars[i] for i in ids).encode()


class GPT2(Tokenizer):
    """GPT-2's byte-pair encoding. "<|endoftext|>" in a text is the end of a document, id 50256."""

    vocab_size = 50257
    end_of_text = 50256

    @cached_property
    def _encoding(self) -> Any:
        from data.gpt2 import gpt2_encoding

        return gpt2_encoding()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special={"<|endoftext|>"})

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))


def load_tokenizer(meta: Mapping[str, Any] | None, name: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer that `meta` (of `read_meta`, or of a checkpoint) describes; GPT-2's for None.

    Raises ValueError, with `name` as where it comes from, for what describes none.
    """
    if meta is None:
        return GPT2()
    known = check_meta(meta, name)
    if known["kind"] == "char":
        return Char(known["chars"])
    return Bytes() if known["kind"] == "bytes" else GPT2()


# -- the meta of a data set ----------------------------------------------------------


def check_meta(meta: Any, name: str) -> dict[str, Any]:
    """`meta` itself, a Meta. Raises ValueError, beginning with `name`, for what is none."""
    remedy = "it must be what data/SET/prepare.py writes: prepare the data again"
    known = formed(meta, Meta, name, remedy)
    ids = {"bytes": 256, "gpt2": 50257}.get(known["kind"], len(known.get("chars", "")))
    if known["vocab_size"] != ids:
        raise ValueError(f"{name}: vocab_size={known['vocab_size']}, but its kind, "
                         f"{known['kind']}, has {ids} ids; {remedy}")
    return dict(known)


def read_meta(data_dir: str | Path) -> dict[str, Any] | None:
    """What `data_dir` says of its tokens: meta.json, else nanoGPT's meta.pkl as such, else None."""
    path, theirs = Path(data_dir) / "meta.json", Path(data_dir) / "meta.pkl"
    if os.path.lexists(path):
        return check_meta(read_json(path, dict[str, Any], "prepare the data again"), str(path))
    if os.path.lexists(theirs):
        return check_meta(_read_pickle(theirs), str(theirs))
    return None


# What a pickle of dicts, texts and integers is made of. With tuples in it a key of forty of them,
# each holding the last one twice, would take years to hash.
_PLAIN = (pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.EMPTY_DICT, pickle.DICT,
          pickle.SETITEM, pickle.SETITEMS, pickle.UNICODE, pickle.SHORT_BINUNICODE,
          pickle.BINUNICODE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG,
          pickle.LONG1, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.GET, pickle.BINGET,
          pickle.LONG_BINGET, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL)


class _PlainUnpickler(pickle._Unpickler):
    """Reads dicts, text and integers, in Python: C's makes room for any number that a PUT names.

    A pickle runs code only through names that it imports: none is allowed.
    """

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PLAIN}

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def _read_pickle(path: Path) -> dict[str, Any]:
    """nanoGPT's meta.pkl, {"vocab_size": n, "itos": {id: character}, ...}, in meta.json's form."""
    try:
        file = io.BytesIO(regular(path, "prepare the data again").read_bytes())
        content = _PlainUnpickler(file).load()
        chars = [content["itos"][i] for i in range(content["vocab_size"])]
        if not all(isinstance(char, str) and len(char) == 1 for char in chars):
            raise ValueError("an entry of itos is not one character")
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError,
            struct.error) as error:
        raise ValueError(f"{path}: refused, {error!s:.200}; it must be nanoGPT's dict of "
                         "vocab_size, itos and stoi: prepare the data again, or write a "
                         "meta.json") from None
    return {"kind": "char", "vocab_size": len(chars), "chars": "".join(chars)}


def write_meta(data_dir: str | Path, kind: str, vocab_size: int, chars: Iterable[str] = "") -> None:
    """Write meta.json; for kind "char" also the meta.pkl that nanoGPT's own sample.py reads."""
    meta: dict[str, Any] = {"kind": kind, "vocab_size": vocab_size}
    if kind == "char":
        meta["chars"] = "".join(chars)
        itos = dict(enumerate(meta["chars"]))
        with whole(Path(data_dir) / "meta.pkl") as file:
            pickle.dump({"vocab_size": vocab_size, "itos": itos,
                         "stoi": {c: i for i, c in itos.items()}}, file)
    write_json(Path(data_dir) / "meta.json", meta)
