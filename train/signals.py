"""What asks a run to save and stop: signals, and a terminal or pipe that is closed."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

# In this order: from torchrun and schedulers; from Slurm's --signal, before the time is up; from a
# terminal that is closed; from Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
SAME_PRESS_S = 1.0  # under torchrun one Ctrl-C arrives twice: from the terminal and from torchrun
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

    A signal that is already ignored, as nohup ignores SIGHUP, stays ignored. Does nothing outside
    the main thread, where Python handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number, _frame):
        elapsed_s = time.monotonic() - request.at
        if number == signal.SIGINT:
            if request.reason == signal.SIGINT.name and elapsed_s > SAME_PRESS_S:
                raise KeyboardInterrupt
            if not request.reason:
                with contextlib.suppress(OSError):  # not print, which this may have interrupted
                    os.write(2, b"\nCtrl-C: saves after this step and ends; once more: ends "
                                b"without\n")
        request.reason, request.at = signal.Signals(number).name, time.monotonic()

    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def detach_closed() -> str:
    """Redirect stdout and stderr to the null device where their reader is gone; return which.

    The reader of a pipe has ended (`| head`), or the terminal was closed. Otherwise every later
    write would fail, too. The result is for a message: "", "stdout", "stdout and stderr".
    """
    poll, names = select.poll(), {1: "stdout", 2: "stderr"}
    for descriptor in names:
        poll.register(descriptor, 0)
    closed = select.POLLERR | select.POLLHUP
    gone = [descriptor for descriptor, event in poll.poll(0) if event & closed]
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in gone:
        os.dup2(null, descriptor)
    os.close(null)
    return " and ".join(names[descriptor] for descriptor in gone)
