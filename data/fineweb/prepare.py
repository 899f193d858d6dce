"""FineWeb's samples in GPT-2's tokens, as shards that llm.c and modded-nanogpt read too."""

import sys
from pathlib import Path

from common.bounds import NonNegative, NotEmpty, Positive
from common.cli import run
from data.encode import Format, Split, Workers, prepare
from data.sources import Files, Hub, Source

VALIDATION_TOKENS = 100_000_000


def main(input: str = "", out: Path | None = None, *, edu: bool = False,
         sample: NotEmpty = "sample-10BT", column: NotEmpty = "text", revision: NotEmpty = "main",
         format: Format = "shards", shard_tokens: Positive = 100_000_000,
         val_tokens: NonNegative = 0, workers: Workers = 0) -> None:
    """Write the shards, or train.bin and val.bin, and meta.json and manifest.json. After a kill the
    same command goes on.

    Args:
        input: a file, folder or pattern of parquet, arrow, jsonl or txt files; without it, the
        Hub's data set is streamed
        out: the folder to write to; without it, data/fineweb, or data/fineweb_edu with --edu=True
        edu: FineWeb-Edu instead of FineWeb
        sample: which of the Hub's samples
        column: where the text is in a row
        revision: of the data set on the Hub
        format: shards for files with llm.c's header, raw for nanoGPT's train.bin and val.bin
        shard_tokens: tokens in a shard
        val_tokens: the first so many tokens are for validation; 0 for 100 million, as in llm.c, or
        of local text under
            4 GB a token for every 40 bytes
        workers: processes that encode; 0 for one a core
    """
    name = "fineweb_edu" if edu else "fineweb"
    hub = "HuggingFaceFW/fineweb-edu" if edu else "HuggingFaceFW/fineweb"
    source: Source = Files(input, column) if input else Hub(hub, sample, column=column,
                                                            revision=revision)
    if not val_tokens:
        val_tokens = VALIDATION_TOKENS if source.text_bytes is None else min(VALIDATION_TOKENS,
                                                                             source.text_bytes
                                                                             // 40 + 1)
    prepare(source, Split(tokens=val_tokens), out or Path(__file__).parents[1] / name, name=name,
            format=format,
            shard_tokens=shard_tokens, workers=workers)


if __name__ == "__main__":
    sys.exit(run(main))
