"""Bounds of values, declared in their types: `batch_size: Positive = 12`.

Command-line options, configs and the types of JSON files (TypedDicts) declare their bounds this
way, and `check` and `check_declared` enforce them. Imports neither torch nor numpy.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import (
    Annotated,
    Any,
    NamedTuple,
    NotRequired,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)


class Must(NamedTuple):
    """A rule in words and as a test: `Annotated[int, Must("be even", lambda n: n % 2 == 0)]`."""

    words: str
    holds: Callable[[Any], bool]


def _is_bare_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


Positive = Annotated[int, Must("be at least 1", lambda n: n >= 1)]
NonNegative = Annotated[int, Must("be at least 0", lambda n: n >= 0)]
Processes = Annotated[int, Must("be from 1 to 1024", lambda n: 1 <= n <= 1024)]
PositiveFloat = Annotated[float, Must("be more than 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, Must("be at least 0", lambda x: x >= 0)]
ZeroToOne = Annotated[float, Must("be from 0 to 1", lambda x: 0 <= x <= 1)]
BelowOne = Annotated[float, Must("be at least 0 and below 1", lambda x: 0 <= x < 1)]
AboveZeroToOne = Annotated[float, Must("be more than 0 and at most 1", lambda x: 0 < x <= 1)]
NotEmpty = Annotated[str, Must("not be empty", bool)]
FileName = Annotated[str, Must("be a bare file name", _is_bare_name)]


def check(options: Any, hints: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError, `name=value: must ...`, for the first option that breaks a rule.

    `options` is a dataclass, which may contain others, or a mapping with the type hints `hints`.
    Besides its declared rules every float must be finite, and every int must fit 64 bits, since
    torch and numpy refuse larger ones.
    """
    values = options if isinstance(options, Mapping) else vars(options)
    for name, hint in (hints_of(type(options)) if hints is None else hints).items():
        value = values[name]
        if dataclasses.is_dataclass(value):
            check(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value}: must be finite")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}={_short(value)}: must fit 64 bits")
        else:
            check_declared(value, hint, name)


def check_declared(value: Any, form: Any, name: str) -> None:
    """Check a value by the rules in its type `form`, also inside TypedDicts, lists and dicts.

    Raises ValueError, `name=value: must ...`, for the first rule that is broken.
    """
    inner = get_args(form)
    if get_origin(form) is Annotated:
        check_declared(value, inner[0], name)
        for rule in inner[1:]:
            if isinstance(rule, Must) and not rule.holds(value):
                raise ValueError(f"{name}={_short(value)}: must {rule.words}")
    elif get_origin(form) is NotRequired:
        check_declared(value, inner[0], name)
    elif is_typeddict(form):
        for key, hint in hints_of(form).items():
            if key in value:
                check_declared(value[key], hint, key)
    elif get_origin(form) is list:
        for item in value:
            check_declared(item, inner[0], name)
    elif get_origin(form) is dict:
        for key, item in value.items():
            check_declared(key, inner[0], name)
            check_declared(item, inner[1], key)


def hints_of(form: Any) -> dict[str, Any]:
    """The types, with their rules, of the fields of a class or the parameters of a function."""
    hints = get_type_hints(form, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
