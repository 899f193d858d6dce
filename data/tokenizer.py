"""Text to token ids and back: bytes, the characters of a data set, or GPT-2's byte-pair encoding.

Which of them a data set uses is in its meta.json, {"kind": "bytes" | "char" | "gpt2", "vocab_size": n} and, for "char",
"chars": one character per id. nanoGPT's meta.pkl is read where there is no meta.json; neither means GPT-2's encoding.
"""

import codecs
import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data.files import read_json, whole, write_json


class Tokenizer:
    """What every tokenizer does; a kind of tokenizer has `encode` and `decode_bytes` and knows its `vocab_size`."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may begin or end inside a character."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; a byte that belongs to no whole character becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> Callable[..., str]:
        """A function that takes one id after another and returns the text that has become whole with it, often none.

        Called without an id at the end, it returns what is left. The pieces joined equal `decode` of all ids.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def text_of(token: int | None = None) -> str:
            return decoder.decode(b"", final=True) if token is None else decoder.decode(self.decode_bytes([token]))

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
            raise ValueError(f"the character {unknown} is none of this data set's {self.vocab_size}; leave it out, or "
                             "prepare the data with text that has it") from None

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return "".join(self.chars[i] for i in ids).encode()


class GPT2(Tokenizer):
    """GPT-2's byte-pair encoding. "<|endoftext|>" in a text is the end of a document, id 50256."""

    vocab_size = 50257

    @cached_property
    def _encoding(self) -> Any:
        from data.gpt2 import gpt2_encoding

        return gpt2_encoding()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special={"<|endoftext|>"})

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))


def load_tokenizer(meta: dict[str, Any] | None) -> Tokenizer:
    """The tokenizer that `meta` (of `read_meta`, or of a checkpoint) describes; GPT-2's for None."""
    kind = "gpt2" if meta is None else meta.get("kind")
    if kind == "char" and meta:
        return Char(meta["chars"])
    if kind not in ("bytes", "gpt2"):
        raise ValueError(f"meta.json: no such kind of tokenizer: {kind!r}; known are bytes, char and gpt2")
    return Bytes() if kind == "bytes" else GPT2()


# -- the meta of a data set ----------------------------------------------------------


def read_meta(data_dir: str | Path) -> dict[str, Any] | None:
    """What `data_dir` says of its tokens: its meta.json, else nanoGPT's meta.pkl in the same form, else None."""
    folder = Path(data_dir)
    if (folder / "meta.json").exists():
        return read_json(folder / "meta.json", dict[str, Any], "prepare the data again")
    return _read_pickle(folder / "meta.pkl") if (folder / "meta.pkl").exists() else None


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, text and numbers. A pickle runs code only through names that it imports: none is allowed."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def _read_pickle(path: Path) -> dict[str, Any]:
    """nanoGPT's meta.pkl, {"vocab_size": n, "itos": {id: character}, "stoi": {character: id}}, in meta.json's form."""
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file).load()
        chars = [content["itos"][i] for i in range(content["vocab_size"])]
        if not all(isinstance(char, str) and len(char) == 1 for char in chars):
            raise ValueError("an entry of itos is not one character")
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: refused, {error!s:.200}; it must be nanoGPT's dict of vocab_size, itos and stoi: "
                         "prepare the data again, or write a meta.json") from None
    return {"kind": "char", "vocab_size": len(chars), "chars": "".join(chars)}


def write_meta(data_dir: str | Path, kind: str, vocab_size: int, chars: Iterable[str] = "") -> None:
    """Write meta.json; for kind "char" also the meta.pkl that nanoGPT's own sample.py reads."""
    meta: dict[str, Any] = {"kind": kind, "vocab_size": vocab_size}
    if kind == "char":
        meta["chars"] = "".join(chars)
        itos = dict(enumerate(meta["chars"]))
        with whole(Path(data_dir) / "meta.pkl") as file:
            pickle.dump({"vocab_size": vocab_size, "itos": itos, "stoi": {c: i for i, c in itos.items()}}, file)
    write_json(Path(data_dir) / "meta.json", meta)
