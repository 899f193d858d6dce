"""The command line of every prepare.py."""

import sys
from collections.abc import Callable
from typing import Any


def run(main: Callable[..., Any]) -> None:
    """Call `main` with the options on the command line (`--name=value`, after its signature, `--help`).

    What the user or the disk did wrong, a ValueError or an OSError, ends in one line on stderr and exit code 2, which
    is also what an unknown option exits with.
    """
    import tyro

    try:
        tyro.cli(main, config=(tyro.conf.FlagConversionOff,))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
