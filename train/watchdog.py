"""Names the rank that hangs, and ends the run."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from train.parallel import World

HUNG = 86  # exit code of every rank when one of them hangs


class Progress:
    """How far this process is: a count of things begun, and the last of them."""

    def __init__(self) -> None:
        self.count, self.doing = 0, "starting"

    def begins(self, doing: str) -> None:
        self.count, self.doing = self.count + 1, doing


@contextlib.contextmanager
def watchdog(progress: Progress, store: dist.Store | None, w: World,
             timeout_s: float) -> Iterator[None]:
    """Beside the run, a thread that tells the other ranks how far this one is. Where nothing moves
    for timeout_s seconds (three times that until the first step is done, which compiles) it names
    the rank that is behind and ends the process.
    """
    if store is None or w.size == 1:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(progress, store, w, timeout_s, done),
                              daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def _watch(progress: Progress, store: dist.Store, w: World, timeout_s: float,
           done: threading.Event) -> None:
    pause_s = min(timeout_s / 4, 10.0)
    seen, since = -1, time.monotonic()
    while not done.wait(pause_s):
        try:
            store.set(f"progress/{w.rank}",
                      json.dumps([progress.count, progress.doing, time.time()]))
        # the store went with the process that held it; what follows still ends this one
        except RuntimeError:
            pass
        if progress.count != seen:
            seen, since = progress.count, time.monotonic()
        elif time.monotonic() - since > timeout_s * (1 if progress.count > 10 else 3):
            behind = _behind(store, w, 4 * pause_s)
            print(f"error: rank {w.rank} waited {timeout_s:.0f} s in {progress.doing}: {behind}",
                  file=sys.stderr, flush=True)
            # where this rank stands, which is the answer if it is the one
            faulthandler.dump_traceback()
            os._exit(HUNG)


def _behind(store: dist.Store, w: World, stale_s: float) -> str:
    """Which ranks are furthest behind, or no longer say anything."""
    try:
        there = {rank: json.loads(store.get(f"progress/{rank}"))
                 for rank in range(w.size) if store.check([f"progress/{rank}"])}
    except RuntimeError as error:
        return f"the ranks' store does not answer ({str(error).splitlines()[0]})"
    now, least = time.time(), min((count for count, _, _ in there.values()), default=0)
    silent = {rank for rank in range(w.size) if rank not in there or now - there[rank][2] > stale_s}
    late = silent or {rank for rank, (count, _, _) in there.items() if count == least}
    what = "stopped or dead" if silent else "behind the others"
    if len(late) == w.size:
        return "all ranks are equally far"
    return "; ".join(f"rank {rank} hangs, {what}, in "
                     f"{there[rank][1] if rank in there else 'start'}" for rank in sorted(late))
