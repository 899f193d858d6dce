"""Token files: written atomically, read back in both formats, and a bad file is named."""

import json
import os

import numpy as np
import pytest

from data import manifest, tokens
from data.shards import ShardWriter
from data.tokens import (
    check_vocabulary,
    check_window,
    header_of,
    open_split,
    open_tokens,
    write_tokens,
)


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 65536, 3001).astype(np.uint16)


def all_ids(opened):
    return np.concatenate(list(opened.chunks()))


def write(path, ids, header):
    """A raw file, or one with the header of llm.c's shards."""
    if header:
        path.write_bytes(header_of(len(ids)) + ids.tobytes())
    else:
        assert write_tokens(path, ids) == len(ids)


@pytest.mark.parametrize("header", [False, True], ids=["raw", "header"])
def test_what_is_written_is_read(tmp_path, ids, header):
    write(tmp_path / "a.bin", ids, header)
    opened = open_tokens(tmp_path / "a.bin")
    assert len(opened) == len(ids)
    assert np.array_equal(all_ids(opened), ids)
    windows = opened.read(np.array([0, 2990, 17]), 11)
    assert windows.dtype == np.uint16
    assert np.array_equal(windows, np.stack([ids[:11], ids[-11:], ids[17:28]]))


def test_the_formats_are_those_of_the_other_trainers(tmp_path, ids):
    write_tokens(tmp_path / "raw.bin", ids)
    assert np.array_equal(np.fromfile(tmp_path / "raw.bin", np.uint16), ids)
    writer = ShardWriter(tmp_path, "val", "t", 5000, {"shards": [], "open": 0, "max_id": 0})
    for part in np.array_split(ids, 7):
        writer.write(part)
    writer.finish()
    with open(tmp_path / "t_val_000000.bin", "rb") as file:
        header = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        assert header[:3].tolist() == [20240520, 1, len(ids)] and not header[3:].any()
        assert np.array_equal(np.frombuffer(file.read(), dtype=np.uint16), ids)


@pytest.mark.parametrize("header", [False, True], ids=["raw", "header"])
def test_shards_read_as_one_file(tmp_path, ids, header, monkeypatch):
    for i, part in enumerate(np.split(ids, [5, 5, 1000, 1003])):
        write(tmp_path / f"text_train_{i:06}.bin", part, header)
    write(tmp_path / "text_val_000000.bin", ids[:9], header)
    monkeypatch.setattr(tokens, "_CHUNK_TOKENS", 100)
    for opened in (open_split(tmp_path, "train"), open_tokens(tmp_path / "*train_*.bin")):
        assert np.array_equal(all_ids(opened), ids)
        windows = opened.read(np.arange(len(ids) - 1001), 1002)
        assert np.array_equal(windows, np.lib.stride_tricks.sliding_window_view(ids, 1002))
    assert len(open_split(tmp_path, "val")) == 9


@pytest.mark.parametrize("outside", [65536, -1])
def test_an_id_beyond_16_bits_is_refused_and_nothing_is_left(tmp_path, outside):
    with pytest.raises(ValueError, match=f"id {outside} does not fit"):
        write_tokens(tmp_path / "a.bin", np.array([1, 2, 3, outside]))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, ids, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    write_tokens(tmp_path / "a.bin", ids)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_tokens(tmp_path / "a.bin", ids[:7])
    assert os.listdir(tmp_path) == ["a.bin"]
    assert len(open_tokens(tmp_path / "a.bin")) == len(ids)


def test_an_absent_file_names_the_command_that_makes_it(tmp_path):
    command = r"train.bin.*python data/shakespeare_char/prepare.py --out="
    with pytest.raises(ValueError, match=command):
        open_split(tmp_path / "shakespeare_char", "train")
    with pytest.raises(ValueError, match=r"mine.bin.*data/SET/prepare.py.*shakespeare_char"):
        open_tokens(tmp_path / "mine.bin")


