"""OpenWebText in GPT-2's tokens, with nanoGPT's split: what GPT-2 is reproduced on."""

import sys
from pathlib import Path

from common.bounds import NotEmpty, Positive
from common.cli import run
from data.encode import Format, Split, Workers, prepare
from data.sources import Files, Hub, Source

DOCUMENTS = 8_013_769
VALIDATION = 0.0005


def main(input: str = "", out: Path = Path(__file__).parent, *, column: NotEmpty = "text",
         revision: NotEmpty = "refs/convert/parquet", format: Format = "raw",
         shard_tokens: Positive = 100_000_000, workers: Workers = 0) -> None:
    """Write train.bin and val.bin, or shards, and meta.json and manifest.json. After a kill the
    same command goes on.

    Args:
        input: a file, folder or pattern of parquet, arrow, jsonl or txt files; without it, the
        Hub's data set is streamed
        out: the folder to write to
        column: where the text is in a row
        revision: of the data set on the Hub; the default is its conversion to parquet, which needs
        no script
        format: raw for nanoGPT's train.bin and val.bin, shards for files with llm.c's header
        shard_tokens: tokens in a shard
        workers: processes that encode; 0 for one a core
    """
    source: Source = Files(input, column) if input else Hub("Skylion007/openwebtext",
                                                            column=column, revision=revision,
                                                            documents=DOCUMENTS)
    prepare(source, Split(fraction=VALIDATION), out, name="openwebtext", format=format,
            shard_tokens=shard_tokens,
            workers=workers)


if __name__ == "__main__":
    sys.exit(run(main))
