"""What every command does: read the command line, report an error in one line, return an exit code.

A command ends with `sys.exit(run(main))`. Its options are the fields of a dataclass or the
parameters of `main`, written `--name=value`, and tyro makes the parser and `--help` from them.
"""

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

# The message of the RuntimeError that torch raises when memory runs out.
_NO_MEMORY = re.compile("allocate memory|not enough memory|out of memory|size calculation overflow")


def run(main: Callable[..., Any], options: type | None = None, argv: Sequence[str] | None = None, *,
        markers: tuple = ()) -> int:
    """Call `main` with the options from the command line and return the exit code (`exit_code`).

    The options are the fields of the dataclass `options`, of which main takes an instance, or else
    the parameters of main. Their bounds (common/bounds.py) are checked. `markers` are tyro's.
    """
    root = Path(__file__).resolve().parents[1]
    prog = Path(inspect.getfile(main)).resolve().relative_to(root).as_posix()

    def work() -> Any:
        given = parse(options or main, argv, prog=prog, markers=markers)
        return main(given) if options else main(**given)

    return exit_code(work)


def exit_code(work: Callable[[], Any]) -> int:
    """Call `work` and return the exit code: the int that it returns, or 0 for anything else.

    Bad input (ValueError, OSError, FloatingPointError) and running out of memory print one line on
    stderr and give 2. A closed pipe behind stdout gives 2 without a line. Ctrl-C gives 130.
    """
    _open_standard_streams()
    try:
        result = work()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        return _report_error(str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _report_error(f"out of memory ({str(error) or type(error).__name__}); take fewer or "
                             "smaller things at a time, such as a smaller --batch_size, or a "
                             "smaller model")
    except KeyboardInterrupt:
        _print_to_stderr("interrupted")
        return 130
    finally:
        _flush_or_discard(sys.stdout)


def _report_error(message: str) -> int:
    _print_to_stderr(f"error: {_one_line(message)}")
    return 2


def _print_to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # the reader of stderr may be gone
        print(line, file=sys.stderr, flush=True)


def _one_line(text: str) -> str:
    """`text` on one line, with control characters escaped so that no terminal obeys them."""
    joined = " ".join(text.split("\n"))
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in joined)


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch's CPU operators raise a RuntimeError for that."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def _open_standard_streams() -> None:
    """Open the null device for each of the descriptors 0 to 2 that is closed.

    Otherwise the next file to be opened would get that number, and C libraries would print into
    it. If stderr was closed, Python prints errors to stdout.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or sys.stdout


def _flush_or_discard(stream: TextIO) -> None:
    """Flush `stream`; if that fails, send the rest to the null device.

    Python flushes stdout again when it exits, and would print a second error.
    """
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


# -- reading the command line ----------------------------------------------------------


def parse(target: Any, argv: Sequence[str] | None = None, *, prog: str, markers: tuple = (),
          **settings: Any) -> Any:
    """Read the command line: into the dataclass `target`, or into a dict of a function's arguments.

    Raises ValueError, with a message of one line, for a bad command line. `--help` prints and
    exits with 0. `settings` are tyro's.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    _check_names(argv, types_of(target))
    is_class, complaint = isinstance(target, type), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            form = target if is_class else _returning_arguments(target)
            given = tyro.cli(form, args=argv, prog=prog, use_underscores=True,
                             config=(tyro.conf.FlagConversionOff, *markers), **settings)
    except SystemExit as stop:
        if stop.code != 2:  # --help
            raise
        raise ValueError(_without_box(complaint.getvalue())) from None
    bounds.check(given, None if is_class else bounds.hints_of(target))
    return given


def _check_names(argv: Sequence[str], types: dict[str, Any]) -> None:
    """Raise ValueError for an unknown flag or an empty path, which Path would read as `.`."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        if not arg.startswith("--"):
            continue
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        if name not in types and name != "help":
            raise ValueError(f"unknown flag --{name}{suggestion(name, types)}")
        is_path = Path in (types.get(name), *get_args(types.get(name)))
        if is_path and not (value if equals else following):
            raise ValueError(f"--{name}= is empty; name a file or a folder (. is this one)")


def suggestion(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the one of `names` closest to `name`, or where to find them."""
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean --{matches[0]}?" if matches else "; --help lists them all"


def types_of(target: Any) -> dict[str, Any]:
    """The type of every flag, with its bounds, for a dataclass (nested ones too) or a function."""
    types: dict[str, Any] = {}
    for name, hint in bounds.hints_of(target).items():
        types |= types_of(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return types


def _returning_arguments(main: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """A function with the signature of `main` that returns its arguments by name."""
    @wraps(main)
    def arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return inspect.signature(main).bind(*args, **kwargs).arguments

    return arguments


def _without_box(text: str) -> str:
    """The message in tyro's boxed error, on one line, without the box, its title and advice."""
    stripped = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    lines = [line for line in stripped if line.strip("-")]
    message = " ".join(itertools.takewhile(lambda line: "helptext" not in line, lines[1:]))
    return re.sub(r"^Error parsing \w+: (?=\w+=)", "", message)
