"""Documents from files: each one exactly, from any number on, and a bad file is named."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import sources
from data.gpt2 import encode_ordinary
from data.sources import Files, Hub, in_pieces

DOCUMENTS = ["plain", "", "naïve — 東京 🙂", "two\nlines\r\n", " \t spaces  in   it \n\n\n end",
             "<|endoftext|>", "last " * 99]


def write(folder, kind, documents=tuple(DOCUMENTS), name="d"):
    """Write the documents as one file of `kind`, or as a txt file each; returns the --input."""
    if kind == "txt":
        for i, text in enumerate(documents):
            (folder / f"{name}{i:02}.txt").write_bytes(text.encode())
        return folder
    path = folder / f"{name}.{kind.partition('-')[0]}"
    if kind == "jsonl":
        lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 > 0)
                 for i, text in enumerate(documents)]
        path.write_text("\n\n".join(lines) + "\n")
        return path
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"id": list(range(len(documents))), "text": list(documents)})
    if kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, path, row_group_size=3)
    else:
        new = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def read(source, start=0):
    return ["".join(pieces) for pieces in source.read(start)]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "arrow", "arrow-file"])
def test_each_document_comes_exactly_from_any_number_on(tmp_path, kind, monkeypatch):
    source = Files(str(write(tmp_path, kind)))
    assert source.documents == len(DOCUMENTS) and source.text_bytes
    monkeypatch.setattr(sources, "_BATCH_ROWS", 2)
    for start in range(len(DOCUMENTS) + 1):
        assert read(source, start) == DOCUMENTS[start:]


def test_files_of_all_kinds_are_read_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for kind, name in (("parquet", "b/2"), ("jsonl", "a"), ("arrow", "b/1")):
        write(tmp_path, kind, [name + kind, name], name)
    (tmp_path / "readme.md").write_text("not text of the corpus")
    source = Files(str(tmp_path))
    assert read(source) == ["ajsonl", "a", "b/1arrow", "b/1", "b/2parquet", "b/2"]
    assert read(source, 3) == ["b/1", "b/2parquet", "b/2"]
    assert read(Files(str(tmp_path / "b" / "*.arrow"))) == ["b/1arrow", "b/1"]


def test_a_large_document_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 100)
    text = "Ein Wort, und noch eins. 東京\n" * 200
    for kind in ("txt", "jsonl"):
        (tmp_path / kind).mkdir()
        path = write(tmp_path / kind, kind, [text])
        (pieces,) = [list(document) for document in Files(str(path)).read(0)]
        assert "".join(pieces) == text and len(pieces) > 40 and max(map(len, pieces)) < 250


BLOCKS = st.text(alphabet="ab 1'.\n\t\r\x1c\x85\u00a0\u3000é東🙂st", max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(BLOCKS, min_size=1, max_size=4))
@example(["don't  stop\n\n  now \x1c a", " "])
@example(["!!\x1c \n a", "\u3000 \u00a0 b"])
def test_the_ids_of_the_pieces_are_the_ids_of_the_text(blocks):
    pieces = pieces_of_one_character(blocks)
    assert "".join(pieces) == "".join(blocks)
    apart = np.concatenate([encode_ordinary(piece) for piece in pieces])
    assert np.array_equal(apart, encode_ordinary("".join(blocks)))


def pieces_of_one_character(blocks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_PIECE_CHARACTERS", 1)  # cuts wherever a cut is allowed
        return list(in_pieces(iter(blocks)))


@pytest.mark.parametrize("content, fraction", [
    ("one\ntwo\nthree\nfour\nfive\n" * 40, 0.1), ("東" * 50, 0.1), ("ab", 0.5),
])
def test_a_single_text_is_cut_in_two(tmp_path, content, fraction):
    (tmp_path / "book.txt").write_text(content)
    source = Files(str(tmp_path / "book.txt"))
    assert source.cut_single_text(fraction) and source.documents == 2
    first, last = read(source)
    assert first + last == content and first
    assert 0.5 * fraction <= len(last) / len(content) <= 1.5 * fraction
    assert read(source, 1) == [last] and len(source.describe()["files"]) == 1


def test_what_is_not_a_single_text_is_not_cut(tmp_path):
    assert not Files(str(write(tmp_path, "jsonl", ["a"]))).cut_single_text(0.5)
    assert not Files(str(write(tmp_path, "txt", ["a", "b"]))).cut_single_text(0.5)


# -- bad files --------------------------------------------------------------------------


def fails(pattern, says, column="text"):
    with pytest.raises(ValueError, match=says) as failure:
        read(Files(str(pattern), column))
    assert "\n" not in str(failure.value)


def test_no_file_and_an_unknown_kind(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    fails(tmp_path / "none", "none: no such file")
    fails(tmp_path, r"no folder or pattern with \.txt")
    fails(tmp_path / "a.docx", r"a\.docx: of no known kind; .*\.parquet")


def test_invalid_utf8_is_placed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE_CHARACTERS", 25)
    (tmp_path / "a.txt").write_bytes("東".encode() * 20 + b"\xff" + b"x" * 9)
    fails(tmp_path / "a.txt", r"a\.txt: not UTF-8 at byte 60;")
    (tmp_path / "a.txt").write_bytes(b"x" * 9 + "é".encode()[:1])
    fails(tmp_path / "a.txt", r"a\.txt: not UTF-8 at byte 9;")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    fails(tmp_path / "a.jsonl", r"a\.jsonl: line 2 is not UTF-8 JSON")
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    bad = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", r"a\.parquet: row 1 is not UTF-8")


@pytest.mark.parametrize("line, says", [
    ('{"text": "a', "line 3 is not UTF-8 JSON"),
    ('{"txt": "a"}', "its columns: txt"),
    ('{"text": 7}', "line 3 has no text"),
    ('["a"]', "its columns: none"),
])
def test_a_bad_line_of_json_is_named(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + line)
    fails(tmp_path / "a.jsonl", rf"a\.jsonl: .*{says}")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow-file"])
def test_a_truncated_or_damaged_table_is_named(tmp_path, kind):
    path = write(tmp_path, kind, ["some text " * 50] * 20)
    content = path.read_bytes()
    for end in (0, 5, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:end])
        # A stream without its end mark counts as complete.
        if not (kind == "arrow" and end == len(content) - 3):
            fails(path, path.name)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_wrong_column_or_a_null_is_named(tmp_path, kind):
    path = write(tmp_path, kind)
    fails(path, "the column 'body' is absent, not text; its columns: id, text; name one with "
                "--column", "body")
    fails(path, "the column 'id' is int64, not text", "id")
    fails(write(tmp_path, kind, ["a", "b", None, "c"]), r"row 2 has no text in 'text' \(null\)")


def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(tmp_path / "a.parquet", "pip install pyarrow")


# -- memory -----------------------------------------------------------------------------


MEASURE = """
import re, sys
from data.sources import Files

