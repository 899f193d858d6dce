"""What the command lines of bench/ share."""

from collections.abc import Iterable


def named(flag: str, given: str, known: Iterable[str]) -> list[str]:
    """The names in `given`, split at commas. Raises ValueError for one that is not `known`."""
    names, known = given.split(","), list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--{flag}={given}: no {unknown[0]!r}; choose from {', '.join(known)}")
    return names
