"""Every entry point: the command line in, a line on stderr for what is wrong, the exit code out."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TextIO, get_args

from common import bounds

# What torch says, in a RuntimeError, where memory cannot be had.
_NO_MEMORY = re.compile("allocate memory|not enough memory|out of memory|size calculation overflow")


def run(main: Callable[..., Any], options: type | None = None, argv: Sequence[str] | None = None, *,
        markers: tuple = ()) -> int:
    """Call `main` with the options on the command line (`--name=value`, `--help`); the exit code.

    The options are those of the dataclass `options`, which main takes, or else of main's own
    signature, with their bounds (common/bounds.py); `markers` are tyro's. The int that main returns
    is the exit code.
    """
    prog = Path(inspect.getfile(main)).resolve().relative_to(Path(__file__).parents[1]).as_posix()

    def work() -> Any:
        given = parse(options or main, argv, prog=prog, markers=markers)
        return main(given) if options else main(**given)

    return exit_code(work)


def exit_code(work: Callable[[], Any]) -> int:
    """The int that `work` returns, or 0; 2, after one line on stderr, for what the user can mend.

    That is a ValueError, an OSError, a FloatingPointError, and memory that cannot be had. A stdout
    whose reader has gone is 2 without a line, and Ctrl-C is 130.
    """
    open_standard_streams()
    try:
        done = work()
        sys.stdout.flush()
        return done if isinstance(done, int) else 0
    except BrokenPipeError:
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        return _refused(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _refused(f"out of memory ({str(error) or type(error).__name__}); take fewer or "
                        "smaller things at a time, such as a smaller --batch_size, or a smaller "
                        "model")
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    finally:
        _let_go(sys.stdout)


def _refused(message: str) -> int:
    _say(f"error: {one_line(message)}")
    return 2


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody may read stderr any more
        print(line, file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text` on one line, with what would move a terminal's cursor written out."""
    joined = " ".join(text.split("\n"))
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in joined)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had, which torch's operators on a CPU say with a RuntimeError."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def open_standard_streams() -> None:
    """Point descriptors 0 to 2 at the null device where they are closed.

    Else the next file opened would have such a number, and what is printed would go into it. What
    a closed stderr would have said goes to stdout.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or sys.stdout


def _let_go(stream: TextIO) -> None:
    """Write what `stream` holds; where that fails, keep Python from trying again when it ends."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


# -- reading the command line ----------------------------------------------------------


def parse(of: Any, argv: Sequence[str] | None = None, *, prog: str, markers: tuple = (),
          **settings: Any) -> Any:
    """What the command line says: the dataclass `of`, or the arguments by name of a function.

    Raises ValueError, in one line, for what is wrong with it; --help prints and exits with 0.
    `settings` are tyro's.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    _check_names(argv, types_of(of))
    is_class, complaint = isinstance(of, type), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            given = tyro.cli(of if is_class else _arguments_of(of), args=argv, prog=prog,
                             use_underscores=True, config=(tyro.conf.FlagConversionOff, *markers),
                             **settings)
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        raise ValueError(_without_box(complaint.getvalue())) from None
    bounds.check(given, None if is_class else bounds.hints_of(of))
    return given


def _check_names(argv: Sequence[str], types: dict[str, Any]) -> None:
    """Raise ValueError for a flag that is none, or an empty path: Path takes it for this folder."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        if not arg.startswith("--"):
            continue
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        if name not in types and name != "help":
            raise ValueError(f"unknown flag --{name}{nearest(name, types)}")
        is_path = Path in (types.get(name), *get_args(types.get(name)))
        if is_path and not (value if equals else following):
            raise ValueError(f"--{name}= is empty; name a file or a folder (. is this one)")


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint at the one of `names` that was meant."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean --{near[0]}?" if near else "; --help lists them all"


def types_of(of: Any) -> dict[str, Any]:
    """The type of every flag, with its bounds: of a dataclass's fields, those of its sections too,
    or of a function's parameters."""
    found: dict[str, Any] = {}
    for name, hint in bounds.hints_of(of).items():
        found |= types_of(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def _arguments_of(main: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    @wraps(main)
    def arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return inspect.signature(main).bind(*args, **kwargs).arguments

    return arguments


def _without_box(text: str) -> str:
    """What tyro says in a box, without the box, its title and its advice."""
    stripped = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    lines = [line for line in stripped if line.strip("-")]
    message = " ".join(itertools.takewhile(lambda line: "helptext" not in line, lines[1:]))
    return re.sub(r"^Error parsing \w+: (?=\w+=)", "", message)
