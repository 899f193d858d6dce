"""Train a GPT: `python train/run.py [CONFIG] [--key=value ...]`, alone or under torchrun. --help lists the keys."""

import sys

from data.cli import exit_code
from train.config import parse


def main(argv: list[str] | None = None) -> int:
    """0 when the run is done; 2, after a line on stderr, for what the user can mend."""
    return exit_code(lambda: start(argv))


def start(argv: list[str] | None) -> None:
    """Train what the command line says. Raises what `exit_code` knows."""
    config = parse(argv)
    from train.loop import train  # after parsing, which needs no torch

    try:
        train(config)
    except BrokenPipeError as error:  # where a command that prints may end quietly, a run may not
        raise ValueError(f"stdout was closed ({error}); print to a file, or to /dev/null") from None


if __name__ == "__main__":
    sys.exit(main())
