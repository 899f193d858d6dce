"""The watchdog: where this rank makes no progress, name the rank that hangs, and end the run."""

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
    """How far this process has come: how many activities it has begun, and which is the last."""

    def __init__(self) -> None:
        self.count, self.doing, self.steps = 0, "starting", 0

    def begins(self, doing: str) -> None:
        """Count the activity `doing`, which begins now."""
        self.count, self.doing = self.count + 1, doing


@contextlib.contextmanager
def watchdog(progress: Progress, store: dist.Store | None, w: World,
             timeout_s: float) -> Iterator[None]:
    """Watch over the block in a thread, which tells the other ranks this rank's progress.

    Without progress for timeout_s seconds the thread says which rank is behind and ends the process
    with exit code HUNG. Until the second step begins it waits three times as long, because the
    first one compiles.
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
        # The store ends with the process that holds it. The timeout below must still come.
        with contextlib.suppress(RuntimeError):
            store.set(f"progress/{w.rank}",
                      json.dumps([progress.count, progress.doing, time.time()]))
        if progress.count != seen:
            seen, since = progress.count, time.monotonic()
        elif time.monotonic() - since > (limit_s := timeout_s * (1 if progress.steps > 1 else 3)):
            behind = _behind(store, w, 4 * pause_s)
            print(f"error: rank {w.rank} waited {limit_s:.0f} s in {progress.doing}: {behind}",
                  file=sys.stderr, flush=True)
            faulthandler.dump_traceback()  # if this rank is the one that hangs, it says where
            os._exit(HUNG)


def _behind(store: dist.Store, w: World, stale_s: float) -> str:
    """Say which ranks have made the least progress, or have reported none for stale_s seconds."""
    try:
        reports = {rank: json.loads(store.get(f"progress/{rank}"))
                   for rank in range(w.size) if store.check([f"progress/{rank}"])}
    except RuntimeError as error:
        return f"the ranks' store does not answer ({str(error).splitlines()[0]})"
    now, least = time.time(), min((count for count, _, _ in reports.values()), default=0)
    silent = {rank for rank in range(w.size)
              if rank not in reports or now - reports[rank][2] > stale_s}
    late = silent or {rank for rank, (count, _, _) in reports.items() if count == least}
    if len(late) == w.size:
        return "all ranks are equally far"
    what = "stopped or dead" if silent else "behind the others"
    doing = {rank: reports[rank][1] if rank in reports else "start" for rank in late}
    return "; ".join(f"rank {rank} hangs, {what}, in {doing[rank]}" for rank in sorted(late))
