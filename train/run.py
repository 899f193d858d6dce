"""Train a GPT: `python train/run.py [CONFIG] [--key=value ...]`, alone or under torchrun. --help lists the keys."""

import sys

from train.config import parse


def main(argv: list[str] | None = None) -> int:
    """0 when the run is done; 2, after one line on stderr, for what the user can mend."""
    try:
        config = parse(argv)
        from train.loop import train  # after parsing, which needs no torch

        train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
