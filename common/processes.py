"""What a worker process needs: an end when its parent ends."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this worker process, with code 1, when its parent process ends.

    A worker holds both ends of the pipe its work comes through, so it would wait there for ever
    after its parent was killed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "end_with_parent() is for worker processes"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
