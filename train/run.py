"""Train a GPT, alone or under torchrun: `python train/run.py [CONFIG] [--key=value ...]`.

--help lists the keys.
"""

import sys

from common.cli import exit_code
from train.command_line import parse


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, also after SIGTERM; 2 after one line for bad input; 130 for Ctrl-C."""
    return exit_code(lambda: start(argv))


def start(argv: list[str] | None) -> None:
    """Train what the command line says. Raises the errors that `exit_code` reports."""
    config = parse(argv)
    from train.loop import train  # after parsing, which needs no torch

    train(config)


if __name__ == "__main__":
    sys.exit(main())
