"""Documents out of files and Hub data sets, one after another, in memory that does not grow with
their number.

A document comes as pieces of about a million characters, so that one of any size keeps all cores
busy and fits. Pieces end where GPT-2's pattern always ends a word, so that the ids of the pieces
are the ids of the document.
"""

import codecs
import glob
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from common.files import regular
from data.manifest import fingerprint

_PIECE = 1 << 20  # characters
_BATCH = 256  # rows of parquet read at once
# No alternative of GPT-2's pattern goes on from a character that is no whitespace to one that is,
# and none looks back.
_CUT = re.compile(r"(?<=\S)[ \n]")


class Source(Protocol):
    """Where documents come from."""

    documents: int | None  # how many there are, where that is known beforehand
    text_bytes: int | None  # about how much text there is, likewise

    def describe(self) -> dict[str, Any]:
        """What goes into the manifest; equal for equal documents."""
        ...

    def read(self, start: int) -> Iterator[Iterator[str]]:
        """The documents from number `start` on, each as its pieces (one at least, which may be
        empty)."""
        ...


def in_pieces(blocks: Iterator[str]) -> Iterator[str]:
    """The text of `blocks` in pieces that can be encoded each on its own."""
    held, searched = "", _PIECE
    for block in blocks:
        held, begin = held + block, 0
        while cut := _CUT.search(held, begin + searched):
            yield held[begin : cut.start()]
            begin, searched = cut.start(), _PIECE
        held = held[begin:]
        searched = max(_PIECE, len(held))
    yield held


# -- files ---------------------------------------------------------------------------


class Files:
    """The documents in text, JSON-lines, parquet and arrow files, in the order of the files' paths.

    `pattern` names a file, a folder (all files in it and below with a known ending) or many files
    (`*`, `?`, `**`). A text file is one document; in the others each row has one, in `column`.
    """

    def __init__(self, pattern: str, column: str = "text") -> None:
        self.column = column
        self._parts = [_KINDS[path.suffix](path, column) for path in _find(pattern)]
        self.documents: int | None = sum(part.documents for part in self._parts)
        self.text_bytes: int | None = sum(part.text_bytes for part in self._parts)

    def describe(self) -> dict[str, Any]:
        paths = dict.fromkeys(part.path for part in self._parts)
        files = [{"file": path.name, "bytes": path.stat().st_size, "sample": fingerprint(path)}
                 for path in paths]
        return {"files": files, "column": self.column, "documents": self.documents}

    def read(self, start: int) -> Iterator[Iterator[str]]:
        for part in self._parts:
            if start < part.documents:
                yield from part.read(start)
            start = max(0, start - part.documents)

    def cut_single_text(self, fraction: float) -> bool:
        """Make two documents of a text file that is alone, at the first end of a line in its last
        `fraction`."""
        if len(self._parts) > 1 or not isinstance(text := self._parts[0], _Text):
            return False
        border = text.border(int(text.text_bytes * (1 - fraction)))
        self._parts = [_Text(text.path, end=border), _Text(text.path, start=border)]
        self.documents = 2
        return True


def _find(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.suffix in _KINDS
                 and file.is_file()]
    else:
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not found:
        raise ValueError(f"{pattern}: no such file, and no folder or pattern with "
                         f"{', '.join(_KINDS)} files in it")
    for file in found:
        if file.suffix not in _KINDS:
            raise ValueError(f"{file}: of no known kind; the name must end in one of "
                             f"{', '.join(_KINDS)}")
    return [regular(file, "leave it out of --input") for file in found]


class _Text:
    """A UTF-8 text file, or the bytes from `start` to `end` of it: one document, its line ends as
    they are."""

    documents = 1

    def __init__(self, path: Path, column: str = "", *, start: int = 0,
                 end: int | None = None) -> None:
        self.path, self._start = path, start
        self._end = path.stat().st_size if end is None else end
        self.text_bytes = self._end - start

    def read(self, start: int) -> Iterator[Iterator[str]]:
        yield in_pieces(self._blocks())

    def _blocks(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(self.path, "rb") as file:
            file.seek(self._start)
            while (at := file.tell()) < self._end:
                if not (block := file.read(min(_PIECE, self._end - at))):
                    raise ValueError(f"{self.path}: cut short while it was read")
                pending = len(decoder.getstate()[0])
                try:
                    yield decoder.decode(block, final=file.tell() >= self._end)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{self.path}: not UTF-8 at byte "
                                     f"{at - pending + error.start:,}; convert it, e.g. with iconv "
                                     "-t utf-8") from None

    def border(self, position: int) -> int:
        """Where the line that the byte at `position` is in ends; where this is the last one, the
        character it is in."""
        with open(self.path, "rb") as file:
            file.seek(position)
            if (end := position + len(file.readline())) < self._end:
                return end
            file.seek(position)
            return position + next((i for i, byte in enumerate(file.read(4))
                                    if byte & 0xC0 != 0x80), 0)


