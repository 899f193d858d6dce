"""OpenWebText, an open copy of GPT-2's training text, in GPT-2's tokens with nanoGPT's split."""

import sys
from pathlib import Path

from common.bounds import NotEmpty, Positive
from common.cli import run
from data.encode import Format, Validation, Workers, prepare
from data.sources import Files, Hub, Source

DOCUMENTS = 8_013_769
VALIDATION = 0.0005


def main(input: str = "", out: Path = Path(__file__).parent, *, column: NotEmpty = "text",
         revision: NotEmpty = "refs/convert/parquet", format: Format = "raw",
         shard_tokens: Positive = 100_000_000, workers: Workers = 0) -> None:
    """Write the token files, meta.json and manifest.json. After a kill the same command resumes.

    Args:
        input: a file, folder or pattern of parquet, arrow, jsonl or txt files; by default the data
            set is streamed from the Hub
        out: the folder to write to
        column: the column that holds the text
        revision: the revision of the data set on the Hub; the default is its conversion to parquet,
            which needs no script
        format: raw for nanoGPT's train.bin and val.bin, shards for files with llm.c's header
        shard_tokens: the number of tokens in a shard
        workers: the number of processes that encode; 0 for one per core
    """
    source: Source
    if input:
        source = Files(input, column)
    else:
        source = Hub("Skylion007/openwebtext", column=column, revision=revision,
                     documents=DOCUMENTS)
    prepare(source, Validation(fraction=VALIDATION), out, name="openwebtext", format=format,
            shard_tokens=shard_tokens, workers=workers)


if __name__ == "__main__":
    sys.exit(run(main))
