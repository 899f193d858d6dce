"""For tests of hostile input: a command must not hang, fill the memory, or print much."""

import contextlib
import os
import random
import resource
import signal
from functools import partial
from pathlib import Path

SECONDS, BYTES = 60, 8 << 30


class Hung(BaseException):
    """A BaseException, so that the code it interrupts does not catch it."""


@contextlib.contextmanager
def bounded(seconds: int = SECONDS, size: int = BYTES):
    """Raise Hung after so many seconds; let the block map at most `size` more bytes."""

    def hung(*_):
        raise Hung(f"more than {seconds} s")

    before, limits = signal.signal(signal.SIGALRM, hung), resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def assert_ends_well(main, argv, capsys, codes=(0, 2)):
    """`main(argv)` ends in time, with 0, or with 2 and one line on stderr; the exit code."""
    capsys.readouterr()
    with bounded():
        try:
            code = main(argv)
        except SystemExit as stop:  # --help
            code = stop.code or 0
    err = capsys.readouterr().err
    errors = [line for line in err.replace("\r", "\n").splitlines() if not is_progress(line)]
    assert code in codes, f"{argv}: exit code {code}\n{err}"
    assert "Traceback" not in err, f"{argv}\n{err}"
    if code == 2:
        assert len(errors) == 1 and len(errors[0]) > 12, f"{argv}\n{err}"
        assert errors[0].startswith("error: "), f"{argv}\n{err}"
    return code


def is_progress(line):
    return not line.strip() or any(part in line for part in ("documents/s", "%|", "0 documents ["))


def contents(folder):
    """Every regular file below `folder`, with its bytes."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink()}


# -- mutations ---------------------------------------------------------------------------

PATHS = ["../canary.txt", "/etc/hostname", "..", ".", "", "a/../../canary.txt", "train.bin\0",
         "x" * 300, "notes.txt"]
VALUES = [None, True, False, 0, -1, 1, 2**16, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308,
          float("nan"), float("inf"), "", "x", "\ud800", "a\nb", "\x1b[2J", [], {}, [[]],
          {"": {}}, [None], *PATHS]


def mutated_json(value, rng: random.Random):
    """`value` with a key dropped, renamed or added, or another kind or size of value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        change = rng.choice([
            lambda: value | {key: mutated_json(value[key], rng)},
            lambda: value | {key: mutated_json(value[key], rng)},
            lambda: {k: v for k, v in value.items() if k != key},
            lambda: value | {key: rng.choice(VALUES)},
            lambda: {k + "x" if k == key else k: v for k, v in value.items()},
            lambda: value | {"added": rng.choice(VALUES)},
        ])
        return change()
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return rng.choice([value[:i] + value[i + 1 :], value * 3,
                           [*value[:i], mutated_json(value[i], rng), *value[i + 1 :]]])
    return rng.choice(VALUES)


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """`content` with bytes flipped, cut off, taken out, doubled or put in, or something else."""
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    noise = rng.randbytes(rng.randrange(1, 9))
    flipped = bytearray(content)
    for _ in range(rng.randrange(1, 9)):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return rng.choice([
        bytes(flipped), content[:a], content[a:], content[:a] + content[b:],
        content[:b] + content[a:], content[:a] + noise + content[b:], content + noise, b"",
        b"\xff\xfe" + content, b"[" * 100_000, b"{}", b"null", b'{"a":' * 50_000, b"9" * 5000,
        content.replace(b"1", b"1e999"), content.replace(b'"', b"'"), b"\0" * 1024,
    ])


def replaced(path: Path, rng: random.Random) -> None:
    """Replace `path` by a FIFO, a folder or a symbolic link."""
    path.unlink(missing_ok=True)
    targets = ["/dev/zero", "nowhere", path.name, "../canary.txt", "/proc/self/mem"]
    links = [partial(path.symlink_to, target) for target in targets]
    replace = rng.choice([partial(os.mkfifo, path), path.mkdir, *links])
    replace()