class _Lines:
    """A file with one JSON object a line, the document in its `column`. Blank lines are none."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self._column = path, column
        self.text_bytes = path.stat().st_size
        self.documents = sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with open(self.path, "rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if not line.isspace())

    def read(self, start: int) -> Iterator[Iterator[str]]:
        for number, line in islice(self._lines(), start, None):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}: line {number:,} is not UTF-8 JSON ({error})") from None
            if not isinstance(row, dict) or not isinstance(text := row.get(self._column), str):
                columns = ", ".join(row) if isinstance(row, dict) else "none"
                raise ValueError(f"{self.path}: line {number:,} has no text in {self._column!r}; "
                                 f"its columns: {columns}; name one with --column")
            yield in_pieces(iter([text]))


class _Rows:
    """What parquet and arrow files share: batches of rows, the document in one column of them."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self._column = path, column

    def _texts(self, column: Any, first: int) -> Iterator[Iterator[str]]:
        """The documents of a column of rows from number `first` on."""
        for i, value in enumerate(column):
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                raise ValueError(f"{self.path}: row {first + i:,} is not UTF-8") from None
            if text is None:
                raise ValueError(f"{self.path}: row {first + i:,} has no text in {self._column!r} "
                                 "(null)")
            yield in_pieces(iter([text]))

    def _check(self, schema: Any) -> None:
        kind = str(schema.field(self._column).type) if self._column in schema.names else "absent"
        if kind not in ("string", "large_string", "string_view"):
            raise ValueError(f"{self.path}: the column {self._column!r} is {kind}, not text; its "
                             f"columns: {', '.join(schema.names)}; name one with --column")


class _Parquet(_Rows):
    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path, column)
        with self._open() as file:
            self._check(file.schema_arrow)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            self._rows = [group.num_rows for group in groups]
            place = next(i for i in range(file.metadata.num_columns)
                         if file.schema.column(i).path == column)
            self.text_bytes = sum(group.column(place).total_uncompressed_size for group in groups)
            self.documents = sum(self._rows)

    def _open(self) -> Any:
        pyarrow = _pyarrow()
        from pyarrow import parquet

        try:  # buffered, so that memory does not depend on how large the file's row groups are
            return parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path}: no whole parquet file ({_first_line(error)}); get it "
                             "again") from None

    def read(self, start: int) -> Iterator[Iterator[str]]:
        with self._open() as file:
            row = 0
            for group, rows in enumerate(self._rows):
                if row + rows > start:
                    yield from self._read_group(file, group, row, max(0, start - row))
                row += rows

    def _read_group(self, file: Any, group: int, row: int, skipped: int) -> Iterator[Iterator[str]]:
        try:
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[self._column],
                                           use_threads=False):
                yield from self._texts(batch.column(0)[skipped:], row + min(skipped, len(batch)))
                row, skipped = row + len(batch), max(0, skipped - len(batch))
        except (_pyarrow().ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path}: damaged after row {row:,} ({_first_line(error)}); get "
                             "it again") from None


class _Arrow(_Rows):
    """Arrow's IPC format, as a stream (what the package datasets writes) or as a file."""

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path, column)
        self.text_bytes = path.stat().st_size
        self.documents = sum(len(batch) for batch in self._batches())

    def _batches(self) -> Iterator[Any]:
        pyarrow = _pyarrow()
        try:  # not mapped into memory: the pages read would count as this process's
            with pyarrow.OSFile(str(self.path)) as file:
                if file.read(6) == b"ARROW1":
                    reader = pyarrow.ipc.open_file(file)
                    batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                else:
                    file.seek(0)
                    reader = batches = pyarrow.ipc.open_stream(file)
                self._check(reader.schema)
                yield from batches
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path}: no whole arrow file ({_first_line(error)}); get it "
                             "again") from None

    def read(self, start: int) -> Iterator[Iterator[str]]:
        row = 0
        for batch in self._batches():
            skipped = min(len(batch), max(0, start - row))
            yield from self._texts(batch.column(self._column)[skipped:], row + skipped)
            row += len(batch)


_KINDS: dict[str, Any] = {".txt": _Text, ".jsonl": _Lines, ".ndjson": _Lines, ".parquet": _Parquet,
                          ".arrow": _Arrow}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            "parquet and arrow files need the package pyarrow; pip install pyarrow") from None
    return pyarrow


# -- the Hub -------------------------------------------------------------------------


class Hub:
    """The documents in `column` of a split of a Hugging Face data set, streamed; scripts are never
    run.

    `documents`, where given, is what the data set must have. The revision is resolved to a commit,
    which the manifest names, and which a resumed preparation asks for again.
    """

    text_bytes: int | None = None

    def __init__(self, name: str, config: str | None = None, *, split: str = "train",
                 column: str = "text",
                 revision: str = "main", documents: int | None = None) -> None:
        try:
            import datasets
            from huggingface_hub import HfApi
        except ImportError:
            raise ValueError("a data set of the Hub needs the package datasets; pip install "
                             "datasets") from None
        try:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
        except (RuntimeError, OSError) as error:  # a script, or no network, or no such data set
            raise ValueError(f"{name}: {_first_line(error)}; try --revision=refs/convert/parquet, "
                             "where the Hub keeps what it converted from scripts, or fetch its "
                             "files and give --input=FOLDER") from None
        known = (builder.info.splits or {}).get(split)
        self.documents = documents or (known.num_examples if known else None)
        self._commit = HfApi().dataset_info(name, revision=revision).sha
        self._name, self._config, self._split, self._column = name, config, split, column

    def describe(self) -> dict[str, Any]:
        return {"hub": self._name, "config": self._config, "split": self._split,
                "revision": self._commit,
                "column": self._column, "documents": self.documents}

    def read(self, start: int) -> Iterator[Iterator[str]]:
        import datasets

        rows = datasets.load_dataset(self._name, self._config, split=self._split,
                                     revision=self._commit, streaming=True)
        for number, row in enumerate(rows.skip(start), start):
            if not isinstance(text := row.get(self._column), str):
                raise ValueError(f"{self._name}: row {number:,} has no text in {self._column!r}; "
                                 f"its columns: {', '.join(row)}; name one with --column")
            yield in_pieces(iter([text]))
