"""Train a GPT: `python train/run.py [CONFIG] [--key=value ...]`, alone or under torchrun. --help
lists the keys."""

import sys

from common.cli import exit_code
from train.command_line import parse


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 2 after one line on stderr for bad input; 130 for Ctrl-C."""
    return exit_code(lambda: start(argv))


def start(argv: list[str] | None) -> None:
    """Train what the command line says. Raises what `exit_code` knows."""
    config = parse(argv)
    from train.loop import train  # after parsing, which needs no torch

    train(config)


if __name__ == "__main__":
    sys.exit(main())
