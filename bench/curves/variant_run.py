"""Train a variant of bench/curves/variants.py: `variant_run.py VARIANT [CONFIG] [--key=value ...]`.

All but the first argument is that of train/run.py.
"""

import sys

from bench.curves.variants import registered
from common.cli import exit_code
from train.run import start


def main(argv: list[str]) -> int:
    """Exit codes are those of train/run.py."""
    return exit_code(lambda: train(argv))


def train(argv: list[str]) -> None:
    """Train what the command line says. Raises the errors that `exit_code` reports."""
    if not argv:
        raise ValueError("no variant is named; `variant_run.py VARIANT [CONFIG] [--key=value ...]`")
    with registered(argv[0]):
        start(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
