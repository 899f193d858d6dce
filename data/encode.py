"""Text to files of GPT-2's token ids, on all cores: the path that every large data set takes.

The main process reads the documents in order, worker processes encode them, about a million
characters at a time, and the main process writes the ids in the order of the documents. So the
files are the same for any number of workers. Progress is saved in unfinished.json every few
seconds: after a kill, the same command resumes there and makes the same files.
"""

import errno
import fcntl
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from common.bounds import Must
from common.files import read_json, write_json
from common.processes import end_with_parent
from data.gpt2 import END_OF_TEXT, VOCAB_SIZE, encode_ordinary
from data.manifest import (
    MANIFEST,
    UNFINISHED,
    Progress,
    SplitEntry,
    SplitProgress,
    already_made,
    listed_files,
    shard_entry,
    start_unfinished,
    write_manifest,
)
from data.shards import SHARD_FILE_NAME, ShardWriter
from data.sources import Source
from data.tokenizer import write_meta
from data.tokens import DTYPE

Format = Literal["raw", "shards"]
# The pool starts all of its workers at once, so the number is bounded.
Workers = Annotated[int, Must("be from 0 to 1024", lambda n: 0 <= n <= 1024)]
_TASK_CHARACTERS = 1 << 20
_COMMIT_SECONDS = 5.0


# -- the split -----------------------------------------------------------------------


def validation_documents(documents: int, fraction: float, seed: int = 2357) -> np.ndarray:
    """Draw the documents of the validation split: (documents,) bool, True for validation.

    They are the rows that `train_test_split(test_size=fraction, seed=seed, shuffle=True)` of the
    package datasets puts into "test". With 0.0005 and 2357 that is nanoGPT's split of OpenWebText.
    Unlike there, both splits keep the order of the documents.
    """
    is_validation = np.zeros(documents, bool)
    shuffled = np.random.default_rng(seed).permutation(documents)
    is_validation[shuffled[: math.ceil(fraction * documents)]] = True
    return is_validation


class Validation(NamedTuple):
    """Which text is for validation: the first `tokens` of all, or a `fraction` of the documents.

    With `last` it is the last document: the second part of a single text that was cut in two.
    """

    fraction: float = 0.0
    tokens: int = 0
    last: bool = False

    def is_validation(self, documents: int | None) -> np.ndarray:
        """(documents,) bool, True for validation; empty if `tokens` decides instead."""
        if self.last:
            return np.arange(documents or 0) == (documents or 0) - 1
        if self.fraction:
            return validation_documents(documents or 0, self.fraction)
        return np.zeros(0, bool)


# -- workers -------------------------------------------------------------------------


class Task(NamedTuple):
    """Text of one split for one worker, and the position in the source behind that text."""

    split: str
    pieces: list[str | None]  # None stands for the end of a document
    documents: int  # whole documents from the start of the source up to there
    begun: int  # pieces of the next document up to there
    empty: int  # documents without text from the start of the source up to there


def _tasks(source: Source, validation: Validation, progress: Progress) -> Iterator[Task]:
    """Cut the text of `source` into tasks of one split each, beginning where `progress` ends."""
    documents, begun, empty = progress["documents"], progress["begun"], progress["empty"]
    is_validation = validation.is_validation(source.documents)
    pieces: list[str | None] = []
    size, task_split = 0, ""
    for document in source.read(documents):
        # A slice: the array is empty where `tokens` decides, and a source may hold more documents
        # than it said.
        name = "val" if is_validation[documents : documents + 1].any() else "train"
        if pieces and name != task_split:
            yield Task(task_split, pieces, documents, begun, empty)
            pieces, size = [], 0
        task_split, characters = name, begun
        for number, piece in enumerate(document):
            if number < begun:
                continue
            if size >= _TASK_CHARACTERS:
                yield Task(task_split, pieces, documents, number, empty)
                pieces, size = [], 0
            pieces.append(piece)
            size, characters = size + len(piece), characters + len(piece)
        pieces.append(None)
        documents, begun, empty = documents + 1, 0, empty + (characters == 0)
    if pieces:
        yield Task(task_split, pieces, documents, begun, empty)


