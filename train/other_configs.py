"""Read config files of other projects: nanoGPT's top-level assignments, and YAML by hydra.

Both give settings with the names of train/config.py; the groups of YAML files do not matter.
"""

import ast
import operator
import sys
from pathlib import Path
from typing import Any

from train.config import Config, flatten, unflatten

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
              ast.Mod: operator.mod}
_CHANGERS = {"exec", "eval", "globals", "locals", "vars", "setattr", "__import__"}
_LARGEST, _LONGEST = 2**63, 1000  # of what is computed: 9**9**9 would take hours

_DEEP = "nested too deep; write plain assignments"


class _NotRead(Exception):
    """A value is computed by more than arithmetic."""


def is_nanogpt(source: str, path: Path) -> bool:
    """Whether a config file is nanoGPT's: one of ours assigns `config`."""
    nodes = list(ast.walk(_parsed(source, path)))
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return "config" not in names | {n.asname or n.name for n in nodes if isinstance(n, ast.alias)}


def read_nanogpt(source: str, path: Path) -> Config:
    """Read a nanoGPT config file: its assignments; nothing in it is run.

    A value may be a literal, arithmetic, an f-string of names, or a name: one assigned before, or a
    setting's default. A value computed otherwise, as nanoGPT computes a run's name from the clock,
    is not read: its setting keeps the default, and stderr says so. Imports of other names, prints,
    strings and `pass` are passed over. Raises ValueError for any other statement.
    """
    defaults, given, used = dict(flatten(Config())), dict[str, Any](), set[str]()
    known: dict[str, Any] = defaults | {"backward": False}
    for node in _parsed(source, path).body:
        try:
            used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _is_read(n)}
            if used & _CHANGERS or any(isinstance(n, ast.NamedExpr) for n in ast.walk(node)):
                raise ValueError(_not_read(node))
            for name, value in _assigned(node, known):
                given[name] = value
                known[name] = value
        except _NotRead as error:
            for name in _targets(node):
                print(f"{path}, line {node.lineno}: {name} keeps its default, {error} is not read",
                      file=sys.stderr)
                given.pop(name, None)
                known.pop(name, None)  # nor is what is computed from it
        except RecursionError:
            raise ValueError(f"{path}, line {node.lineno}: {_DEEP}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {node.lineno}: {error}") from None
    settings = {k: v for k, v in given.items() if k in defaults or k == "backward" or k not in used}
    return _config(settings, str(path))


def _parsed(source: str, path: Path) -> ast.Module:
    try:
        return ast.parse(source, str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno or 1}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{path}: {_DEEP}") from None


def _is_read(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Load)


def _not_read(node: ast.stmt) -> str:
    line = ast.unparse(node).splitlines()[0]
    return f"`{line:.60}` is not read; write plain assignments, or a config of ours (configs/)"


def _targets(node: ast.stmt) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not _is_read(n)]


def _assigned(node: ast.stmt, known: dict[str, Any]) -> list[tuple[str, Any]]:
    """The names that a statement assigns, and their values. Raises ValueError if it may do more."""
    if isinstance(node, ast.Assign):
        value = _value(node.value, known)
        return [pair for target in node.targets for pair in _unpacked(node, target, value)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [(node.target.id, _value(node.value, known))] if node.value else []
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        name = ast.Name(node.target.id, ast.Load())
        return [(name.id, _value(ast.BinOp(name, node.op, node.value), known))]
    if not _changes_nothing(node, known):
        raise ValueError(_not_read(node))
    return []


def _unpacked(node: ast.stmt, target: ast.expr, value: Any) -> list[tuple[str, Any]]:
    if isinstance(target, ast.Name):
        return [(target.id, value)]
    names = target.elts if isinstance(target, ast.Tuple | ast.List) else []
    if not isinstance(value, tuple) or len(names) != len(value):
        raise ValueError(_not_read(node))
    pairs = zip(names, value, strict=True)
    return [pair for name, part in pairs for pair in _unpacked(node, name, part)]


def _changes_nothing(node: ast.stmt, settings: dict[str, Any]) -> bool:
    """Whether a statement changes no setting: a string, a print, an import of other names."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        bound = {alias.asname or alias.name for alias in node.names}
        return "*" not in bound and not bound & settings.keys()
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
        return [ast.unparse(function) for function in calls] == ["print"]
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Pass)


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(part, known) for part in node.elts)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(_value(part, known)) for part in node.values)
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and not node.format_spec:
        return _value(node.value, known)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _computed(node, operator.sub, 0, _value(node.operand, known))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, known), _value(node.right, known)
        return _computed(node, _OPERATORS[type(node.op)], left, right)
    raise _NotRead(f"`{ast.unparse(node):.60}`")


def _computed(node: ast.expr, apply: Any, left: Any, right: Any) -> Any:
    """Apply an operator to numbers, or + to strings. Raises ValueError for too large results."""
    numbers = all(isinstance(side, int | float) for side in (left, right))
    texts = isinstance(left, str) and isinstance(right, str) and apply is operator.add
    what = f"`{ast.unparse(node):.60}`"
    if not numbers and not texts:
        raise ValueError(f"{what} is neither arithmetic on numbers nor texts joined")
    if apply is operator.pow and abs(right) > 64:
        raise ValueError(f"{what} has an exponent beyond 64")
    try:
        found = apply(left, right)
    except ArithmeticError as error:
        raise ValueError(f"{what}: {error}") from None
    fits = len(found) <= _LONGEST if texts else not abs(found) >= _LARGEST
    if not fits or isinstance(found, complex):
        raise ValueError(f"{what} is too large")
    return found


def _config(leaves: dict[str, Any], origin: str) -> Config:
    """The Config with these leaves; Stitch-LLMs' `backward` becomes the direction."""
    for name, value in leaves.items():
        if not isinstance(value, str | int | float):
            raise ValueError(f"{origin}: {name}={value!r:.60}; a text, a number or a bool is "
                             "needed")
    if "backward" in leaves:
        if not isinstance(leaves["backward"], bool) or "direction" in leaves:
            raise ValueError(f"{origin}: backward={leaves['backward']!r:.60}; give True or False, "
                             "or direction alone")
        direction = "backward" if leaves["backward"] else "forward"
        leaves = {k: v for k, v in leaves.items() if k != "backward"} | {"direction": direction}
    return unflatten(leaves, origin)


def compose_yaml(config_path: str, config_name: str, overrides: list[str]) -> Config:
    """Compose a YAML file by hydra, with its overrides (`model.n_layer=4`).

    Groups (system, model, data, algorithm, ...) only sort the settings, whose names are unique.
    """
    try:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError:
        raise ValueError("--config-path and --config-name need hydra-core; "
                         "pip install hydra-core") from None
    folder = Path(config_path).resolve()
    if not folder.is_dir():
        raise ValueError(f"--config-path={config_path}: no such folder")
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = OmegaConf.to_container(compose(config_name, overrides), resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError,
            RecursionError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder / config_name}: {why}") from error
    assert isinstance(composed, dict)  # hydra refuses anything else
    return _config(dict(_leaves(composed, config_name)), config_name)


def _leaves(tree: dict, path: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{path}.{key}") if isinstance(value, dict) else [(str(key), value)]
    names = [name for name, _ in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {sorted(twice)[0]} is given twice, in two groups")
    return found
