"""The command line of a run, `[CONFIG] [--key=value ...]`. No torch here: errors are instant."""

import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from common import cli
from common.files import read_text
from train.config import ROOT, Config
from train.other_configs import compose_yaml, is_nanogpt, read_nanogpt

SHORTHANDS = {
    "--batch_size=auto": "--fit_batch=True", "--batch-size=auto": "--fit_batch=True",
    # Stitch-LLMs' words
    "--backward=True": "--direction=backward", "--backward=False": "--direction=forward",
}
# What importing a config file may raise by a mistake in it.
RAISED_BY_CODE = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
                  MemoryError, NameError, OSError, RuntimeError, SyntaxError, SystemExit, TypeError,
                  ValueError)


def load_file(path: str) -> Config:
    """Read a config file, ours or nanoGPT's: a path, or the name of one in configs/."""
    places = (Path(path), ROOT / path, ROOT / "configs" / f"{path}.py")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = ", ".join(sorted(p.stem for p in (ROOT / "configs").glob("*.py")
                                 if p.stem != "__init__"))
        raise ValueError(f"no config file {path!r}; configs/ has {known}")
    spec = importlib.util.spec_from_file_location(f"_config_{found.stem}", found)
    if spec is None or spec.loader is None:
        raise ValueError(f"{found}: a config file is a Python module, NAME.py, with `config = "
                         "Config(...)`")
    source = read_text(found)
    if is_nanogpt(source, found):
        return read_nanogpt(source, found)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except RAISED_BY_CODE as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(found)]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{found}, line {lines[-1] if lines else '?'}: {kind}{error}") from None
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"{found}: its `config` is not a Config (train/config.py)")
    return config


def parse(argv: Sequence[str] | None = None) -> Config:
    """Read `[CONFIG] [--key=value ...]`. Raises ValueError, in one line, for bad input."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if any(a.startswith(("--config-name", "--config_name")) for a in argv):
        return _compose(argv)
    argv = [SHORTHANDS.get(a, a) for a in argv]
    positional = [i for i, a in enumerate(argv) if not a.startswith("-") and not _is_value(argv, i)]
    files = [argv[i] for i in positional]
    if len(files) > 1:
        raise ValueError(f"more than one config file: {', '.join(files)}")
    flags = [a for i, a in enumerate(argv) if i not in positional]
    return cli.parse(Config, flags, prog="train/run.py", markers=(tyro.conf.OmitArgPrefixes,),
                     default=load_file(files[0]) if files else Config())


def _compose(argv: list[str]) -> Config:
    """Read `--config-path=DIR --config-name=NAME` and hydra's overrides, `group.key=value`."""
    named = dict(a[2:].partition("=")[::2] for a in argv if a.startswith("--"))
    if odd := named.keys() - {"config-path", "config_path", "config-name", "config_name"}:
        raise ValueError(f"--{sorted(odd)[0]} beside --config-name; override as in hydra, "
                         "group.key=value")
    path, name = (named.get(f"config-{what}") or named.get(f"config_{what}") or "."
                  for what in ("path", "name"))
    return compose_yaml(path, name, [a for a in argv if not a.startswith("--")])


def _is_value(argv: list[str], i: int) -> bool:
    """Whether argv[i] is the value of the flag before it."""
    return i > 0 and argv[i - 1].startswith("--") and "=" not in argv[i - 1]
