"""Several ranks on this machine at the price of one import: a server with torch forks them."""

import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

ranks = multiprocessing.get_context("forkserver")
ranks.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "train.run", "train.loop", "matplotlib.figure"])


def free_port() -> int:
    """A free port below those that the system gives to sockets that ask for any.

    One of those could be taken by another test's rank before ours listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port


def start(function, args: tuple, size: int, logs: Path, **environment) -> list:
    """`function(*args)` on `size` ranks, as torchrun starts them; output goes to logs/RANK.log."""
    logs.mkdir(parents=True, exist_ok=True)
    port, processes = free_port(), []
    for rank in range(size):
        env = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
               "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port, "TRITON_INTERPRET": 1, "GLOO_SOCKET_IFNAME": "lo"} | environment
        env = {k: str(v) for k, v in env.items()} if size > 1 or environment else {}
        processes.append(ranks.Process(target=_rank,
                                       args=(function, args, env, logs / f"{rank}.log")))
        processes[-1].log = logs / f"{rank}.log"
        processes[-1].start()
    return processes


def wait(processes, seconds: float = 120) -> list[int | None]:
    """Return the exit codes. A rank that is late is aborted (-6) and prints where it stood."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
            process.join()
            print(process.log.read_text()[-6000:])
    return [process.exitcode for process in processes]


def run(function, args: tuple, size: int, logs: Path, seconds: float = 120,
        **environment) -> list[int | None]:
    return wait(start(function, args, size, logs, **environment), seconds)


def train(flags: list[str]) -> None:
    """A rank that runs train/run.py."""
    from train import run

    assert any(f.startswith("--dtype=") for f in flags), "auto is another one on another CPU"
    sys.exit(run.main(flags))


def train_each(runs: list[tuple[list[str], dict[str, int]]]) -> None:
    """A rank that runs train/run.py several times, each with its flags and environment.

    torch.compile traces, and leaves the code as it is: what is compiled well is tested elsewhere.
    """
    import functools

    import torch

    from train import run

    torch.compile = functools.partial(torch.compile, backend="eager")
    for flags, environment in runs:
        os.environ.update({k: str(v) for k, v in environment.items()})
        assert any(f.startswith("--dtype=") for f in flags), "auto is another one on another CPU"
        print(f"== {' '.join(flags)}", flush=True)
        if code := run.main(flags):
            sys.exit(code)


def _rank(function, args: tuple, env: dict[str, str], log: Path) -> None:
    import torch

    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    code = 0
    try:
        function(*args)
    except SystemExit as ended:
        code = int(ended.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    # Twice in some sixty starts a forked rank stayed after all was done, in what libraries do at
    # exit; torchrun's do not fork.
    os._exit(code)
