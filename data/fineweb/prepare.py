"""FineWeb's samples in GPT-2's tokens, as shards that llm.c and modded-nanogpt also read."""

import sys
from pathlib import Path

from common.bounds import NonNegative, NotEmpty, Positive
from common.cli import run
from data.encode import Format, Validation, Workers, prepare
from data.sources import Files, Hub, Source

VALIDATION_TOKENS = 100_000_000


def main(input: str = "", out: Path | None = None, *, edu: bool = False,
         sample: NotEmpty = "sample-10BT", column: NotEmpty = "text", revision: NotEmpty = "main",
         format: Format = "shards", shard_tokens: Positive = 100_000_000,
         val_tokens: NonNegative = 0, workers: Workers = 0) -> None:
    """Write the token files, meta.json and manifest.json. After a kill the same command resumes.

    Args:
        input: a file, folder or pattern of parquet, arrow, jsonl or txt files; by default the data
            set is streamed from the Hub
        out: the folder to write to; by default data/fineweb, or data/fineweb_edu with --edu=True
        edu: FineWeb-Edu instead of FineWeb
        sample: the name of the sample on the Hub
        column: the column that holds the text
        revision: the revision of the data set on the Hub
        format: shards for files with llm.c's header, raw for nanoGPT's train.bin and val.bin
        shard_tokens: the number of tokens in a shard
        val_tokens: how many of the first tokens are for validation; 0 for 100 million, as in llm.c,
            or for one per 40 bytes of local text if that is less
        workers: the number of processes that encode; 0 for one per core
    """
    name = "fineweb_edu" if edu else "fineweb"
    hub = "HuggingFaceFW/fineweb-edu" if edu else "HuggingFaceFW/fineweb"
    source: Source
    if input:
        source = Files(input, column)
    else:
        source = Hub(hub, sample, column=column, revision=revision)
    if not val_tokens:
        val_tokens = VALIDATION_TOKENS
        if source.text_bytes is not None:
            val_tokens = min(val_tokens, source.text_bytes // 40 + 1)
    out = out or Path(__file__).parents[1] / name
    prepare(source, Validation(tokens=val_tokens), out, name=name, format=format,
            shard_tokens=shard_tokens, workers=workers)


if __name__ == "__main__":
    sys.exit(run(main))
