"""Tiny Shakespeare with one id for each character, split as in nanoGPT."""

import hashlib
import sys
from pathlib import Path

import numpy as np

from common.cli import run
from data.small import tiny_shakespeare, write_dataset


def main(input: Path | None = None, out: Path = Path(__file__).parent) -> None:
    """Write train.bin (the first nine tenths), val.bin, meta.json, meta.pkl and manifest.json.

    Args:
        input: any UTF-8 text; by default OUT/input.txt, which is downloaded if it is absent
        out: the folder to write to
    """
    text = tiny_shakespeare(input, out)
    code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    chars, ids = np.unique(code_points, return_inverse=True)
    print(f"length of dataset in characters: {len(ids):,}")
    train = len(ids) * 9 // 10
    recipe = {"name": "shakespeare_char", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_dataset(out, {"train": ids[:train], "val": ids[train:]}, recipe, "char", len(chars),
                  chars.tobytes().decode("utf-32-le"))


if __name__ == "__main__":
    sys.exit(run(main))
