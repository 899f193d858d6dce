"""MB/s of text preparation beside tiktoken's own batch encoder, on the same text and the same
cores, in turns.

    python bench/steps/tokenizing.py --text=FILE

`prepare` reads the text from the disk, encodes it, and writes ids, checksums and manifest; tiktoken
encodes a list of documents that is already in memory, with a thread a core. The ids must be equal
before anything is timed.
"""

import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import cli
from common.bounds import NotEmpty, Positive, Processes
from data.encode import Split, prepare
from data.gpt2 import END_OF_TEXT, gpt2_encoding
from data.sources import Files
from data.tokens import DTYPE


@dataclass(frozen=True)
class Options:
    """Measure text preparation."""

    text: str = ""
    """a text file of at least a few MB; it is repeated up to --megabytes"""
    megabytes: Positive = 64
    workers: Processes = 2
    repeats: Positive = 3
    out: NotEmpty = str(Path(__file__).parents[1] / "results" / "tokenizing.json")


def main(options: Options) -> dict:
    """Check, time in turns, print, write."""
    # here: the workers of `prepare` import this file, and not torch
    from bench.timing import environment, measure, write_result

    if not Path(options.text).is_file():
        raise ValueError(f"--text={options.text}: no such file; name one of a few MB")
    once = Path(options.text).read_text(encoding="utf-8")
    documents = [once] * max(1, round(options.megabytes * 1e6 / len(once.encode())))
    encoding, megabytes = gpt2_encoding(), len("".join(documents).encode()) / 1e6
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        texts = Path(folder) / "texts"
        texts.mkdir()
        for number, document in enumerate(documents):
            (texts / f"{number:05}.txt").write_text(document, encoding="utf-8")
        runs: list[Path] = []

        def ours() -> None:
            runs.append(Path(folder) / f"out-{len(runs)}")
            with redirect_stdout(null), redirect_stderr(null):
                prepare(Files(str(texts)), Split(tokens=1), runs[-1], name="text",
                        workers=options.workers)

        ours()
        ids = np.concatenate([np.fromfile(runs[-1] / f"{split}.bin", DTYPE)
                              for split in ("val", "train")])
        expected = np.array([*encoding.encode_ordinary(once), END_OF_TEXT])
        if not np.array_equal(ids, np.tile(expected, len(documents))):
            raise ValueError("prepare's ids are not tiktoken's; not timed")
        variants = {"prepare": ours,
                    "tiktoken": lambda: encoding.encode_ordinary_batch(documents,
                                                                       num_threads=options.workers)}
        timings = measure(variants, device="cpu", warmup=0, repeats=options.repeats)
    speeds = {name: megabytes / timing.median_ms * 1e3 for name, timing in timings.items()}
    for name, speed in speeds.items():
        print(f"{name:10} {speed:6.2f} MB/s   prepare is {speeds['prepare'] / speed:.2f} x this")
    result = {"benchmark": "tokenizing", "environment": environment(), "megabytes": megabytes,
              "workers": options.workers,
              "variants": {n: {"time": t.as_json(), "megabytes_per_s": speeds[n]}
                           for n, t in timings.items()}}
    write_result(options.out, result)
    return result


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
