"""Your own text in GPT-2's tokens: txt, jsonl, parquet or arrow files, or a data set of the Hub."""

import sys
from pathlib import Path
from typing import Annotated

from common.bounds import FileName, Must, NonNegative, NotEmpty, Positive
from common.cli import run
from data.encode import Format, Validation, Workers, prepare
from data.sources import Files, Hub, Source

BetweenZeroAndOne = Annotated[float, Must("be between 0 and 1", lambda x: 0 < x < 1)]


def main(input: str = "", out: Path = Path(__file__).parent, *, hub: str = "",
         config: str | None = None, hub_split: NotEmpty = "train", revision: NotEmpty = "main",
         column: NotEmpty = "text", val_fraction: BetweenZeroAndOne = 0.05,
         val_tokens: NonNegative = 0, name: FileName = "text", format: Format = "raw",
         shard_tokens: Positive = 100_000_000, workers: Workers = 0) -> None:
    """Write the token files, meta.json and manifest.json. After a kill the same command resumes.

    Args:
        input: a file, folder or pattern of txt files (each is a document, and a single one is cut
            in two) or of jsonl, parquet or arrow files (each row is a document)
        out: the folder to write to
        hub: the name of a data set on the Hub, instead of files
        config: the configuration of the Hub's data set
        hub_split: the split of the Hub's data set to read
        revision: the revision of the Hub's data set
        column: the column that holds the text
        val_fraction: the share of the documents for validation, drawn with a fixed seed
        val_tokens: how many of the first tokens are for validation, instead of a share
        name: the beginning of the names of shards
        format: raw for nanoGPT's train.bin and val.bin, shards for files with llm.c's header
        shard_tokens: the number of tokens in a shard
        workers: the number of processes that encode; 0 for one per core
    """
    if bool(input) == bool(hub):
        raise ValueError("give either --input=FILE, FOLDER or PATTERN, or --hub=OWNER/NAME")
    source: Source
    was_cut = False
    if input:
        source = files = Files(input, column)
        was_cut = not val_tokens and files.cut_single_text(val_fraction)
    else:
        source = Hub(hub, config, split=hub_split, column=column, revision=revision)
    validation = Validation(fraction=val_fraction, last=was_cut)
    if val_tokens:
        validation = Validation(tokens=val_tokens)
    prepare(source, validation, out, name=name, format=format, shard_tokens=shard_tokens,
            workers=workers)


if __name__ == "__main__":
    sys.exit(run(main))
