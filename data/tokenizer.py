"""Text to token ids and back: bytes, the characters of a data set, or GPT-2's byte-pair encoding.

The meta.json of a data set says which: {"kind": "bytes" | "char" | "gpt2", "vocab_size": n} and for
"char" also "chars", the characters in the order of their ids. Without a meta.json nanoGPT's
meta.pkl is read; without either the tokenizer is GPT-2's.
"""

import codecs
import io
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from common.bounds import Must, Positive
from common.files import atomic_write, check_json, read_json, regular_file, write_json
from data.gpt2 import END_OF_TEXT, VOCAB_SIZE, gpt2_encoding


def _are_distinct(chars: str) -> bool:
    # JSON can hold half a surrogate pair, which is not a character.
    return len(set(chars)) == len(chars) and not any("\ud800" <= char <= "\udfff" for char in chars)


class Meta(TypedDict):
    """Describes a tokenizer: the content of meta.json, and of a checkpoint's tokenizer.json."""

    kind: Annotated[str, Must("be bytes, char or gpt2", ("bytes", "char", "gpt2").__contains__)]
    vocab_size: Positive
    chars: NotRequired[Annotated[str, Must("be characters of UTF-8, each once", _are_distinct)]]


class Tokenizer:
    """The base class: a tokenizer defines `encode`, `decode_bytes` and `vocab_size`."""

    vocab_size: int
    end_of_text: int | None = None  # the id of the end of a document, if there is one

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may start or end within a character."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with U+FFFD for bytes that are no whole character."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> Callable[..., str]:
        """Return a function that takes one id at a time and returns the characters it completes.

        Called at the end without an id, it returns the rest. The pieces, joined, equal `decode` of
        all ids.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def text_of(token: int | None = None) -> str:
            if token is None:
                return decoder.decode(b"", final=True)
            return decoder.decode(self.decode_bytes([token]))

        return text_of


class Bytes(Tokenizer):
    """One id for each byte of the text in UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)


class Char(Tokenizer):
    """One id for each character of `chars`: its index there."""

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


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding. In a text "<|endoftext|>" becomes the one id 50256."""

    vocab_size = VOCAB_SIZE
    end_of_text = END_OF_TEXT

    def encode(self, text: str) -> list[int]:
        return gpt2_encoding().encode(text, allowed_special={"<|endoftext|>"})

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return gpt2_encoding().decode_bytes(list(ids))


def load_tokenizer(meta: Mapping[str, Any] | None, name: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer that `meta`, of a data set or a checkpoint, describes; for None GPT-2's.

    Raises ValueError, beginning with `name`, for a bad `meta`.
    """
    if meta is None:
        return GPT2Tokenizer()
    checked = check_meta(meta, name)
    if checked["kind"] == "char":
        return Char(checked["chars"])
    return Bytes() if checked["kind"] == "bytes" else GPT2Tokenizer()


# -- the meta of a data set ----------------------------------------------------------


def check_meta(meta: Any, name: str) -> dict[str, Any]:
    """Return `meta` if it is a valid Meta. Raises ValueError, beginning with `name`, otherwise."""
    remedy = "it must be what data/SET/prepare.py writes: prepare the data again"
    checked = check_json(meta, Meta, name, remedy)
    kind = checked["kind"]
    ids = {"bytes": 256, "gpt2": VOCAB_SIZE}.get(kind, len(checked.get("chars", "")))
    if checked["vocab_size"] != ids:
        raise ValueError(f"{name}: vocab_size={checked['vocab_size']}, but its kind, {kind}, has "
                         f"{ids} ids; {remedy}")
    return dict(checked)


def read_meta(data_dir: str | Path) -> dict[str, Any] | None:
    """The Meta in `data_dir`: from meta.json, else from nanoGPT's meta.pkl, else None.

    Raises ValueError for a bad file.
    """
    path, pickled = Path(data_dir) / "meta.json", Path(data_dir) / "meta.pkl"
    if os.path.lexists(path):
        return check_meta(read_json(path, dict[str, Any], "prepare the data again"), str(path))
    if os.path.lexists(pickled):
        return check_meta(_read_pickle(pickled), str(pickled))
    return None


# The opcodes of dicts, texts and integers. Tuples are left out: a dict key of forty nested tuples,
# each holding the one below twice, would take years to hash.
_OPCODES = (pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.EMPTY_DICT, pickle.DICT,
            pickle.SETITEM, pickle.SETITEMS, pickle.UNICODE, pickle.SHORT_BINUNICODE,
            pickle.BINUNICODE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2,
            pickle.LONG, pickle.LONG1, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.GET,
            pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL)


class _PlainUnpickler(pickle._Unpickler):
    """Unpickles dicts, texts and integers, and imports nothing, so no code of the file can run.

    The base class is the one written in Python: the one in C allocates as much memory as the number
    in a PUT opcode says.
    """

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def _read_pickle(path: Path) -> dict[str, Any]:
    """Read nanoGPT's meta.pkl, {"vocab_size": n, "itos": {id: character}, ...}, as a Meta."""
    try:
        file = io.BytesIO(regular_file(path, "prepare the data again").read_bytes())
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
    """Write meta.json, and for kind "char" also the meta.pkl that nanoGPT's sample.py reads."""
    meta: dict[str, Any] = {"kind": kind, "vocab_size": vocab_size}
    if kind == "char":
        meta["chars"] = "".join(chars)
        itos = dict(enumerate(meta["chars"]))
        with atomic_write(Path(data_dir) / "meta.pkl") as file:
            pickle.dump({"vocab_size": vocab_size, "itos": itos,
                         "stoi": {c: i for i, c in itos.items()}}, file)
    write_json(Path(data_dir) / "meta.json", meta)