def test_a_folder_with_two_answers_is_refused(tmp_path, ids):
    write_tokens(tmp_path / "train.bin", ids)
    write_tokens(tmp_path / "a_train_000001.bin", ids)
    with pytest.raises(ValueError, match=r"both train\.bin and 1 shards"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("content, says", [
    (b"abc", "3 bytes is no whole number"),
    (header_of(5) + bytes(8), "header says 5 tokens"),
    (np.array([20240520, 2, 4] + [0] * 253, np.int32).tobytes() + bytes(8), "version 2"),
    (np.array([20240801, 7, 4] + [0] * 253, np.int32).tobytes() + bytes(8), "magic 20240801"),
], ids=["odd", "truncated", "version", "magic"])
def test_a_broken_file_is_named(tmp_path, content, says):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.bin.*{says}"):
        open_tokens(tmp_path / "a.bin")


def test_a_shard_without_the_header_of_its_siblings_is_named(tmp_path, ids):
    write(tmp_path / "train_0.bin", ids, header=True)
    write(tmp_path / "train_1.bin", ids, header=False)
    with pytest.raises(ValueError, match=r"train_1\.bin.*magic"):
        open_split(tmp_path, "train")


def test_a_file_cut_short_while_it_is_read_is_named(tmp_path, ids):
    write_tokens(tmp_path / "a.bin", ids)
    opened = open_tokens(tmp_path / "a.bin")
    os.truncate(tmp_path / "a.bin", 100)
    with pytest.raises(ValueError, match=r"a\.bin: cut short"):
        opened.read(np.array([60]), 10)
    with pytest.raises(ValueError, match="no window of 10 tokens at 2992"):
        opened.read(np.array([2992]), 10)


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    write_tokens(tmp_path / "a.bin", np.arange(9))
    check_window(open_tokens(tmp_path / "a.bin"), 8)
    with pytest.raises(ValueError, match=r"a\.bin: holds 9 tokens, .* = 10; lower --block_size"):
        check_window(open_tokens(tmp_path / "a.bin"), 9)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_CHUNK_TOKENS", 10)
    ids = np.zeros(1000, int)
    ids[777] = 65
    write_tokens(tmp_path / "train.bin", ids)
    check_vocabulary(open_tokens(tmp_path / "train.bin"), 66)
    message = r"train\.bin: holds the id 65, the model's vocab_size is 65"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(open_tokens(tmp_path / "train.bin"), 65)


def test_of_a_large_file_the_manifest_tells_the_largest_id(tmp_path, monkeypatch):
    write_tokens(tmp_path / "train.bin", np.arange(1000))
    shard = manifest.shard_entry(tmp_path / "train.bin", 1000)
    splits = {"train": {"tokens": 1000, "max_id": 50256, "shards": [shard]}}
    manifest.write_manifest(tmp_path, {}, "gpt2", 50257, splits)
    monkeypatch.setattr(tokens, "_SCAN_BYTES", 1000)
    with pytest.raises(ValueError, match="the id 50256"):
        check_vocabulary(open_split(tmp_path, "train"), 50000)
    (tmp_path / "manifest.json").unlink()
    check_vocabulary(open_split(tmp_path, "train"), 50000)
    with pytest.raises(ValueError, match="holds the id"):
        check_vocabulary(open_split(tmp_path, "train"), 100)


# -- the manifest --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, ids):
    shards = []
    for i, part in enumerate(np.split(ids, [1000])):
        write_tokens(tmp_path / f"train_{i}.bin", part)
        shards.append(manifest.shard_entry(tmp_path / f"train_{i}.bin", len(part)))
    splits = {"train": {"tokens": 3001, "max_id": 1, "shards": shards}}
    manifest.write_manifest(tmp_path, {"name": "x"}, "gpt2", 50257, splits)
    return tmp_path


@pytest.mark.parametrize("whole_bytes", [1 << 25, 10], ids=["small", "large"])
@pytest.mark.parametrize("full", [False, True])
def test_a_changed_shard_is_named(folder, full, whole_bytes, monkeypatch):
    monkeypatch.setattr(manifest, "_WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(manifest, "_PIECE_BYTES", 100)
    shards = json.loads((folder / "manifest.json").read_text())
    for shard in shards["splits"]["train"]["shards"]:
        shard["sample"] = manifest.fingerprint(folder / shard["file"])
    (folder / "manifest.json").write_text(json.dumps(shards))
    manifest.verify(folder, full=full)
    with open(folder / "train_1.bin", "r+b") as file:
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=r"train_1\.bin: its content"):
        manifest.verify(folder, full=full)


def test_an_absent_or_shorter_shard_is_named(folder):
    os.truncate(folder / "train_0.bin", 1998)
    with pytest.raises(ValueError, match=r"train_0\.bin: 1,998 bytes, manifest.json says 2,000"):
        manifest.verify(folder)
    (folder / "train_0.bin").unlink()
    with pytest.raises(ValueError, match=r"train_0\.bin: no such file; manifest\.json names it"):
        manifest.verify(folder)


def test_a_folder_without_a_manifest_passes_and_a_broken_one_does_not(tmp_path):
    manifest.verify(tmp_path)
    (tmp_path / "manifest.json").write_text('{"splits": ')
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
        manifest.verify(tmp_path)


# -- not a regular file ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["train_0.bin", "manifest.json", "train_1.bin"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_regular_file_is_refused(folder, name, kind):
    """A FIFO in a data folder was waited for, and a link to /dev/zero read without an end."""
    def link_to_device(path):
        path.symlink_to("/dev/zero")

    (folder / name).unlink()
    {"fifo": os.mkfifo, "device": link_to_device, "folder": os.mkdir}[kind](folder / name)
    with pytest.raises(ValueError, match=rf"{name}: no regular file"):
        manifest.verify(folder)
    with pytest.raises(ValueError, match=rf"{name}: no regular file"):
        open_split(folder, "train")
        manifest.read_manifest(folder)


@pytest.mark.parametrize("change", [
    {"splits": []}, {"splits": {"train": []}}, {"vocab_size": 0}, {"source": None},
    {"splits": {"train": {"tokens": -1, "max_id": 0, "shards": []}}},
    {"splits": {"train": {"tokens": 1, "max_id": 65536, "shards": []}}},
    {"splits": {"train": {"tokens": 1, "max_id": 1, "shards": [{"file": "a.bin"}]}}},
    {"splits": {"train": {"tokens": 1, "max_id": 1, "shards": [
        {"file": "a.bin", "tokens": 1, "bytes": 2, "sha256": "no", "sample": "0" * 64}]}}},
])
def test_a_malformed_manifest_is_refused(folder, change):
    """Missing keys and lists for objects ended in tracebacks, and negative counts were taken."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"manifest\.json: .*; remove it, and prepare the data"):
        manifest.verify(folder)
