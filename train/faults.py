"""What goes wrong with machines, and what a run then does: signals, a second run on the same
folder, ranks that hang."""

import contextlib
import faulthandler
import fcntl
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from train import parallel
from train.parallel import World

# Sent by torchrun and schedulers; by Slurm's --signal before the time is up; when a terminal is
# closed; by Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
SAME_PRESS_S = 1.0  # one Ctrl-C reaches a rank twice: from the terminal, and from torchrun
LOCK = ".lock"
CLOSED = " is closed"
HUNG = 86  # the exit code of a rank that ends because another one, or it, hangs


@dataclass
class Asked:
    """Whether this process was asked to stop, and by which signal. Ranks tell each other with the
    loss of each step."""

    by: str = ""
    at: float = 0.0  # time.monotonic()


@contextlib.contextmanager
def listen(asked: Asked) -> Iterator[None]:
    """Let SIGNALS ask instead of kill; Ctrl-C, pressed once more, is a KeyboardInterrupt.

    What is ignored already, as nohup does with SIGHUP, stays so. Only the main thread hears
    signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number, _frame):
        interrupted = number == signal.SIGINT
        again = asked.by == signal.SIGINT.name and time.monotonic() - asked.at > SAME_PRESS_S
        if interrupted and again:
            raise KeyboardInterrupt
        if interrupted and not asked.by:
            with contextlib.suppress(OSError):  # not print, which this may have interrupted
                os.write(2, b"\nCtrl-C: saves after this step and ends; once more: ends without\n")
        asked.by, asked.at = signal.Signals(number).name, time.monotonic()

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def detach_closed() -> str:
    """Point stdout and stderr at the null device where nobody can read them any more.

    A pipe's reader ended (`| head`), or a terminal was closed. Without this each later write would
    fail, too. Returns the names of those that were closed, for a message.
    """
    poll, names = select.poll(), {1: "stdout", 2: "stderr"}
    for descriptor in names:
        poll.register(descriptor, 0)
    closed = select.POLLERR | select.POLLHUP
    gone = [descriptor for descriptor, event in poll.poll(0) if event & closed]
    nobody = os.open(os.devnull, os.O_WRONLY)
    for descriptor in gone:
        os.dup2(nobody, descriptor)
    os.close(nobody)
    return " and ".join(names[descriptor] for descriptor in gone)


@contextlib.contextmanager
def only_run(out_dir: Path, w: World) -> Iterator[None]:
    """Hold out_dir against other runs. Raises ValueError, on all ranks, where one is at work in it.

    The lock is the kernel's (flock): it goes with the process, however that ends. A folder that
    was made for the lock is removed again if nothing else was written to it.
    """
    held = contextlib.ExitStack()
    with held:
        parallel.first_rank_decides(lambda: _lock(out_dir, held), w)
        yield


def _lock(out_dir: Path, held: contextlib.ExitStack) -> None:
    made = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    file = held.enter_context((out_dir / LOCK).open("a+"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(
            f"another run is at work in {out_dir} ({file.read().strip()}); wait for it, or give "
            "this one another --out_dir"
        ) from error
    if not os.path.samestat(os.fstat(file.fileno()), os.stat(out_dir / LOCK)):
        raise ValueError(f"another run in {out_dir} ended just now; give the same command again")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    if made:
        held.callback(_unmake, out_dir)


def _unmake(out_dir: Path) -> None:
    if os.listdir(out_dir) == [LOCK]:
        (out_dir / LOCK).unlink()
        out_dir.rmdir()


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
