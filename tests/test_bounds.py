"""Bounds of values: checked in nested types, and declared for every number of every command."""

import dataclasses
import importlib
from pathlib import Path
from typing import Literal, TypedDict, get_origin

import pytest

from common import bounds
from common.bounds import check, check_declared, hints_of
from common.cli import types_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        ("Positive", [1, 2**63 - 1], [0, -1]),
        ("NonNegative", [0], [-1]),
        ("PositiveFloat", [1e-9], [0.0, -1.0]),
        ("NonNegativeFloat", [0.0], [-1e-9]),
        ("ZeroToOne", [0.0, 1.0], [-0.1, 1.1]),
        ("BelowOne", [0.0, 0.999], [1.0, -0.1]),
        ("AboveZeroToOne", [1.0, 1e-9], [0.0, 1.1]),
        ("NotEmpty", ["a"], [""]),
        ("Processes", [1, 1024], [0, 1025]),
        ("FileName", ["a.bin", "..a"], ["", ".", "..", "a/b", "/a", "a\\b", "a\0"]),
    ],
)
def test_good_values_pass_and_bad_ones_are_named(kind, good, bad):
    for value in good:
        check({"x": value}, {"x": getattr(bounds, kind)})
    for value in bad:
        with pytest.raises(ValueError, match="x=.*: must ") as refused:
            check({"x": value}, {"x": getattr(bounds, kind)})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2**63, -(2**63) - 1])
def test_every_float_is_finite_and_every_int_has_64_bits(value):
    """nan passed checks such as `x < 0`, and torch raised a traceback for longer seeds."""
    with pytest.raises(ValueError, match="x=.*: must "):
        check({"x": value}, {"x": type(value)})


def test_items_of_lists_and_dicts_are_checked():
    class Inner(TypedDict):
        n: bounds.Positive

    class Outer(TypedDict):
        many: list[Inner]
        named: dict[str, Inner]

    check_declared({"many": [{"n": 1}], "named": {"a": {"n": 1}}}, Outer, "")
    bad_item = {"many": [{"n": 1}, {"n": 0}], "named": {}}
    for wrong in (bad_item, {"many": [], "named": {"a": {"n": 0}}}):
        with pytest.raises(ValueError, match="n=0: must be at least 1"):
            check_declared(wrong, Outer, "")


OPTIONS = ("Options", "Sample", "Predict", "Evaluate", "Export", "Doctor")


def commands():
    """The modules that are commands, by name."""
    for folder in ("bench/**", "data/*", "train", "gpt"):
        for path in ROOT.glob(f"{folder}/*.py"):
            text = path.read_text()
            if "cli.run(" not in text and "run(main)" not in text:
                continue
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_number_of_every_command_has_a_bound(name):
    """bench/operators.py --batch_size=0 wrote an empty result over a good one."""
    module = importlib.import_module(name)
    own = [value for value in vars(module).values()
           if dataclasses.is_dataclass(value) and value.__module__ == name]
    options = [value for value in own if value.__name__ in OPTIONS] or [module.main]
    for option, hint in types_of(options[0]).items():
        assert hint not in (int, float), f"{name}: {option}"
        if get_origin(hint) is not Literal and ("int" in str(hint) or "float" in str(hint)):
            rules = getattr(hint, "__metadata__", ())
            assert any(isinstance(rule, bounds.Must) for rule in rules), f"{name}: {option}"


def test_every_number_of_a_run_has_a_bound():
    from train.config import Config

    assert not [name for name, hint in types_of(Config).items() if hint in (int, float)]
    assert hints_of(Config)["model"].__name__ == "GPTConfig"
