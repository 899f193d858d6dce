"""What the command lines of bench/ share."""

from collections.abc import Iterable
from typing import Any


def named(flag: str, given: str, known: Iterable[str]) -> list[str]:
    """The names in `given`, split at commas. Raises ValueError for one that is not `known`."""
    names, known = given.split(","), list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--{flag}={given}: no {unknown[0]!r}; choose from {', '.join(known)}")
    return names


def numbers(flag: str, given: str, kind: type) -> list[Any]:
    """The numbers in `given`, split at commas, without repeats. Raises ValueError for others."""
    try:
        found = [kind(word) for word in given.split(",") if word.strip()]
    except ValueError:
        raise ValueError(f"--{flag}={given}: numbers with commas are needed") from None
    if len(set(found)) < len(found) or any(not value >= 0 for value in found):
        raise ValueError(f"--{flag}={given}: each must be at least 0, and given once")
    return found
