"""MB/s of text preparation beside tiktoken's own batch encoder, on the same text and cores.

    python bench/steps/tokenizing.py --text=FILE

`prepare` reads the text from the disk, encodes it, and writes ids, checksums and manifest; tiktoken
encodes a list of documents that is already in memory, with one thread per core. The ids must be
equal before anything is timed; then the two run in turns.
"""

import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from common import cli
from common.bounds import NotEmpty, Positive, Processes
from data.encode import Validation, prepare
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
    """Check, time in turns, print, write. Raises ValueError where the ids differ."""
    # here: the workers of `prepare` import this file, and not torch
    from bench.timing import environment, measure, write_result

    if not Path(options.text).is_file():
        raise ValueError(f"--text={options.text}: no such file; name one of a few MB")
    once = Path(options.text).read_text(encoding="utf-8")
    documents = [once] * max(1, round(options.megabytes * 1e6 / len(once.encode())))
    encoding, megabytes = gpt2_encoding(), len("".join(documents).encode()) / 1e6
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        preparation = Preparation(Path(folder), documents, options.workers, null)
        expected = np.array([*encoding.encode_ordinary(once), END_OF_TEXT])
        if not np.array_equal(preparation.ids(), np.tile(expected, len(documents))):
            raise ValueError("prepare's ids are not tiktoken's; not timed")

        def tiktoken() -> None:
            encoding.encode_ordinary_batch(documents, num_threads=options.workers)

        timings = measure({"prepare": preparation.run, "tiktoken": tiktoken}, device="cpu",
                          warmup=0, repeats=options.repeats)
    speeds = {name: megabytes / timing.median_ms * 1e3 for name, timing in timings.items()}
    for name, speed in speeds.items():
        print(f"{name:10} {speed:6.2f} MB/s   prepare is {speeds['prepare'] / speed:.2f} x this")
    result = {"benchmark": "tokenizing", "environment": environment(), "megabytes": megabytes,
              "workers": options.workers,
              "variants": {n: {"time": t.as_json(), "megabytes_per_s": speeds[n]}
                           for n, t in timings.items()}}
    write_result(options.out, result)
    return result


class Preparation:
    """The documents as files in a folder; each `run` prepares them into a new one."""

    def __init__(self, folder: Path, documents: list[str], workers: int, output: TextIO) -> None:
        self.folder, self.workers, self.output, self.runs = folder, workers, output, 0
        (folder / "texts").mkdir()
        for number, document in enumerate(documents):
            (folder / "texts" / f"{number:05}.txt").write_text(document, encoding="utf-8")

    def run(self) -> None:
        with redirect_stdout(self.output), redirect_stderr(self.output):
            prepare(Files(str(self.folder / "texts")), Validation(tokens=1),
                    self.folder / f"out-{self.runs}", name="text", workers=self.workers)
        self.runs += 1

    def ids(self) -> np.ndarray:
        """The ids that a first run makes."""
        self.run()
        made = self.folder / "out-0"
        return np.concatenate([np.fromfile(made / f"{split}.bin", DTYPE)
                               for split in ("val", "train")])


if __name__ == "__main__":
    sys.exit(cli.run(main, Options))