def _encode(pieces: list[str | None]) -> np.ndarray:
    """The ids (n,) uint16 of `pieces`, with END_OF_TEXT for each None."""
    end = np.array([END_OF_TEXT])
    ids = [end if piece is None else encode_ordinary(piece) for piece in pieces]
    return np.concatenate(ids).astype(DTYPE)


Encoded = Generator[tuple[Task, np.ndarray], None, None]


def _encode_in_order(tasks: Iterable[Task], pool: ProcessPoolExecutor | None,
                     max_pending: int) -> Encoded:
    """Yield each task with its ids, in order, while the pool works on up to `max_pending` tasks.

    Without a pool this process encodes them.
    """
    if pool is None:
        yield from ((task, _encode(task.pieces)) for task in tasks)
        return
    pending: deque[tuple[Task, Future[np.ndarray]]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(_encode, task.pieces)))
            if len(pending) >= max_pending:
                oldest, ids = pending.popleft()
                yield oldest, ids.result()
        yield from ((task, ids.result()) for task, ids in pending)
    except BrokenProcessPool:
        raise ChildProcessError("a worker process died, killed perhaps for want of memory; what is "
                                "finished is kept: give the same command again, if need be with "
                                "fewer --workers") from None


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


# -- preparation ---------------------------------------------------------------------


def prepare(source: Source, validation: Validation, out: Path, *, name: str,
            format: Format = "raw", shard_tokens: int = 100_000_000, workers: int = 0) -> None:
    """Encode all documents of `source` for GPT-2, <|endoftext|> after each, into files in `out`.

    `format` "raw" writes train.bin and val.bin, "shards" writes files NAME_SPLIT_000001.bin of
    `shard_tokens` tokens with llm.c's header. meta.json and manifest.json come last. `workers` is
    the number of worker processes, 0 for one per core. Raises ValueError for bad input.
    """
    workers = workers or _cores()
    if validation.fraction and (source.documents or 0) < 2:
        count = "is not known" if source.documents is None else f"is {source.documents}"
        raise ValueError(f"the number of documents {count}: a share of them for validation cannot "
                         "be told; give --val_tokens=N, and the first N tokens are for validation")
    size = shard_tokens if format == "shards" else None
    recipe = {"name": name, "text": source.describe(), "split": validation._asdict(),
              "format": format, "shard_tokens": size}
    with _locked(out), ExitStack() as stack:
        progress = _resume_or_start(out, recipe)
        if progress is None:
            return
        writers = {}
        for part in ("train", "val"):
            written = progress["splits"].get(part, SplitProgress(shards=[], open=0, max_id=0))
            writers[part] = ShardWriter(out, part, name, size, written)
            stack.callback(writers[part].close)
        pool = None
        if workers > 1:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
            stack.callback(pool.shutdown, cancel_futures=True)
        _encode_all(source, validation, out, progress, writers, pool, 2 * workers)
        _finish(out, recipe, progress, writers, pool)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold a lock on the folder `out`, which the system releases even if this process is killed.

    Raises ValueError if another preparation holds it. Turns a full disk into a clear OSError.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another preparation is writing here; wait, or give another "
                             "--out") from None
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(f"{out}: the disk is full; what is finished is kept: make room and give "
                          "the same command again") from None
        raise
    finally:
        os.close(folder)


