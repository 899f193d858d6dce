"""Text to files of GPT-2's ids, on all cores: the one path that every large data set takes.

The documents are read here, in order; worker processes encode about a million characters at a time;
the ids are written here, in the order of the documents, so that the files do not depend on the
number of workers. How far it got is in unfinished.json, renewed every few seconds: after a kill,
the same command goes on from there to the same files.
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
from data.gpt2 import END_OF_TEXT, encode_ordinary
from data.manifest import NAME as MANIFEST
from data.manifest import (
    UNFINISHED,
    Progress,
    Unfinished,
    already_made,
    files_of,
    shard_entry,
    unfinished,
    write_manifest,
)
from data.manifest import Split as Counts
from data.shards import NAMES, ShardWriter
from data.sources import Source
from data.tokenizer import write_meta
from data.tokens import DTYPE

Format = Literal["raw", "shards"]
Workers = Annotated[int, Must("be from 0 to 1024", lambda n: 0 <= n <= 1024)]  # all are started
_TASK = 1 << 20  # characters
_COMMIT_SECONDS = 5.0


# -- the split -----------------------------------------------------------------------


def validation_documents(documents: int, fraction: float, seed: int = 2357) -> np.ndarray:
    """Which of the documents are the validation split: (documents,) bool.

    The rows that train_test_split(test_size=fraction, seed=seed, shuffle=True) of the package
    datasets gives to "test", which with 0.0005 and 2357 is nanoGPT's split of OpenWebText. Here
    both splits keep the documents' order.
    """
    chosen = np.zeros(documents, bool)
    chosen[np.random.default_rng(seed).permutation(
        documents)[: math.ceil(fraction * documents)]] = True
    return chosen


class Split(NamedTuple):
    """Which text is for validation: the first `tokens` of all, or a `fraction` of the documents.

    With `last`, the last document is: a single text was cut in two, this part of it behind the
    other.
    """

    fraction: float = 0.0
    tokens: int = 0
    last: bool = False

    def documents(self, documents: int | None) -> np.ndarray:
        """Which of so many documents are for validation, bool; none are where `tokens` decides."""
        if self.last:
            return np.arange(documents or 0) == (documents or 0) - 1
        return validation_documents(documents or 0,
                                    self.fraction) if self.fraction else np.zeros(0, bool)


# -- workers -------------------------------------------------------------------------


class Task(NamedTuple):
    """Work for one worker, and where the text has been read to when it is done."""

    split: str
    pieces: list[str | None]  # None is the end of a document
    documents: int  # whole ones, counted from the first
    begun: int  # pieces of the one after them
    empty: int  # documents without text, counted from the first


def _tasks(source: Source, split: Split, start: Unfinished) -> Iterator[Task]:
    """The text of `source` from `start` on (a Task's last three numbers), cut into tasks of one
    split each."""
    documents, begun, empty = start["documents"], start["begun"], start["empty"]
    validation = split.documents(source.documents)
    pieces: list[str | None] = []
    size, now = 0, ""
    for document in source.read(documents):
        kind = "val" if validation[documents : documents + 1].any() else "train"
        if pieces and kind != now:
            yield Task(now, pieces, documents, begun, empty)
            pieces, size = [], 0
        now, characters = kind, begun
        for number, piece in enumerate(document):
            if number < begun:
                continue
            if size >= _TASK:
                yield Task(now, pieces, documents, number, empty)
                pieces, size = [], 0
            pieces.append(piece)
            size, characters = size + len(piece), characters + len(piece)
        pieces.append(None)
        documents, begun, empty = documents + 1, 0, empty + (characters == 0)
    if pieces:
        yield Task(now, pieces, documents, begun, empty)


def _encode(pieces: list[str | None]) -> np.ndarray:
    """The ids (n,) uint16 of `pieces`, END_OF_TEXT for each None."""
    end = np.array([END_OF_TEXT])
    return np.concatenate([end if piece is None else encode_ordinary(piece)
                           for piece in pieces]).astype(DTYPE)


Encoded = Generator[tuple[Task, np.ndarray], None, None]


def _encoded(tasks: Iterable[Task], pool: ProcessPoolExecutor | None, ahead: int) -> Encoded:
    """The tasks in order, with their ids; at most `ahead` of them are under way. Without a pool
    they run here."""
    if pool is None:
        yield from ((task, _encode(task.pieces)) for task in tasks)
        return
    waiting: deque[tuple[Task, Future[np.ndarray]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(_encode, task.pieces)))
            if len(waiting) >= ahead:
                oldest, ids = waiting.popleft()
                yield oldest, ids.result()
        yield from ((task, ids.result()) for task, ids in waiting)
    except BrokenProcessPool:
        raise ChildProcessError("a worker process died, killed perhaps for want of memory; what is "
                                "finished is kept: give the same command again, if need be with "
                                "fewer --workers") from None


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


# -- preparation ---------------------------------------------------------------------


def prepare(source: Source, split: Split, out: Path, *, name: str, format: Format = "raw",
            shard_tokens: int = 100_000_000, workers: int = 0) -> None:
    """Encode every document of `source` with GPT-2's tokenizer, each followed by <|endoftext|>,
    into files in `out`.

    `format` "raw" makes train.bin and val.bin, "shards" files NAME_SPLIT_000001.bin of
    `shard_tokens` each with llm.c's header; meta.json and the manifest come last. `workers` is the
    number of worker processes, 0 for one a core.
    """
    workers = workers or _cores()
    if split.fraction and (source.documents or 0) < 2:
        known = "is not known" if source.documents is None else f"is {source.documents}"
        raise ValueError(f"the number of documents {known}: a share of them for validation cannot "
                         "be told; give --val_tokens=N, and the first N tokens are for validation")
    shard = shard_tokens if format == "shards" else None
    made_from = {"name": name, "text": source.describe(), "split": split._asdict(),
                 "format": format,
                 "shard_tokens": shard}
    with _alone_in(out), ExitStack() as stack:
        state = _begin(out, made_from)
        if state is None:
            return
        writers = {}
        for kind in ("train", "val"):
            begun = state["splits"].get(kind, Progress(shards=[], open=0, max_id=0))
            writers[kind] = ShardWriter(out, kind, name, shard, begun)
            stack.callback(writers[kind].close)
        pool = None
        if workers > 1:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
            stack.callback(pool.shutdown, cancel_futures=True)
        _encode_all(source, split, out, state, writers, pool, 2 * workers)
        _finish(out, made_from, state, writers, pool)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keep a second preparation out of the folder, until this process ends by whatever; say it
    where the disk is full."""
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


def _begin(out: Path, made_from: dict[str, Any]) -> Unfinished | None:
    """Where to go on from; None where all is made. Removes what an earlier preparation made from
    something else."""
    state = None
    if os.path.lexists(out / UNFINISHED):
        state = read_json(out / UNFINISHED, Unfinished, "remove it to start anew")
    if state and state["made_from"] == made_from:
        print(f"{out}: going on after {state['documents']:,} documents")
        return state
    if state is None and already_made(out, made_from):
        return None
    earlier = _files_of(out, state is not None)
    if others := sorted(set(out.glob("*.bin")) - earlier):
        raise ValueError(f"{out}: holds {others[0].name}, which no manifest accounts for; move it "
                         "away, or give another --out")
    for path in earlier:
        path.unlink(missing_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    return unfinished(out, made_from)


def _files_of(out: Path, was_unfinished: bool) -> set[Path]:
    """The files of an earlier preparation: what its manifest names, or else is named like them."""
    if was_unfinished:
        named = [path for path in out.iterdir() if NAMES.fullmatch(path.name)]
    else:
        named = [path for path, _ in files_of(out)]
    return {path for path in named if not path.is_dir()}


def _encode_all(source: Source, split: Split, out: Path, state: Unfinished,
                writers: dict[str, ShardWriter], pool: ProcessPoolExecutor | None,
                ahead: int) -> None:
    """Encode and write the rest of the text, committing `state` every few seconds and whenever a
    shard is full."""

    def commit() -> None:
        state["splits"] = {kind: writer.commit() for kind, writer in writers.items()}
        write_json(out / UNFINISHED, state)

    committed, shards = time.monotonic(), 0
    bar = tqdm(total=source.documents, initial=state["documents"], unit=" documents",
               smoothing=0.05)
    with bar, closing(_encoded(_tasks(source, split, state), pool, ahead)) as encoded:
        for task, ids in encoded:
            first = max(0, split.tokens - writers["val"].tokens) if task.split == "train" else 0
            writers["val"].write(ids[:first])
            writers[task.split].write(ids[first:])
            bar.update(task.documents - state["documents"])
            state["documents"], state["begun"] = task.documents, task.begun
            state["empty"] = task.empty
            full = sum(len(writer.shards) for writer in writers.values())
            if full > shards or time.monotonic() - committed > _COMMIT_SECONDS:
                commit()
                committed, shards = time.monotonic(), full
    commit()
    if source.documents not in (None, state["documents"]):
        raise ValueError(f"{state['documents']:,} documents came, where there should be "
                         f"{source.documents:,}; the source changed or was not whole: remove "
                         f"{out / UNFINISHED} and prepare again")
    for kind, writer in writers.items():
        if not writer.tokens:
            raise ValueError(f"of {state['documents']:,} documents none came to the split "
                             f"{kind!r}; give more text, or another share of it to validation "
                             f"(now: {split})")


def _finish(out: Path, made_from: dict[str, Any], state: Unfinished,
            writers: dict[str, ShardWriter], pool: ProcessPoolExecutor | None) -> None:
    """Give all files their names and checksums, write meta.json and the manifest, and say what
    there is."""
    splits: dict[str, Counts] = {}
    for kind, writer in writers.items():
        writer.finish()
        paths = [writer.path(shard) for shard in range(len(writer.shards))]
        entries = list((pool.map if pool else map)(shard_entry, paths, writer.shards))
        splits[kind] = {"tokens": writer.tokens, "max_id": writer.max_id, "shards": entries}
    write_meta(out, "gpt2", 50257)
    write_manifest(out, made_from, "gpt2", 50257, splits)
    (out / UNFINISHED).unlink()
    print(f"{state['documents']:,} documents"
          + (f", {state['empty']:,} of them empty" if state["empty"] else ""))
    for kind, writer in writers.items():
        print(f"{kind} has {writer.tokens:,} tokens in {len(writer.shards)} "
              f"file{'s' * (len(writer.shards) > 1)}")
