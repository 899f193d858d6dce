"""Documents from files and Hub data sets, read one after another in constant memory.

A document comes in pieces of about a million characters, so that one of any size fits into memory
and keeps all cores busy. Pieces end where GPT-2's pattern always ends a word. So the ids of the
pieces, joined, are the ids of the document.
"""

import codecs
import glob
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from common.files import regular_file
from data.manifest import fingerprint

_PIECE_CHARACTERS = 1 << 20
_BATCH_ROWS = 256  # rows of parquet that are read together
# No alternative of GPT-2's pattern matches whitespace after a character that is not, and none looks
# back. So a cut before such whitespace changes no id.
_CUT = re.compile(r"(?<=\S)[ \n]")


class Source(Protocol):
    """Where documents come from."""

    documents: int | None  # their number, or None if it is not known in advance
    text_bytes: int | None  # the rough size of the text, or None

    def describe(self) -> dict[str, Any]:
        """The manifest's entry for this source. Equal documents give equal entries."""
        ...

    def read(self, start: int) -> Iterator[Iterator[str]]:
        """The documents from number `start` on, each as its pieces: one or more, maybe empty."""
        ...


def in_pieces(blocks: Iterator[str]) -> Iterator[str]:
    """Cut the text of `blocks` into pieces whose ids, joined, are the ids of the whole text."""
    buffer, searched = "", _PIECE_CHARACTERS  # no cut in the first `searched` characters
    for block in blocks:
        buffer, begin = buffer + block, 0
        while cut := _CUT.search(buffer, begin + searched):
            yield buffer[begin : cut.start()]
            begin, searched = cut.start(), _PIECE_CHARACTERS
        buffer = buffer[begin:]
        searched = max(_PIECE_CHARACTERS, len(buffer))
    yield buffer


# -- files ---------------------------------------------------------------------------


class Files:
    """The documents in text, JSON Lines, parquet and arrow files, in the order of their paths.

    `pattern` is a file, a folder (all such files in it and below) or a glob pattern. A text file
    is one document. In the other kinds each row is one, in `column`. Raises ValueError for a file
    that is absent, damaged or of another kind.
    """

    def __init__(self, pattern: str, column: str = "text") -> None:
        self.column = column
        self._parts = [_READERS[path.suffix](path, column) for path in _find_files(pattern)]
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
        """If there is a single text file, make two documents of it; return whether there is.

        The second document is about the last `fraction` of the text, from the start of a line.
        """
        text = self._parts[0]
        if len(self._parts) > 1 or not isinstance(text, _TextFile):
            return False
        cut = text.cut_near(int(text.text_bytes * (1 - fraction)))
        self._parts = [_TextFile(text.path, end=cut), _TextFile(text.path, start=cut)]
        self.documents = 2
        return True


def _find_files(pattern: str) -> list[Path]:
    path, endings = Path(pattern), ", ".join(_READERS)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*"))
                 if file.suffix in _READERS and file.is_file()]
    else:
        files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not files:
        raise ValueError(f"{pattern}: no such file, and no folder or pattern with {endings} files "
                         "in it")
    for file in files:
        if file.suffix not in _READERS:
            raise ValueError(f"{file}: of no known kind; the name must end in one of {endings}")
    return [regular_file(file, "leave it out of --input") for file in files]