def _resume_or_start(out: Path, recipe: dict[str, Any]) -> Progress | None:
    """The progress to continue from, or None if the files of this `recipe` are all there.

    Removes the files that were made by another recipe. Raises ValueError if `out` holds .bin files
    that no preparation has made.
    """
    progress = None
    if os.path.lexists(out / UNFINISHED):
        progress = read_json(out / UNFINISHED, Progress, "remove it to start anew")
    if progress and progress["made_from"] == recipe:
        print(f"{out}: going on after {progress['documents']:,} documents")
        return progress
    if progress is None and already_made(out, recipe):
        return None
    outdated = _outdated_files(out, was_unfinished=progress is not None)
    if others := sorted(set(out.glob("*.bin")) - outdated):
        raise ValueError(f"{out}: holds {others[0].name}, which no manifest accounts for; move it "
                         "away, or give another --out")
    if outdated:
        print(f"{out}: removes {len(outdated)} files of an earlier preparation")
    for path in outdated:
        path.unlink(missing_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    return start_unfinished(out, recipe)


def _outdated_files(out: Path, was_unfinished: bool) -> set[Path]:
    """The files of an earlier preparation: those in its manifest, or else with a shard's name."""
    if was_unfinished:
        paths = [path for path in out.iterdir() if SHARD_FILE_NAME.fullmatch(path.name)]
    else:
        paths = [path for path, _ in listed_files(out)]
    return {path for path in paths if os.path.lexists(path) and not path.is_dir()}


def _encode_all(source: Source, validation: Validation, out: Path, progress: Progress,
                writers: dict[str, ShardWriter], pool: ProcessPoolExecutor | None,
                max_pending: int) -> None:
    """Encode and write the rest of the text; save `progress` at each full shard, or every 5 s.

    Raises ValueError if the source has another number of documents, or if a split stays empty.
    """

    def commit() -> None:
        progress["splits"] = {name: writer.commit() for name, writer in writers.items()}
        write_json(out / UNFINISHED, progress)

    committed, shards = time.monotonic(), 0
    bar = tqdm(total=source.documents, initial=progress["documents"], unit=" documents",
               smoothing=0.05)
    tasks = _tasks(source, validation, progress)
    with bar, closing(_encode_in_order(tasks, pool, max_pending)) as encoded:
        for task, ids in encoded:
            still_val = 0  # how many of these ids are among the first `tokens`, for validation
            if task.split == "train":
                still_val = max(0, validation.tokens - writers["val"].tokens)
            writers["val"].write(ids[:still_val])
            writers[task.split].write(ids[still_val:])
            bar.update(task.documents - progress["documents"])
            progress["documents"], progress["begun"] = task.documents, task.begun
            progress["empty"] = task.empty
            full = sum(len(writer.shards) for writer in writers.values())
            if full > shards or time.monotonic() - committed > _COMMIT_SECONDS:
                commit()
                committed, shards = time.monotonic(), full
    commit()
    if source.documents not in (None, progress["documents"]):
        raise ValueError(f"{progress['documents']:,} documents came, where there should be "
                         f"{source.documents:,}; the source changed or was not whole: remove "
                         f"{out / UNFINISHED} and prepare again")
    for name, writer in writers.items():
        if not writer.tokens:
            raise ValueError(f"of {progress['documents']:,} documents none came to the split "
                             f"{name!r}; give more text, or other --val_fraction or --val_tokens")


def _finish(out: Path, recipe: dict[str, Any], progress: Progress,
            writers: dict[str, ShardWriter], pool: ProcessPoolExecutor | None) -> None:
    """Name the last shards, compute all checksums, write meta.json and the manifest, print counts.

    The pool, if there is one, computes the checksums.
    """
    splits: dict[str, SplitEntry] = {}
    for name, writer in writers.items():
        writer.finish()
        paths = [writer.path(shard) for shard in range(len(writer.shards))]
        entries = list((pool.map if pool else map)(shard_entry, paths, writer.shards))
        splits[name] = {"tokens": writer.tokens, "max_id": writer.max_id, "shards": entries}
    write_meta(out, "gpt2", VOCAB_SIZE)
    write_manifest(out, recipe, "gpt2", VOCAB_SIZE, splits)
    (out / UNFINISHED).unlink()
    empty = f", {progress['empty']:,} of them empty" if progress["empty"] else ""
    print(f"{progress['documents']:,} documents{empty}")
    for name, writer in writers.items():
        files = len(writer.shards)
        print(f"{name} has {writer.tokens:,} tokens in {files} file{'s' * (files > 1)}")
