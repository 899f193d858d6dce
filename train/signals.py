"""Signals, and a terminal that is gone: what asks a run to save and stop."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

# Sent by torchrun and schedulers; by Slurm's --signal before the time is up; when a terminal is
# closed; by Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
SAME_PRESS_S = 1.0  # one Ctrl-C reaches a rank twice: from the terminal, and from torchrun
CLOSED = " is closed"


@dataclass
class StopRequest:
    """Why this process must save and stop; "" while it need not.

    Each step adds the requests of all ranks up, so that all of them stop after the same step.
    """

    reason: str = ""
    """the name of a signal, or in words"""
    at: float = 0.0
    """when, by time.monotonic()"""


@contextlib.contextmanager
def listen(request: StopRequest) -> Iterator[None]:
    """Let SIGNALS fill in `request` instead of killing; a second Ctrl-C is a KeyboardInterrupt.

    What is ignored already, as nohup does with SIGHUP, stays so. Only the main thread hears
    signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number, _frame):
        interrupted = number == signal.SIGINT
        again = request.reason == signal.SIGINT.name and time.monotonic() - request.at > SAME_PRESS_S
        if interrupted and again:
            raise KeyboardInterrupt
        if interrupted and not request.reason:
            with contextlib.suppress(OSError):  # not print, which this may have interrupted
                os.write(2, b"\nCtrl-C: saves after this step and ends; once more: ends without\n")
        request.reason, request.at = signal.Signals(number).name, time.monotonic()

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
