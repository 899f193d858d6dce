"""Tiny Shakespeare in GPT-2's tokens, for fine-tuning, split as in nanoGPT."""

import hashlib
import sys
from pathlib import Path

from common.cli import run
from data.gpt2 import VOCAB_SIZE, encode_ordinary
from data.small import tiny_shakespeare, write_dataset


def main(input: Path | None = None, out: Path = Path(__file__).parent) -> None:
    """Write train.bin (nine tenths of the characters), val.bin, meta.json and manifest.json.

    Args:
        input: any UTF-8 text; by default OUT/input.txt, which is downloaded if it is absent
        out: the folder to write to
    """
    text = tiny_shakespeare(input, out)
    train = len(text) * 9 // 10
    splits = {"train": encode_ordinary(text[:train]), "val": encode_ordinary(text[train:])}
    recipe = {"name": "shakespeare", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_dataset(out, splits, recipe, "gpt2", VOCAB_SIZE)


if __name__ == "__main__":
    sys.exit(run(main))