def size(pattern):
    return sum(len(piece) for pieces in Files(pattern).read(0) for piece in pieces)

def peak_kb():  # not ru_maxrss, which a process takes over from the one that started it
    return int(re.search("VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1])

size(sys.argv[1])  # imports all that reading needs
before = peak_kb()
print(size(sys.argv[2]), peak_kb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "arrow"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    """60 MB of text, in parquet one row group, are read by a process that grows by under 20 MB."""
    words = [f"word{i:07} " * 50 for i in range(100_000)]
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"text": words}), tmp_path / "d.parquet", compression="none",
                            use_dictionary=False)
    else:
        write(tmp_path, kind, ["".join(words)] if kind == "txt" else words)
    (tmp_path / "small").mkdir()
    small = write(tmp_path / "small", kind)
    command = [sys.executable, "-c", MEASURE, small, str(tmp_path / "d*.*")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, grown_kb = map(int, done.stdout.split())
    assert size == 60_000_000 and grown_kb < 20_000


# -- the Hub ----------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake Hub: its only data set is a local parquet file. Returns the list of its requests."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    path, asked = str(write(tmp_path, "parquet")), []
    builder, load = datasets.load_dataset_builder, datasets.load_dataset
    cache = {"data_files": path, "cache_dir": str(tmp_path / "cache")}

    def fake_builder(name, config, *, revision):
        asked.append((name, config, revision))
        if name == "with/script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        return builder("parquet", **cache)

    def fake_load(name, config, *, split, revision, streaming):
        asked.append((name, config, revision))
        return load("parquet", split=split, streaming=streaming, **cache)

    class Api:
        def dataset_info(self, name, revision):
            return type("Info", (), {"sha": "c0ffee"})

    monkeypatch.setattr(datasets, "load_dataset_builder", fake_builder)
    monkeypatch.setattr(datasets, "load_dataset", fake_load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


def test_a_data_set_of_the_hub_is_streamed_from_one_commit(hub):
    source = Hub("some/text", "en", revision="main", documents=7)
    assert read(source) == DOCUMENTS and read(source, 3) == DOCUMENTS[3:]
    assert hub == [("some/text", "en", "main")] + [("some/text", "en", "c0ffee")] * 2
    assert source.describe()["revision"] == "c0ffee" and Hub("some/text").documents is None
    with pytest.raises(ValueError, match="row 0 has no text in 'body'; its columns: id, text"):
        read(Hub("some/text", column="body"))


def test_a_remote_script_is_refused(hub):
    with pytest.raises(ValueError, match=r"no longer supported.*--revision=refs/convert/parquet"):
        Hub("with/script")
