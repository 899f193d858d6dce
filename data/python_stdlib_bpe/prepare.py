"""The source of Python's standard library in GPT-2's tokens: a BPE corpus without a network."""

import sys
from pathlib import Path

import numpy as np

from common.cli import run
from data.gpt2 import END_OF_TEXT, VOCAB_SIZE, encode_ordinary
from data.manifest import already_made
from data.python_stdlib.prepare import read_library
from data.small import write_dataset


def encoded(files: list[bytes]) -> np.ndarray:
    """The ids of all files, <|endoftext|> after each; bytes that are not UTF-8 are replaced."""
    end = np.array([END_OF_TEXT], np.uint32)
    return np.concatenate([part for file in files
                           for part in (encode_ordinary(file.decode(errors="replace")), end)])


def main(out: Path = Path(__file__).parent) -> None:
    """Write train.bin, val.bin, meta.json and manifest.json.

    Args:
        out: the folder to write to
    """
    parts, source = read_library()
    recipe = {"name": "python_stdlib_bpe"} | source
    if already_made(out, recipe):
        return
    splits = {split: encoded(files) for split, files in parts.items()}
    write_dataset(out, splits, recipe, "gpt2", VOCAB_SIZE)


if __name__ == "__main__":
    sys.exit(run(main))
