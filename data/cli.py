"""The command line of every entry point but train/run.py, whose config is read by train/config.py."""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run(main: Callable[..., Any], options: type | None = None, argv: Sequence[str] | None = None, *, markers: tuple = ()) -> int:
    """Call `main` with the options on the command line (`--name=value`, `--help`); the exit code.

    The options are those of the dataclass `options`, which main takes, or else of main's own signature; `markers` are
    tyro's. What the user or the disk did wrong, a ValueError or an OSError, is one line on stderr and 2, which is also
    what an unknown option exits with. Otherwise it is the int that main returned, or 0.
    """
    import tyro

    prog = Path(inspect.getfile(main)).resolve().relative_to(Path(__file__).parents[1]).as_posix()
    config = (tyro.conf.FlagConversionOff, *markers)
    try:
        if options is None:
            done = tyro.cli(main, args=argv, prog=prog, use_underscores=True, config=config)
        else:
            done = main(tyro.cli(options, args=argv, prog=prog, use_underscores=True, config=config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return done if isinstance(done, int) else 0
