"""Config files of other projects: nanoGPT's (top-level assignments) and YAML composed by hydra.

Both come down to leaves with the names of train/config.py, whatever groups they are in.
"""

import ast
import operator
import sys
from pathlib import Path
from typing import Any

from train.config import Config, unflatten

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.Mod: operator.mod}


def read_nanogpt(source: str, path: Path) -> Config:
    """The Config of a nanoGPT config file: its assignments are read, nothing in it is run.

    A value may be a literal, arithmetic on literals, or a name assigned before. What is computed otherwise (nanoGPT's
    own do it for a run's name, from the clock) keeps its default, and stderr says so.
    """
    leaves: dict[str, Any] = {}
    for node in ast.parse(source, str(path)).body:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        try:
            leaves[name] = _value(node.value, leaves)
        except ValueError as error:
            print(f"{path}, line {node.lineno}: {name} keeps its default, {error} is not read", file=sys.stderr)
    return unflatten(leaves, str(path))


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, known)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, known), _value(node.right, known))
    raise ValueError(f"`{ast.unparse(node)}`")


def compose_yaml(config_path: str, config_name: str, overrides: list[str]) -> Config:
    """The Config of a YAML file composed by hydra: defaults, _self_, ${a.b}, and dotted overrides (`model.n_layer=4`).

    Groups (system, model, data, algorithm, ...) are only for order: leaves go by their own names, which are unique.
    """
    try:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError:
        raise ValueError("--config-path and --config-name need hydra-core; pip install hydra-core") from None
    folder = Path(config_path).resolve()
    if not folder.is_dir():
        raise ValueError(f"--config-path={config_path}: no such folder")
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = OmegaConf.to_container(compose(config_name, overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{folder / config_name}: {' '.join(str(error).split())}") from error
    assert isinstance(composed, dict)
    return unflatten(dict(_leaves(composed, config_name)), config_name)


def _leaves(tree: dict, path: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{path}.{key}") if isinstance(value, dict) else [(str(key), value)]
    names = [name for name, _ in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {sorted(twice)[0]} is given twice, in two groups")
    return found