class _TextFile:
    """One document: a UTF-8 text file, or its bytes from `start` to `end`; line ends are kept."""

    documents = 1

    def __init__(self, path: Path, column: str = "", *, start: int = 0,
                 end: int | None = None) -> None:
        self.path, self._start = path, start
        self._end = path.stat().st_size if end is None else end
        self.text_bytes = self._end - start

    def read(self, start: int) -> Iterator[Iterator[str]]:
        yield in_pieces(self._blocks())

    def _blocks(self) -> Iterator[str]:
        """The text in blocks of up to a million bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(self.path, "rb") as file:
            file.seek(self._start)
            while (position := file.tell()) < self._end:
                block = file.read(min(_PIECE_CHARACTERS, self._end - position))
                if not block:
                    raise ValueError(f"{self.path}: cut short while it was read")
                pending = len(decoder.getstate()[0])
                try:
                    yield decoder.decode(block, final=file.tell() >= self._end)
                except UnicodeDecodeError as error:
                    byte = position - pending + error.start
                    raise ValueError(f"{self.path}: not UTF-8 at byte {byte:,}; convert it, e.g. "
                                     "with iconv -t utf-8") from None

    def cut_near(self, position: int) -> int:
        """The start of the next line after the byte `position`; in the last line, of a character.

        The result never lies inside a character, whose later bytes are 0b10xxxxxx in UTF-8.
        """
        with open(self.path, "rb") as file:
            file.seek(position)
            next_line = position + len(file.readline())
            if next_line < self._end:
                return next_line
            file.seek(position)
            starts = (i for i, byte in enumerate(file.read(4)) if byte & 0xC0 != 0x80)
            return position + next(starts, 0)


class _JsonLines:
    """A JSON object per line, with the document under the key `column`. Blank lines are skipped."""

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
                raise ValueError(f"{self.path}: line {number:,} is not UTF-8 "
                                 f"JSON ({error})") from None
            text = row.get(self._column) if isinstance(row, dict) else None
            if not isinstance(text, str):
                columns = ", ".join(row) if isinstance(row, dict) else "none"
                raise ValueError(f"{self.path}: line {number:,} has no text in {self._column!r}; "
                                 f"its columns: {columns}; name one with --column")
            yield in_pieces(iter([text]))


class _Table:
    """What parquet and arrow files share: batches of rows, with the documents in one column."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self._column = path, column

    def _texts(self, column: Any, first: int) -> Iterator[Iterator[str]]:
        """The documents in `column`, whose first row is number `first` in the file."""
        for i, value in enumerate(column):
            try:
                text = value.as_py()
            except UnicodeDecodeError:
                raise ValueError(f"{self.path}: row {first + i:,} is not UTF-8") from None
            if text is None:
                raise ValueError(f"{self.path}: row {first + i:,} has no text in "
                                 f"{self._column!r} (null)")
            yield in_pieces(iter([text]))

    def _check(self, schema: Any) -> None:
        """Raise ValueError unless the column is there and holds text."""
        kind = str(schema.field(self._column).type) if self._column in schema.names else "absent"
        if kind not in ("string", "large_string", "string_view"):
            raise ValueError(f"{self.path}: the column {self._column!r} is {kind}, not text; its "
                             f"columns: {', '.join(schema.names)}; name one with --column")


class _Parquet(_Table):
    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path, column)
        with self._open() as file:
            self._check(file.schema_arrow)
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            self._rows = [group.num_rows for group in groups]
            index = next(i for i in range(file.metadata.num_columns)
                         if file.schema.column(i).path == column)
            self.text_bytes = sum(group.column(index).total_uncompressed_size for group in groups)
            self.documents = sum(self._rows)

    def _open(self) -> Any:
        pyarrow = _pyarrow()
        from pyarrow import parquet

        try:  # with a buffer, since without one a whole row group is read into memory
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
        """The documents of a row group that begins at number `row`, without its first `skipped`."""
        try:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self._column],
                                           use_threads=False):
                yield from self._texts(batch.column(0)[skipped:], row + min(skipped, len(batch)))
                row, skipped = row + len(batch), max(0, skipped - len(batch))
        except (_pyarrow().ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path}: damaged after row {row:,} ({_first_line(error)}); get "
                             "it again") from None


class _Arrow(_Table):
    """Arrow's IPC format: as a stream, which the package datasets writes, or as a file."""

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path, column)
        self.text_bytes = path.stat().st_size
        self.documents = sum(len(batch) for batch in self._batches())

    def _batches(self) -> Iterator[Any]:
        pyarrow = _pyarrow()
        try:  # not as a memory map, whose pages would count as this process's memory
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


_READERS: dict[str, Any] = {".txt": _TextFile, ".jsonl": _JsonLines, ".ndjson": _JsonLines,
                            ".parquet": _Parquet, ".arrow": _Arrow}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError("parquet and arrow files need the package pyarrow; pip install "
                         "pyarrow") from None
    return pyarrow


# -- the Hub -------------------------------------------------------------------------


class Hub:
    """The documents in `column` of a split of a Hugging Face data set, streamed, never a script.

    `documents` is the number that the data set must have, if it is given. The revision is resolved
    to a commit, which goes into the manifest, so a resumed preparation reads the same commit.
    """

    text_bytes: int | None = None

    def __init__(self, name: str, config: str | None = None, *, split: str = "train",
                 column: str = "text", revision: str = "main",
                 documents: int | None = None) -> None:
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
        info = (builder.info.splits or {}).get(split)
        self.documents = documents or (info.num_examples if info else None)
        self._commit = HfApi().dataset_info(name, revision=revision).sha
        self._name, self._config, self._split, self._column = name, config, split, column

    def describe(self) -> dict[str, Any]:
        return {"hub": self._name, "config": self._config, "split": self._split,
                "revision": self._commit, "column": self._column, "documents": self.documents}

    def read(self, start: int) -> Iterator[Iterator[str]]:
        import datasets

        rows = datasets.load_dataset(self._name, self._config, split=self._split,
                                     revision=self._commit, streaming=True)
        for number, row in enumerate(rows.skip(start), start):
            text = row.get(self._column)
            if not isinstance(text, str):
                raise ValueError(f"{self._name}: row {number:,} has no text in {self._column!r}; "
                                 f"its columns: {', '.join(row)}; name one with --column")
            yield in_pieces(iter([text]))
